"""Differentiable crops of boxes out of feature maps. Needs only torch."""

from detector.crop.crop import AffineCrop, affine_crop
from detector.crop.geometry import boxes_to_theta, denormalize_boxes, normalize_boxes
from detector.crop.prroi_pool import PrRoIPool2D, prroi_pool2d
from detector.crop.roi_align_rotated import RoIAlignRotated, roi_align_rotated

__all__ = [
    "AffineCrop",
    "PrRoIPool2D",
    "RoIAlignRotated",
    "affine_crop",
    "boxes_to_theta",
    "denormalize_boxes",
    "normalize_boxes",
    "prroi_pool2d",
    "roi_align_rotated",
]
