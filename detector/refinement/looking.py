"""Looking again: boxes are moved by the deltas that the head reads off the crop at them, look by look."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from detector.refinement.head import CODER, Refinement


def look_again(
    refinement: Refinement,
    features: dict[str, Tensor],
    boxes: Sequence[Tensor],
    image_shapes: list[tuple[int, int]],
    *,
    looks: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Apply the head to its own boxes; a box moves as long as the fit that the head expects does not fall, and it does
    not leave the detector's own box behind.

    Args:
        features: the detector's maps, as its own pool gets them.
        boxes: [L, 4] (x1, y1, x2, y2) of each image, in pixels of the resized images, float32 or better.
        image_shapes: (height, width) of those.
        looks: how often. There is one crop more, at the last boxes, for their fit.

    Returns:
        The moved boxes of each image, clipped to it, and their fit, [L], 0 to 1.
    """
    counts = [b.shape[0] for b in boxes]
    config = refinement.config
    start = best = torch.cat(list(boxes))
    fit, deltas = None, None
    tried = list(boxes)
    for look in range(looks + 1):
        new_deltas, logit = refinement.stage(look)(refinement.pool(features, tried, image_shapes))
        new_fit = logit.sigmoid()
        if fit is None or deltas is None:
            deltas, fit = new_deltas, new_fit
        else:
            there = torch.cat(tried)
            fits = (new_fit >= fit) & (paired_iou(there, start) >= config.least_overlap)  # false for NaN
            best = torch.where(fits[:, None], there, best)
            deltas = torch.where(fits[:, None], new_deltas, deltas)
            fit = torch.where(fits, new_fit, fit)
        by = config.look_scale * deltas.nan_to_num()  # the crop refuses what is not finite
        tried = decoded(by, best.split(counts), image_shapes)
    assert fit is not None
    return list(best.split(counts)), list(fit.split(counts))


def decoded(deltas: Tensor, boxes: Sequence[Tensor], image_shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The boxes [L, 4] of each image, moved by their deltas [K, 4] and clipped to the image."""
    moved = CODER.decode_single(deltas, torch.cat(list(boxes)).to(deltas.dtype))
    parts = moved.split([b.shape[0] for b in boxes])  # not len(), which would be a constant of a graph
    return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """The IoU of each box with its counterpart, [L]; 0 for boxes without area."""
    overlap = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    shared = overlap.prod(1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) for b in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)
