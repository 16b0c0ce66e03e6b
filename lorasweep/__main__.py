"""`python -m lorasweep`."""

import sys

from lorasweep.cli.main import main

sys.exit(main())
