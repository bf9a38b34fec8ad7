"""Affine-crop R-CNN: detectors whose boxes get gradients through the crop.

What is imported here needs torch and torchvision alone. Training lives in ``detector.training`` (Lightning).
"""

from detector.box_gradient import BoxGradient
from detector.crop import AffineCrop, affine_crop
from detector.geometry import boxes_to_theta, denormalize_boxes, normalize_boxes
from detector.pooler import MultiScaleAffineCrop
from detector.swap import restore_roi_align, swap_crop_head

__all__ = [
    "AffineCrop",
    "BoxGradient",
    "MultiScaleAffineCrop",
    "affine_crop",
    "boxes_to_theta",
    "denormalize_boxes",
    "normalize_boxes",
    "restore_roi_align",
    "swap_crop_head",
]
