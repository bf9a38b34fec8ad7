"""Pictures of what a detector sees: detections beside the truth."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes

# Okabe and Ito's colours, which colour-blind readers can tell apart; one a class, in turn.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
GAP = 8  # pixels between the pictures of a sheet


def draw(image: Tensor, target: dict[str, Tensor], names: Sequence[str], *, min_score: float = 0.5) -> Tensor:
    """Draw boxes with class names, and scores if there are any.

    Args:
        image: [3, H, W], float in 0..1 or uint8.
        target: ``boxes`` [L, 4] in pixels, ``labels`` [L] from 1 on, and perhaps ``scores`` [L].
        names: the class names, that of label 1 first.
        min_score: detections below it are left out.

    Returns:
        [3, H, W], uint8.
    """
    picture = v2.functional.to_dtype(image.cpu(), torch.uint8, scale=True)
    boxes, labels = target["boxes"].detach().cpu(), target["labels"].tolist()
    captions = [names[label - 1] for label in labels]
    if "scores" in target:
        scores = target["scores"].tolist()
        captions = [f"{caption} {score:.2f}" for caption, score in zip(captions, scores)]
        kept = [i for i, score in enumerate(scores) if score >= min_score]
        boxes, labels, captions = boxes[kept], [labels[i] for i in kept], [captions[i] for i in kept]
    if not len(boxes):
        return picture
    colors = [COLORS[(label - 1) % len(COLORS)] for label in labels]
    return draw_bounding_boxes(picture, boxes, captions, colors=colors, width=2)


def sheet(rows: Sequence[Sequence[Tensor]]) -> Image.Image:
    """Put pictures [3, H, W] uint8 of any sizes on one white sheet, row by row."""
    heights = [max(picture.shape[1] for picture in row) for row in rows]
    width = max(sum(picture.shape[2] + GAP for picture in row) for row in rows) + GAP
    canvas = torch.full((3, sum(heights) + GAP * (len(rows) + 1), width), 255, dtype=torch.uint8)
    top = GAP
    for row, height in zip(rows, heights):
        left = GAP
        for picture in row:
            canvas[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
            left += picture.shape[2] + GAP
        top += height + GAP
    return v2.functional.to_pil_image(canvas)
