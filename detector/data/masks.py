"""Masks of objects: COCO's segmentations (polygons, RLE) as tensors, and back."""

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
MASK = 0.5  # probability above which a pixel is of the object, as in torchvision's references


def as_rle(segmentation: Any, height: int, width: int) -> Rle:
    """A segmentation of COCO's format, without a problem, as one compressed RLE.

    Args:
        segmentation: polygons, [[x1, y1, x2, y2, ...], ...] in pixels, one for each part; an RLE, compressed or not;
            nothing, see :func:`is_empty`, is an empty mask.
        height, width: of the image.
    """
    if is_empty(segmentation):
        return as_rle({"counts": [height * width]}, height, width)
    if isinstance(segmentation, Mapping):
        rle = {"size": [height, width], "counts": segmentation["counts"]}
        if isinstance(rle["counts"], list):
            rle = _as_text(coco_mask.frPyObjects(rle, height, width))
        # pycocotools takes a run without pixels for the end where it compares masks.
        has_empty_runs = 0 in (run_lengths(rle["counts"]) or [])[1:]
        return _as_text(coco_mask.encode(coco_mask.decode(rle))) if has_empty_runs else rle
    return _as_text(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


def is_empty(segmentation: Any) -> bool:
    """Whether there is none: ``None``, no polygon, or only polygons without a point, as some tools write."""
    return not segmentation or (isinstance(segmentation, list) and all(part == [] for part in segmentation))


def decode_masks(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """Segmentations, see :func:`as_rle`, as masks [L, H, W], uint8, 1 on the object."""
    masks = torch.zeros(len(segmentations), height, width, dtype=torch.uint8)
    for mask, segmentation in zip(masks, segmentations):  # one by one: pycocotools' own array of all would be a copy
        _paint(mask, as_rle(segmentation, height, width), 1)
    return masks


@dataclass(frozen=True)
class MaskLayers:
    """Masks as a few maps, in each of which objects that lie apart are numbered: of a large image with many objects the
    masks themselves would fill the memory before they are resized.

    Args:
        maps: [N, H, W] uint8, 0 where no object is.
        places: of each object its map, and its number there.
    """

    maps: Tensor
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, segmentations: Sequence[Any], height: int, width: int) -> "MaskLayers":
        """Lay out segmentations, see :func:`as_rle`."""
        maps: list[Tensor] = []
        boxes: list[list[tuple[float, ...]]] = []  # of the objects on each map
        places = []
        for segmentation in segmentations:
            rle = as_rle(segmentation, height, width)
            x, y, w, h = mask_box(rle)
            box = (x, y, x + w, y + h)
            free = (i for i, others in enumerate(boxes) if len(others) < 255 and not any(_meet(box, o) for o in others))
            layer = next(free, len(maps))
            if layer == len(maps):
                maps.append(torch.zeros(height, width, dtype=torch.uint8))
                boxes.append([])
            boxes[layer].append(box)
            places.append((layer, len(boxes[layer])))
            _paint(maps[layer], rle, len(boxes[layer]))
        return cls(torch.stack(maps) if maps else torch.zeros(0, height, width, dtype=torch.uint8), tuple(places))

    def masks(self) -> Tensor:
        """The masks [L, H, W], uint8."""
        masks = self.maps.new_empty((len(self.places), *self.maps.shape[1:]))
        for mask, (layer, number) in zip(masks, self.places):
            torch.eq(self.maps[layer], number, out=mask)
        return masks

    def resized(self, size: tuple[int, int]) -> Tensor:
        """The masks [L, H', W'], uint8, at another height and width, as torchvision's detectors resize them."""
        return MaskLayers(functional.interpolate(self.maps[:, None], size)[:, 0], self.places).masks()

    def to(self, device: torch.device | str, **options: Any) -> "MaskLayers":
        """The same on another device; Lightning moves what has this method."""
        return MaskLayers(self.maps.to(device, **options), self.places)


def _paint(canvas: Tensor, rle: Rle, number: int) -> None:
    """Set the pixels of a mask, on a canvas [H, W] of uint8, to a number."""
    left, top, width, height = (int(side) for side in mask_box(rle))
    there = np.s_[top : top + height, left : left + width]  # no more: pycocotools' columns are not torch's rows
    canvas.numpy()[there][coco_mask.decode(rle)[there] > 0] = number


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (x1, y1, x2, y2) have a pixel in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def encode_masks(masks: Tensor) -> list[Rle]:
    """Masks [L, H, W] as RLE; of probabilities, what is above 0.5."""
    on = masks > MASK if masks.is_floating_point() else masks > 0
    return [_as_text(coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))) for mask in on]


def encode_crops(crops: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Rle]:
    """What a mask head says of its boxes, pasted into the image, as RLE.

    The values are those of torchvision's detectors, which paste all masks of an image at once, at 4 bytes a pixel each;
    here each is pasted into its box, on one canvas.

    Args:
        crops: [L, 1, M, M], probabilities.
        boxes: [L, 4] (x1, y1, x2, y2) in pixels of the image.
        size: height and width of the image.
    """
    padded, scale = expand_masks(crops.detach().float().cpu(), 1)
    corners = expand_boxes(boxes.detach().cpu(), scale).to(torch.int64)
    canvas = np.zeros(size, np.uint8, order="F")
    height, width = size
    masks = []
    for mask, box in zip(padded, corners):
        left, top, right, bottom = box.tolist()
        left, right = (min(max(x, 0), width) for x in (left, right + 1))
        top, bottom = (min(max(y, 0), height) for y in (top, bottom + 1))
        pasted = paste_mask_in_image(mask[0], box - torch.tensor([left, top, left, top]), bottom - top, right - left)
        canvas[top:bottom, left:right] = pasted > MASK
        masks.append(_as_text(coco_mask.encode(canvas)))
        canvas[top:bottom, left:right] = 0
    return masks


def mask_area(rle: Rle) -> float:
    """The number of pixels of a mask."""
    return float(coco_mask.area(rle))


def mask_box(rle: Rle) -> list[float]:
    """The smallest box (x, y, width, height) around a mask, in pixels; all 0 around an empty one."""
    return [float(side) for side in coco_mask.toBbox(rle)]


def _as_text(rle: Mapping[str, Any]) -> Rle:
    """An RLE that JSON takes: pycocotools has bytes."""
    return {"size": [int(side) for side in rle["size"]], "counts": bytes(rle["counts"]).decode("ascii")}


def run_lengths(counts: str) -> list[int] | None:
    """The lengths of the runs in a compressed RLE, ``None`` if it is broken.

    Each is written as digits of 5 bits, the lowest first, in characters from "0" on, with a sixth bit where more
    follow; from the fourth on as the difference to the length two before (pycocotools' maskApi.c, rleToString).
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
    if length.max() > 6:  # pycocotools reads 32 bits, and no image needs more than 30
        return None
    place = np.arange(len(digits)) - np.repeat(first, length)
    runs = np.add.reduceat((digits & 31) << (5 * place), first)
    runs -= np.where(digits[last] & 16, 1 << (5 * length), 0)
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return None if runs.min() < 0 else runs.tolist()
