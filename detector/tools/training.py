"""What ``tools/train.py`` does."""

import argparse
import os
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from detector.data.folder import find_root
from detector.errors import UserError, exit_on_user_error, one_line
from detector.tools.arguments import read_yaml, underscored
from detector.training.data import CocoDataModule
from detector.training.failures import Interrupted
from detector.training.run import Run
from detector.training.task import DetectionTask


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's, with the lines of the description as they are."""


class SavedConfig(SaveConfigCallback):
    """All settings, beside the checkpoints: with ``--config`` they start the same run again, from the beginning."""

    def __init__(self, parser: LightningArgumentParser, config: Any, *arguments: Any, **options: Any) -> None:
        config = config.clone()
        config.ckpt_path = None
        super().__init__(parser, config, *arguments, **options)


class TrainingCLI(LightningCLI):
    """Task, data and trainer by configuration file and flags, in a run folder of their own."""

    run: Run

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/detector",
            help="Folder for checkpoints, logs and scores. A new run beside an old one gets a number: runs/detector-2.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="last: go on, exactly, from the last checkpoint of the last run in run_dir (or its numbered "
            "siblings); FILE: from that one, in its own run folder if it is a last.ckpt, in a new one if not.",
        )
        parser.add_argument(
            "--save_every",
            type=int,
            default=500,
            help="Steps between two checkpoints; one is also written before and after each scoring.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(CocoDataModule, "data")  # Lightning's own order has the trainer first
        parser.add_lightning_class_args(DetectionTask, "model")
        parser.add_lightning_class_args(lightning.Trainer, "trainer")

    def before_instantiate_classes(self) -> None:
        data = self.config.data
        # Absolute, so that the saved settings stand for the same data wherever they are read.
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
            while cause.__cause__ is not None:  # jsonargparse's own words, around it, are a page
                cause = cause.__cause__
            raise MisconfigurationException(f"a setting cannot be used: {one_line(cause)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        return super().instantiate_trainer(**self.run.trainer_options(dict(self.config_init["trainer"]) | kwargs))


def parse(args: list[str] | None, description: str, kind: type[TrainingCLI] = TrainingCLI) -> TrainingCLI:
    """A run's task, data and trainer, as the command line says."""
    if args is None:
        sys.argv[1:] = underscored(sys.argv[1:])  # which Lightning starts other processes with
    else:
        args = underscored(args)
    given = sys.argv[1:] if args is None else args
    files = [value for flag, value in pairwise(given) if flag == "--config"]
    files += [argument.removeprefix("--config=") for argument in given if argument.startswith("--config=")]
    for file in files:
        if Path(file).is_file():
            read_yaml(file)  # which says in a sentence what is wrong with it; jsonargparse does not always
    return kind(
        DetectionTask,
        CocoDataModule,
        run=False,
        args=args,
        seed_everything_default=0,
        save_config_callback=SavedConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "description": description,
            "usage": "%(prog)s --config FILE [--NAME VALUE ...]",
            "formatter_class": HelpFormatter,
        },
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
    )


def train(args: list[str] | None = None, description: str = "") -> int:
    """Train as the command line says, then score the val split. Returns the exit code."""
    with exit_on_user_error(MisconfigurationException):
        cli = parse(args, description)
        try:
            cli.run.train(cli.trainer, cli.model, cli.datamodule)
        except Interrupted as stop:
            rank_zero_only(print)(f"Stopped. {resuming_command(args, stop.checkpoint)}", file=sys.stderr)
            sys.exit(130)
    return 0


def resuming_command(args: list[str] | None, checkpoint: Path | None) -> str:
    """How to go on: the same command with another ``--ckpt_path``."""
    flag = f"--ckpt_path {checkpoint}"
    if checkpoint is None:
        return "There is no checkpoint yet: the same command starts again."
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"To go on: the same command with {flag}"
    given = list(sys.argv[1:] if args is None else args)
    for position, argument in reversed(list(enumerate(given))):
        if argument.startswith("--ckpt_path="):
            del given[position]
        elif argument == "--ckpt_path":
            del given[position : position + 2]
    return f"To go on:\n  {shlex.join(['python', sys.argv[0], *given])} {flag}"
