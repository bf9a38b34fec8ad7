"""The command line of ``tools/train.py``: LightningCLI with a run folder that never overwrites a result."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.coco import CocoDetection, DataError
from detector.models import ModelError, load_torchvision_detector
from detector.swap import restore_roi_align, swap_crop_head
from detector.training.data import CocoDataModule, find_root
from detector.training.scoring import score_split
from detector.training.task import DetectionTask, TrainedDetector, TrainingError, load_checkpoint

LAST = "last"


class TrainingCLI(LightningCLI):
    """Adds the run folder, the checkpoints and the logger, which follow from one another."""

    run_dir: Path

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
            help=f"Go on from this checkpoint, in its own run folder; {LAST!r}: from the last one in run_dir.",
        )

    def before_instantiate_classes(self) -> None:
        config = self.config
        if config.ckpt_path is None:
            self.run_dir = unused_folder(Path(config.run_dir))
        else:
            if config.ckpt_path == LAST:
                config.ckpt_path = str(Path(config.run_dir) / "checkpoints" / "last.ckpt")
            path = Path(config.ckpt_path)
            if not path.is_file():
                raise ModelError(f"--ckpt_path {path}: no such file")
            self.run_dir = run_folder(path)
        config.run_dir = str(self.run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        given = self.config_init["trainer"]
        kwargs.setdefault("default_root_dir", str(self.run_dir))
        if given.get("logger") is None:
            kwargs["logger"] = TensorBoardLogger(str(self.run_dir), name="", version="")
        folder = self.run_dir / "checkpoints"
        callbacks: list[Callback] = [
            ModelCheckpoint(folder, "best", monitor="val/AP", mode="max", enable_version_counter=False),
            ModelCheckpoint(folder, LAST, enable_version_counter=False),
            LearningRateMonitor("step"),
        ]
        if given.get("enable_progress_bar") is not False:  # by default it would depend on whether rich is installed
            callbacks.append(TQDMProgressBar())
        kwargs["callbacks"] = [*(given.get("callbacks") or []), *callbacks]
        return super().instantiate_trainer(**kwargs)


def train(args: list[str] | None = None) -> None:
    """Train as the command line says, then score the val split. Mistakes of the user end in one sentence."""
    # From inside Lightning, about torch; nothing that a user could act on.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    try:
        cli = TrainingCLI(
            DetectionTask,
            CocoDataModule,
            run=False,
            args=args,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"num_sanity_val_steps": 0, "use_distributed_sampler": False},
            parser_kwargs={"description": "Train an affine-crop R-CNN; see configs/ for complete settings."},
            load_from_checkpoint_support=False,
            auto_configure_optimizers=False,
        )
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C
            last = cli.run_dir / "checkpoints" / f"{LAST}.ckpt"
            if last.exists():
                print(f"Stopped. To go on from the last whole epoch, add to the same command: --ckpt_path {last}")
            raise
        if cli.trainer.is_global_zero:
            finish(cli)
    except (DataError, ModelError, TrainingError, OSError) as error:
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def finish(cli: TrainingCLI) -> None:
    """Score the val split with the weights as they are, draw examples, and say where everything lies."""
    task, data = cli.model, cli.datamodule
    device = cli.trainer.strategy.root_device
    folder = cli.run_dir
    with cli.trainer.precision_plugin.forward_context():
        scores = score_split(
            task.model.to(device),
            data.val_set,
            folder,
            device=device,
            batch_size=data.batch_size,
            workers=data.workers,
        )
    print(f"\nThe run is in {folder}/")
    for name, what in {
        "checkpoints/last.ckpt": "the weights that were scored",
        "checkpoints/best.ckpt": "those of the epoch with the highest val AP",
        "scores.json": f"the scores, AP {scores['AP']:.3f}",
        "detections.json": "detections in COCO's results format",
        "examples.png": "val images: the truth on the left, detections on the right",
        "config.yaml": "all settings",
    }.items():
        if (folder / name).exists():
            print(f"  {name:22} {what}")
    print(f"  tensorboard --logdir {folder}")


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
    batch_size: int = 2,
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
        batch_size: images at a time.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ... Default: cuda if there is one.
    """
    try:
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
    except (DataError, ModelError, OSError) as error:
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def sentence(error: Exception) -> str:
    """What an error says. From a data loader's worker it comes with a traceback before it."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        text = text.splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return " ".join(text.split())


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


def run_folder(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def unused_folder(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, ... that holds nothing yet."""
    candidate, number = folder, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
