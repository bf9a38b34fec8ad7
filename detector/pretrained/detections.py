"""What was found in an image, to look at in a notebook."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from detector.data.drawing import draw
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
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    category_names: Sequence[str]

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.category_names[label - 1] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Plain values, a detection at a time: ``name``, ``label``, ``score`` and ``box`` (x1, y1, x2, y2)."""
        for name, label, score, box in zip(
            self.names, self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True
        ):
            yield {"name": name, "label": label, "score": score, "box": box}

    def draw(self, *, min_score: float = 0.0) -> Image.Image:
        """The picture with boxes, names and scores; enlarged if it is small."""
        target = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        return draw(self.image, target, self.category_names, min_score=min_score)

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
