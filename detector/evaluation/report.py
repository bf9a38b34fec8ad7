"""The report of an evaluation: a dataclass of JSON types, built section by section."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from detector.errors import DataError
from detector.evaluation.confusion import MATCHING_IOU, BoxOutcome, confusion_matrix, image_rows
from detector.evaluation.metric import class_names, summaries, summary
from detector.evaluation.operating_points import operating_points
from detector.evaluation.proposals import recall
from detector.evaluation.running import Predictions
from detector.files import read_json

Section = dict[str, Any]
SIZE_RANGES = {  # COCO's, in its order
    "small": "area below 32 x 32 pixels",
    "medium": "area from 32 x 32 to 96 x 96 pixels",
    "large": "area above 96 x 96 pixels",
}
OBJECT_COUNTS = ("objects", *(f"objects_{size}" for size in SIZE_RANGES))
IOUS = [i / 100 for i in range(50, 100, 5)]  # COCO's thresholds
CURVE_IOUS = (0.5, 0.75, 0.9)  # of the mean precision-recall curves


@dataclass
class Report:
    """The numbers of an evaluation in JSON types. An undefined number, or a section without data, is ``None``."""

    about: Section  # how the detections were made, and the numbers of images, objects and detections
    scores: dict[str, float | None] = field(default_factory=dict)  # COCO's numbers of boxes, and AP90
    by_iou: list[Section] = field(default_factory=list)
    by_size: list[Section] = field(default_factory=list)
    by_class: list[Section] = field(default_factory=list)
    proposals: Section | None = None  # recall of the RPN
    losses: dict[str, float] | None = None  # per image
    curves: Section = field(default_factory=dict)  # precision over recall
    operating_points: Section = field(default_factory=dict)  # see operating_points.py
    confusion: Section = field(default_factory=dict)
    images: list[Section] = field(default_factory=list)  # see confusion.image_rows
    segm: Section | None = None  # the scores of masks
    keypoints: Section | None = None
    refinement: Section | None = None  # the scores before and after
    speed: Section | None = None  # see timing.measure_stages
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, content: Any) -> "Report":
        """Return the report of :meth:`to_dict`.

        Raises:
            DataError: ``about`` is missing, or a section is unknown.
        """
        try:
            return cls(**content)
        except TypeError as error:
            raise DataError(f"not a report: {error}") from None


def make_report(
    scorers: Sequence[COCOeval],
    found: Predictions,
    outcomes: Mapping[int, Sequence[BoxOutcome]],
    *,
    about: Mapping[str, Any],
    min_score: float,
    unrefined: Sequence[COCOeval] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Build the report of an evaluation.

    Args:
        scorers: see :func:`~detector.evaluation.metric.match_types`.
        found: the predictions that were scored.
        outcomes: of the boxes with at least ``min_score``, see :func:`~detector.evaluation.confusion.match_boxes`.
        about: how the detections were made.
        min_score: minimum score of the detections in ``outcomes``.
        unrefined: as ``scorers``, without the refinement.
        notes: remarks for readers of the scores.
    """
    boxes, *others = scorers
    images, scores, counts = boxes.cocoGt.imgs, _defined(summary(boxes)[0]), _count_objects(boxes)
    by_class = [row | counts[row["id"]] | more for row, more in _classes(boxes)]
    total, *by_size = (sum(of_class[name] for of_class in counts.values()) for name in OBJECT_COUNTS)
    report = Report(
        about={**about, "images": len(found.image_ids), "objects": total, "detections": len(found.results)},
        scores=scores,
        by_iou=_by_iou(boxes),
        by_size=[
            {"size": size, "range": text, "objects": count, "AP": scores[f"AP{size[0]}"], "AR": scores[f"AR{size[0]}"]}
            for (size, text), count in zip(SIZE_RANGES.items(), by_size, strict=True)
        ],
        by_class=by_class,
        losses=found.mean_losses(),
        curves=_curves(boxes),
        operating_points=operating_points(boxes, found.results),
        confusion={
            "names": class_names(boxes),
            "matrix": confusion_matrix(outcomes, boxes.params.catIds).tolist(),
            "min_score": min_score,
            "iou": MATCHING_IOU,
        },
        images=[{**row, "file_name": images[row["id"]].get("file_name", "")} for row in image_rows(outcomes)],
        notes=list(notes),
    )
    for scorer in others:
        section = {"scores": _defined(summary(scorer)[0]), "by_iou": _by_iou(scorer)}
        setattr(report, scorer.params.iouType, section | {"by_class": [row | more for row, more in _classes(scorer)]})
    if unrefined:
        report.refinement = {
            when: {"scores": _defined(summaries(several)[0]), "by_iou": _by_iou(several[0])}
            for when, several in (("before", unrefined), ("after", scorers))
        }
    if found.kept_proposals:
        rows = [_defined(row) for row in recall(boxes.cocoGt, found.proposals, found.image_ids)]
        report.proposals = {"kept": found.kept_proposals, "rows": rows}
    return report


def _by_iou(scorer: COCOeval) -> list[Section]:
    precision = scorer.eval["precision"]  # [IoU, recall, class, size, maximum number of detections]
    return [{"iou": iou, "AP": _mean(of_iou[..., 0, -1])} for iou, of_iou in zip(IOUS, precision, strict=True)]


def _curves(scorer: COCOeval) -> Section:
    """Return precision over recall: the mean of the classes at :data:`CURVE_IOUS`, and each class at IoU 0.50."""
    precision, names = scorer.eval["precision"][..., 0, -1], class_names(scorer)
    with_objects = np.flatnonzero((precision > -1).all(axis=(0, 1)))
    mean = {
        f"{iou:.2f}": precision[IOUS.index(iou)][:, with_objects].mean(axis=1).tolist()
        for iou in (CURVE_IOUS if len(with_objects) else ())
    }
    by_class = {names[k]: precision[IOUS.index(0.5), :, k].tolist() for k in with_objects}
    return {"recall": [round(float(r), 2) for r in scorer.params.recThrs], "mean": mean, "by_class": by_class}


def _classes(scorer: COCOeval) -> Iterator[tuple[Section, Section]]:
    """Yield ``id`` and ``name`` of each class, and its scores. No keypoints are small."""
    sizes = [size[0] for size in scorer.params.areaRngLbl[1:]]
    for k, category in enumerate(scorer.params.catIds):
        precision, recalls = scorer.eval["precision"][:, :, k, :, -1], scorer.eval["recall"][:, k, :, -1]
        scores = {"AP": _mean(precision[..., 0])}
        scores |= {f"AP{iou}": _mean(precision[IOUS.index(iou / 100), :, 0]) for iou in (50, 75)}
        scores |= {f"AP{size}": _mean(precision[..., a]) for a, size in enumerate(sizes, 1)}
        scores |= {f"AR{size}": _mean(recalls[:, a]) for a, size in enumerate(("", *sizes))}
        yield {name: scorer.cocoGt.cats[category][name] for name in ("id", "name")}, scores


def _count_objects(scorer: COCOeval) -> dict[int, dict[str, int]]:
    """Count the objects of each class, in total and by size. Crowds do not count."""
    counts = {category: dict.fromkeys(OBJECT_COUNTS, 0) for category in scorer.cocoGt.cats}
    ranges = dict(zip(OBJECT_COUNTS, [(-np.inf, np.inf), *scorer.params.areaRng[1:]], strict=True))
    for one in (one for image_id in scorer.params.imgIds for one in scorer.cocoGt.imgToAnns[image_id]):
        for name, (low, high) in ranges.items():
            counts[one["category_id"]][name] += not one["iscrowd"] and low <= one["area"] <= high
    return counts


def _defined(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Replace pycocotools' -1 by ``None``."""
    return {name: None if score == -1 else score for name, score in scores.items()}


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of the defined values; pycocotools has -1 where there are no objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def newest_report(folder: Path, **about: Any) -> Report | None:
    """Return the newest report of a detector in a run's folder and the folders in it.

    Args:
        folder: the run's folder.
        about: required values of ``Report.about``: ``weights``, the digest of the detector's weights, and others.
    """
    reports = []
    for path in (*folder.glob("report.json"), *folder.glob("*/report.json")):
        try:
            report = Report.from_dict(read_json(path))
            if all(report.about[name] == value for name, value in about.items()):
                reports.append(report)
        except (DataError, KeyError, TypeError):  # another program's file
            continue
    return max(reports, key=lambda report: str(report.about.get("time", "")), default=None)
