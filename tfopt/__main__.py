"""`python -m tfopt` is `tfopt`."""

import sys

from tfopt.commands import main

if __name__ == "__main__":
    sys.exit(main())
