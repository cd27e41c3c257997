"""The read models: what operators and other systems see of a tenant."""

from leasekit.views.authority import Catalogue
from leasekit.views.pages import Filters
from leasekit.views.runs import RunFilters
from leasekit.views.views import Views

__all__ = ["Catalogue", "Filters", "RunFilters", "Views"]
