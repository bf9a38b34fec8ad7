"""Detections of images, together with their training losses and their proposals."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import resize_boxes

from detector.data.masks import MaskLayers
from detector.models.rle_detections import DetectionDict, postprocess, sizes_of
from detector.overriding import eval_mode, overridden
from detector.rcnn.forward import propose
from detector.refinement.attach import refinement_of

Targets = Sequence[Mapping[str, Any]]


@torch.no_grad()
def detect_with_losses(
    model: nn.Module, images: list[Tensor], targets: Targets
) -> tuple[list[DetectionDict], dict[str, Tensor]]:
    """Return the detections of images and their training losses; an R-CNN runs its backbone and its RPN once.

    All modules are in eval mode: no dropout, and no statistic of batch norm changes. The losses of an R-CNN are those
    of the test-time proposals, without those that a refinement adds.

    Args:
        model: a torchvision detector. Its mode does not change.
        images: [3, H, W] in 0..1.
        targets: as in training. Masks may be :class:`~detector.data.masks.MaskLayers`.

    Returns:
        See :func:`~detector.models.rle_detections.detect`, and the losses by torchvision's names.
    """
    with eval_mode(model):
        if isinstance(model, GeneralizedRCNN):
            return run_rcnn(model, images, targets)[:2]
        detections = model(images)
        with overridden(model, training=True):
            return detections, model(images, targets)


def run_rcnn(
    model: Any, images: list[Tensor], targets: Targets | None = None, *, min_proposals: int = 0
) -> tuple[list[DetectionDict], dict[str, Tensor], list[Tensor]]:
    """Run an R-CNN in eval mode. Returns its detections, its losses (none without targets), and its proposals.

    The proposals [P, 4] of each image are (x1, y1, x2, y2) in pixels of the image, in the order of their objectness.
    There are up to ``min_proposals`` if the model uses fewer.
    """
    rpn, heads = model.rpn, model.roi_heads
    pre_nms, post_nms = rpn.pre_nms_top_n(), rpn.post_nms_top_n()
    given = None if targets is None else [dict(target) for target in targets]
    layers = [one.pop("masks") if isinstance(one.get("masks"), MaskLayers) else None for one in given or ()]
    numbers = {"pre_nms_top_n": lambda: pre_nms, "post_nms_top_n": lambda: max(post_nms, min_proposals)}
    with overridden(rpn, training=targets is not None, **numbers):
        first = propose(model, images, given)
    # NMS comes before the cut, so additional proposals do not change the first ones.
    proposals = [boxes[:post_nms] for boxes in first.boxes]
    losses = first.losses
    if first.targets is not None:
        for target, mask, size in zip(first.targets, layers, first.image_sizes, strict=True):
            if mask is not None:
                target["masks"] = mask.resized(size)
        refinement = refinement_of(model)
        unrefined = nullcontext() if refinement is None else overridden(refinement, enabled=False)
        with overridden(heads, training=True), unrefined:
            losses = losses | heads(first.features, proposals, first.image_sizes, first.targets)[1]
    detections, _ = heads(first.features, proposals, first.image_sizes)
    sizes = sizes_of(images)
    resized = [resize_boxes(*one) for one in zip(first.boxes, first.image_sizes, sizes, strict=True)]
    return postprocess(model, detections, first.image_sizes, sizes), losses, resized
