"""Affine-crop R-CNN: detectors whose boxes get gradients through the crop.

These names need only torch and torchvision, except ``load_detector``. Each package uses only those above it:

* ``crop``: three operators that crop boxes out of feature maps, with gradients to the boxes;
* ``rcnn``: swaps the crop into torchvision's R-CNNs, and lets the losses of the second stage move the proposals;
* ``refinement``: refinement iterations and gradient ascent on the predicted IoU of detections;
* ``data``: images, annotations and results in COCO's formats: checks, batches and pictures;
* ``models``: detectors by name and settings, and files of weights;
* ``pretrained``: trained detectors: loading, prediction and export;
* ``evaluation``: COCO's metric and more, as a report and a page;
* ``training``: training with Lightning;
* ``tools``: the command lines.

All of them use the modules beside them: ``errors``, ``text``, ``files``, ...
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detector.crop import (
        AffineCrop,
        PrRoIPool2D,
        RoIAlignRotated,
        affine_crop,
        boxes_to_theta,
        denormalize_boxes,
        normalize_boxes,
        prroi_pool2d,
        roi_align_rotated,
    )
    from detector.pretrained import load_detector
    from detector.rcnn import BoxGradient, MultiScaleAffineCrop, restore_roi_align, swap_crop_head, watch_box_gradient
    from detector.refinement import RefinementConfig, add_refinement, refinement_losses, remove_refinement

__all__ = [
    "AffineCrop",
    "BoxGradient",
    "MultiScaleAffineCrop",
    "PrRoIPool2D",
    "RefinementConfig",
    "RoIAlignRotated",
    "add_refinement",
    "affine_crop",
    "boxes_to_theta",
    "denormalize_boxes",
    "load_detector",
    "normalize_boxes",
    "prroi_pool2d",
    "refinement_losses",
    "remove_refinement",
    "restore_roi_align",
    "roi_align_rotated",
    "swap_crop_head",
    "watch_box_gradient",
]

_LAYERS = ("crop", "rcnn", "refinement", "pretrained")

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """Import a name on first use: torch takes seconds, and command lines must answer faster."""
        for layer in _LAYERS if name in __all__ else ():
            module = import_module(f"detector.{layer}")
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
