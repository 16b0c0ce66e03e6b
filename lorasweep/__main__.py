"""`python -m lorasweep`."""

import sys

from lorasweep.cli.main import program

sys.exit(program())
