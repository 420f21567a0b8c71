"""`python -m matta` is the command `matta`."""

import sys

from matta.cli import main

if __name__ == "__main__":
    sys.exit(main())
