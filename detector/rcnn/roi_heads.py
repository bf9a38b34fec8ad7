"""RoI heads whose losses move the proposals."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.box_gradient import BoxGradient, LossName, scale_gradient
from detector.rcnn.forward import Boxes, Features, Found, HeadOutput, Losses, Sizes, Targets
from detector.rcnn.watch import BoxGradientWatch

# torchvision's names of the losses, by the pool whose crops they are computed from.
LOSSES: dict[str, dict[LossName, str]] = {
    "box": {"box": "loss_box_reg", "classification": "loss_classifier"},
    "mask": {"mask": "loss_mask"},
    "keypoint": {"keypoint": "loss_keypoint"},
}


class AttachedRoIHeads(RoIHeads):
    """torchvision's RoI heads with the gradient that :class:`~detector.BoxGradient` describes.

    The heads run once, on crops at detached proposals. For each loss that may move proposals, with g its gradient at
    the crops, ``g * (crop - crop.detach())`` is added, where the crop is taken again from detached features at attached
    proposals. The added value is zero, and its gradient is the loss's crop path.
    """

    mixin_order = 1
    box_gradient = BoxGradient()
    box_gradient_watch: BoxGradientWatch | None = None
    # The positive RoIs of the current step per image, attached, and which of the sampled RoIs they are.
    _positives: tuple[Boxes, list[Tensor]] | None = None

    def forward(self, features: Features, proposals: Boxes, image_shapes: Sizes, targets: Targets = None) -> HeadOutput:
        if not self.box_gradient.enabled:
            proposals = [p.detach() for p in proposals]
        if not (self.training and self.box_gradient.enabled and torch.is_grad_enabled()):
            return super().forward(features, proposals, image_shapes, targets)
        used = {"box": True, "mask": self.has_mask(), "keypoint": self.has_keypoint()}
        pools = {name: getattr(self, f"{name}_roi_pool") for name in LOSSES if used[name]}
        crops: list[Tensor] = []

        def record(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # Without a graph, all layers below are frozen.
            crops.append(output if output.requires_grad else output.detach().requires_grad_())
            return crops[-1]

        handles = [pool.register_forward_hook(record) for pool in set(pools.values())]
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
            self._add_crop_path(losses, dict(zip(pools, crops)), features, image_shapes)
        finally:
            self.__dict__.pop("_positives", None)  # releases the graph of the step
            for handle in handles:
                handle.remove()
        return result, losses

    def select_training_samples(self, proposals: Boxes, targets: Targets) -> tuple[list[Tensor], ...]:
        sampled, matched, labels, regression_targets = super().select_training_samples(proposals, targets)
        assert targets is not None  # checked by torchvision
        regression_targets = [t.detach() for t in regression_targets]
        masks = [image_labels > 0 for image_labels in labels]
        positives = [p[mask] for p, mask in zip(sampled, masks)]
        truth = [t["boxes"].to(p.dtype)[m[mask]] for t, p, m, mask in zip(targets, sampled, matched, masks)]
        if self.box_gradient_watch is not None:
            for boxes, goals in zip(positives, truth):
                self.box_gradient_watch.watch_positives(boxes, goals)
        if (scale := self.box_gradient.coder_scale) > 0:
            # The targets of other RoIs must stay out of the graph: for an image without objects they are logarithms of
            # 0, and an infinite derivative times a gradient of 0 is NaN.
            encoded = [scale_gradient(e, scale) for e in self.box_coder.encode(truth, positives)]
            regression_targets = [t.index_put((m,), e) for t, m, e in zip(regression_targets, masks, encoded)]
        if self.box_gradient.enabled and torch.is_grad_enabled():
            self._positives = positives, masks
        # Crops, mask targets and keypoint targets are taken at constant boxes.
        return [p.detach() for p in sampled], matched, labels, regression_targets

    def postprocess_detections(self, class_logits: Tensor, box_regression: Tensor, *boxes_and_sizes: Any) -> Found:
        # The box coder would cast the proposals to the deltas' dtype, bfloat16 under autocast.
        dtype = torch.promote_types(box_regression.dtype, torch.float32)
        return super().postprocess_detections(class_logits.to(dtype), box_regression.to(dtype), *boxes_and_sizes)

    def _add_crop_path(self, losses: Losses, crops: dict[str, Tensor], features: Features, sizes: Sizes) -> None:
        assert self._positives is not None  # set by select_training_samples
        positives, masks = self._positives
        if self.box_gradient.crop == 0 or not any(p.requires_grad for p in positives):
            return
        constant = {name: feature.detach() for name, feature in features.items()}
        for pool, crop in crops.items():
            names = [name for loss, name in LOSSES[pool].items() if loss in self.box_gradient.losses]
            if not names:
                continue
            attached = getattr(self, f"{pool}_roi_pool")(constant, positives, sizes)
            attached = attached.to(torch.promote_types(attached.dtype, torch.float32))
            zero = attached - attached.detach()
            # A gradient scaler would act too late for gradients that underflow in float16 here.
            scale = 1024.0 if crop.dtype == torch.float16 else 1.0
            for name in names:
                (gradient,) = torch.autograd.grad(losses[name] * scale, crop, retain_graph=True)
                if pool == "box":  # masks and keypoints have crops of positives only
                    gradient = gradient[torch.cat(masks)]
                losses[name] = losses[name] + self.box_gradient.crop * (gradient.to(zero.dtype) / scale * zero).sum()
