"""A region proposal network whose proposals carry a gradient."""

import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from detector.rcnn.box_coding import attached_boxes
from detector.rcnn.box_gradient import BoxGradient, bounded_copies
from detector.rcnn.forward import Boxes, Features, Losses, Targets
from detector.rcnn.watch import BoxGradientWatch


class AttachedRPN(RegionProposalNetwork):
    """torchvision's RPN with proposals attached to the deltas, the gradient held to ``box_gradient.bound``.

    The stock ``forward`` detaches the deltas inline, so it is written anew. Anchors and proposals are float32 under
    autocast, too: above 256, bfloat16 has steps of 2 pixels.
    """

    mixin_order = 1
    box_gradient = BoxGradient()
    box_gradient_watch: BoxGradientWatch | None = None

    def forward(self, images: ImageList, features: Features, targets: Targets = None) -> tuple[Boxes, Losses]:
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        # numel() would be baked into an exported graph.
        anchors_per_level = [o.shape[1] * o.shape[2] * o.shape[3] for o in objectness]
        # The anchor generator takes only shape, dtype and device from the maps.
        shapes = [m.new_empty((), dtype=torch.promote_types(m.dtype, torch.float32)).expand(m.shape) for m in maps]
        anchors = self.anchor_generator(images, shapes)
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        objectness, deltas = objectness.to(anchors[0].dtype), deltas.to(anchors[0].dtype)

        own = others = deltas
        # Not self.training: the RoI heads may have losses while the RPN is in eval mode.
        if targets is not None and self.box_gradient.enabled and torch.is_grad_enabled():
            own, others = bounded_copies(deltas, self.box_gradient.bound)
            if self.box_gradient_watch is not None:
                self.box_gradient_watch.watch_deltas(deltas, own, others)
        proposals = self.box_coder.decode(others.detach(), anchors).view(-1, 4)
        if others.requires_grad and self.box_gradient.enabled:
            proposals = attached_boxes(proposals, others, torch.cat(anchors), self.box_coder.weights)
        proposals = proposals.view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(proposals, objectness, images.image_sizes, anchors_per_level)
        if not self.training:
            return boxes, {}
        assert targets is not None  # checked by torchvision
        labels, matched_boxes = self.assign_targets_to_anchors(anchors, targets)
        regression_targets = self.box_coder.encode(matched_boxes, anchors)
        loss_objectness, loss_box = self.compute_loss(objectness, own, labels, regression_targets)
        return boxes, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}
