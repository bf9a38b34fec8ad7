"""Score a detector: python tools/eval.py --help."""

import sys

from detector.tools.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
