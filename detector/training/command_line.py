"""The command lines of ``tools/train.py``, ``tools/browse.py`` and ``tools/eval.py``."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.coco import CocoDetection, DataError
from detector.models import ModelError, load_torchvision_detector
from detector.swap import restore_roi_align, swap_crop_head
from detector.training.browsing import browse
from detector.training.checkpoints import TrainedDetector, load_checkpoint
from detector.training.data import CocoDataModule, find_root
from detector.training.failures import Interrupted, TrainingError, sentence
from detector.training.run import Run, run_folder, unused_folder
from detector.training.scoring import score_split
from detector.training.task import DetectionTask

# Their words are meant for the user.
OURS = (DataError, ModelError, TrainingError, OSError, MisconfigurationException)


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

    def before_instantiate_classes(self) -> None:
        data = self.config.data
        # Absolute, so that the saved settings stand for the same data wherever they are read.
        data.root = str(find_root(data.root, data.dataset).absolute())
        self.run = Run(self.config.run_dir, self.config.ckpt_path, save_every=self.config.save_every)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        return super().instantiate_trainer(**self.run.trainer_options(dict(self.config_init["trainer"]) | kwargs))


def parse(args: list[str] | None, description: str, kind: type[TrainingCLI] = TrainingCLI) -> TrainingCLI:
    """A run's task, data and trainer, as the command line says."""
    return kind(
        DetectionTask,
        CocoDataModule,
        run=False,
        args=args,
        seed_everything_default=0,
        save_config_callback=SavedConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"description": description},
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,
    )


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """A mistake of the user ends the program in one sentence, Ctrl-C in a word."""
    try:
        yield
    except OURS as error:
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def train(args: list[str] | None = None) -> None:
    """Train as the command line says, then score the val split."""
    with in_a_sentence():
        cli = parse(args, "Train an affine-crop R-CNN; see configs/ for complete settings.")
        try:
            cli.run.train(cli.trainer, cli.model, cli.datamodule)
        except Interrupted as stop:
            rank_zero_only(print)(f"Stopped. {resuming_command(args, str(stop))}", file=sys.stderr)
            sys.exit(130)


class BrowsingCLI(TrainingCLI):
    """The command line of a training, to look at its data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str, default="browse.png", help="The picture to write.")
        parser.add_argument("--count", type=int, default=6, help="How many images, spread over the split.")
        parser.add_argument("--epochs", type=int, default=3, help="How many draws of each: those of the first epochs.")

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        return lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def browse_training_images(args: list[str] | None = None) -> None:
    """Draw a sheet of training images, as the command line of a training would augment them."""
    with in_a_sentence():
        description = "Draw training images as the model sees them; takes all flags of tools/train.py."
        cli = parse(args, description, BrowsingCLI)
        data, config = cli.datamodule, cli.config
        data.prepare_data()
        stored, augmented = data.split(data.train_split), data.split(data.train_split, train=True)
        browse(stored, augmented, Path(config.output), images=config.count, epochs=config.epochs)
        print(f"{config.output}: {data.train_split} of {data.root} as stored, and as the first epochs see it")


def resuming_command(args: list[str] | None, flag: str) -> str:
    """How to go on: the same command with another ``--ckpt_path``."""
    if not flag:
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


def score(
    checkpoint: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Literal["affine", "roi_align"] | None = None,
    root: str | None = None,
    dataset: str | None = None,
    split: str = "val2017",
    annotations: str = "annotations/instances_{split}.json",
    images: str = "{split}",
    output: str | None = None,
    batch_size: int = 1,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Score a detector with COCO's metric; write scores.json, detections.json and examples.png.

    Args:
        checkpoint: a checkpoint of tools/train.py.
        model: or the name of a torchvision R-CNN, such as fasterrcnn_resnet50_fpn,
        weights: with its weights: a state_dict file, or a name that torchvision publishes (DEFAULT).
        crop: "affine" scores it swapped, "roi_align" stock. Default: as the checkpoint was trained; stock.
        root: the data set's folder. Default: the folder DATASET in the folder that DETECTOR_DATA names.
        dataset: the data set's name, a folder of DETECTOR_DATA; used where root is not given.
        split: the split to score on.
        annotations: annotation file of a split, relative to root; {split} stands for the split.
        images: image folder of a split, relative to root.
        output: the folder to write to. Default: eval-SPLIT in the checkpoint's run folder; runs/eval-MODEL-SPLIT.
        batch_size: images at a time; with more than 1 they are padded to one size, which changes scores a little.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ... Default: cuda if there is one.
    """
    with in_a_sentence():
        folder = find_root(root, dataset)
        data = CocoDetection(folder / images.format(split=split), folder / annotations.format(split=split))
        category_ids: Sequence[int | None]
        if (checkpoint is None) == (model is None):
            raise ModelError("give either --checkpoint FILE, or --model NAME --weights FILE")
        if checkpoint is not None:
            trained = load_checkpoint(checkpoint)
            network: GeneralizedRCNN = trained.model
            category_ids = match_categories(trained, data)
            default_output = run_folder(Path(checkpoint)) / f"eval-{split}"
        else:
            if weights is None:
                raise ModelError("--model needs --weights: a state_dict file, or DEFAULT for the published ones")
            assert model is not None
            network = load_torchvision_detector(model, weights)
            category_ids = published_categories(network, data)
            default_output = Path("runs") / f"eval-{model}-{split}"
        if crop is not None:
            (swap_crop_head if crop == "affine" else restore_roi_align)(network)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        target = Path(output) if output is not None else unused_folder(default_output)
        score_split(
            network.to(place),
            data,
            target,
            category_ids=category_ids,
            device=place,
            batch_size=batch_size,
            workers=workers,
        )
        print(f"\nscores.json, detections.json and examples.png are in {target}/")


def match_categories(trained: TrainedDetector, data: CocoDetection) -> Sequence[int]:
    """The category ids of a checkpoint's labels. Raises :class:`ModelError` if the data's are others."""
    known = dict(zip(data.category_ids, data.category_names))
    for category_id, name in zip(trained.category_ids, trained.category_names):
        if known.get(category_id) != name:
            raise ModelError(
                f"the checkpoint was trained on category {category_id} {name!r}, which is "
                f"{known.get(category_id, 'missing')!r} in the data: not the same set of classes"
            )
    return trained.category_ids


def published_categories(model: GeneralizedRCNN, data: CocoDetection) -> Sequence[int | None]:
    """The category ids of a torchvision detector's labels: as many as the data has, or COCO's own ids."""
    labels = model.roi_heads.box_predictor.cls_score.out_features - 1
    if labels == len(data.category_ids):
        return data.category_ids
    if labels == 90:  # torchvision's published weights keep COCO's ids, of which 10 stand for nothing
        names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        known = dict(zip(data.category_ids, data.category_names))
        same = [category if known.get(category) == names[category] else None for category in range(1, 91)]
        if any(category is not None for category in same):
            return same
        raise ModelError(
            "the weights have COCO's 90 category ids, and the data has no category of the same id and name"
        )
    raise ModelError(f"the weights have {labels} classes, the data has {len(data.category_ids)}")
