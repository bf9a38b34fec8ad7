"""The tools. ``main`` of each module is its command line; ``evaluate``, ``refine``, ... are its call from Python.

Their modules import torch within functions, so that ``--help`` answers at once. They are all imported here: a module
that is imported later would take the place of the function of its name.
"""

from typing import TYPE_CHECKING, Any

from detector.tools.check import check
from detector.tools.evaluate import evaluate
from detector.tools.export import export
from detector.tools.predict import predict
from detector.tools.refine import refine

if TYPE_CHECKING:
    from detector.training.run import train

__all__ = ["check", "evaluate", "export", "predict", "refine", "train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detector.training.run import train

    return train
