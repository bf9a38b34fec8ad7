"""Box operations of the refinement. Boxes are (x1, y1, x2, y2) in pixels of the resized image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from detector.rcnn.box_coding import MAX_LOG_SCALE
from detector.rcnn.forward import Boxes, Sizes

# Deltas of nearly correct boxes are small, so the weights are twice the detector's own. Cascade R-CNN (Cai and
# Vasconcelos, 2018, section 4.1) does the same.
CENTRE_WEIGHT, SIZE_WEIGHT = 20.0, 10.0
WEIGHTS = (CENTRE_WEIGHT, CENTRE_WEIGHT, SIZE_WEIGHT, SIZE_WEIGHT)


def encode(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the deltas [K, 4] from ``others`` [K, 4] to ``boxes`` [K, 4]: torchvision's, but with no copy to a GPU."""
    (centre, size), (other_centre, other_size) = _centre_and_size(boxes), _centre_and_size(others)
    offset = CENTRE_WEIGHT * (centre - other_centre) / other_size
    return torch.cat([offset, SIZE_WEIGHT * torch.log(size / other_size)], dim=1)


def decode(deltas: Tensor, boxes: Boxes, image_sizes: Sizes, weights: Sequence[float] = WEIGHTS) -> Boxes:
    """Apply deltas [K, 4] to the boxes [L, 4] of all images, and clip each image's boxes to its (height, width).

    A box that would be thinner than one pixel, or whose deltas are NaN, stays.
    """
    centre, size = _centre_and_size(torch.cat(boxes).to(deltas.dtype))
    # One number at a time, as a tensor of the weights would be copied to a GPU.
    scaled = torch.stack([column / weight for column, weight in zip(deltas.unbind(1), weights)], dim=1)
    centre = scaled[:, :2] * size + centre
    half = 0.5 * (torch.exp(scaled[:, 2:].clamp(max=MAX_LOG_SCALE)) * size)
    decoded = torch.cat([centre - half, centre + half], dim=1)
    by_image = decoded.split([b.shape[0] for b in boxes])  # len() would be baked into a traced graph
    clipped = [clip_boxes_to_image(b, shape) for b, shape in zip(by_image, image_sizes, strict=True)]
    return [
        torch.where((new[:, 2:] - new[:, :2] >= 1).all(dim=1, keepdim=True), new, old.detach().to(new.dtype))
        for new, old in zip(clipped, boxes, strict=True)
    ]


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * size, size


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU [L] of boxes [L, 4] and their counterparts [L, 4]; 0 where a box has no area."""
    overlap = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    intersection = overlap.prod(1)
    area, other_area = ((b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) for b in (boxes, others))
    return intersection / (area + other_area - intersection).clamp(min=1e-6)


def move(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Move boxes [K, 4] by (x, y, log width, log height) [K, 4], x and y in units of the box's width and height."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + offsets[:, :2] * size
    half = size * offsets[:, 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)
