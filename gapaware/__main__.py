"""`python -m gapaware` is the command line `gapaware`."""

import sys

from gapaware.cli import main

if __name__ == "__main__":
    sys.exit(main())
