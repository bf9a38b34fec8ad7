"""Test-time augmentation: a detector looks at an image mirrored and in several sizes, and the looks are merged."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detector.errors import ModelError
from detector.overriding import overridden

SMALLEST, LARGEST = 32, 10_000  # pixels; below, an image has no feature map; above, it fills the memory


class AugmentedDetector(nn.Module):
    """A torchvision detector that merges the detections of several looks at each image.

    All looks' detections go together through one suppression by class, by the model's own threshold, and the best
    are kept.

    Args:
        model: a torchvision detector, in eval mode.
        flip: also look at each image mirrored, left to right.
        sizes: look at each with its shorter side resized to these pixels, instead of the model's own size. The
            limit to the longer side grows and shrinks in proportion.

    Raises:
        ModelError: a size is out of range, or the detector resizes images to one fixed size (SSD).
    """

    def __init__(self, model: nn.Module, *, flip: bool = False, sizes: Sequence[int] = ()) -> None:
        super().__init__()
        transform: Any = model.transform  # torchvision's
        if sizes and getattr(transform, "fixed_size", None) is not None:
            raise ModelError(f"sizes: {type(model).__name__} resizes every image to {tuple(transform.fixed_size)}")
        if not all(SMALLEST <= size <= LARGEST for size in sizes):
            raise ModelError(f"sizes must be {SMALLEST} to {LARGEST} pixels, got {list(sizes)}")
        self.model: Any = model
        self.flip = flip
        own = transform.min_size[-1]
        self.sizes = [(size, round(transform.max_size * size / own)) for size in sizes] or [(own, transform.max_size)]
        settings: Any = getattr(model, "roi_heads", model)
        self.iou = settings.nms_thresh
        self.most = settings.detections_per_img

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Images [3, H, W] in 0..1; for each a dict of ``boxes``, ``labels`` and ``scores``, the best first."""
        looks: list[list[dict[str, Tensor]]] = []
        for min_size, max_size in self.sizes:
            with overridden(self.model.transform, min_size=(min_size,), max_size=max_size):
                looks.append(self.model(images))
                if self.flip:
                    mirrored = self.model([image.flip(-1) for image in images])
                    looks.append([_mirrored(d, image.shape[-1]) for d, image in zip(mirrored, images)])
        return [self._merge([look[i] for look in looks]) for i in range(len(images))]

    def _merge(self, looks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        boxes, scores, labels = (torch.cat([look[name] for look in looks]) for name in ("boxes", "scores", "labels"))
        kept = batched_nms(boxes, scores, labels, self.iou)[: self.most]
        return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}


def _mirrored(detections: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    x1, y1, x2, y2 = detections["boxes"].unbind(1)
    return detections | {"boxes": torch.stack([width - x2, y1, width - x1, y2], dim=1)}
