"""Launches `tfopt rebuild`; takes the same flags."""

import sys

from tfopt.commands import main

if __name__ == "__main__":
    sys.exit(main(["rebuild", *sys.argv[1:]]))
