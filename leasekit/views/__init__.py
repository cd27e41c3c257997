"""The read models: what operators and other systems see of a tenant."""

from leasekit.views.authority import Catalogue
from leasekit.views.pages import Filters, Reader
from leasekit.views.resuming import Missing
from leasekit.views.runs import RunFilters
from leasekit.views.views import CatalogueOf, Views

__all__ = ["Catalogue", "CatalogueOf", "Filters", "Missing", "Reader", "RunFilters", "Views"]
