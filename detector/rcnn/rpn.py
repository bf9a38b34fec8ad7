"""A region proposal network whose proposals carry a gradient."""

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from detector.rcnn.bound import bounded_copies
from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.watch import BoxGradientWatch


class AttachedRPN(RegionProposalNetwork):
    """torchvision's RPN, its proposals attached to the deltas and in float32.

    The stock one decodes ``deltas.detach()``, inline, so ``forward`` is written anew; all it calls is inherited.
    Anchors and proposals are float32 under autocast too: bfloat16 has steps of 2 pixels above 256.

    In training, what comes back through a proposal is held to ``box_gradient.bound`` of what the RPN's own box loss
    asks of the same anchor. ``swap_crop_head`` sets ``box_gradient`` here and in the RoI heads.
    """

    box_gradient = BoxGradient()
    box_gradient_watch: BoxGradientWatch | None = None

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of each image, [L, 4] (x1, y1, x2, y2) in pixels, and in training the RPN's own losses."""
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        # Not numel, which would be a constant in an exported graph.
        anchors_per_level = [o.shape[1] * o.shape[2] * o.shape[3] for o in objectness]
        # The anchors take their dtype from the maps, of which only shape, dtype and device are read.
        shapes = [m.new_empty((), dtype=torch.promote_types(m.dtype, torch.float32)).expand(m.shape) for m in maps]
        anchors = self.anchor_generator(images, shapes)
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        objectness, deltas = objectness.to(anchors[0].dtype), deltas.to(anchors[0].dtype)

        # Not self.training: the RoI heads may have losses while the RPN is in eval mode.
        deltas, deltas_of_proposals = self._bounded(deltas, training=targets is not None)
        proposals = self.box_coder.decode(deltas_of_proposals, anchors).view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(proposals, objectness, images.image_sizes, anchors_per_level)
        if not self.training:
            return boxes, {}
        if targets is None:
            raise ValueError("targets must be given in training mode, got None")
        labels, matched_boxes = self.assign_targets_to_anchors(anchors, targets)
        regression_targets = self.box_coder.encode(matched_boxes, anchors)
        loss_objectness, loss_box = self.compute_loss(objectness, deltas, labels, regression_targets)
        return boxes, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}

    def _bounded(self, deltas: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """Return the deltas [N, 4] for the RPN's own box loss, and those for the proposals."""
        settings = self.box_gradient
        if not (training and settings.enabled and torch.is_grad_enabled()):
            return deltas, deltas
        own, others = bounded_copies(deltas, settings.bound)
        if self.box_gradient_watch is not None:
            self.box_gradient_watch.see_deltas(deltas, own, others)
        return own, others
