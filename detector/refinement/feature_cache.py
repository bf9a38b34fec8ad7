"""Features and detections of a frozen detector, kept for the training of its refinement."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.rcnn.forward import Features, detect_boxes, propose


@dataclass(frozen=True)
class ImageFeatures:
    """Feature maps [1, C, H, W] by level, detected boxes [L, 4] and the resized (height, width) of one image."""

    features: Features
    boxes: Tensor
    size: tuple[int, int]


class FeatureCache:
    """Runs the detector once per image, and keeps at most ``max_bytes`` of features on the model's device.

    Images are identified by their pixels, so a flipped image is another one.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._features: dict[bytes, ImageFeatures] = {}

    def __call__(self, model: Any, image: Tensor) -> ImageFeatures:
        key = hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
        features = self._features.get(key)
        if features is None:
            features = extract_features(model, image)
            nbytes = sum(m.nbytes for m in features.features.values())
            if self.nbytes + nbytes <= self.max_bytes:
                self._features[key] = features
                self.nbytes += nbytes
        return features


@torch.no_grad()
def extract_features(model: Any, image: Tensor) -> ImageFeatures:
    """Run a detector in eval mode, without its refinement, on an image [3, H, W] in 0..1."""
    proposed = propose(model, [image])
    heads = model.roi_heads
    (found,) = detect_boxes(heads, proposed.features, proposed.boxes, proposed.image_sizes)
    maps = {name: m for name, m in proposed.features.items() if name in heads.box_roi_pool.featmap_names}
    return ImageFeatures(maps, found["boxes"], proposed.image_sizes[0])


def batch_features(images: Sequence[ImageFeatures]) -> Features:
    """Batch the maps of several images [N, C, H, W], padded with zeros at the bottom and the right."""
    batched = {}
    for name in images[0].features:
        maps = [one.features[name] for one in images]
        height, width = (max(m.shape[axis] for m in maps) for axis in (2, 3))
        padded = [F.pad(m, (0, width - m.shape[3], 0, height - m.shape[2])) for m in maps]
        batched[name] = torch.cat(padded).contiguous(memory_format=torch.channels_last)
    return batched
