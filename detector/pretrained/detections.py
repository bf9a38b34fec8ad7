"""What was found in an image, to look at in a notebook."""

import io
from collections.abc import Iterator, Mapping, Sequence
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
    """What was found in an image, the best first. A notebook shows it as a picture.

    Args:
        image: [3, H, W], uint8.
        boxes: [L, 4], float32, (x1, y1, x2, y2) in pixels of the image.
        labels: [L], int64, from 1 on.
        scores: [L], float32.
        category_names: the name of each label, that of label 1 first.
        segmentations: of a Mask R-CNN the mask of each, as COCO's RLE; see :attr:`masks`.
        keypoints: of a Keypoint R-CNN, [L, K, 3], float32: x and y in pixels of the image, and 1.
        keypoints_scores: [L, K], float32: the heatmap there, a logit; the higher, the surer.
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
        """The mask of each, [L, H, W], bool; ``None`` of a detector that finds none. Decoded anew each time."""
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
        """Plain values, a detection at a time: ``name``, ``label``, ``score`` and ``box`` (x1, y1, x2, y2).

        Of masks also ``segmentation``, COCO's RLE, of keypoints ``keypoints``, by name (x, y, score).
        """
        for number, name in enumerate(self.names):
            found = {"label": int(self.labels[number]), "score": float(self.scores[number])}
            parts = parts_as_values(number, vars(self), self.layout)
            yield {"name": name, **found, "box": self.boxes[number].tolist(), **parts}

    def draw(self, *, min_score: float = 0.0) -> Image.Image:
        """The picture with boxes, names and scores, masks and keypoints; enlarged if it is small."""
        target: dict[str, Any] = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        if self.segmentations is not None:
            target["segmentations"] = self.segmentations
        if self.keypoints is not None:
            target["keypoints"] = self.keypoints
        return draw(self.image, target, self.category_names, min_score=min_score, layout=self.layout)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.draw().save(file, "PNG")
        return file.getvalue()

    def __repr__(self) -> str:
        height, width = self.image.shape[1:]
        lines = [f"{len(self)} detections in an image of {width} x {height} pixels (x1, y1, x2, y2):"]
        for found in self:
            corners = ", ".join(f"{side:.1f}" for side in found["box"])
            lines.append(f"  {found['score']:.3f}  {clean(found['name'])}  ({corners})")
        return "\n".join(lines)


def parts_as_values(number: int, found: Mapping[str, Any], layout: KeypointLayout | None) -> dict[str, Any]:
    """A detection's mask and keypoints as plain values: an RLE, and x, y and score by the point's name.

    Args:
        number: which detection.
        found: ``segmentations``, ``keypoints`` and ``keypoints_scores``, if there are any: see :class:`Detections`.
        layout: the names of the keypoints.
    """
    values: dict[str, Any] = {}
    if found.get("segmentations") is not None:
        values["segmentation"] = found["segmentations"][number]
    if found.get("keypoints") is not None:
        points = found["keypoints"][number, :, :2]
        if found.get("keypoints_scores") is not None:
            points = torch.cat([points, found["keypoints_scores"][number][:, None]], dim=1)
        names = (layout or KeypointLayout.numbered(len(points))).names
        values["keypoints"] = dict(zip(names, points.tolist(), strict=True))
    return values
