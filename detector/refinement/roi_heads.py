"""RoI heads that refine their detections."""

import copy

from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.forward import Boxes, Features, HeadOutput, Sizes, Targets
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.refinement.head import Refinement
from detector.refinement.inference import refine_detections
from detector.refinement.losses import sample_training_boxes, unrolled_losses


class RefinedRoIHeads(RoIHeads):
    """torchvision's RoI heads with a refinement.

    In eval mode, masks and keypoints are predicted in the refined boxes. In training, the losses of the refinement are
    added to those of the heads.
    """

    mixin_order = 0
    refinement: Refinement
    refined = staticmethod(refine_detections)  # an attribute, so that it can be timed

    def forward(self, features: Features, proposals: Boxes, image_shapes: Sizes, targets: Targets = None) -> HeadOutput:
        heads = self
        if self.refinement.enabled and not self.training:
            heads = copy.copy(self)  # shares all modules; another thread may call self with other features
            heads.__dict__["postprocess_detections"] = lambda *outputs: self.refined(
                self.refinement, features, self.postprocess_detections(*outputs), image_shapes
            )
        result, losses = super(RefinedRoIHeads, heads).forward(features, proposals, image_shapes, targets)
        if self.refinement.enabled and self.training and targets is not None:
            boxes, matched = sample_training_boxes(proposals, [target["boxes"] for target in targets], image_shapes)
            losses = losses | unrolled_losses(self.refinement, features, boxes, matched, image_shapes)
        return result, losses


class AttachedRefinedRoIHeads(AttachedRoIHeads, RefinedRoIHeads):
    """Both mix-ins, the box gradient outermost. A module-level class, so that pickle finds it."""
