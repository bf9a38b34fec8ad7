"""RoI heads whose losses move the proposals, by the crop path and by the coder path."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.box_gradient import BoxGradient, LossName, scale_gradient
from detector.rcnn.watch import BoxGradientWatch

# The names that torchvision gives the losses, by pool: those computed from that pool's crops.
LOSSES: dict[str, dict[LossName, str]] = {
    "box": {"box": "loss_box_reg", "classification": "loss_classifier"},
    "mask": {"mask": "loss_mask"},
    "keypoint": {"keypoint": "loss_keypoint"},
}


class AttachedRoIHeads(RoIHeads):
    """torchvision's RoI heads, with the gradient that :class:`~detector.BoxGradient` describes.

    The heads run once, on crops at detached proposals, as in torchvision. Which loss may move a proposal is then
    decided loss by loss: with g the loss's gradient at the crops, ``g * (crop - crop.detach())`` is added to it, its
    crop taken once more from detached features at the attached proposals. That is zero in value, and its gradient
    is the loss's through the crop; weighting a loss weights its gradient to the proposals alike.
    """

    box_gradient = BoxGradient()
    # The proposals drawn for the step under way, attached, and their labels (0: background), by image.
    _drawn: tuple[list[Tensor], list[Tensor]] | None = None
    box_gradient_watch: BoxGradientWatch | None = None

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.box_gradient.enabled:
            proposals = [p.detach() for p in proposals]
        if not (self.training and self.box_gradient.enabled and torch.is_grad_enabled()):
            return super().forward(features, proposals, image_shapes, targets)
        used = {"box": True, "mask": self.has_mask(), "keypoint": self.has_keypoint()}
        pools = {name: getattr(self, f"{name}_roi_pool") for name in LOSSES if used[name]}
        try:
            with _recorded_outputs(list(pools.values())) as crops:
                result, losses = super().forward(features, proposals, image_shapes, targets)
            self._add_crop_path(losses, dict(zip(pools, crops)), features, image_shapes)
        finally:
            self._drawn = None  # the graph must not outlive the step
        return result, losses

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        drawn, matched, labels, regression_targets = super().select_training_samples(proposals, targets)
        if self.box_gradient.enabled and torch.is_grad_enabled():
            self._drawn = (drawn, labels)
        constant = [p.detach() for p in drawn]
        regression_targets = [t.detach() for t in regression_targets]
        if targets is not None and (self.box_gradient.coder_scale > 0 or self.box_gradient_watch is not None):
            positive = [image_labels > 0 for image_labels in labels]
            truth = [t["boxes"].to(p.dtype)[m[mask]] for t, p, m, mask in zip(targets, drawn, matched, positive)]
            if self.box_gradient_watch is not None:
                self.box_gradient_watch.see_positives(drawn, positive, truth)
            if self.box_gradient.coder_scale > 0:
                # Only positives have a box loss. The targets of the others must stay out of the graph altogether:
                # those of an image without objects are logarithms of 0, whose derivative times no gradient is NaN.
                attached = self.box_coder.encode(truth, [p[mask] for p, mask in zip(drawn, positive)])
                regression_targets = [
                    t.index_put((mask,), scale_gradient(a, self.box_gradient.coder_scale))
                    for t, mask, a in zip(regression_targets, positive, attached)
                ]
        # What is cropped, and what mask and keypoint targets are cut with, is constant.
        return constant, matched, labels, regression_targets

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        return super().assign_targets_to_proposals([p.detach() for p in proposals], gt_boxes, gt_labels)

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        # The box coder would cast the proposals to the deltas' dtype, bfloat16 under autocast.
        dtype = torch.promote_types(box_regression.dtype, torch.float32)
        return super().postprocess_detections(class_logits.to(dtype), box_regression.to(dtype), proposals, image_shapes)

    def _add_crop_path(
        self,
        losses: dict[str, Tensor],
        crops: dict[str, Tensor],
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> None:
        assert self._drawn is not None  # set by select_training_samples
        drawn, labels = self._drawn
        settings = self.box_gradient
        if settings.crop == 0 or not any(p.requires_grad for p in drawn):
            return
        constant = {name: feature.detach() for name, feature in features.items()}
        for pool, crop in crops.items():
            names = [name for loss, name in LOSSES[pool].items() if loss in settings.losses]
            if not names:
                continue
            positive = [image_labels > 0 for image_labels in labels]
            boxes = [p[mask] for p, mask in zip(drawn, positive)]
            # The other pools crop positives only.
            rows = torch.cat(positive) if pool == "box" else slice(None)
            attached = getattr(self, f"{pool}_roi_pool")(constant, boxes, image_shapes)
            attached = attached.to(torch.promote_types(attached.dtype, torch.float32))
            zero = attached - attached.detach()
            # A gradient scaler would come too late for what underflows in float16 here.
            boost = 1024.0 if crop.dtype == torch.float16 else 1.0
            for name in names:
                (gradient,) = torch.autograd.grad(losses[name] * boost, crop, retain_graph=True)
                gradient = gradient[rows].to(zero.dtype) / boost
                losses[name] = losses[name] + settings.crop * (gradient * zero).sum()


@contextmanager
def _recorded_outputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what the modules return, call by call, each ready to be differentiated with respect to."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:  # all layers below are frozen
            output = output.detach().requires_grad_()
        outputs.append(output)
        return output

    handles = [module.register_forward_hook(record) for module in dict.fromkeys(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
