"""`python -m leasekit.cli`: the command line where its script is not on PATH."""

from __future__ import annotations

import sys

from leasekit.cli import main

sys.exit(main())
