"""Check a data set before training: python tools/check.py --help."""

import sys

from detector.command_line.check import main

if __name__ == "__main__":
    sys.exit(main())
