"""The tools. ``main`` of each module is its command line; ``evaluate``, ``refine``, ... are its call from Python.

Their modules import torch within functions, so that ``--help`` answers at once.
"""

from detector.tools.check import check
from detector.tools.evaluate import evaluate
from detector.tools.export import export
from detector.tools.predict import predict
from detector.tools.refine import refine

__all__ = ["check", "evaluate", "export", "predict", "refine"]
