"""The report of an evaluation: a dataclass of JSON types, built section by section."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector.errors import DataError
from detector.evaluation.confusion import BoxOutcome, confusion_matrix, image_rows
from detector.evaluation.metric import SUMMARY, scores_of
from detector.evaluation.operating_points import operating_points
from detector.evaluation.proposals import recall
from detector.evaluation.running import Predictions
from detector.files import read_json
from detector.text import told_apart

Section = dict[str, Any]
SIZE_RANGES = {  # COCO's, in its order
    "small": "area below 32 x 32 pixels",
    "medium": "area from 32 x 32 to 96 x 96 pixels",
    "large": "area above 96 x 96 pixels",
}
CURVE_IOUS = (0.5, 0.75, 0.9)  # of the mean precision-recall curves
MATCHING_IOU = 0.5  # of the confusion matrix and of the images' counts


@dataclass
class Report:
    """The numbers of an evaluation, section by section, in JSON types. An undefined number is ``None``.

    Args:
        about: how the detections were made, and the numbers of images, objects and detections.
        scores: COCO's numbers, and AP90.
        by_iou: ``AP`` at each IoU threshold.
        by_size: ``AP``, ``AR`` and the number of objects of each size.
        by_class: the scores and the numbers of objects of each class.
        proposals: recall of the RPN's proposals, if they were recorded.
        losses: mean losses, if they were computed.
        curves: precision over recall.
        operating_points: see :func:`~detector.evaluation.operating_points.operating_points`.
        confusion: class names, and their confusion matrix.
        images: see :func:`~detector.evaluation.confusion.image_rows`.
        segm: the scores of masks, if they are scored.
        keypoints: the scores of keypoints, if they are scored.
        refinement: the scores before and after the refinement, if they are compared.
        speed: see :func:`~detector.evaluation.timing.measure_stages`.
        notes: sentences that a reader of the scores needs to know.
    """

    about: Section
    scores: dict[str, float | None] = field(default_factory=dict)
    by_iou: list[Section] = field(default_factory=list)
    by_size: list[Section] = field(default_factory=list)
    by_class: list[Section] = field(default_factory=list)
    proposals: Section | None = None
    losses: dict[str, float] | None = None
    curves: Section = field(default_factory=dict)
    operating_points: Section = field(default_factory=dict)
    confusion: Section = field(default_factory=dict)
    images: list[Section] = field(default_factory=list)
    segm: Section | None = None
    keypoints: Section | None = None
    refinement: Section | None = None
    speed: Section | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_dict(cls, content: Any) -> "Report":
        """Return the report of :meth:`to_dict`.

        Raises:
            DataError: there is no ``about``, or an unknown section.
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
    min_score: float = 0.5,
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
    scorer = scorers[0]
    truth, image_ids = scorer.cocoGt, [int(image_id) for image_id in scorer.params.imgIds]
    categories = [truth.cats[category] for category in scorer.params.catIds]
    scores = scores_section([scorer])
    by_class, by_size = by_class_section(scorer), by_size_section(scorer, scores)
    objects = sum(row["objects"] for row in by_class)
    report = Report(
        about={**about, "images": len(image_ids), "objects": objects, "detections": len(found.results)},
        scores={name: scores[name] for name in (*SUMMARY, "AP90")},
        by_iou=by_iou_section(scorer),
        by_size=by_size,
        by_class=by_class,
        losses=found.mean_losses(),
        curves=curves_section(scorer),
        operating_points=operating_points(scorer, found.results),
        confusion={
            "names": [category["name"] for category in categories],
            "matrix": confusion_matrix(outcomes, scorer.params.catIds).tolist(),
            "min_score": min_score,
            "iou": MATCHING_IOU,
        },
        images=[{**row, "file_name": truth.imgs[row["id"]].get("file_name", "")} for row in image_rows(outcomes)],
        notes=list(notes),
    )
    for other in scorers[1:]:
        setattr(report, other.params.iouType, masks_or_keypoints_section(other))
    if unrefined:
        report.refinement = refinement_section(unrefined, scorers)
    if found.proposals is not None:
        rows = [_defined(row) for row in recall(truth, found.proposals, image_ids)]
        report.proposals = {"kept": found.kept_proposals, "rows": rows}
    return report


def scores_section(scorers: Sequence[COCOeval]) -> dict[str, float | None]:
    """Return the scores of :func:`~detector.evaluation.metric.scores_of`, ``None`` where they are undefined."""
    return _defined(scores_of(scorers))


def by_iou_section(scorer: COCOeval) -> list[Section]:
    precision = scorer.eval["precision"]  # [IoU, recall, class, size, maximum number of detections]
    return [{"iou": iou, "AP": _mean(precision[t, :, :, 0, -1])} for t, iou in enumerate(_ious(scorer))]


def by_size_section(scorer: COCOeval, scores: Mapping[str, float | None]) -> list[Section]:
    counts = _object_counts(scorer)
    return [
        {
            "size": size,
            "range": text,
            "objects": sum(of_class[f"objects_{size}"] for of_class in counts.values()),
            "AP": scores[f"AP{size[0]}"],
            "AR": scores[f"AR{size[0]}"],
        }
        for size, text in SIZE_RANGES.items()
    ]


def by_class_section(scorer: COCOeval) -> list[Section]:
    counts = _object_counts(scorer)
    return [{**row, **counts[row["id"]], **_class_scores(scorer, k)} for k, row in enumerate(_classes(scorer))]


def curves_section(scorer: COCOeval) -> Section:
    """Return precision over recall: the mean of the classes at :data:`CURVE_IOUS`, and each class at IoU 0.50."""
    precision, ious = scorer.eval["precision"][..., 0, -1], _ious(scorer)  # [IoU, recall, class]
    with_objects = np.flatnonzero((precision > -1).all(axis=(0, 1)))
    names = told_apart(scorer.cocoGt.cats[category] for category in scorer.params.catIds)
    mean = {
        f"{iou:.2f}": precision[ious.index(iou)][:, with_objects].mean(axis=1).tolist()
        for iou in (CURVE_IOUS if len(with_objects) else ())
    }
    by_class = {names[k]: precision[ious.index(0.5), :, k].tolist() for k in with_objects}
    return {"recall": [round(float(r), 2) for r in scorer.params.recThrs], "mean": mean, "by_class": by_class}


def masks_or_keypoints_section(scorer: COCOeval) -> Section:
    scores = scores_section([scorer])
    return {
        "scores": {name.rpartition("/")[2]: score for name, score in scores.items()},
        "by_iou": by_iou_section(scorer),
        "by_class": [{**row, **_class_scores(scorer, k)} for k, row in enumerate(_classes(scorer))],
    }


def refinement_section(before: Sequence[COCOeval], after: Sequence[COCOeval]) -> Section:
    return {
        when: {"scores": scores_section(scorers), "by_iou": by_iou_section(scorers[0])}
        for when, scorers in (("before", before), ("after", after))
    }


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
    categories = [scorer.cocoGt.cats[category] for category in scorer.params.catIds]
    return [{"id": category["id"], "name": category["name"]} for category in categories]


def _object_counts(scorer: COCOeval) -> dict[int, dict[str, int]]:
    """Count the objects of each class, in total and by size. Crowds do not count."""
    truth: COCO = scorer.cocoGt
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
