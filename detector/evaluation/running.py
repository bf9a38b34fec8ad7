"""Running a detector over a split, in one process or in those that torchrun started (ranks)."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm

from detector.choices import Evaluator
from detector.data.annotations import Annotations
from detector.data.batches import scoring_batches
from detector.data.dataset import CocoDetection, Target, as_float
from detector.data.loading import make_loader
from detector.data.results import Result, to_results
from detector.errors import DataError, one_line
from detector.evaluation.losses import detect_with_losses, run_rcnn
from detector.evaluation.proposals import COUNTS, covering_proposals
from detector.models.rle_detections import detect
from detector.overriding import eval_mode
from detector.rcnn.sampling import seed_sampling
from detector.seeds import seed_of


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation.

    Args:
        limit: maximum number of images, the first ones of the split.
        min_score: minimum score of the detections in the confusion matrix and the pictures.
        evaluator: see :func:`~detector.evaluation.evaluate`.
        skip_broken: leave out images that cannot be read. Otherwise the first one ends the run.
        speed: number of images on which the stages are timed.
        batch_size: images per batch.
        workers: processes that read images.
        device: where the detector runs.
        compare_refinement: also score the detector without its refinement.
    """

    limit: int | None = None
    min_score: float = 0.5
    evaluator: Evaluator = "pycocotools"
    skip_broken: bool = False
    speed: int = 0
    batch_size: int = 1
    workers: int = 2
    device: torch.device | str = "cpu"
    compare_refinement: bool = False


DEFAULT_OPTIONS = EvaluationOptions()


@dataclass
class Predictions:
    """The output of a detector on a split, or on a part of it."""

    image_ids: list[int] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)  # the detections, in COCO's results format
    losses: Counter[str] = field(default_factory=Counter)  # by torchvision's names, summed over the images
    proposals: list[Result] = field(default_factory=list)  # see covering_proposals
    kept_proposals: int = 0  # number of proposals per image that the heads get; 0 if they were not recorded
    unrefined: list[Result] | None = None  # the detections without the refinement, if they are to be compared
    broken: dict[int, str] = field(default_factory=dict)  # why an image cannot be read, by its id
    stopped: KeyboardInterrupt | DataError | None = None  # why the run ended early

    def add(self, other: "Predictions") -> None:
        """Add the predictions on other images."""
        self.image_ids += other.image_ids  # first, so that after Ctrl-C every result has its image
        self.results += other.results
        self.losses.update(other.losses)
        self.broken |= other.broken
        self.proposals += other.proposals
        self.kept_proposals = self.kept_proposals or other.kept_proposals

    def mean_losses(self) -> dict[str, float] | None:
        """Return the mean losses per image, their sum first, as "loss"; ``None`` if there are none."""
        if not self.losses or not self.image_ids:
            return None
        means = {name: total / len(self.image_ids) for name, total in self.losses.items()}
        return {"loss": sum(means.values())} | means


def run_detector(
    model: Any,
    split: CocoDetection,
    category_ids: Sequence[int | None],
    options: EvaluationOptions = DEFAULT_OPTIONS,
    *,
    labels: Tensor | None = None,
    proposals: bool = False,
    partial: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Predictions:
    """Run a detector in eval mode over a split, with a progress bar.

    Args:
        model: a torchvision detector on ``options.device``, in any mode. The mode does not change.
        split: the data, without a transform.
        category_ids: the category id of each label of the model, from label 1 on.
        options: uses ``limit``, ``skip_broken``, ``batch_size``, ``workers`` and ``device``.
        labels: [n + 1], the model's label of each label of the split, from 0 on; needed for losses.
        proposals: record the proposals of an R-CNN.
        partial: after Ctrl-C or an unreadable image, return the predictions so far instead of raising.
        share: the rank of this process, and the number of processes that share the split. Batches are those of a
            single process.

    Raises:
        DataError: an image cannot be read.
    """
    rank, ranks = share
    total = len(split) if options.limit is None else min(options.limit, len(split))
    # Masks and keypoints are read for losses only.
    split = (split.boxes_alone() if labels is None else split.with_layers()).as_bytes()
    batches = scoring_batches(total, options.batch_size, ranks=ranks, rank=rank)
    loader = make_loader(_Readable(split) if options.skip_broken else split, batches, workers=options.workers)
    truth, found = split.annotations if proposals else None, Predictions()
    bar = tqdm(total=total, desc="scoring", unit="image", leave=False, disable=rank > 0 or None)
    try:
        with bar, eval_mode(model), torch.inference_mode():
            for images, targets in loader:
                how: Any = {"device": options.device, "labels": labels, "proposals_of": truth}
                one = predict(model, images, targets, category_ids, **how)
                found.add(one)
                bar.update((len(one.image_ids) + len(one.broken)) * ranks)
    except (KeyboardInterrupt, DataError) as stop:
        if not partial or not found.image_ids:
            raise
        found.stopped = stop
    finally:
        if labels is not None and isinstance(model, GeneralizedRCNN):
            seed_sampling(model, None)
    return found


def predict(
    model: Any,
    images: Sequence[Tensor | None],
    targets: Sequence[Target],
    category_ids: Sequence[int | None],
    *,
    device: torch.device | str = "cpu",
    labels: Tensor | None = None,
    proposals_of: Annotations | None = None,
) -> Predictions:
    """Run a detector in eval mode on a batch.

    Args:
        model, category_ids, device, labels: see :func:`run_detector`.
        images: [3, H, W], float in 0..1 or uint8; ``None`` for an image that cannot be read.
        targets: ``image_id``, and all fields for losses; or ``broken``, the reason why the image cannot be read.
        proposals_of: the ground truth; needed to record the proposals of an R-CNN.
    """
    found = Predictions(broken={int(one["image_id"]): one["broken"] for one in targets if "broken" in one})
    targets = [target for target in targets if "broken" not in target]
    readable = [as_float(image.to(device)) for image in images if image is not None]
    if not readable:
        return found
    found.image_ids = [int(target["image_id"]) for target in targets]
    if labels is not None:
        targets = [target | {"labels": labels[target["labels"]]} for target in targets]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    losses: dict[str, Tensor] = {}
    if isinstance(model, GeneralizedRCNN):
        if labels is not None:  # the same losses in every run, for any number of processes
            seed_sampling(model, [seed_of(0, 0, image_id) for image_id in found.image_ids])
        given, recorded = (None if labels is None else targets), (0 if proposals_of is None else max(COUNTS))
        detections, losses, proposals = run_rcnn(model, readable, given, min_proposals=recorded)
        if proposals_of is not None:
            pairs = zip(found.image_ids, proposals, strict=True)
            found.proposals = [one for pair in pairs for one in covering_proposals(proposals_of, *pair)]
            found.kept_proposals = model.rpn.post_nms_top_n()
    elif labels is not None:
        detections, losses = detect_with_losses(model, readable, targets)
    else:
        detections = detect(model, readable)
    found.results = to_results(detections, found.image_ids, category_ids)
    found.losses.update({name: loss.item() * len(readable) for name, loss in losses.items()})
    return found


class _Readable(Dataset[Any]):
    """A split that returns ``None`` for an image that cannot be read, with the reason in the target."""

    def __init__(self, split: CocoDetection) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Target]:
        try:
            return self.split[index]
        except DataError as error:
            return None, {"image_id": self.split.image_ids[index], "broken": one_line(error)}


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the processes. Yields this process's rank and the number of ranks: (0, 1) without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1
        return
    distributed.init_process_group("gloo")  # lists are gathered, which are on no device
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def gathered(part: Predictions) -> Predictions | None:
    """Return the predictions of all ranks, in the order of a single process, on rank 0; ``None`` on the others."""
    if not distributed.is_initialized():
        return part
    parts = [part] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(part, parts)
    if parts is None:
        return None
    whole, *others = parts
    for other in others:
        whole.add(other)
    whole.results.sort(key=lambda result: result["image_id"])
    return whole
