"""Draw training images as the model sees them: python tools/browse.py --help."""

import sys

from detector.tools.browse import main

if __name__ == "__main__":
    sys.exit(main())
