"""The tool that draws training images: ``tools/browse.py``. It takes the flags of ``tools/train.py``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detector.errors import exit_on_user_error
from detector.tools.cli import FlagNames, check_arguments

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from detector.data.dataset import CocoDetection, Target

LARGEST = 480  # pixels of a picture's longer side
DESCRIPTION = """Draw training images as the model sees them. Takes all flags of tools/train.py.

Examples:
    python tools/browse.py --config configs/bccd.yaml --data.root FOLDER --output sheet.png
    python tools/browse.py --config configs/bccd.yaml --data.augmentation+ RandomPhotometricDistort"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tools/browse.py`` and return its exit code."""
    flags = FlagNames()
    with exit_on_user_error(flag_of=flags):
        check_arguments(DESCRIPTION, sys.argv[1:] if arguments is None else arguments, files=("config", "ckpt_path"))
        from detector.tools.training_cli import BrowsingCLI, parse

        cli = parse(arguments, DESCRIPTION, BrowsingCLI, flags=flags)
        data, config = cli.datamodule, cli.config
        data.prepare_data()
        types = cli.model.annotation_types
        stored = data.split(data.train_split, annotation_types=types)
        augmented = data.split(data.train_split, train=True, annotation_types=types)
        browse(stored, augmented, Path(config.output), images=config.count, epochs=config.epochs)
        print(f"{config.output}: {data.train_split} of {data.root} as stored, and as the first epochs see it")
    return 0


def browse(
    stored: "CocoDetection", augmented: "CocoDetection", path: Path, *, images: int = 6, epochs: int = 3
) -> None:
    """Write a picture of images as stored, and beside them as the first epochs of a training see them.

    Args:
        stored: a split without a transform.
        augmented: the split with the training's transform.
        path: the picture to write.
        images: number of images, spread over the split. Images with objects come first.
        epochs: number of epochs.
    """
    import numpy as np

    from detector.data.drawing import sheet

    order = np.argsort(stored.counts() == 0, kind="stable").tolist()
    rows = []
    for index in order[:: max(len(order) // images, 1)][:images]:
        items = [stored[index], *(augmented[epoch, index] for epoch in range(epochs))]
        rows.append([_picture(image, target, stored) for image, target in items])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, ["as stored", *(f"epoch {epoch}" for epoch in range(epochs))]).save(path)


def _picture(image: "Tensor", target: "Target", split: "CocoDetection") -> "Image.Image":
    import torch
    from PIL import ImageDraw

    from detector.data.drawing import draw

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
