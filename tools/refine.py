"""Train a refinement of a detector's boxes: python tools/refine.py --help."""

import sys

from detector.tools.refine import main

if __name__ == "__main__":
    sys.exit(main())
