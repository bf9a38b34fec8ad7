"""Draw training images as the model sees them. Takes all flags of tools/train.py.

Examples:
    python tools/browse.py --config configs/bccd.yaml --data.root FOLDER --output sheet.png
    python tools/browse.py --config configs/bccd.yaml --data.augmentation+ RandomPhotometricDistort
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from detector.errors import UsageError, exit_on_user_error
from detector.tools.cli import flag_names, given_arguments

if TYPE_CHECKING:
    from detector.data.dataset import CocoDetection

MAX_SIDE = 480  # pixels of a picture on the sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tools/browse.py`` and return its exit code."""
    with exit_on_user_error():
        given = given_arguments(arguments, __doc__)
        from detector.tools.training_cli import instantiated, read_settings, training_parser

        parser = training_parser(__doc__)
        parser.add_argument("--output", type=str, default="browse.png", help="The picture to write.")
        parser.add_argument("--count", type=PositiveInt, default=6, help="Number of images, spread over the split.")
        parser.add_argument("--epochs", type=PositiveInt, default=3, help="Number of epochs to show each image in.")
        with exit_on_user_error(flag_names(parser)):
            config = read_settings(parser, given)
            if Path(config.output).suffix.lower() not in (".png", ".jpg", ".jpeg"):
                raise UsageError("must end in .png or .jpg", setting="output", value=config.output)
            made = instantiated(lambda: parser.instantiate(config))
            data, types = made.data, made.model.annotation_types
            data.prepare_data()
            stored = data.split(data.train_split, annotation_types=types)
            augmented = data.split(data.train_split, train=True, annotation_types=types)
            browse(stored, augmented, Path(config.output), images=config.count, epochs=config.epochs)
            print(f"{config.output}: {data.train_split} of {data.root} as stored, and as the first epochs see it")
    return 0


def browse(
    stored: "CocoDetection", augmented: "CocoDetection", path: Path, *, images: int = 6, epochs: int = 3
) -> None:
    """Write a picture with a row per image: as stored, and as augmented in the first epochs.

    Args:
        stored: a split without a transform. Its images are sampled evenly, those with objects first.
        augmented: the same split with the training's transform.
        path: the picture to write.
        images: number of images.
        epochs: number of epochs.
    """
    from detector.data.drawing import draw, sheet

    counts, rows = stored.counts(), []
    order = sorted(range(len(stored)), key=lambda index: counts[index] == 0)
    for index in order[:: max(len(order) // images, 1)][:images]:
        row = []
        for image, target in [stored[index], *(augmented[epoch, index] for epoch in range(epochs))]:
            names, size = stored.category_names, f"{image.shape[2]} x {image.shape[1]}"
            row.append(draw(image, target, names, layout=stored.keypoints, max_side=MAX_SIDE, caption=size))
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, ["as stored", *(f"epoch {epoch}" for epoch in range(epochs))]).save(path)
