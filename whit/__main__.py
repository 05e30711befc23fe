"""`python -m whit` is the command line."""

import sys

from whit.cli import main

sys.exit(main())
