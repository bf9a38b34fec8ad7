"""Running a detector over a split: detections, and on the way its losses and its proposals."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
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
from detector.evaluation.losses import detect_with_losses
from detector.evaluation.proposals import Hit, ProposalRecorder
from detector.models.rle_detections import detect, sizes_of
from detector.rcnn.sampling import seed_sampling
from detector.seeds import seed_of


@dataclass
class Predictions:
    """What a detector made of a split, or of a rank's part of one. Nothing of an image's size is kept.

    Args:
        image_ids: the ids of the images that it has seen.
        results: the detections, in COCO's results format.
        losses: the losses by torchvision's names, summed over the images; empty if they were not asked for.
        proposals: the proposals that may cover an object; ``None`` if they were not asked for.
        kept_proposals: how many of an image's proposals the head sees.
        broken: why each image that was left out cannot be read, by its id.
        stopped: what ended the run before its end: Ctrl-C, or an image that cannot be read.
    """

    image_ids: list[int] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    losses: Counter[str] = field(default_factory=Counter)
    proposals: list[Hit] | None = None
    kept_proposals: int = 0
    broken: dict[int, str] = field(default_factory=dict)
    stopped: KeyboardInterrupt | DataError | None = None

    def add(self, other: "Predictions") -> None:
        """Take in those of another rank."""
        self.image_ids += other.image_ids
        self.results += other.results
        self.losses.update(other.losses)
        self.broken |= other.broken
        if self.proposals is not None:
            self.proposals += other.proposals or []

    def mean_losses(self) -> dict[str, float] | None:
        """The losses of a mean image, their sum first, as "loss"; ``None`` if there are none."""
        if not self.losses or not self.image_ids:
            return None
        means = {name: total / len(self.image_ids) for name, total in self.losses.items()}
        return {"loss": sum(means.values())} | means


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]],
    category_ids: Sequence[int | None],
    *,
    device: torch.device | str = "cpu",
    labels: Tensor | None = None,
    proposals_of: Annotations | None = None,
    on_batch: Callable[[int], Any] = lambda images: None,
    into: Predictions | None = None,
) -> Predictions:
    """Run a detector over batches of images.

    Args:
        model: a torchvision detector; put in eval mode for the run.
        batches: images [3, H, W], float in 0..1 or uint8, at their annotated size, and targets of which ``image_id``
            is used, and all for losses.
        category_ids: the category id of each of the model's labels, from label 1 on.
        device: where the model is.
        labels: [n + 1], the model's label for each of the targets', from 0 on, by which the losses are computed;
            without them they are not.
        proposals_of: the ground truth: the proposals that may cover one of its objects are kept, too.
        on_batch: called with the number of images of each batch done, for a progress bar.
        into: the predictions to add to, batch by batch.
    """
    training = model.training
    model.eval()
    done = Predictions() if into is None else into
    recorder = ProposalRecorder()
    try:
        with ExitStack() as stack:
            if proposals_of is not None:
                assert isinstance(model, GeneralizedRCNN)
                done.proposals = done.proposals or []
                done.kept_proposals = stack.enter_context(recorder.recording(model))
            for images, targets in batches:
                image_ids = [int(target["image_id"]) for target in targets]
                sizes = sizes_of(images)
                images = [as_float(image.to(device)) for image in images]
                losses: dict[str, Tensor] = {}
                if labels is None:
                    detections = detect(model, images)
                else:
                    relabelled = [t | {"labels": labels[t["labels"]]} for t in targets]
                    on_device = [{name: value.to(device) for name, value in t.items()} for t in relabelled]
                    if isinstance(model, GeneralizedRCNN):  # the same in each run, and by any number of processes
                        seed_sampling(model, [seed_of(0, 0, image_id) for image_id in image_ids])
                    detections, losses = detect_with_losses(model, images, on_device)
                hits = [] if proposals_of is None else recorder.hits(proposals_of, image_ids, sizes)
                results = to_results(detections, image_ids, category_ids)
                # The ids first: Ctrl-C may come in between, and what has an image without an id cannot be scored.
                done.image_ids += image_ids
                done.results += results
                done.losses.update({name: loss.item() * len(images) for name, loss in losses.items()})
                if done.proposals is not None:
                    done.proposals += hits
                on_batch(len(images))
    finally:
        if labels is not None and isinstance(model, GeneralizedRCNN):
            seed_sampling(model, None)
        model.train(training)
    return done


def run_detector(
    model: nn.Module,
    split: CocoDetection,
    category_ids: Sequence[int | None],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    workers: int = 2,
    limit: int | None = None,
    labels: Tensor | None = None,
    proposals: bool = False,
    skip_broken: bool = False,
    partial: bool = False,
    ranks: int = 1,
    rank: int = 0,
) -> Predictions:
    """Run a detector over a split, or a rank's part of it, with a progress bar.

    Args:
        model: a torchvision detector on ``device``; put in eval mode for the run.
        split: the data, without a transform.
        category_ids: the category id of each of the model's labels, from label 1 on.
        device: where the model is.
        batch_size: images at a time.
        workers: processes that read images.
        limit: only the first so many images.
        labels: see :func:`predict`.
        proposals: also keep the proposals that may cover an object.
        skip_broken: go on after an image that cannot be read, and keep the reason.
        partial: return what was found before Ctrl-C, or before an image that cannot be read, instead of raising it.
        ranks: how many processes share the split. Batches are those of a single process.
        rank: the number of this process.

    Raises:
        DataError: an image cannot be read.
    """
    images = len(split) if limit is None else min(limit, len(split))
    # Without losses nothing but boxes is looked at.
    split = (split.boxes_alone() if labels is None else split.with_layers()).as_bytes()
    loader = make_loader(
        _Readable(split) if skip_broken else split,
        ScoringBatches(images, batch_size, ranks=ranks, rank=rank),
        workers=workers,
        collate_fn=_collate_readable if skip_broken else collate,
    )
    found = Predictions()
    with tqdm(total=images, desc="scoring", unit="image", leave=False, disable=rank > 0 or None) as bar:
        try:
            predict(
                model,
                _without_broken(loader, found, ranks, bar) if skip_broken else loader,
                category_ids,
                device=device,
                labels=labels,
                proposals_of=split.annotations if proposals else None,
                on_batch=lambda done: bar.update(done * ranks),
                into=found,
            )
        except (KeyboardInterrupt, DataError) as stop:
            if not partial or not found.image_ids:
                raise
            found.stopped = stop
    return found


class _Readable(Dataset[Any]):
    """A split that gives the id and the reason instead of an image that cannot be read."""

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
    """A batch as :func:`~detector.data.loading.collate` makes it, and the images that cannot be read."""
    readable = [item for item in items if isinstance(item[0], Tensor)]
    images, targets = collate(readable) if readable else ([], [])
    return images, targets, dict(item for item in items if not isinstance(item[0], Tensor))


def _without_broken(batches: Iterable[Any], found: Predictions, ranks: int, bar: tqdm) -> Iterator[Any]:
    for images, targets, broken in batches:
        found.broken |= broken
        bar.update(len(broken) * ranks)
        if images:
            yield images, targets
