"""Differentiable crops of boxes out of feature maps. Needs only torch and torchvision.ops."""

from detector.crop.crop import AffineCrop, affine_crop, exact_crop
from detector.crop.geometry import boxes_to_theta, denormalize_boxes, normalize_boxes
from detector.crop.pyramid import MultiScaleAffineCrop

__all__ = [
    "AffineCrop",
    "MultiScaleAffineCrop",
    "affine_crop",
    "boxes_to_theta",
    "denormalize_boxes",
    "exact_crop",
    "normalize_boxes",
]
