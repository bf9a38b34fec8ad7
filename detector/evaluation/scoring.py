"""Evaluations: of a detector on a split, of its predictions, and of a file of detections."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor

from detector.choices import Orientation
from detector.data.annotation_types import AnnotationType
from detector.data.annotations import Annotations, read_annotations
from detector.data.categories import match_categories, match_notes
from detector.data.checks import CENTRES, FAR_FROM_BOX, IGNORED, no_box
from detector.data.dataset import CocoDetection
from detector.data.folder import DataFolder
from detector.data.keypoints import KeypointLayout
from detector.data.results import Result, annotation_types_in, read_results, results_file
from detector.errors import DataError, MissingAnnotationsError, UserError, one_line, short_repr
from detector.evaluation.confusion import BoxOutcome, match_boxes
from detector.evaluation.metric import IOU_TYPES, evaluator_version, match_types, summaries
from detector.evaluation.page import render_page
from detector.evaluation.pictures import draw_examples, worst_and_best
from detector.evaluation.report import Report, make_report
from detector.evaluation.running import DEFAULT_OPTIONS, EvaluationOptions, Predictions, gathered, joined, run_detector
from detector.evaluation.tables import report_text
from detector.evaluation.timing import measure_stages
from detector.evaluation.truth import coco_of
from detector.files import write_atomically, write_json
from detector.models.rle_detections import annotation_types_of
from detector.overriding import overridden
from detector.pretrained.detector import Detector
from detector.versions import circumstances

# The effects of warnings about the annotations on the scores.
EFFECTS_ON: dict[str, dict[str, str]] = {
    "boxes": {
        FAR_FROM_BOX: "AP by size and the errors of keypoints use these areas.",
        IGNORED: "They are scored as all others.",
        "empty boxes": "They count as missed.",
        "boxes outside their image": "They count as missed.",
        "duplicate boxes": "An object counts twice, and is found once.",
        CENTRES: "All scores are too low. Run tools/check.py.",
    },
    "masks": {
        "masks without a pixel": "They count as missed in segm scores.",
        "masks outside their boxes": "The objects in the boxes count as missed in segm scores.",
        "areas that are far from their masks'": "segm AP by size uses these areas.",
        "objects without a segmentation": "They count as missed in segm scores.",
        "masks without an area": "segm AP by size uses the areas of the boxes.",
    },
    "keypoints": {
        "keypoints outside their boxes": "They are compared as they are in keypoints scores.",
        "labelled keypoints at (0, 0) or (-1, -1)": "They are compared as they are in keypoints scores.",
        "keypoints outside their image": "They are compared as they are in keypoints scores. Training leaves them out.",
        "objects without keypoints": "They count as neither found nor missed in keypoints scores.",
        "objects whose keypoints are all unlabelled": "They count as neither found nor missed in keypoints scores.",
        "keypoints without an area": "The larger areas of the boxes are used, so keypoints scores are too high.",
    },
}
MAX_PER_CLASS = 100  # detections of a class in an image that COCO's metric uses


@dataclass
class Evaluation:
    """The outcome of an evaluation.

    ``scores`` are COCO's numbers of boxes, and those of masks and keypoints as "segm/AP", "keypoints/AP", ...; -1 where
    there is no object.
    """

    report: Report
    results: list[Result]  # the detections, in COCO's results format
    scores: dict[str, float]
    tables: str  # pycocotools'
    outcomes: dict[int, list[BoxOutcome]]  # of the boxes in each image
    images: CocoDetection | None = None  # if some are to be drawn
    unrefined: list[Result] = field(default_factory=list)  # detections without the refinement, to be drawn
    skipped: dict[int, str] = field(default_factory=dict)  # why an image could not be read, by its id
    stopped: KeyboardInterrupt | DataError | None = None  # why the evaluation covers a part of the images
    warning: str = ""  # on the images that were skipped

    def write(self, folder: Path, *, pictures: int = 6, of_training: bool = False) -> None:
        """Write detections.json, scores.json, report.json and report.html to a folder, and print the tables.

        Args:
            folder: created if it does not exist.
            pictures: number of the worst images on the page, and of the best.
            of_training: also write examples.png, and print pycocotools' tables only.
        """
        report = self.report
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "detections.json", self.results)
            write_json(folder / "scores.json", self.scores)
            write_json(folder / "report.json", report.to_dict(), indent=1)  # before the drawing, which may fail
            drawn, notes = worst_and_best(self.images, report, self.outcomes, self.unrefined, number=pictures)
            if notes:
                report = replace(report, notes=[*report.notes, *notes])
                write_json(folder / "report.json", report.to_dict(), indent=1)
            write_atomically(folder / "report.html", render_page(report, drawn).encode())
            if of_training and self.images is not None:
                draw_examples(self.images, self.outcomes, folder / "examples.png")
        finally:  # last, because the output may be closed; also on a full disk
            print(self.tables if of_training else f"{self.tables}\n{report_text(report)}")
        if not of_training:
            print(f"\nreport.html, report.json, scores.json and detections.json are in {folder}/")
        if self.warning:
            print(self.warning, file=sys.stderr)


def split_for(detector: Detector, folder: DataFolder, split: str, *, skip_missing: bool = False) -> CocoDetection:
    """Return a split with the masks and keypoints that the detector finds, if the split has them.

    Raises:
        DataError: the split cannot be read, or has no box.
    """
    try:
        data = folder.dataset(split, annotation_types=annotation_types_of(detector.model), skip_missing=skip_missing)
    except MissingAnnotationsError:  # the report says so
        data = folder.dataset(split, skip_missing=skip_missing)
    if not data.counts().any():
        raise DataError(no_box(folder.annotation_file(split), "score").message)
    return data


def evaluate_detector(
    detector: Detector, split: CocoDetection, options: EvaluationOptions, *, model: str, root: str, split_name: str
) -> Evaluation | None:
    """Evaluate a detector on a split. Processes that torchrun started share the images.

    Args:
        detector: moved to the device.
        split: the data, without a transform. Images that cannot be read are left out of it.
        options: see :class:`~detector.evaluation.EvaluationOptions`.
        model: the source of the detector, for the report.
        root: the data set, for the report.
        split_name: the name of the split, for the report.

    Returns:
        The evaluation; ``None`` on all ranks but 0.

    Raises:
        DataError: none of the images can be read, or the first cannot, or with several processes any cannot.
        ModelError: the detector has no class of the data.
    """
    category_ids = match_categories(detector, split)
    detector.to(options.device)
    notes, total, unrefined = match_notes(detector, category_ids, split), len(split), None
    labels, later = _labels_for_losses(detector, category_ids, split)
    with joined() as (rank, ranks):

        def run(**recorded: Any) -> Predictions | None:
            how = {"partial": ranks == 1, "share": (rank, ranks), **recorded}
            return gathered(run_detector(detector.model, split, category_ids, options, **how))

        for note in notes if rank == 0 else ():
            print(f"Note: {note}", file=sys.stderr)
        found = run(labels=labels, proposals=True)
        if options.compare_refinement and detector.refinement is not None and (found is None or not found.stopped):
            with overridden(detector.refinement, enabled=False):
                unrefined = run()
    if found is None:
        return None
    warning = split.leave_out(found.broken) if found.broken else ""
    if warning and not found.image_ids:
        raise DataError(f"none of the requested images can be read: {warning}")
    if found.stopped or options.limit is not None:
        why = "Limited"
        if found.stopped:
            by_user = isinstance(found.stopped, KeyboardInterrupt)
            why = f"Stopped by {'Ctrl-C' if by_user else f'an image ({one_line(found.stopped)})'}"
        later.append(f"{why}: these are the first {len(found.broken) + len(found.image_ids):,} of {total:,} images.")
    if warning:
        later.append(f"{warning}.")
    if unrefined is not None and not unrefined.stopped:
        found.unrefined = unrefined.results
    elif options.compare_refinement:
        later.append("Not compared with the detector without its refinement: stopped before the end.")
    sources = {"model": model, "root": root, "split_name": split_name}
    evaluation = evaluate_predictions(found, split, options, detector=detector, notes=notes, **sources)
    evaluation.warning = warning
    if options.speed and found.stopped is None and found.image_ids:
        try:
            timed: Any = {"images": options.speed, "among": len(found.image_ids), "device": options.device}
            evaluation.report.speed = measure_stages(detector.model, split, **timed)
        except (KeyboardInterrupt, UserError, RuntimeError, MemoryError) as stop:  # the scores are valid
            reason = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else one_line(stop)[:200]
            later.append(f"No times: the measurement was stopped by {reason}.")
    evaluation.report.notes += later
    return evaluation


def evaluate_predictions(
    found: Predictions,
    split: CocoDetection,
    options: EvaluationOptions,
    *,
    detector: Detector,
    model: str,
    root: str,
    split_name: str,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Evaluate the predictions of a detector on a split.

    Args:
        found: the predictions.
        split, options, detector, model, root, split_name: see :func:`evaluate_detector`.
        notes: remarks for the report.
    """
    found_types = annotation_types_of(detector.model)
    annotation_types, type_notes = scored_types(found_types, detector.keypoints, split.annotations)
    refinement = None if detector.refinement is None else detector.refinement.description
    made = {"model": model, "crop": detector.crop, "refinement": refinement}
    made["weights"] = detector.digest()  # by which a model card recognizes its scores
    return evaluate_coco(
        coco_of(split.annotations, found.image_ids),
        found,
        about={**made, "data": root, "split": split_name, **circumstances(options.device)},
        annotation_types=annotation_types,
        options=options,
        images=split,
        notes=[*notes, *type_notes],
    )


def evaluate_results(
    results: str,
    annotations: Path,
    options: EvaluationOptions,
    *,
    images: Path | None = None,
    orientation: Orientation = "upright",
    split_name: str | None = None,
) -> Evaluation:
    """Evaluate a results file.

    Args:
        results: the file, in COCO's results format.
        annotations: the annotation file, which is the ground truth.
        options: uses ``limit``, ``min_score`` and ``evaluator``.
        images: the folder of the images, which are needed for pictures only.
        orientation: how EXIF orientations are applied, see :func:`~detector.data.images.read_image`.
        split_name: the name of the split, for the report.
    """
    entries = results_file(results)
    found_types, split = annotation_types_in(entries), None
    truth = read_annotations(annotations, annotation_types=found_types, needed=False)
    listed, notes = read_results(entries, truth)
    layout = KeypointLayout.numbered(len(listed[0]["keypoints"]) // 3) if "keypoints" in found_types else None
    annotation_types, type_notes = scored_types(found_types, layout, truth)
    notes = [*notes, *type_notes]
    if images is not None:
        try:
            split = CocoDetection(images, truth, annotation_types=annotation_types, orientation=orientation)
        except DataError as error:
            notes.append(f"No pictures: {error}")
    image_ids = truth.image_ids[: options.limit].tolist()
    if options.limit is not None:
        notes.append(f"Limited to the first {len(image_ids):,} of {len(truth):,} images.")
    kept = set(image_ids)
    listed = [result for result in listed if result["image_id"] in kept]
    counts = Counter((result["image_id"], result["category_id"]) for result in listed)
    if crowded := len({image for (image, _), count in counts.items() if count > MAX_PER_CLASS}):
        notes.append(f"Images with more than {MAX_PER_CLASS} results of one class: {crowded:,}. Only the best count.")
    made = {"model": results, **dict.fromkeys(("crop", "refinement", "weights"))}
    return evaluate_coco(
        coco_of(truth, image_ids),
        Predictions(image_ids, listed),
        about={**made, "data": str(annotations), "split": split_name, **circumstances(None)},
        annotation_types=annotation_types,
        options=options,
        images=split,
        notes=notes,
    )


def evaluate_coco(
    truth: COCO,
    found: Predictions,
    *,
    about: Mapping[str, Any],
    annotation_types: Sequence[AnnotationType] = (),
    options: EvaluationOptions = DEFAULT_OPTIONS,
    images: CocoDetection | None = None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Evaluate predictions with pycocotools.

    Args:
        truth: the ground truth.
        found: the predictions.
        about: how they were made, for the report.
        annotation_types: what is scored besides boxes.
        options: uses ``min_score`` and ``evaluator``.
        images: the images, to draw some of them.
        notes: remarks for the report.
    """
    how: Any = {"annotation_types": annotation_types, "evaluator": options.evaluator}
    scorers = match_types(truth, found.results, found.image_ids, **how)
    before = [] if found.unrefined is None else match_types(truth, found.unrefined, found.image_ids, **how)
    outcomes = match_boxes(truth, found.results, found.image_ids, min_score=options.min_score)
    about = {**about, "evaluator": evaluator_version(options.evaluator)}
    counted: Any = {"about": about, "min_score": options.min_score, "unrefined": before, "notes": notes}
    report, (scores, tables) = make_report(scorers, found, outcomes, **counted), summaries(scorers)
    drawn: Any = {"outcomes": outcomes, "images": images, "unrefined": found.unrefined or []}
    return Evaluation(report, found.results, scores, tables, skipped=found.broken, stopped=found.stopped, **drawn)


def scored_types(
    found: Sequence[AnnotationType], layout: KeypointLayout | None, truth: Annotations
) -> tuple[list[AnnotationType], list[str]]:
    """Return the annotation types that are scored besides boxes, and notes on the others and on warnings.

    Args:
        found: the annotation types of the detections.
        layout: that of their keypoints, if it is known.
        truth: the ground truth.
    """
    scored: list[AnnotationType] = []
    notes, effects = [], dict(EFFECTS_ON["boxes"])
    for name in found:
        theirs = truth.keypoint_layout() if name == "keypoints" else None
        reason = None
        if name not in truth.annotation_types:
            reason = f"the annotations have no {name}"
        elif layout and theirs and len(layout) != len(theirs):
            reason = f"detections have {len(layout)} keypoints, the annotations {len(theirs)}"
        elif layout and theirs and not layout.fits(theirs):
            reason = f"detections have the keypoints {short_repr(layout.names)}, not {short_repr(theirs.names)}"
        if reason is None:
            scored.append(name)
            effects |= EFFECTS_ON[name]
        else:
            notes.append(f"No {IOU_TYPES[name]} scores: {reason}.")
    given = [kind for kind in effects if kind in truth.warnings]
    return scored, notes + [f"{kind[0].upper()}{kind[1:]}: {truth.warnings[kind]:,}. {effects[kind]}" for kind in given]


def _labels_for_losses(
    detector: Detector, category_ids: Sequence[int | None], split: CocoDetection
) -> tuple[Tensor | None, list[str]]:
    """Return the model's label for each label of the data, or a note on why there are no losses."""
    found = annotation_types_of(detector.model)
    scored, _ = scored_types(found, detector.keypoints, split.annotations)
    if missing := [name for name in found if name not in scored]:
        return None, [f"No losses: the annotations have no {' and '.join(missing)} for them."]
    label = {category: label for label, category in enumerate(category_ids, start=1)}
    if any(split.category_ids[one - 1] not in label for one in split.label_counts()):
        return None, ["No losses: the detector lacks some of the classes."]
    return torch.tensor([0, *(label.get(category, 0) for category in split.category_ids)]), []  # 0: the background
