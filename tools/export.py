"""Export a detector: python tools/export.py --help."""

import sys

from detector.tools.export import main

if __name__ == "__main__":
    sys.exit(main())
