"""From detections to all that an evaluation leaves: the scores, the report, the page and its pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detector.data.annotation_types import AnnotationType
from detector.data.annotations import Annotations
from detector.data.dataset import CocoDetection
from detector.evaluation.metric import Evaluator, evaluator_version, match_types, scores_of
from detector.evaluation.page import render_page
from detector.evaluation.pictures import draw_examples, worst_and_best
from detector.evaluation.report import as_text, make_report
from detector.evaluation.running import Predictions
from detector.evaluation.truth import coco_of
from detector.files import write_atomically, write_json
from detector.pretrained.detector import Detector
from detector.refinement.attach import refinement_of
from detector.versions import circumstances


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What an evaluation covers, and how it is done.

    Args:
        limit: score only the first so many images.
        min_score: detections below it are left out of the confusion matrix and of the pictures.
        evaluator: see :func:`~detector.evaluation.evaluate`.
        pictures: how many of the worst images the page shows, and of the best.
        skip_broken: leave out images that cannot be read; without it the first one ends the run.
        speed: how many images to time the stages on; 0 is not to.
        batch_size: images at a time.
        workers: processes that read images.
        device: where the detector runs.
        compare_refinement: score the detector without its refinement, too.
    """

    limit: int | None = None
    min_score: float = 0.5
    evaluator: Evaluator = "pycocotools"
    pictures: int = 6
    skip_broken: bool = False
    speed: int = 0
    batch_size: int = 1
    workers: int = 2
    device: torch.device | str = "cpu"
    compare_refinement: bool = False


def write_evaluation(
    found: Predictions,
    truth: Annotations,
    folder: Path,
    options: EvaluationOptions,
    *,
    about: Mapping[str, Any],
    split: CocoDetection | None = None,
    annotation_types: Sequence[AnnotationType] = (),
    unrefined: Predictions | None = None,
    speed: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    of_training: bool = False,
) -> dict[str, float]:
    """Score what was found, write the evaluation to a folder, and print its tables.

    The folder gets ``scores.json``, ``detections.json`` (COCO's results format), ``report.json`` (see
    :func:`~detector.evaluation.report.make_report`) and ``report.html``, a page of it.

    Args:
        found: the detections, and the images that they were looked for in.
        truth: the ground truth; the images in ``found`` are scored.
        folder: made if it is not there.
        options: how.
        about: how the detections were made, see :func:`described`.
        split: the images, to draw some of them on the page.
        annotation_types: what is scored besides boxes: "masks", "keypoints".
        unrefined: what was found without the refinement, in the same images, to compare with.
        speed: the times of :func:`~detector.evaluation.timing.measure_stages`.
        notes: sentences for the report.
        of_training: write ``examples.png``, too, and print no more than pycocotools' tables.

    Returns:
        The scores, as :func:`~detector.evaluation.evaluate`, those of masks and keypoints as "segm/AP",
        "keypoints/AP" and so on.
    """
    how: dict[str, Any] = {"annotation_types": annotation_types, "evaluator": options.evaluator}
    coco = coco_of(truth, found.image_ids)
    scorer, *others = scorers = match_types(coco, found.results, found.image_ids, **how)
    before = [] if unrefined is None else match_types(coco, unrefined.results, unrefined.image_ids, **how)
    report, tables = make_report(
        scorer,
        found.results,
        about={**about, "evaluator": evaluator_version(options.evaluator)},
        min_score=options.min_score,
        losses=found.mean_losses(),
        proposals=found.proposals,
        kept_proposals=found.kept_proposals,
        unrefined=before,
        parts=others,
        speed=speed,
        notes=notes,
    )
    scores = scores_of(scorers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "detections.json", found.results)
        write_json(folder / "scores.json", scores)
        noted = list(report["notes"])
        write_json(folder / "report.json", report, indent=1)  # before the drawing, which may fail
        drawn = (
            ()
            if split is None
            else worst_and_best(
                split, found.results, report, unrefined=unrefined.results if unrefined else (), each=options.pictures
            )
        )
        write_atomically(folder / "report.html", render_page(report, drawn).encode())
        if report["notes"] != noted:  # of the drawing
            write_json(folder / "report.json", report, indent=1)
        if of_training and split is not None:
            draw_examples(split, found.results, folder / "examples.png")
    finally:  # after all is written, as nobody may read it; but on a full disk as well
        print(tables)
        if not of_training:
            print(as_text(report))
    if not of_training:
        print(f"\nreport.html, report.json, scores.json and detections.json are in {folder}/")
    return scores


def refinement_in_words(model: nn.Module) -> str | None:
    """Return a detector's refinement iterations and ascent steps, "off", or ``None`` without a refinement."""
    refinement = refinement_of(model)
    if refinement is None:
        return None
    if not refinement.enabled:
        return "off"
    return f"{refinement.config.iterations} iterations, {refinement.config.ascent_steps} ascent steps"


def described(
    detector: Detector | None, *, model: str, data: str, split: str | None, device: torch.device | str | None
) -> dict[str, Any]:
    """How detections are made.

    Args:
        detector: what makes them. A model card knows the scores as its own by the digest of its weights.
        model: where they come from: a file, a folder, a name.
        data: the data set, or the annotation file.
        split: the split of the data.
        device: what the detector runs on.
    """
    return {
        "model": model,
        "crop": None if detector is None else detector.crop,
        "refinement": None if detector is None else refinement_in_words(detector.model),
        "weights": None if detector is None else detector.digest(),
        "data": data,
        "split": split,
        **circumstances(device),
    }
