"""Masks of objects: COCO's segmentations (polygons, RLE) as tensors, and tensors as RLE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks, paste_mask_in_image

Rle = dict[str, Any]  # compressed, as in COCO's files: "size" [height, width] and "counts", a string
MASK_THRESHOLD = 0.5  # probability, as in torchvision's references


def as_rle(segmentation: Any, height: int, width: int) -> Rle:
    """Convert a valid segmentation of an image to one compressed RLE.

    It is a list of polygons [x1, y1, x2, y2, ...] in pixels, whose union is the mask; an RLE, compressed or not; or
    empty, see :func:`is_empty`.
    """
    if is_empty(segmentation):
        return as_rle({"counts": [height * width]}, height, width)
    if isinstance(segmentation, Mapping):
        rle = {"size": [height, width], "counts": segmentation["counts"]}
        if isinstance(rle["counts"], list):
            rle = _as_text(coco_mask.frPyObjects(rle, height, width))
        # pycocotools treats an empty run as the end when it compares masks.
        has_empty_runs = 0 in (run_lengths(rle["counts"]) or [])[1:]
        return _as_text(coco_mask.encode(coco_mask.decode(rle))) if has_empty_runs else rle
    return _as_text(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


def is_empty(segmentation: Any) -> bool:
    """Return whether a segmentation is ``None`` or has no polygon with a point."""
    return not segmentation or (isinstance(segmentation, list) and all(polygon == [] for polygon in segmentation))


def decode_masks(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """Convert segmentations, see :func:`as_rle`, to masks [L, H, W], uint8, 1 on the object."""
    masks = torch.zeros(len(segmentations), height, width, dtype=torch.uint8)
    for mask, segmentation in zip(masks, segmentations):  # decoding all at once would take a second copy
        _paint(mask, as_rle(segmentation, height, width), 1)
    return masks


@dataclass(frozen=True)
class MaskLayers:
    """Masks as a few maps with numbered objects, because all masks of a large image may not fit in memory.

    Args:
        maps: [N, H, W] uint8, 0 on the background. Objects whose boxes overlap are on different maps.
        places: index of the map, and number there, of each object.
    """

    maps: Tensor
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, segmentations: Sequence[Any], height: int, width: int) -> "MaskLayers":
        """Lay out segmentations, see :func:`as_rle`."""
        maps: list[Tensor] = []
        boxes: list[list[list[float]]] = []  # of the objects on each map, at most 255
        places = []
        for segmentation in segmentations:
            rle = as_rle(segmentation, height, width)
            box = mask_box(rle)
            free = (i for i, others in enumerate(boxes) if len(others) < 255 and not any(_meet(box, b) for b in others))
            layer = next(free, len(maps))
            if layer == len(maps):
                maps.append(torch.zeros(height, width, dtype=torch.uint8))
                boxes.append([])
            boxes[layer].append(box)
            places.append((layer, len(boxes[layer])))
            _paint(maps[layer], rle, len(boxes[layer]))
        return cls(torch.stack(maps) if maps else torch.zeros(0, height, width, dtype=torch.uint8), tuple(places))

    def masks(self) -> Tensor:
        """Return the masks [L, H, W], uint8."""
        masks = self.maps.new_empty((len(self.places), *self.maps.shape[1:]))
        for mask, (layer, number) in zip(masks, self.places):
            torch.eq(self.maps[layer], number, out=mask)
        return masks

    def resized(self, size: tuple[int, int]) -> Tensor:
        """Return the masks [L, H', W'], uint8, resized to (height, width) as torchvision's detectors resize them."""
        return MaskLayers(functional.interpolate(self.maps[:, None], size)[:, 0], self.places).masks()

    def to(self, device: torch.device | str, **options: Any) -> "MaskLayers":
        """Move the maps to a device. Lightning calls this."""
        return MaskLayers(self.maps.to(device, **options), self.places)


def _paint(canvas: Tensor, rle: Rle, number: int) -> None:
    """Set the pixels of a mask to a number, on a canvas [H, W] of uint8."""
    left, top, width, height = (int(side) for side in mask_box(rle))
    box = np.s_[top : top + height, left : left + width]  # pycocotools' column-major order makes whole images slow
    canvas.numpy()[box][coco_mask.decode(rle)[box] > 0] = number


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


def encode_masks(masks: Tensor) -> list[Rle]:
    """Encode masks [L, H, W]; floats are probabilities."""
    on = masks > MASK_THRESHOLD if masks.is_floating_point() else masks > 0
    return [_as_text(coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))) for mask in on]


def encode_crops(crops: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Rle]:
    """Paste the output of a mask head into the image, and encode it.

    The masks equal those of torchvision's detectors, which paste all masks of an image at once, as floats.

    Args:
        crops: [L, 1, M, M], probabilities.
        boxes: [L, 4] (x1, y1, x2, y2) in pixels of the image.
        size: (height, width) of the image.
    """
    padded, scale = expand_masks(crops.detach().float().cpu(), 1)
    corners = expand_boxes(boxes.detach().cpu(), scale).to(torch.int64)
    canvas = np.zeros(size, np.uint8, order="F")
    masks = []
    for mask, box in zip(padded, corners):
        clipped = (box + torch.tensor([0, 0, 1, 1])).clamp(min=0).minimum(torch.tensor(size[::-1] * 2))
        left, top, right, bottom = clipped.tolist()
        pasted = paste_mask_in_image(mask[0], box - torch.tensor([left, top, left, top]), bottom - top, right - left)
        canvas[top:bottom, left:right] = pasted > MASK_THRESHOLD
        masks.append(_as_text(coco_mask.encode(canvas)))
        canvas[top:bottom, left:right] = 0
    return masks


def mask_area(rle: Rle) -> float:
    """Return the number of pixels of a mask."""
    return float(coco_mask.area(rle))


def mask_box(rle: Rle) -> list[float]:
    """Return the smallest box (x, y, width, height) around a mask, in pixels; zeros for an empty mask."""
    return [float(side) for side in coco_mask.toBbox(rle)]


def _as_text(rle: Mapping[str, Any]) -> Rle:
    return {"size": [int(side) for side in rle["size"]], "counts": bytes(rle["counts"]).decode("ascii")}


def run_lengths(counts: str) -> list[int] | None:
    """Return the run lengths of a compressed RLE, ``None`` if it is broken.

    Each number is written as 5-bit digits, the lowest first, in characters from "0" on. A sixth bit marks that more
    digits follow. From the fourth number on, it is the difference to the number two before (rleToString in maskApi.c).
    """
    if not counts.isascii():
        return None
    digits = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if not len(digits):
        return []
    if digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return None
    last = np.flatnonzero(digits & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 6:  # pycocotools reads 32 bits, and images need at most 30
        return None
    place = np.arange(len(digits)) - np.repeat(first, length)
    runs = np.add.reduceat((digits & 31) << (5 * place), first)
    runs -= np.where(digits[last] & 16, 1 << (5 * length), 0)
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return None if runs.min() < 0 else runs.tolist()
