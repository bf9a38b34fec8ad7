"""The Lightning command line of the tools that train, and of ``tools/browse.py``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from detector.data.folder import find_root
from detector.errors import UserError, one_line
from detector.tools.cli import FlagNames, named_flags, read_yaml, underscored, usage_error
from detector.training.data import CocoDataModule
from detector.training.run import Run
from detector.training.task import DetectionTask


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's formatter, without wrapping the description."""


class SavedConfig(SaveConfigCallback):
    """Writes all settings beside the checkpoints. ``--config`` starts the same run again from the beginning."""

    def __init__(self, parser: LightningArgumentParser, config: Any, *arguments: Any, **options: Any) -> None:
        config = config.clone()
        config.ckpt_path = None
        super().__init__(parser, config, *arguments, **options)


class TrainingCLI(LightningCLI):
    """Builds a task, the data and a trainer from configuration files and flags."""

    run: Run

    def __init__(self, *arguments: Any, flags: FlagNames, **options: Any) -> None:
        self.flags = flags
        super().__init__(*arguments, **options)

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        self.flags.parser = parser = super().init_parser(**options)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            raise usage_error(error) from None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/detector",
            help="Folder for checkpoints, logs and scores. If it holds a run, a number is added: runs/detector-2.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="last: resume from the last checkpoint of the last run in run_dir. FILE: resume from that checkpoint, "
            "in its own run folder if it is a last.ckpt, otherwise in a new one.",
        )
        parser.add_argument(
            "--save_every",
            type=int,
            default=500,
            help="Steps between checkpoints. One is also written before and after each scoring.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(CocoDataModule, "data")  # Lightning's own order has the trainer first
        parser.add_lightning_class_args(DetectionTask, "model")
        parser.add_lightning_class_args(lightning.Trainer, "trainer")

    def before_instantiate_classes(self) -> None:
        data = self.config.data
        # Absolute, so that the saved settings work from any folder.
        data.root = str(find_root(data.root, data.dataset).absolute())
        detector = self.config.model.detector
        if detector.weights is not None and Path(detector.weights).exists():
            detector.weights = str(Path(detector.weights).absolute())
        self.run = Run(self.config.run_dir, self.config.ckpt_path, save_every=self.config.save_every)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ImportError, TypeError, ValueError) as error:  # a logger that is not installed, no such device, ...
            cause: BaseException = error
            while cause.__cause__ is not None:  # jsonargparse's own message is a page long
                cause = cause.__cause__
            raise UserError(f"a setting cannot be used: {one_line(cause)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        return super().instantiate_trainer(**self.run.trainer_options(dict(self.config_init["trainer"]) | kwargs))

    def train(self) -> None:
        """Train, then score the val split."""
        try:
            self.run.train(self.trainer, self.model, self.datamodule)
        except MisconfigurationException as error:
            raise UserError(one_line(error)) from error


class BrowsingCLI(TrainingCLI):
    """The command line of ``tools/browse.py``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str, default="browse.png", help="The picture to write.")
        parser.add_argument("--count", type=int, default=6, help="Number of images, spread over the split.")
        parser.add_argument("--epochs", type=int, default=3, help="Number of epochs to show each image in.")

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        return lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def parse(
    arguments: Sequence[str] | None,
    description: str = "",
    kind: type[TrainingCLI] = TrainingCLI,
    *,
    flags: FlagNames | None = None,
) -> TrainingCLI:
    """Return the task, the data and the trainer of a command line.

    Args:
        arguments: the command line; default: this process's.
        description: the first lines of ``--help``.
        kind: the class of the command line.
        flags: gets the parser, for the messages of later errors.
    """
    given = underscored(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        sys.argv[1:] = given  # Lightning starts other processes with it
    for name, value in named_flags(given):
        if name == "config" and Path(value).is_file():
            read_yaml(value)  # its messages are shorter than jsonargparse's
    return kind(
        DetectionTask,
        CocoDataModule,
        flags=flags or FlagNames(),
        run=False,
        args=None if arguments is None else given,
        seed_everything_default=0,
        save_config_callback=SavedConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "description": description,
            "usage": "%(prog)s --config FILE [--NAME VALUE ...]",
            "formatter_class": HelpFormatter,
            "exit_on_error": False,
        },
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
    )
