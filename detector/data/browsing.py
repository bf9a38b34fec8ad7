"""A sheet of training images as the model sees them: augmented, resized, with what is left of their objects."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from detector.data.dataset import CocoDetection, Target
from detector.data.drawing import draw, sheet

LARGEST = 480  # pixels of a picture's longer side on the sheet


def browse(stored: CocoDetection, augmented: CocoDetection, path: Path, *, images: int = 6, epochs: int = 3) -> None:
    """Write a picture of some images of a split as they are stored, and beside them as the first epochs see them.

    They are spread over the split, those with objects first. ``augmented`` is the split with the training's transform.
    """
    order = np.argsort(stored.counts() == 0, kind="stable").tolist()
    rows = []
    for index in order[:: max(len(order) // images, 1)][:images]:
        items = [stored[index], *(augmented[epoch, index] for epoch in range(epochs))]
        rows.append([_picture(image, target, stored) for image, target in items])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, ["as stored", *(f"epoch {epoch}" for epoch in range(epochs))]).save(path)


def _picture(image: Tensor, target: Target, split: CocoDetection) -> Image.Image:
    height, width = image.shape[1:]
    scale = min(LARGEST / max(height, width), 1.0)
    if scale < 1:
        size = [max(round(height * scale), 1), max(round(width * scale), 1)]
        image = torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
        target = target | {"boxes": target["boxes"] * scale}  # masks are stretched over the picture
        if "keypoints" in target:
            target["keypoints"] = target["keypoints"] * torch.tensor([scale, scale, 1])
    picture = draw(image, target, split.category_names, layout=split.keypoints)
    pen = ImageDraw.Draw(picture)
    caption, place = f"{width} x {height}", (4, picture.height - 4)
    pen.rectangle(pen.textbbox(place, caption, anchor="lb"), fill="white")
    pen.text(place, caption, "black", anchor="lb")
    return picture
