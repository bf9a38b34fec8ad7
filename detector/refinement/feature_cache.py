"""Features and detections of a frozen detector, kept for the training of its refinement."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.rcnn.forward import Features, detect_boxes, propose


class ImageFeatures(NamedTuple):
    """Feature maps [1, C, H, W] by level, detected boxes [L, 4] and the resized (height, width) of one image."""

    features: Features
    boxes: Tensor
    size: tuple[int, int]


class FeatureCache:
    """Runs the detector once per image, and keeps at most ``max_bytes`` of features on the model's device.

    A cache serves one model. Images are identified by their pixels, so a flipped image is a different image.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._features: dict[tuple[torch.Size, bytes], ImageFeatures] = {}

    def __call__(self, model: Any, image: Tensor) -> ImageFeatures:
        pixels = image.detach().cpu().contiguous().numpy().tobytes()
        key = image.shape, hashlib.blake2b(pixels, digest_size=16).digest()
        if key in self._features:
            return self._features[key]
        extracted = extract_features(model, image)
        nbytes = sum(m.nbytes for m in extracted.features.values())
        if self.nbytes + nbytes <= self.max_bytes:
            self._features[key] = extracted
            self.nbytes += nbytes
        return extracted


@torch.no_grad()
def extract_features(model: Any, image: Tensor) -> ImageFeatures:
    """Run a detector in eval mode, without its refinement, on an image [3, H, W] in 0..1."""
    features, proposals, sizes, *_ = propose(model, [image])
    (boxes,), _, _ = detect_boxes(model.roi_heads, features, proposals, sizes)
    used = model.roi_heads.box_roi_pool.featmap_names
    return ImageFeatures({name: m for name, m in features.items() if name in used}, boxes, sizes[0])


def batch_features(images: Sequence[Features]) -> Features:
    """Batch the maps of several images [N, C, H, W], padded with zeros at the bottom and the right."""
    batched = {}
    for name in images[0]:
        maps = [one[name] for one in images]
        height, width = (max(m.shape[axis] for m in maps) for axis in (2, 3))
        padded = [F.pad(m, (0, width - m.shape[3], 0, height - m.shape[2])) for m in maps]
        batched[name] = torch.cat(padded).contiguous(memory_format=torch.channels_last)
    return batched
