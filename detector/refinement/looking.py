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
) -> list[Tensor]:
    """Apply the head to its own boxes. Differentiable in the features and in the boxes.

    Args:
        features: the detector's maps, as its own pool gets them.
        boxes: [L, 4] (x1, y1, x2, y2) of each image, in pixels of the resized images, float32 or better.
        image_shapes: (height, width) of those.
        looks: how often.

    Returns:
        The moved boxes, clipped to their images.
    """
    moved = list(boxes)
    for look in range(looks):
        deltas, _ = refinement.stage(look)(refinement.pool(features, moved, image_shapes))
        moved = decoded(deltas, moved, image_shapes)
    return moved


def decoded(deltas: Tensor, boxes: Sequence[Tensor], image_shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The boxes [L, 4] of each image, moved by their deltas [K, 4] and clipped to the image."""
    moved = CODER.decode_single(deltas, torch.cat(list(boxes)).to(deltas.dtype))
    parts = moved.split([len(b) for b in boxes])
    return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]
