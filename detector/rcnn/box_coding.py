"""Gradients of torchvision's box coder in closed form. Its own backward passes start two to three times the kernels.

With centres and sizes of boxes, the targets of boxes and the boxes decoded from deltas are (Ren et al., "Faster R-CNN",
2015, equation 2)

    targets = weight * (true centre - centre) / size, weight * log(true size / size)
    boxes: centre = anchor's centre + delta / weight * anchor's size, size = anchor's size * exp(delta / weight)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # of torchvision's coder: greater deltas of the size are constant


def attached_targets(targets: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the regression targets of boxes, both [K, 4], with their gradient to the boxes.

    In an image without objects, where targets are logarithms of 0, torchvision's makes NaN of gradients that are 0.
    """
    return _AttachedTargets.apply(targets.detach(), boxes, weights)


def attached_boxes(boxes: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the boxes decoded from deltas and anchors, all [K, 4], with their gradient to the deltas."""
    return _AttachedBoxes.apply(boxes.detach(), deltas, anchors, weights)


class _AttachedTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
        attached = targets.view_as(targets)
        ctx.weights = weights
        ctx.save_for_backward(attached, boxes)
        return attached

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        targets, boxes = ctx.saved_tensors
        weighted = torch.stack([w * g for w, g in zip(ctx.weights, gradient.unbind(1), strict=True)], dim=1)
        size, half = boxes[:, 2:] - boxes[:, :2], weighted[:, :2] / 2
        shrink = gradient[:, :2] * targets[:, :2] + weighted[:, 2:]  # minus the derivative by the log of the size
        return None, torch.cat([shrink - half, -shrink - half], dim=1) / size.repeat(1, 2), None


class _AttachedBoxes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, boxes: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
        attached = boxes.view_as(boxes)
        ctx.weights = weights
        ctx.save_for_backward(attached, deltas, anchors)
        return attached

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        boxes, deltas, anchors = ctx.saved_tensors
        low, high = gradient[:, :2], gradient[:, 2:]
        of_centre = (low + high) * (anchors[:, 2:] - anchors[:, :2])
        of_size = (high - low) / 2 * (boxes[:, 2:] - boxes[:, :2])
        columns = [g if w == 1 else g / w for g, w in zip((*of_centre.unbind(1), *of_size.unbind(1)), ctx.weights)]
        for column in (2, 3):
            columns[column] = columns[column] * (deltas[:, column] <= MAX_LOG_SCALE * ctx.weights[column])
        return None, torch.stack(columns, dim=1), None, None
