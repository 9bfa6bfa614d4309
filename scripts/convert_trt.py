"""Launches `tfopt convert_trt`; takes the same flags."""

import sys

from tfopt.commands import main

if __name__ == "__main__":
    sys.exit(main(["convert_trt", *sys.argv[1:]]))
