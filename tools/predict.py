"""Detect objects in images: python tools/predict.py --help."""

import sys

from detector.tools.predict import main

if __name__ == "__main__":
    sys.exit(main())
