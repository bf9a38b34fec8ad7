"""Train an affine-crop R-CNN and score it: python tools/train.py --help."""

import sys

from detector.tools.training_cli import main

if __name__ == "__main__":
    sys.exit(main())
