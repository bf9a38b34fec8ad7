"""RoI heads whose losses move the proposals."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from detector.rcnn.box_coding import attached_targets
from detector.rcnn.box_gradient import BoxGradient, LossName, add_gradient, scale_gradient
from detector.rcnn.forward import Boxes, Features, Found, HeadOutput, Sizes, Targets
from detector.rcnn.watch import BoxGradientWatch

# torchvision's names of the losses, by the pool whose crops they are computed from.
LOSSES: dict[str, dict[LossName, str]] = {
    "box": {"box": "loss_box_reg", "classification": "loss_classifier"},
    "mask": {"mask": "loss_mask"},
    "keypoint": {"keypoint": "loss_keypoint"},
}


class AttachedRoIHeads(RoIHeads):
    """torchvision's RoI heads with the gradient that :class:`~detector.BoxGradient` describes.

    The sampled proposals stay attached, and a hook drops the gradients of all but the positives. A pool crops at
    attached boxes if all losses of its crops move proposals, and at constant boxes otherwise. If only one of the box
    head's two losses does, its gradient at the crops is taken apart from the other's and carried on to the boxes.
    """

    mixin_order = 1
    box_gradient = BoxGradient()
    box_gradient_watch: BoxGradientWatch | None = None
    # The sampled RoIs of the current step per image, attached, and which of them are positives.
    _sampled: tuple[Boxes, list[Tensor]] | None = None

    def forward(self, features: Features, proposals: Boxes, image_shapes: Sizes, targets: Targets = None) -> HeadOutput:
        if not self.box_gradient.enabled:
            proposals = [p.detach() for p in proposals]
        if not (self.training and torch.is_grad_enabled() and any(p.requires_grad for p in proposals)):
            return super().forward(features, proposals, image_shapes, targets)
        used = {"box": True, "mask": self.has_mask(), "keypoint": self.has_keypoint()}
        names = [name for name in LOSSES if used[name]]
        calls = iter(names)  # torchvision's order of the crops; two of them may share a pool
        moving = [name for loss, name in LOSSES["box"].items() if loss in self.box_gradient.losses]
        apart = moving if self.box_gradient.crop > 0 and len(moving) == 1 else []
        crops: list[Tensor] = []

        def attach(module: nn.Module, given: Any) -> Any:
            pool, (maps, boxes, sizes) = next(calls), given
            scale = self.box_gradient.crop if LOSSES[pool].keys() <= set(self.box_gradient.losses) else 0
            scaled = [scale_gradient(b, scale) for b in boxes]
            if pool != "box":
                # In place, as torchvision takes the targets of masks and keypoints at the boxes of this list.
                boxes[:] = [b.detach() for b in boxes]
            return maps, scaled, sizes

        def record(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            # Without a graph, all layers below are frozen.
            crops.append(output if output.requires_grad else output.detach().requires_grad_())
            return crops[-1]

        pools = {getattr(self, f"{name}_roi_pool") for name in names}
        handles = [pool.register_forward_pre_hook(attach) for pool in pools]
        handles += [self.box_roi_pool.register_forward_hook(record)] if apart else []
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
            for name in apart:
                losses[name] = self._with_box_gradient(losses[name], crops[0], features, image_shapes)
        finally:
            self.__dict__.pop("_sampled", None)  # releases the graph of the step
            for handle in handles:
                handle.remove()
        return result, losses

    def select_training_samples(self, proposals: Boxes, targets: Targets) -> tuple[list[Tensor], ...]:
        sampled, matched, labels, regression_targets = super().select_training_samples(proposals, targets)
        assert targets is not None  # checked by torchvision
        if not any(boxes.requires_grad for boxes in sampled):
            return sampled, matched, labels, regression_targets
        positive = [image_labels > 0 for image_labels in labels]
        for boxes, mask in zip(sampled, positive):
            if boxes.requires_grad:
                boxes.register_hook(lambda gradient, mask=mask: torch.where(mask[:, None], gradient, 0))
        if self.box_gradient_watch is not None:
            for boxes, mask, target, match in zip(sampled, positive, targets, matched):
                self.box_gradient_watch.watch_positives(boxes, mask, target["boxes"].to(boxes.dtype)[match[mask]])
        self._sampled = sampled, positive
        regression_targets = [t.detach() for t in regression_targets]
        if (scale := self.box_gradient.coder_scale) > 0:
            boxes = scale_gradient(torch.cat(sampled), scale)
            attached = attached_targets(torch.cat(regression_targets), boxes, self.box_coder.weights)
            regression_targets = list(attached.split([len(t) for t in regression_targets]))
        return sampled, matched, labels, regression_targets

    def postprocess_detections(self, class_logits: Tensor, box_regression: Tensor, *boxes_and_sizes: Any) -> Found:
        # The box coder would cast the proposals to the deltas' dtype, bfloat16 under autocast.
        dtype = torch.promote_types(box_regression.dtype, torch.float32)
        return super().postprocess_detections(class_logits.to(dtype), box_regression.to(dtype), *boxes_and_sizes)

    def _with_box_gradient(self, loss: Tensor, crop: Tensor, features: Features, sizes: Sizes) -> Tensor:
        """Return a loss of the box head with its gradient at the sampled RoIs, through their crops."""
        assert self._sampled is not None  # set by select_training_samples
        boxes, positive = self._sampled
        # A gradient scaler would act too late for gradients that underflow in float16 here.
        scale = 1024.0 if crop.dtype == torch.float16 else 1.0
        (upstream,) = torch.autograd.grad(loss, crop, loss.new_full((), scale), retain_graph=True)
        pool: Any = self.box_roi_pool
        # Selecting the positives spares their crops. On a GPU it waits for the device, so not where no crop is spared.
        if not pool.needs_no_forward(features):
            boxes, upstream = [b[mask] for b, mask in zip(boxes, positive)], upstream[torch.cat(positive)]
        gradient = pool.box_gradient(features, [b.detach() for b in boxes], sizes, upstream)
        factor = self.box_gradient.crop / scale
        return add_gradient(loss, boxes, [g if factor == 1 else factor * g for g in gradient])
