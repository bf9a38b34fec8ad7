"""Running a detector over a split: detections, losses and proposals."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm

from detector.data.annotations import Annotations
from detector.data.batches import ScoringBatches
from detector.data.dataset import CocoDetection, Target, as_float
from detector.data.loading import collate, make_loader
from detector.data.results import Result, to_results
from detector.errors import DataError, one_line
from detector.evaluation.losses import detect_with_losses, run_rcnn
from detector.evaluation.metric import Evaluator
from detector.evaluation.proposals import COUNTS, CoveringProposal, covering_proposals
from detector.models.rle_detections import detect
from detector.overriding import eval_mode
from detector.rcnn.sampling import seed_sampling
from detector.seeds import seed_of


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How a detector is evaluated.

    Args:
        limit: maximum number of images, the first ones of the split.
        min_score: minimum score of the detections in the confusion matrix and the pictures.
        evaluator: see :func:`~detector.evaluation.evaluate`.
        skip_broken: leave out images that cannot be read. Without it the first one ends the run.
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
    """The output of a detector on a split, or on a part of it.

    Args:
        image_ids: the images that it ran on.
        results: the detections, in COCO's results format.
        losses: the losses by torchvision's names, summed over the images; empty if they were not computed.
        proposals: the proposals that cover an object; ``None`` if they were not recorded.
        kept_proposals: number of proposals per image that the heads get.
        unrefined: the detections in the same images without the refinement, if they are to be compared.
        broken: why an image cannot be read, by the id of the image.
        stopped: why the run ended early: Ctrl-C, or an image that cannot be read.
    """

    image_ids: list[int] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    losses: Counter[str] = field(default_factory=Counter)
    proposals: list[CoveringProposal] | None = None
    kept_proposals: int = 0
    unrefined: list[Result] | None = None
    broken: dict[int, str] = field(default_factory=dict)
    stopped: KeyboardInterrupt | DataError | None = None

    def add(self, other: "Predictions") -> None:
        """Add the predictions on other images."""
        self.image_ids += other.image_ids  # first: after Ctrl-C no result may lack its image
        self.results += other.results
        self.losses.update(other.losses)
        self.broken |= other.broken
        if other.proposals is not None:
            self.proposals = [*(self.proposals or []), *other.proposals]
            self.kept_proposals = other.kept_proposals

    def mean_losses(self) -> dict[str, float] | None:
        """Return the mean losses per image, their sum first, as "loss"; ``None`` if there are none."""
        if not self.losses or not self.image_ids:
            return None
        means = {name: total / len(self.image_ids) for name, total in self.losses.items()}
        return {"loss": sum(means.values())} | means


@torch.inference_mode()
def predict(
    model: Any,
    batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]],
    category_ids: Sequence[int | None],
    *,
    device: torch.device | str = "cpu",
    labels: Tensor | None = None,
    proposals_of: Annotations | None = None,
) -> Generator[Predictions]:
    """Run a detector in eval mode over batches of images, and yield the predictions on each batch.

    Args:
        model: a torchvision detector.
        batches: images [3, H, W], float in 0..1 or uint8, and targets, of which ``image_id`` is used, and all for
            losses.
        category_ids: the category id of each label of the model, from label 1 on.
        device: where the model is.
        labels: [n + 1], the model's label of each label of the targets, from 0 on; needed for losses.
        proposals_of: the ground truth; needed to record the proposals of an R-CNN.
    """
    is_rcnn = isinstance(model, GeneralizedRCNN)
    try:
        with eval_mode(model):
            for images, targets in batches:
                image_ids = [int(target["image_id"]) for target in targets]
                images = [as_float(image.to(device)) for image in images]
                found, on_device = Predictions(image_ids), None
                if labels is not None:
                    relabelled = [target | {"labels": labels[target["labels"]]} for target in targets]
                    on_device = [{name: value.to(device) for name, value in one.items()} for one in relabelled]
                    if is_rcnn:  # the same losses in every run, for any number of processes
                        seed_sampling(model, [seed_of(0, 0, image_id) for image_id in image_ids])
                losses: dict[str, Tensor] = {}
                if proposals_of is not None:
                    detections, losses, proposals = run_rcnn(model, images, on_device, min_proposals=max(COUNTS))
                    found.kept_proposals = model.rpn.post_nms_top_n()
                    found.proposals = []
                    for image_id, boxes in zip(image_ids, proposals, strict=True):
                        found.proposals += covering_proposals(proposals_of, image_id, boxes)
                elif on_device is not None:
                    detections, losses = detect_with_losses(model, images, on_device)
                else:
                    detections = detect(model, images)
                found.results = to_results(detections, image_ids, category_ids)
                found.losses.update({name: loss.item() * len(images) for name, loss in losses.items()})
                yield found
    finally:
        if labels is not None and is_rcnn:
            seed_sampling(model, None)


def run_detector(
    model: nn.Module,
    split: CocoDetection,
    category_ids: Sequence[int | None],
    options: EvaluationOptions = DEFAULT_OPTIONS,
    *,
    labels: Tensor | None = None,
    proposals: bool = False,
    partial: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Predictions:
    """Run a detector over a split, with a progress bar.

    Args:
        model: a torchvision detector on ``options.device``, in any mode, which it keeps.
        split: the data, without a transform.
        category_ids: the category id of each label of the model, from label 1 on.
        options: of which ``limit``, ``skip_broken``, ``batch_size``, ``workers`` and ``device`` are used.
        labels: see :func:`predict`.
        proposals: whether to record the proposals of an R-CNN.
        partial: whether Ctrl-C, or an image that cannot be read, returns what was found before instead of raising.
        share: the rank of this process, and the number of processes that share the split. Batches are those of a
            single process.

    Raises:
        DataError: an image cannot be read.
    """
    rank, ranks = share
    images = len(split) if options.limit is None else min(options.limit, len(split))
    # Masks and keypoints are read for losses alone.
    split = (split.boxes_alone() if labels is None else split.with_layers()).as_bytes()
    loader = make_loader(
        _Readable(split) if options.skip_broken else split,
        ScoringBatches(images, options.batch_size, ranks=ranks, rank=rank),
        workers=options.workers,
        collate_fn=_collate_readable if options.skip_broken else collate,
    )
    found = Predictions(proposals=[] if proposals else None)
    with tqdm(total=images, desc="scoring", unit="image", leave=False, disable=rank > 0 or None) as bar:
        batches = _without_broken(loader, found, ranks, bar) if options.skip_broken else loader
        truth = split.annotations if proposals else None
        running = predict(model, batches, category_ids, device=options.device, labels=labels, proposals_of=truth)
        try:
            with closing(running):  # which restores the model's mode
                for batch in running:
                    found.add(batch)
                    bar.update(len(batch.image_ids) * ranks)
        except (KeyboardInterrupt, DataError) as stop:
            if not partial or not found.image_ids:
                raise
            found.stopped = stop
    return found


class _Readable(Dataset[Any]):
    """A split that returns (image id, reason) in place of an image that cannot be read."""

    def __init__(self, split: CocoDetection) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Target] | tuple[int, str]:
        try:
            return self.split[index]
        except DataError as error:
            return self.split.image_ids[index], one_line(error)


def _collate_readable(items: list[Any]) -> tuple[list[Tensor], list[Target], dict[int, str]]:
    """Collate the readable images, and the reasons of the others by image id."""
    readable = [item for item in items if isinstance(item[0], Tensor)]
    images, targets = collate(readable) if readable else ([], [])
    return images, targets, dict(item for item in items if not isinstance(item[0], Tensor))


def _without_broken(batches: Iterable[Any], found: Predictions, ranks: int, bar: tqdm) -> Iterator[Any]:
    for images, targets, broken in batches:
        found.broken |= broken
        bar.update(len(broken) * ranks)
        if images:
            yield images, targets
