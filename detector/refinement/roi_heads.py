"""RoI heads whose detections are refined, and that learn to in training."""

from contextvars import ContextVar

from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.refinement.head import Refinement
from detector.refinement.losses import boxes_to_learn_from, unrolled_losses
from detector.refinement.refining import refine

# Of the call under way, by name. Not of the heads, which several threads may call at once: each has a context of its
# own.
FEATURES: ContextVar[dict[str, Tensor] | None] = ContextVar("FEATURES", default=None)


class RefinedRoIHeads(RoIHeads):
    """torchvision's RoI heads with a refinement; masks and keypoints are looked for in the refined boxes.

    In training the refinement's losses come beside the heads' own.
    """

    refinement: Refinement

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        outer = FEATURES.set(features)
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
        finally:
            FEATURES.reset(outer)
        if self.training and targets is not None and self.refinement.enabled:
            boxes, truth = boxes_to_learn_from(
                proposals, [target["boxes"] for target in targets], image_shapes, self.refinement
            )
            losses = losses | unrolled_losses(self.refinement, features, boxes, truth, image_shapes)
        return result, losses

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        found = super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        if not self.refinement.enabled or FEATURES.get() is None:
            return found
        boxes, scores, labels = found
        return self.refined(boxes, scores, labels, image_shapes)

    def refined(
        self,
        boxes: list[Tensor],
        scores: list[Tensor],
        labels: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The detections of the call under way, refined; whatever the refinement takes time for is in here."""
        features = FEATURES.get()
        assert features is not None
        threshold = self.nms_thresh
        return refine(self.refinement, features, boxes, scores, labels, image_shapes, nms_threshold=threshold)


class AttachedRefinedRoIHeads(AttachedRoIHeads, RefinedRoIHeads):
    """RoI heads with both, the swap's gradient outermost: a name by which pickle finds them again."""
