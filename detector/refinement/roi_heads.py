"""RoI heads that refine their detections."""

import copy
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.forward import Boxes, Features, HeadOutput, Sizes, Targets
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.refinement.boxes import decode
from detector.refinement.head import Refinement
from detector.refinement.inference import refine_detections
from detector.refinement.losses import sample_training_boxes, unrolled_losses


class RefinedRoIHeads(RoIHeads):
    """torchvision's RoI heads with a refinement.

    In eval mode, masks and keypoints are predicted in the refined boxes. In training, the losses of the refinement are
    added to those of the heads. It learns from the boxes that the box head decodes, the kind of box that it refines in
    testing; these boxes carry no gradient.
    """

    mixin_order = 0
    refinement: Refinement
    refined = staticmethod(refine_detections)  # an attribute, so that it can be timed
    _rois: tuple[Boxes, list[Tensor]] | None = None  # of the current step, and their labels

    def forward(self, features: Features, proposals: Boxes, image_shapes: Sizes, targets: Targets = None) -> HeadOutput:
        if not self.refinement.enabled:
            return super().forward(features, proposals, image_shapes, targets)
        if not self.training:
            heads = copy.copy(self)  # shares all modules; another thread may call self with other features
            heads.__dict__["postprocess_detections"] = lambda *outputs: self.refined(
                self.refinement, features, self.postprocess_detections(*outputs), image_shapes, self._classify
            )
            return super(RefinedRoIHeads, heads).forward(features, proposals, image_shapes, targets)
        outputs: list[Any] = []
        handle = self.box_predictor.register_forward_hook(lambda module, given, output: outputs.append(output))
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
            decoded = self._decoded(outputs[0][1], image_shapes)
        finally:
            handle.remove()
            self.__dict__.pop("_rois", None)
        assert targets is not None  # checked by torchvision
        boxes, matched = sample_training_boxes(decoded, [target["boxes"] for target in targets], image_shapes)
        return result, losses | unrolled_losses(self.refinement, features, boxes, matched, image_shapes)

    def select_training_samples(self, proposals: Boxes, targets: Targets) -> tuple[list[Tensor], ...]:
        selected = super().select_training_samples(proposals, targets)
        self._rois = [boxes.detach() for boxes in selected[0]], selected[2]
        return selected

    def _classify(self, crops: Tensor) -> Tensor:
        logits: Tensor = self.box_predictor(self.box_head(crops))[0]
        return logits

    def _decoded(self, deltas: Tensor, sizes: Sizes) -> Boxes:
        """Return the boxes [L, 4] per image that the deltas [K, 4 * classes] make of the RoIs, for the RoI's class.

        Boxes of the background are 0. Leaving them out would wait for the device.
        """
        assert self._rois is not None  # set by select_training_samples
        rois, labels = self._rois[0], torch.cat(self._rois[1])[:, None]
        dtype = torch.promote_types(deltas.dtype, torch.float32)  # 16 bits cannot hold pixel coordinates
        of_class = deltas.detach().to(dtype).unflatten(1, (-1, 4)).gather(1, labels[:, :, None].expand(-1, -1, 4))
        decoded = decode(of_class[:, 0], rois, sizes, self.box_coder.weights)
        return [torch.where(label[:, None] > 0, boxes, 0) for label, boxes in zip(self._rois[1], decoded)]


class AttachedRefinedRoIHeads(AttachedRoIHeads, RefinedRoIHeads):
    """Both mix-ins, the box gradient outermost. A module-level class, so that pickle finds it."""
