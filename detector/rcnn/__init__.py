"""Changes to torchvision's R-CNN that let the losses of the RoI heads move the proposals."""

from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.pooler import MultiScaleAffineCrop
from detector.rcnn.swap import restore_roi_align, swap_crop_head
from detector.rcnn.watch import watch_box_gradient

__all__ = ["BoxGradient", "MultiScaleAffineCrop", "restore_roi_align", "swap_crop_head", "watch_box_gradient"]
