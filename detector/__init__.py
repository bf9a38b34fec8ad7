"""Affine-crop R-CNN: detectors whose boxes get gradients through the crop.

What is imported here needs torch and torchvision alone, except ``load_detector``. Below it lie, each using only what
stands before it:

* ``crop``: a box becomes an affine matrix, by which feature maps are read where RoIAlign looks;
* ``rcnn``: what changes in torchvision's R-CNN, so that the losses of its second stage move its proposals;
* ``refinement``: refinement iterations and gradient ascent on the predicted IoU of detections;
* ``data``: images and annotations in COCO's format, checked, batched and drawn, and the results format;
* ``models``: detectors by their settings, and files of weights;
* ``pretrained``: trained detectors, out of checkpoints and folders, applied to images, exported;
* ``evaluation``: COCO's metric, and what else tells how a detector does, as a report and a page;
* ``training``: runs, by Lightning;
* ``tools``: what ``tools/`` calls, a module a tool.

The single modules beside them (``errors``, ``text``, ``files``, ...) are what all of these use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detector.crop import (
        AffineCrop,
        MultiScaleAffineCrop,
        affine_crop,
        boxes_to_theta,
        denormalize_boxes,
        exact_crop,
        normalize_boxes,
    )
    from detector.pretrained import load_detector
    from detector.rcnn import BoxGradient, restore_roi_align, swap_crop_head, watch_box_gradient
    from detector.refinement import RefinementConfig, add_refinement, refinement_losses, remove_refinement

__all__ = [
    "AffineCrop",
    "BoxGradient",
    "MultiScaleAffineCrop",
    "RefinementConfig",
    "add_refinement",
    "affine_crop",
    "boxes_to_theta",
    "denormalize_boxes",
    "exact_crop",
    "load_detector",
    "normalize_boxes",
    "refinement_losses",
    "remove_refinement",
    "restore_roi_align",
    "swap_crop_head",
    "watch_box_gradient",
]

# Imported when first asked for: torch takes seconds, in which a command line could have been read.
_FLOORS = {
    "detector.pretrained": ("load_detector",),
    "detector.rcnn": ("BoxGradient", "restore_roi_align", "swap_crop_head", "watch_box_gradient"),
    "detector.refinement": ("RefinementConfig", "add_refinement", "refinement_losses", "remove_refinement"),
    "detector.crop": tuple(__all__),  # the others
}


if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        for floor, names in _FLOORS.items():
            if name in names:
                globals()[name] = value = getattr(import_module(floor), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
