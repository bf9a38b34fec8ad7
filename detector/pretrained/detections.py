"""The detections of an image, for notebooks and scripts."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from detector.data.drawing import draw
from detector.data.keypoints import KeypointLayout
from detector.data.masks import Rle, decode_masks
from detector.text import clean


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of an image, best first. Boxes are (x1, y1, x2, y2) in pixels; notebooks show a picture.

    Args:
        image: [3, H, W], uint8.
        boxes: [L, 4], float32.
        labels: [L], int64, from 1 on.
        scores: [L], float32, 0 to 1.
        category_names: the name of each label, starting with label 1.
        segmentations: a Mask R-CNN's masks, L RLE in COCO's format; see :attr:`masks`.
        keypoints: a Keypoint R-CNN's keypoints, [L, K, 3], float32, (x, y, 1) in pixels.
        keypoints_scores: [L, K], float32, the logits of the keypoints.
        layout: the names of the keypoints.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    category_names: Sequence[str]
    segmentations: Sequence[Rle] | None = None
    keypoints: Tensor | None = None
    keypoints_scores: Tensor | None = None
    layout: KeypointLayout | None = None

    @property
    def masks(self) -> Tensor | None:
        """The masks, [L, H, W], bool, decoded anew at each access; ``None`` without segmentations."""
        if self.segmentations is None:
            return None
        height, width = self.image.shape[1:]
        return decode_masks(self.segmentations, height, width).bool()

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.category_names[label - 1] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield a dict of plain values per detection: ``name``, ``label``, ``score`` and ``box``.

        Masks add ``segmentation`` (RLE), keypoints add ``keypoints``: (x, y, logit) by the keypoint's name.
        """
        columns: dict[str, Sequence[Any]] = {"name": self.names, "label": self.labels.tolist()}
        columns |= {"score": self.scores.tolist(), "box": self.boxes.tolist()}
        if self.segmentations is not None:
            columns["segmentation"] = self.segmentations
        if self.keypoints is not None:
            points = self.keypoints[:, :, :2]
            if self.keypoints_scores is not None:
                points = torch.cat([points, self.keypoints_scores[:, :, None]], dim=2)
            names = (self.layout or KeypointLayout.numbered(points.shape[1])).names
            columns["keypoints"] = [dict(zip(names, of_one, strict=True)) for of_one in points.tolist()]
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row))

    def draw(self, *, min_score: float = 0.0) -> Image.Image:
        """Return the image with its detections drawn on it, enlarged if it is small."""
        fields = ("boxes", "labels", "scores", "segmentations", "keypoints")
        target = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return draw(self.image, target, self.category_names, min_score=min_score, layout=self.layout)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.draw().save(file, "PNG")
        return file.getvalue()

    def __repr__(self) -> str:
        height, width = self.image.shape[1:]
        lines = [f"{len(self)} detections in an image of {width} x {height} pixels (x1, y1, x2, y2):"]
        for one in self:
            corners = ", ".join(f"{side:.1f}" for side in one["box"])
            lines.append(f"  {one['score']:.3f}  {clean(one['name'])}  ({corners})")
        return "\n".join(lines)
