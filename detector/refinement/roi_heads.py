"""RoI heads that refine their detections."""

from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.forward import Detections, Features, Sizes, Targets, add_masks_and_keypoints, detect_boxes
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.refinement.head import Refinement
from detector.refinement.inference import refine_detections
from detector.refinement.losses import sample_training_boxes, unrolled_losses


class RefinedRoIHeads(RoIHeads):
    """torchvision's RoI heads with a refinement.

    In eval mode, masks and keypoints are predicted in the refined boxes. In training, the losses of the refinement are
    added to those of the heads.
    """

    refinement: Refinement

    def forward(
        self, features: Features, proposals: list[Tensor], image_shapes: Sizes, targets: Targets = None
    ) -> tuple[Detections, dict[str, Tensor]]:
        if self.training or not self.refinement.enabled:
            result, losses = super().forward(features, proposals, image_shapes, targets)
            if self.training and self.refinement.enabled and targets is not None:
                truth = [target["boxes"] for target in targets]
                boxes, matched = sample_training_boxes(proposals, truth, image_shapes)
                losses = losses | unrolled_losses(self.refinement, features, boxes, matched, image_shapes)
            return result, losses
        detections = self.refined(features, detect_boxes(self, features, proposals, image_shapes), image_shapes)
        add_masks_and_keypoints(self, features, detections, image_shapes)
        return detections, {}

    def refined(self, features: Features, detections: Detections, image_shapes: Sizes) -> Detections:
        """Refine detections; a method of its own so that it can be timed."""
        return refine_detections(self.refinement, features, detections, image_shapes)


class AttachedRefinedRoIHeads(AttachedRoIHeads, RefinedRoIHeads):
    """Both mix-ins, the box gradient outermost. A module-level class, so that pickle finds it."""
