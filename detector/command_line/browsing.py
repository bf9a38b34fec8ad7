"""What ``tools/browse.py`` does."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from detector.command_line.training import TrainingCLI, parse
from detector.data.browsing import browse
from detector.errors import in_a_sentence


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
    with in_a_sentence(MisconfigurationException):
        cli = parse(args, description, BrowsingCLI)
        data, config = cli.datamodule, cli.config
        data.prepare_data()
        parts = cli.model.parts
        stored = data.split(data.train_split, parts=parts)
        augmented = data.split(data.train_split, train=True, parts=parts)
        browse(stored, augmented, Path(config.output), images=config.count, epochs=config.epochs)
        print(f"{config.output}: {data.train_split} of {data.root} as stored, and as the first epochs see it")
    return 0
