"""RoI heads that refine their detections."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.forward import Boxes, Features, HeadOutput, Sizes, Targets
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.refinement.boxes import decode
from detector.refinement.head import Refinement
from detector.refinement.inference import refine_detections
from detector.refinement.losses import sample_training_boxes, unrolled_losses

# Boxes that refinement has moved onto one object are nearly the same. At the box head's threshold, mostly 0.5, NMS also
# removes neighbours that overlap.
NMS_THRESHOLD = 0.7
IGNORED = -1  # torchvision's label of a box whose IoU is between the thresholds of background and object


class RefinedRoIHeads(RoIHeads):
    """torchvision's RoI heads with a refinement.

    In eval mode, masks and keypoints are predicted in the refined boxes. In training, the losses of the refinement are
    added to those of the heads. The refinement learns from jittered ground truth, and from the boxes that the box head
    decodes, because it refines such boxes in testing. These boxes carry no gradient. Boxes decoded from background RoIs
    count too, where they overlap an object. The box head learns to classify all decoded boxes, because it scores
    refined boxes in testing; this loss is ``loss_classifier_again``. Batch norm in the box head sees RoIs and decoded
    boxes.
    """

    mixin_order = 0
    refinement: Refinement
    refined = staticmethod(refine_detections)  # an attribute, so that it can be timed

    def forward(self, features: Features, proposals: Boxes, image_shapes: Sizes, targets: Targets = None) -> HeadOutput:
        if not self.refinement.enabled:
            return super().forward(features, proposals, image_shapes, targets)
        heads = copy.copy(self)  # shares all modules; another thread may call self with other features
        if not self.training:
            heads.__dict__["postprocess_detections"] = lambda *outputs: self.refined(
                self.refinement,
                features,
                self.postprocess_detections(*outputs),
                image_shapes,
                classify=self._classify,
                nms_thresh=max(self.nms_thresh, NMS_THRESHOLD),
            )
            return super(RefinedRoIHeads, heads).forward(features, proposals, image_shapes, targets)
        seen: dict[str, Any] = {}

        def select(*given: Any) -> Any:
            selected = self.select_training_samples(*given)
            seen.update(rois=[boxes.detach() for boxes in selected[0]], labels=selected[2])
            return selected

        def predict(crops: Tensor) -> Any:
            output = self.box_predictor(crops)
            seen.update(logits=output[0].detach(), deltas=output[1].detach())
            return output

        heads.__dict__.update(select_training_samples=select, box_predictor=predict)
        result, losses = super(RefinedRoIHeads, heads).forward(features, proposals, image_shapes, targets)
        assert targets is not None  # checked by torchvision
        decoded = self._decoded(seen["rois"], seen["labels"], seen["logits"], seen["deltas"], image_shapes)
        truth = [target["boxes"].to(boxes.dtype) for target, boxes in zip(targets, decoded)]
        _, labels = self.assign_targets_to_proposals(decoded, truth, [target["labels"] for target in targets])
        # Not box_roi_pool: the box gradient has hooks there that expect one call.
        logits = self._classify(self.refinement.pool(features, decoded, image_shapes))
        label = torch.cat(labels)
        again = F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="sum")
        losses["loss_classifier_again"] = again / (label != IGNORED).sum().clamp(min=1)  # 0 if all are ignored
        boxes, matched = sample_training_boxes(decoded, truth, image_shapes)
        return result, losses | unrolled_losses(self.refinement, features, boxes, matched, image_shapes)

    def _classify(self, crops: Tensor) -> Tensor:
        """Return the box head's logits [K, classes] of crops [K, C, h, w], in float32 or better."""
        logits: Tensor = self.box_predictor(self.box_head(crops))[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _decoded(self, rois: Boxes, labels: list[Tensor], logits: Tensor, deltas: Tensor, sizes: Sizes) -> Boxes:
        """Return the boxes [L, 4] per image that the deltas [K, 4 * classes] make of the RoIs.

        An RoI takes the deltas of its object's class, or, without an object, of the class with the highest score.
        """
        dtype = torch.promote_types(deltas.dtype, torch.float32)  # 16 bits cannot hold pixel coordinates
        label = torch.cat(labels)
        label = torch.where(label > 0, label, logits[:, 1:].argmax(dim=1) + 1)
        of_class = deltas.to(dtype).unflatten(1, (-1, 4)).gather(1, label[:, None, None].expand(-1, -1, 4))[:, 0]
        return decode(of_class, rois, sizes, self.box_coder.weights)


class AttachedRefinedRoIHeads(AttachedRoIHeads, RefinedRoIHeads):
    """Both mix-ins, the box gradient outermost. A module-level class, so that pickle finds it."""
