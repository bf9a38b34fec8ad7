"""RoI heads whose detections are refined, and that learn to in training."""

from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from detector.refinement.head import Refinement
from detector.refinement.losses import boxes_to_learn_from, unrolled_losses
from detector.refinement.refining import refine


class RefinedRoIHeads(RoIHeads):
    """torchvision's RoI heads with a refinement; masks and key points are looked for in the refined boxes.

    In training the refinement's losses come beside the heads' own.
    """

    refinement: Refinement
    _features: dict[str, Tensor] | None = None  # of the call under way

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        self._features = features
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
        finally:
            self._features = None
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
        if not self.refinement.enabled or self._features is None:
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
        assert self._features is not None
        threshold = self.nms_thresh
        return refine(self.refinement, self._features, boxes, scores, labels, image_shapes, nms_threshold=threshold)
