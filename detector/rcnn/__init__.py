"""What changes in torchvision's R-CNN so that the losses of its second stage move the boxes of the first."""

from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.swap import restore_roi_align, swap_crop_head
from detector.rcnn.watch import watch_box_gradient

__all__ = ["BoxGradient", "restore_roi_align", "swap_crop_head", "watch_box_gradient"]
