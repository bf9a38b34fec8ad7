"""The report of an evaluation: a dataclass of JSON types, built section by section."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from detector.errors import DataError
from detector.evaluation.confusion import MATCHING_IOU, BoxOutcome, confusion_matrix, image_rows
from detector.evaluation.metric import class_names, summaries
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
        return {one.name: getattr(self, one.name) for one in fields(self)}

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
        notes: sentences that a reader of the scores needs to know.
    """
    boxes = scorers[0]
    truth, classes, image_ids = boxes.cocoGt, _classes(boxes), [int(image_id) for image_id in boxes.params.imgIds]
    scores, counts = _defined(summaries([boxes])[0]), _count_objects(boxes)
    objects = sum(of_class["objects"] for of_class in counts.values())
    report = Report(
        about={**about, "images": len(image_ids), "objects": objects, "detections": len(found.results)},
        scores=scores,
        by_iou=by_iou_section(boxes),
        by_size=[
            {
                "size": size,
                "range": text,
                "objects": sum(of_class[f"objects_{size}"] for of_class in counts.values()),
                "AP": scores[f"AP{size[0]}"],
                "AR": scores[f"AR{size[0]}"],
            }
            for size, text in SIZE_RANGES.items()
        ],
        by_class=[{**row, **counts[row["id"]], **_class_scores(boxes, k)} for k, row in enumerate(classes)],
        losses=found.mean_losses(),
        curves=curves_section(boxes),
        operating_points=operating_points(boxes, found.results),
        confusion={
            "names": [row["name"] for row in classes],
            "matrix": confusion_matrix(outcomes, boxes.params.catIds).tolist(),
            "min_score": min_score,
            "iou": MATCHING_IOU,
        },
        images=[{**row, "file_name": truth.imgs[row["id"]].get("file_name", "")} for row in image_rows(outcomes)],
        notes=list(notes),
    )
    for scorer in scorers[1:]:
        setattr(report, scorer.params.iouType, masks_or_keypoints_section(scorer))
    if unrefined:
        report.refinement = {
            when: {"scores": _defined(summaries(several)[0]), "by_iou": by_iou_section(several[0])}
            for when, several in (("before", unrefined), ("after", scorers))
        }
    if found.proposals is not None:
        rows = [_defined(row) for row in recall(truth, found.proposals, image_ids)]
        report.proposals = {"kept": found.kept_proposals, "rows": rows}
    return report


def by_iou_section(scorer: COCOeval) -> list[Section]:
    """Return the ``AP`` at each IoU threshold."""
    precision = scorer.eval["precision"]  # [IoU, recall, class, size, maximum number of detections]
    return [{"iou": iou, "AP": _mean(precision[t, :, :, 0, -1])} for t, iou in enumerate(_ious(scorer))]


def curves_section(scorer: COCOeval) -> Section:
    """Return precision over recall: the mean of the classes at :data:`CURVE_IOUS`, and each class at IoU 0.50."""
    precision, ious, names = scorer.eval["precision"][..., 0, -1], _ious(scorer), class_names(scorer)
    with_objects = np.flatnonzero((precision > -1).all(axis=(0, 1)))
    mean = {
        f"{iou:.2f}": precision[ious.index(iou)][:, with_objects].mean(axis=1).tolist()
        for iou in (CURVE_IOUS if len(with_objects) else ())
    }
    by_class = {names[k]: precision[ious.index(0.5), :, k].tolist() for k in with_objects}
    return {"recall": [round(float(r), 2) for r in scorer.params.recThrs], "mean": mean, "by_class": by_class}


def masks_or_keypoints_section(scorer: COCOeval) -> Section:
    scores = {name.rpartition("/")[2]: score for name, score in _defined(summaries([scorer])[0]).items()}
    by_class = [{**row, **_class_scores(scorer, k)} for k, row in enumerate(_classes(scorer))]
    return {"scores": scores, "by_iou": by_iou_section(scorer), "by_class": by_class}


def newest_report(folder: Path, weights: str) -> Report | None:
    """Return the newest report of a detector in a run's folder and the folders in it.

    Args:
        folder: the run's folder.
        weights: the digest of the detector's weights.
    """
    reports = []
    for path in (*folder.glob("report.json"), *folder.glob("*/report.json")):
        try:
            report = Report.from_dict(read_json(path))
            if report.about["weights"] == weights:
                reports.append(report)
        except (DataError, KeyError, TypeError):  # another program's file
            continue
    return max(reports, key=lambda report: str(report.about.get("time", "")), default=None)


def _ious(scorer: COCOeval) -> list[float]:
    return [round(float(iou), 2) for iou in scorer.params.iouThrs]


def _classes(scorer: COCOeval) -> list[Section]:
    categories = (scorer.cocoGt.cats[category] for category in scorer.params.catIds)
    return [{"id": category["id"], "name": category["name"]} for category in categories]


def _count_objects(scorer: COCOeval) -> dict[int, dict[str, int]]:
    """Count the objects of each class, in total and by size. Crowds do not count."""
    truth = scorer.cocoGt
    counts = {category: {"objects": 0} | {f"objects_{size}": 0 for size in SIZE_RANGES} for category in truth.cats}
    for annotation in (one for image_id in scorer.params.imgIds for one in truth.imgToAnns[image_id]):
        if not annotation["iscrowd"]:
            of_class = counts[annotation["category_id"]]
            of_class["objects"] += 1
            for size, (low, high) in zip(SIZE_RANGES, scorer.params.areaRng[1:]):
                of_class[f"objects_{size}"] += int(low <= annotation["area"] <= high)
    return counts


def _class_scores(scorer: COCOeval, k: int) -> dict[str, float | None]:
    """Return AP, AP50, AP75, AR, and AP and AR by size of the class at place ``k``. No keypoints are small."""
    precision, recalls = scorer.eval["precision"][:, :, k, :, -1], scorer.eval["recall"][:, k, :, -1]
    ious, sizes = _ious(scorer), scorer.params.areaRngLbl[1:]
    row = {"AP": _mean(precision[..., 0])}
    row |= {f"AP{iou}": _mean(precision[ious.index(iou / 100), :, 0]) for iou in (50, 75)}
    row |= {f"AP{size[0]}": _mean(precision[..., a]) for a, size in enumerate(sizes, 1)}
    return row | {f"AR{size[:1]}": _mean(recalls[:, a]) for a, size in enumerate(("", *sizes))}


def _defined(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Replace pycocotools' -1 by ``None``."""
    return {name: None if score == -1 else score for name, score in scores.items()}


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of the defined values; pycocotools has -1 where there are no objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
