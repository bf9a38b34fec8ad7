"""Let a detector refine its boxes: python tools/refine.py --help."""

import sys

from detector.tools.refine import main

if __name__ == "__main__":
    sys.exit(main())
