"""The crop: a box becomes an affine matrix, by which feature maps are read where RoIAlign looks; needs torch alone."""

from detector.crop.crop import AffineCrop, affine_crop
from detector.crop.geometry import boxes_to_theta, denormalize_boxes, normalize_boxes
from detector.crop.pyramid import MultiScaleAffineCrop

__all__ = [
    "AffineCrop",
    "MultiScaleAffineCrop",
    "affine_crop",
    "boxes_to_theta",
    "denormalize_boxes",
    "normalize_boxes",
]
