"""What ``tools/browse.py`` does: draw a sheet of training images as the model sees them."""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image, ImageDraw
from torch import Tensor

from detector.data.dataset import CocoDetection, Target
from detector.data.drawing import draw, sheet
from detector.errors import exit_on_user_error
from detector.tools.training_cli import TrainingCLI, parse

LARGEST = 480  # pixels of a picture's longer side on the sheet


class BrowsingCLI(TrainingCLI):
    """The command line of a training, to look at its data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str, default="browse.png", help="The picture to write.")
        parser.add_argument("--count", type=int, default=6, help="How many images, spread over the split.")
        parser.add_argument("--epochs", type=int, default=3, help="How many draws of each: those of the first epochs.")

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        return lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def browse_training_images(args: list[str] | None = None, description: str = "") -> int:
    """Draw a sheet of training images, as the command line of a training would augment them. Returns the exit code."""
    with exit_on_user_error(MisconfigurationException):
        cli = parse(args, description, BrowsingCLI)
        data, config = cli.datamodule, cli.config
        data.prepare_data()
        parts = cli.model.annotation_types
        stored = data.split(data.train_split, annotation_types=parts)
        augmented = data.split(data.train_split, train=True, annotation_types=parts)
        browse(stored, augmented, Path(config.output), images=config.count, epochs=config.epochs)
        print(f"{config.output}: {data.train_split} of {data.root} as stored, and as the first epochs see it")
    return 0


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
