"""Detect objects in images: python tools/predict.py --help."""

import sys

from detector.command_line.predict import main

if __name__ == "__main__":
    sys.exit(main())
