"""Train a detector with the affine crop, and score it. configs/ has complete settings.

Examples:
    python tools/train.py --config configs/quickstart.yaml --trainer.max_epochs 2
    python tools/train.py --config configs/coco_r50_fpn_1x.yaml --data.root FOLDER --data.batch_size 4

Exit codes:
    0: done.
    1: wrong input.
    2: wrong command line.
    130: interrupted. --ckpt_path last resumes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from detector.errors import UserError, exit_on_user_error, one_line
from detector.tools.cli import flag_names, given_arguments, new_parser, parse_arguments

if TYPE_CHECKING:
    from lightning import Trainer

    from detector.training.data import CocoDataModule
    from detector.training.run import Run
    from detector.training.task import DetectionTask

T = TypeVar("T")


@dataclass
class Training:
    """The task, the data and the trainer of a command line."""

    config: Namespace
    datamodule: "CocoDataModule"
    model: "DetectionTask"
    trainer: "Trainer"
    run: "Run"

    def train(self) -> None:
        """Train, then score the val split."""
        self.run.train(self.trainer, self.model, self.datamodule)


def training_parser(description: str | None = None) -> ArgumentParser:
    """Return the parser of a training's settings."""
    from lightning import Trainer

    from detector.training.data import CocoDataModule
    from detector.training.run import train
    from detector.training.task import DetectionTask

    parser = new_parser(description, mode="yaml")
    parser.usage = "%(prog)s --config FILE [--NAME VALUE ...]"
    parser.add_argument("--seed_everything", type=NonNegativeInt, default=0, help="Seed of all random numbers.")
    parser.add_class_arguments(CocoDataModule, "data", sub_configs=True)
    parser.add_class_arguments(DetectionTask, "model", sub_configs=True)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, sub_configs=True, fail_untyped=False)
    parser.add_function_arguments(train, as_group=False, skip={"task", "data", "trainer_options"})
    return parser


def read_settings(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Return the settings of a training's command line, and seed the random numbers.

    Paths become absolute, so that the settings work from any folder.
    """
    from lightning import seed_everything

    from detector.data.folder import find_root

    config = parse_arguments(parser, arguments)
    seed_everything(config.seed_everything, workers=True)  # the data module reads the seed
    config.data.root = str(find_root(config.data.root, config.data.dataset).absolute())
    weights = config.model.detector.weights
    if weights is not None and Path(weights).exists():
        config.model.detector.weights = str(Path(weights).absolute())
    return config


def instantiated(make: Callable[[], T]) -> T:
    """Build objects from settings, and turn errors, such as a logger that is not installed, into user errors."""
    try:
        return make()
    except UserError:
        raise
    except (ImportError, TypeError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # jsonargparse's own message is a page long
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"a setting cannot be used: {one_line(cause)}") from error


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Training:
    """Return the task, the data and the trainer of a command line."""
    from lightning import Trainer
    from lightning.pytorch.cli import SaveConfigCallback

    from detector.training.run import Run

    config = read_settings(parser, arguments)
    run = Run(config.run_dir, config.ckpt_path, save_every=config.save_every)
    made = instantiated(lambda: parser.instantiate(config))
    options = run.trainer_options(dict(made.trainer))
    if not options["fast_dev_run"]:
        saved = config.clone()
        saved.ckpt_path = None  # --config starts the same run again from the beginning
        options["callbacks"].append(SaveConfigCallback(parser, saved, overwrite=True))  # type: ignore[arg-type]
    return Training(config, made.data, made.model, instantiated(lambda: Trainer(**options)), run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tools/train.py`` and return its exit code."""
    with exit_on_user_error():
        given = given_arguments(arguments, __doc__)  # before Lightning is imported, which takes seconds
        parser = training_parser(__doc__)
        with exit_on_user_error(flag_names(parser)):
            parse(parser, given).train()
    return 0
