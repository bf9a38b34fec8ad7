"""What a frozen detector makes of an image: the features and the boxes that its refinement learns from."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.overriding import overridden


@dataclass(frozen=True)
class Seen:
    """Of one image: its maps [1, C, H, W] by name, its detections [L, 4], and its height and width, as resized."""

    features: dict[str, Tensor]
    boxes: Tensor
    size: tuple[int, int]

    @property
    def bytes(self) -> int:
        return sum(m.numel() * m.element_size() for m in self.features.values())


class FeatureCache:
    """Looks at each image once, and keeps what it saw as long as there is room.

    An image is known again by its pixels, so that a mirrored one is another. What does not fit is looked at anew each
    time.

    Args:
        most_bytes: memory for features, on the model's device. A 320 x 320 image of a detector with 128 channels takes
            4.4 MB, one of 800 x 1333 with 256 channels 91 MB.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._seen: dict[bytes, Seen] = {}

    def __call__(self, model: Any, image: Tensor) -> Seen:
        key = hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
        seen = self._seen.get(key)
        if seen is None:
            seen = look_at(model, image)
            if self.bytes + seen.bytes <= self.most_bytes:
                self._seen[key] = seen
                self.bytes += seen.bytes
        return seen


def finding_boxes_alone(heads: nn.Module) -> AbstractContextManager[None]:
    """Within, RoI heads look for no masks and no keypoints, which take longer than the boxes."""
    return overridden(heads, mask_roi_pool=None, keypoint_roi_pool=None)


@torch.no_grad()
def look_at(model: Any, image: Tensor) -> Seen:
    """Run a detector, in eval mode and its refinement switched off, on an image [3, H, W] in 0..1."""
    inputs, _ = model.transform([image])
    features = model.backbone(inputs.tensors)
    if isinstance(features, Tensor):
        features = OrderedDict([("0", features)])
    proposals, _ = model.rpn(inputs, features)
    with finding_boxes_alone(model.roi_heads):
        found, _ = model.roi_heads(features, proposals, inputs.image_sizes)
    names = model.roi_heads.box_roi_pool.featmap_names
    return Seen({n: m for n, m in features.items() if n in names}, found[0]["boxes"], inputs.image_sizes[0])


def batched(seen: Sequence[Seen]) -> dict[str, Tensor]:
    """The maps of several images, padded with zeros to one size, below and on the right, as images of a batch are."""
    together = {}
    for name in seen[0].features:
        maps = [one.features[name] for one in seen]
        height, width = (max(m.shape[axis] for m in maps) for axis in (2, 3))
        padded = [F.pad(m, (0, width - m.shape[3], 0, height - m.shape[2])) for m in maps]
        together[name] = torch.cat(padded).contiguous(memory_format=torch.channels_last)
    return together
