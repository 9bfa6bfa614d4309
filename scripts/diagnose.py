"""Launches `tfopt diagnose`; takes the same flags."""

import sys

from tfopt.commands import main

if __name__ == "__main__":
    sys.exit(main(["diagnose", *sys.argv[1:]]))
