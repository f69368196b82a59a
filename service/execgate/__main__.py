"""`python -m execgate`."""

import sys

from execgate.cli import main

sys.exit(main())
