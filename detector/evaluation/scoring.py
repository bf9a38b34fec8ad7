"""Score a split from end to end: run a detector over it, evaluate, print, write."""

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from detector.coco import CocoDetection, Target, collate
from detector.environment import versions
from detector.errors import DataError, sentence
from detector.evaluation.metric import Evaluator, Result, evaluator_version, match
from detector.evaluation.page import render_page
from detector.evaluation.pictures import draw_examples, worst_and_best
from detector.evaluation.prediction import Predictions, predict
from detector.evaluation.report import Report, as_text, make_report
from detector.files import write_json, write_whole
from detector.order import ScoringBatches
from detector.signals import ignoring_signals


def score_split(
    model: nn.Module,
    split: CocoDetection,
    folder: Path,
    *,
    category_ids: Sequence[int | None] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    workers: int = 2,
    about: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, float]:
    """Score a detector on a split, print pycocotools' table, and write everything to a folder.

    Args:
        model: a detector on ``device``.
        split: the data, without a transform.
        folder: see :func:`write_scores`.
        category_ids: the category id of each label, from label 1 on; those of ``split`` by default.
        device: where to run.
        batch_size: images at a time.
        workers: processes that read images.
        about: see :func:`described`.
        notes: sentences for the report.

    Returns:
        The scores, as :func:`~detector.evaluation.evaluate`.

    Raises:
        DataError: an image cannot be read; nothing is written.
    """
    found = run_detector(
        model,
        split,
        split.category_ids if category_ids is None else category_ids,
        device=device,
        batch_size=batch_size,
        workers=workers,
    )
    if found.stopped is not None:  # a part of the detections would score as if the rest had been missed
        raise found.stopped
    return write_scores(split, found.results, folder, about=about or {}, notes=notes)


def write_scores(
    split: CocoDetection,
    results: list[Result],
    folder: Path,
    *,
    about: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> dict[str, float]:
    """Score results, print pycocotools' table, and write what a training run leaves.

    ``scores.json``, ``detections.json`` (COCO's results format), ``report.json`` (see :func:`make_report`) and
    ``examples.png`` (a few images, the truth on the left, detections on the right).
    """
    scorer = match(split.coco, results, split.image_ids)
    report, table = make_report(scorer, results, about=about, notes=notes)
    scores = _with_minus_one(report)
    try:
        _write(report, scores, results, folder)
        draw_examples(split, results, folder / "examples.png")
    finally:  # after all is written, as nobody may read it; but on a full disk as well
        _print(table, scores)
    return scores


def write_evaluation(
    truth: COCO,
    results: list[Result],
    folder: Path,
    *,
    about: Mapping[str, Any],
    split: CocoDetection | None = None,
    image_ids: Sequence[int] | None = None,
    evaluator: Evaluator = "pycocotools",
    pictures: int = 6,
    **extras: Any,
) -> Report:
    """Score results, write ``scores.json``, ``detections.json``, ``report.json`` and a page, then print all tables.

    Args:
        truth: the annotations.
        results: COCO's results format.
        folder: where to.
        about: see :func:`described`.
        split: the images, to draw some of them on the page.
        image_ids: the images to score; all of ``truth`` by default.
        evaluator: see :func:`~detector.evaluation.evaluate`.
        pictures: how many of the worst images to draw, and of the best.
        extras: of :func:`~detector.evaluation.report.make_report`.
    """
    scorer = match(truth, results, image_ids, evaluator=evaluator)
    report, table = make_report(scorer, results, about=about, **extras)
    scores = _with_minus_one(report)
    try:
        _write(report, scores, results, folder)  # first: drawing may fail
        drawn = () if split is None else worst_and_best(split, results, report, each=pictures)
        write_whole(folder / "report.html", render_page(report, drawn).encode())
    finally:  # after all is written, as nobody may read it; but on a full disk as well
        _print(table, scores)
        print(as_text(report))
    return report


def described(
    *,
    model: str,
    crop: str | None,
    weights: str | None,
    data: str,
    split: str | None,
    device: str,
    evaluator: Evaluator = "pycocotools",
) -> dict[str, Any]:
    """How an evaluation is made.

    Args:
        model: where it came from: a file, a folder, a name.
        crop: "affine" or "roi_align".
        weights: their digest, by which a model card knows the scores as its own.
        data: the data set, or the annotation file.
        split: of the data.
        device: that it runs on.
        evaluator: that scores it.
    """
    return {
        "model": model,
        "crop": crop,
        "weights": weights,
        "data": data,
        "split": split,
        "device": device,
        "evaluator": evaluator_version(evaluator),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: version for name, version in versions().items() if version is not None},
    }


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
    ranks: int = 1,
    rank: int = 0,
) -> Predictions:
    """Run a detector over a split, or a rank's part of it, with a progress bar.

    Args:
        model, split, category_ids, device, batch_size, workers: as for :func:`score_split`.
        limit: only the first so many images.
        labels: see :func:`~detector.evaluation.predict`.
        proposals: also keep those that may cover an object.
        skip_broken: go on after an image that cannot be read, and keep the reason.
        ranks: how many processes share the split,
        rank: and this one's number. Batches are those of a single process.

    Returns:
        What was found; in a single process also after Ctrl-C, or an image that cannot be read: what was found before.
    """
    images = len(split) if limit is None else min(limit, len(split))
    loader: DataLoader[Any] = DataLoader(
        _Readable(split) if skip_broken else split,
        batch_sampler=ScoringBatches(images, batch_size, ranks=ranks, rank=rank),
        num_workers=workers,
        collate_fn=_collate_readable if skip_broken else collate,
        worker_init_fn=ignoring_signals(),
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
                proposals_of=split.coco if proposals else None,
                on_batch=lambda done: bar.update(done * ranks),
                into=found,
            )
        except (KeyboardInterrupt, DataError) as stop:
            if ranks > 1 or not found.image_ids:
                raise
            found.stopped = stop
    return found


class _Readable(Dataset[Any]):
    """A split of which an image that cannot be read is its id, with the reason."""

    def __init__(self, split: CocoDetection) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Target] | tuple[int, str]:
        try:
            return self.split[index]
        except DataError as error:
            return self.split.image_ids[index], sentence(error)


def _collate_readable(samples: list[Any]) -> tuple[list[Tensor], list[Target], dict[int, str]]:
    """A batch as :func:`~detector.coco.collate` makes it, and the images that cannot be read."""
    readable = [sample for sample in samples if isinstance(sample[0], Tensor)]
    images, targets = collate(readable) if readable else ([], [])
    return images, targets, dict(sample for sample in samples if not isinstance(sample[0], Tensor))


def _without_broken(batches: Iterable[Any], found: Predictions, ranks: int, bar: tqdm) -> Iterator[Any]:
    for images, targets, broken in batches:
        found.broken |= broken
        bar.update(len(broken) * ranks)
        if images:
            yield images, targets


def _with_minus_one(report: Report) -> dict[str, float]:
    """The scores, -1 for an undefined one, as pycocotools says it."""
    return {name: -1.0 if score is None else score for name, score in report["scores"].items()}


def _write(report: Report, scores: dict[str, float], results: list[Result], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "detections.json", results)
    write_json(folder / "scores.json", scores)
    write_json(folder / "report.json", report, indent=1)


def _print(table: str, scores: dict[str, float]) -> None:
    """pycocotools' table, and a line more."""
    print(table)
    print(f" Average Precision  (AP) @[ IoU=0.90      | area=   all | maxDets=100 ] = {scores['AP90']:0.3f}")
