"""`python -m avfusion` is the `avfusion` command."""

import sys

from avfusion.cli import main

sys.exit(main())
