"""Scoring from end to end: a detector on a split, or a file of detections."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm

from detector.data.annotation_types import AnnotationType
from detector.data.annotations import read_annotations
from detector.data.categories import match_categories, match_notes
from detector.data.checks import FAR_FROM_BOX, IGNORED
from detector.data.dataset import CocoDetection
from detector.data.images import Orientation
from detector.data.keypoints import KeypointLayout
from detector.data.results import Result, annotation_types_in, read_results, results_file
from detector.errors import DataError, UserError, one_line, short_repr
from detector.evaluation.metric import IOU_TYPES
from detector.evaluation.ranks import gathered, joined
from detector.evaluation.running import Predictions, run_detector
from detector.evaluation.timing import WARM_UP, measure_stages
from detector.evaluation.writing import EvaluationOptions, described, refinement_in_words, write_evaluation
from detector.models.rle_detections import annotation_types_of
from detector.overriding import overridden
from detector.pretrained.detector import Detector

# What a warning of the annotations does to the scores.
COUNTED_WRONG = {
    FAR_FROM_BOX: "AP by size and keypoints' errors use these areas.",
    IGNORED: "They are scored as any other.",
}
LACKING: dict[AnnotationType, dict[str, str]] = {
    "masks": {
        "masks without a pixel": "In segm scores they count as missed.",
        "masks outside their boxes": "In segm scores the objects in the boxes count as missed.",
        "areas that are far from their masks'": "segm AP by size uses these areas.",
        "objects without a segmentation": "In segm scores they count as missed.",
        "masks without an area": "The boxes' are taken, by which segm scores tell small objects from large ones.",
    },
    "keypoints": {
        "keypoints outside their boxes": "In keypoints scores they are compared as they are.",
        "labelled keypoints at (0, 0) or (-1, -1)": "In keypoints scores they are compared as they are.",
        "keypoints outside their image": "In keypoints scores they are compared as they are; training leaves them out.",
        "objects without keypoints": "In keypoints scores they count as neither found nor missed.",
        "objects whose keypoints are all unlabelled": "In keypoints scores they count as neither found nor missed.",
        "keypoints without an area": "The boxes' are taken, which are larger: keypoints scores are too high.",
    },
}


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
    """Score a detector on a split, print pycocotools' tables, and write what a training run leaves to a folder.

    Args:
        model: a detector on ``device``.
        split: the data, without a transform.
        folder: see :func:`~detector.evaluation.writing.write_evaluation`.
        category_ids: the category id of each label, from label 1 on; those of ``split`` by default.
        device: where to run.
        batch_size: images at a time.
        workers: processes that read images.
        about: what the report says of how it was made.
        notes: sentences for the report.

    Returns:
        The scores, as :func:`~detector.evaluation.evaluate`.

    Raises:
        DataError: an image cannot be read; nothing is written.
    """
    ids = split.category_ids if category_ids is None else category_ids
    found = run_detector(model, split, ids, device=device, batch_size=batch_size, workers=workers)
    name, data = type(model).__name__, str(split.folder)
    made = described(None, model=name, data=data, split=None, device=device)
    made |= {"refinement": refinement_in_words(model), **(about or {})}
    options = EvaluationOptions()
    parts, of_parts = scored_types(split, annotation_types_of(model))
    notes = [*notes, *of_parts]
    return write_evaluation(
        found,
        split.annotations,
        folder,
        options,
        about=made,
        split=split,
        annotation_types=parts,
        notes=notes,
        of_training=True,
    )


def evaluate_detector(
    detector: Detector,
    data: CocoDetection,
    folder: Path,
    options: EvaluationOptions,
    *,
    model: str,
    root: str,
    split: str,
) -> Predictions | None:
    """Score a detector on a split, or, of several processes that torchrun started, on this one's part of it.

    Args:
        detector: is moved to the device.
        data: the split, without a transform. Images that cannot be read are left out of it.
        folder: see :func:`~detector.evaluation.writing.write_evaluation`.
        options: how.
        model: where the detector comes from, for the report.
        root: the data set, for the report.
        split: the split's name, for the report.

    Returns:
        What was found, with the images that were left out, and with what ended the run early; ``None`` on all
        processes but the first.

    Raises:
        DataError: an image cannot be read, before anything was found, or in one of several processes.
        ModelError: the detector has no class of the data.
    """
    category_ids = match_categories(detector, data)
    folder.mkdir(parents=True, exist_ok=True)  # now: it would be late to find out after the run that it cannot be
    detector.to(options.device)
    notes = match_notes(detector, category_ids, data)
    total = len(data)
    with joined() as (rank, ranks):
        for note in notes if rank == 0 else ():
            print(f"Note: {note}", file=sys.stderr)
        parts, of_parts = scored_types(data, annotation_types_of(detector.model), detector.keypoints)
        labels, of_losses = _labels_for_losses(detector.model, category_ids, data, parts)
        run = partial(
            run_detector,
            detector.model,
            data,
            category_ids,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
            limit=options.limit,
            skip_broken=options.skip_broken,
            partial=ranks == 1,
            ranks=ranks,
            rank=rank,
        )
        found = gathered(run(labels=labels, proposals=isinstance(detector.model, GeneralizedRCNN)))
        unrefined = None
        if options.compare_refinement and detector.refinement is not None and (found is None or not found.stopped):
            with overridden(detector.refinement, enabled=False):
                unrefined = gathered(run())
    if found is None:
        return None
    notes += of_parts + of_losses
    left_out = [data.leave_out(found.broken)] if found.broken else []
    if left_out and not found.image_ids:
        with suppress(OSError):  # it holds something
            folder.rmdir()
        raise DataError(f"none of the images that were asked for can be read: {left_out[0]}")
    seen = f"these are the first {len(found.broken) + len(found.image_ids):,} of {total:,} images."
    if isinstance(found.stopped, KeyboardInterrupt):
        notes.append(f"Stopped by Ctrl-C: {seen}")
    elif found.stopped is not None:
        notes.append(f"Stopped by an image ({one_line(found.stopped)}): {seen}")
    elif options.limit is not None:
        notes.append(f"Limited: {seen}")
    notes += [f"{note}." for note in left_out]
    if options.compare_refinement and (unrefined is None or unrefined.stopped):
        notes.append("Not compared with the detector without its refinement: stopped before the end.")
        unrefined = None
    speed = None
    if options.speed and found.stopped is None and found.image_ids:
        speed = _times(detector.model, data, options, len(found.image_ids), notes)
    write_evaluation(
        found,
        data.annotations,
        folder,
        options,
        about=described(detector, model=model, data=root, split=split, device=options.device),
        split=data,
        annotation_types=parts,
        unrefined=unrefined,
        speed=speed,
        notes=notes,
    )
    for note in left_out:
        print(note, file=sys.stderr)
    return found


def evaluate_results(
    results: str,
    annotations: Path,
    folder: Path,
    options: EvaluationOptions,
    *,
    images: Path | None = None,
    orientation: Orientation = "upright",
    split: str | None = None,
) -> None:
    """Score a results file.

    Args:
        results: the file, in COCO's results format.
        annotations: the annotation file, which is the ground truth.
        folder: see :func:`~detector.evaluation.writing.write_evaluation`.
        options: how; those of running a detector have no effect.
        images: the folder of the images, which are looked at only to draw them, and may be missing.
        orientation: whether EXIF orientations are applied there, see :func:`~detector.data.images.read_image`.
        split: the split's name, for the report.
    """
    entries = results_file(results)
    given = annotation_types_in(entries)
    truth = read_annotations(annotations, annotation_types=given, needed=False)
    listed, notes = read_results(entries, truth)
    layout = KeypointLayout.numbered(len(listed[0]["keypoints"]) // 3) if "keypoints" in given else None
    parts, of_parts = _scored(given, layout, list(truth.annotation_types), truth.keypoint_layout(), truth.warnings)
    notes += of_parts
    data = None
    if images is not None:
        try:
            data = CocoDetection(images, truth, annotation_types=parts, orientation=orientation)
        except DataError as error:
            notes.append(f"No pictures: {error}")
    image_ids = truth.image_ids[: options.limit].tolist()
    if options.limit is not None:
        notes.append(f"Limited to the first {len(image_ids):,} of {len(truth):,} images.")
    if count := _crowded(listed):
        notes.append(f"{count:,} images have more than 100 results of one class; the metric looks at the best 100.")
    kept = set(image_ids)
    write_evaluation(
        Predictions(image_ids, [result for result in listed if result["image_id"] in kept]),
        truth,
        folder,
        options,
        about=described(None, model=results, data=str(annotations), split=split, device=None),
        split=data,
        annotation_types=parts,
        notes=notes,
    )


def _crowded(results: list[Result], most: int = 100) -> int:
    """Count the images that have more results of one class than COCO's metric looks at."""
    counts = Counter((result["image_id"], result["category_id"]) for result in results)
    return len({image for (image, _), count in counts.items() if count > most})


def scored_types(
    data: CocoDetection, found: Sequence[AnnotationType], layout: KeypointLayout | None = None
) -> tuple[list[AnnotationType], list[str]]:
    """What a detector is scored by besides boxes, and notes on what it is not scored by, and on objects that lack it.

    Args:
        data: the split; what is not read of it, since it has none, is not scored.
        found: what the detector finds.
        layout: of its keypoints, if it is known.
    """
    return _scored(found, layout, data.annotation_types, data.keypoints, data.annotations.warnings)


def _scored(
    found: Sequence[AnnotationType],
    layout: KeypointLayout | None,
    given: Sequence[AnnotationType],
    layout_given: KeypointLayout | None,
    warnings: Mapping[str, int],
) -> tuple[list[AnnotationType], list[str]]:
    """See :func:`scored_types`; what is given is what the annotations have, and the warnings are theirs by kind."""
    parts: list[AnnotationType] = []
    notes = _counted(warnings, COUNTED_WRONG)
    for part in found:
        if part not in given:
            notes.append(f"No {IOU_TYPES[part]} scores: the annotations have no {part}.")
        elif part == "keypoints" and layout and layout_given and len(layout) != len(layout_given):
            notes.append(
                f"No keypoints scores: {len(layout)} keypoints of an object are found, the annotations have "
                f"{len(layout_given)}."
            )
        elif part == "keypoints" and layout and layout_given and not layout.fits(layout_given):
            notes.append(
                f"No keypoints scores: the detector's keypoints are {short_repr(layout.names)}, those of the "
                f"annotations {short_repr(layout_given.names)}."
            )
        else:
            parts.append(part)
            notes += _counted(warnings, LACKING[part])
    return parts, notes


def _counted(warnings: Mapping[str, int], effects: Mapping[str, str]) -> list[str]:
    return [
        f"{kind[0].upper()}{kind[1:]}: {warnings[kind]:,}. {what}" for kind, what in effects.items() if kind in warnings
    ]


def _labels_for_losses(
    model: Any, category_ids: Sequence[int | None], data: CocoDetection, annotation_types: Sequence[AnnotationType]
) -> tuple[Tensor | None, list[str]]:
    """The model's label for each of the data's, if its losses can be computed; and if not, a note that says why."""
    if missing := [part for part in annotation_types_of(model) if part not in annotation_types]:
        return None, [f"No losses: those of {' and '.join(part for part in missing)} have nothing to go by."]
    label = {category: label for label, category in enumerate(category_ids, start=1)}
    if any(data.category_ids[one - 1] not in label for one in data.label_counts()):
        return None, ["No losses: of some classes the detector has no label."]
    return torch.tensor([0, *(label.get(category, 0) for category in data.category_ids)]), []  # 0: the background


def _times(
    model: nn.Module, data: CocoDetection, options: EvaluationOptions, images: int, notes: list[str]
) -> dict[str, Any] | None:
    """The times of the stages on the images that were scored. Whatever happens: the scores are worth keeping."""
    with tqdm(total=options.speed + WARM_UP, desc="timing", unit="image", leave=False, disable=None) as bar:
        try:
            return measure_stages(
                model, data, images=options.speed, among=images, device=options.device, on_image=bar.update
            )
        except (KeyboardInterrupt, UserError, RuntimeError, MemoryError) as stop:
            reason = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else one_line(stop)[:200]
            notes.append(f"No times: stopped by {reason} while they were taken.")
            return None
