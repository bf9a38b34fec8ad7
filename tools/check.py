"""Check a data set before training: python tools/check.py --help."""

import sys

from detector.tools.check import main

if __name__ == "__main__":
    sys.exit(main())
