"""Running a detector over a split: detections, and on the way its losses and its proposals."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.errors import DataError
from detector.evaluation.losses import detect_with_losses
from detector.evaluation.metric import Result, to_results
from detector.evaluation.proposals import Hit, ProposalRecorder
from detector.seeding import sample_by_image, seed_of


@dataclass
class Predictions:
    """What a detector made of a split, or of a rank's part of one. Nothing of an image's size is kept.

    Args:
        image_ids: of the images it has seen.
        results: COCO's results format.
        losses: sums over the images, by torchvision's names; empty if they were not asked for.
        proposals: see :mod:`~detector.evaluation.proposals`; ``None`` if they were not asked for.
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
        """Take in another rank's."""
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
    proposals_of: COCO | None = None,
    on_batch: Callable[[int], Any] = lambda images: None,
    into: Predictions | None = None,
) -> Predictions:
    """Run a detector over a split.

    Args:
        model: a torchvision detector; put in eval mode for the run.
        batches: images [3, H, W] in 0..1 at their annotated size, and targets of which ``image_id`` is used.
        category_ids: the category id of each of the model's labels, from label 1 on.
        device: where the model is.
        labels: [n + 1], the model's label for each of the targets', from 0 on: also compute the losses.
        proposals_of: the annotations: also keep the proposals that may cover one of their objects.
        on_batch: called with the number of images of each batch done, for a progress bar.
        into: what to fill, batch by batch.
    """
    training = model.training
    model.eval()
    done = Predictions() if into is None else into
    if proposals_of is not None and done.proposals is None:
        done.proposals = []
    recorder = ProposalRecorder()
    try:
        with ExitStack() as stack:
            if proposals_of is not None:
                assert isinstance(model, GeneralizedRCNN)
                done.kept_proposals = stack.enter_context(recorder.recording(model))
            for images, targets in batches:
                image_ids = [int(target["image_id"]) for target in targets]
                sizes = [(image.shape[-2], image.shape[-1]) for image in images]
                images = [image.to(device) for image in images]
                if labels is None:
                    detections = model(images)
                else:
                    relabelled = [t | {"labels": labels[t["labels"]]} for t in targets]
                    on_device = [{name: value.to(device) for name, value in t.items()} for t in relabelled]
                    if isinstance(model, GeneralizedRCNN):  # the same in each run, and by any number of processes
                        sample_by_image(model, [seed_of(0, 0, image_id) for image_id in image_ids])
                    detections, losses = detect_with_losses(model, images, on_device)
                    done.losses.update({name: loss.item() * len(images) for name, loss in losses.items()})
                if proposals_of is not None:
                    assert done.proposals is not None
                    done.proposals += recorder.hits(proposals_of, image_ids, sizes)
                results = to_results(detections, image_ids, category_ids)  # Ctrl-C in here: not seen
                done.image_ids += image_ids
                done.results += results
                on_batch(len(images))
    finally:
        if labels is not None and isinstance(model, GeneralizedRCNN):
            sample_by_image(model, None)
        model.train(training)
    return done
