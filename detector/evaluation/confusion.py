"""Detections matched with objects of any class: confusion matrix, and counts per image."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO

from detector.data.results import Result
from detector.evaluation.metric import ALL_SIZES, match

Outcome = Literal["found", "confused", "missed", "false", "crowd"]
MATCHING_IOU = 0.5  # minimum IoU of a detection with the object that it covers


@dataclass(frozen=True)
class BoxOutcome:
    """The outcome of an object, of a detection, or of both where the detection covers the object.

    "found" is an object detected as its class, "confused" one detected as another class, "missed" one that is not
    detected, "false" a detection without an object, and "crowd" a crowd or a detection on one, which is not counted.
    """

    kind: Outcome
    truth: dict[str, Any] | None  # the annotation
    detection: Result | None


def match_boxes(
    truth: COCO, results: list[Result], image_ids: Iterable[int], *, min_score: float = 0.5
) -> dict[int, list[BoxOutcome]]:
    """Match detections with objects of any class, in the order of their scores.

    Args:
        truth: the ground truth.
        results: detections in COCO's results format.
        image_ids: the images.
        min_score: minimum score of a detection.

    Returns:
        For each image, every object once and every detection once.
    """
    kept, image_ids = [result for result in results if result["score"] >= min_score], list(image_ids)
    settings = {"iouThrs": np.array([MATCHING_IOU]), "maxDets": [max(len(kept), 1)], **ALL_SIZES}
    scorer = match(truth, kept, image_ids, by_class=False, **settings)
    outcomes: dict[int, list[BoxOutcome]] = {image_id: [] for image_id in image_ids}
    for matched in filter(None, scorer.evalImgs):
        of_image, paired = outcomes[matched["image_id"]], set()
        # Detections are looked up by index: pycocotools keeps matched ids as floats, which changes large ones.
        pairs = zip(matched["gtIds"], matched["gtMatches"][0].astype(int), matched["gtIgnore"], strict=True)
        for object_id, number, is_crowd in pairs:
            annotation = truth.anns[object_id]
            if is_crowd or not number:
                of_image.append(BoxOutcome("crowd" if is_crowd else "missed", annotation, None))
                continue
            paired.add(number)
            same = kept[number - 1]["category_id"] == annotation["category_id"]
            of_image.append(BoxOutcome("found" if same else "confused", annotation, kept[number - 1]))
        for number, on_crowd in zip(matched["dtIds"], matched["dtMatches"][0], strict=True):
            if number not in paired:
                of_image.append(BoxOutcome("crowd" if on_crowd else "false", None, kept[number - 1]))
    return outcomes


def confusion_matrix(outcomes: Mapping[int, Sequence[BoxOutcome]], category_ids: Sequence[int]) -> np.ndarray:
    """Count the outcomes of :func:`match_boxes` by class.

    Returns:
        [n + 1, n + 1] counts for n classes. Rows are the ground truth, the last one for false detections; columns are
        the detected classes, the last one for missed objects.
    """
    place = {category: i for i, category in enumerate(category_ids)}
    matrix = np.zeros((len(place) + 1, len(place) + 1), dtype=int)
    for box in (box for boxes in outcomes.values() for box in boxes if box.kind != "crowd"):
        row, column = (len(place) if one is None else place[one["category_id"]] for one in (box.truth, box.detection))
        matrix[row, column] += 1
    return matrix


def image_rows(outcomes: Mapping[int, Sequence[BoxOutcome]]) -> list[dict[str, Any]]:
    """Count the outcomes of :func:`match_boxes` by image, the worst image first.

    Returns:
        For each image its ``id``, the number of its ``objects`` without crowds, how many of them are ``found``,
        ``confused`` and ``missed``, the number of ``false`` detections, and ``f1``: 2 found / (objects + detections),
        or 1 where there are neither objects nor detections.
    """
    rows: list[dict[str, Any]] = []
    for image_id, boxes in outcomes.items():
        kinds = Counter(box.kind for box in boxes)
        counts = {kind: kinds[kind] for kind in ("found", "confused", "missed", "false")}
        total = 2 * (kinds["found"] + kinds["confused"]) + kinds["missed"] + kinds["false"]
        f1 = 2 * kinds["found"] / total if total else 1.0
        rows.append({"id": image_id, "objects": sum(counts.values()) - kinds["false"], **counts, "f1": f1})
    return sorted(rows, key=lambda row: (row["f1"], -(row["missed"] + row["confused"] + row["false"]), row["id"]))


def confused_pairs(confusion: Mapping[str, Any], limit: int) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions as (true class, detected class, count).

    Args:
        confusion: ``names`` and ``matrix``, as in a report.
        limit: maximum number of pairs.
    """
    names, matrix = confusion["names"], np.array(confusion["matrix"])[:-1, :-1]
    matrix = matrix * ~np.eye(len(names), dtype=bool)
    order = np.argsort(-matrix, axis=None, kind="stable")[: min(limit, np.count_nonzero(matrix))]
    return [(names[i], names[j], int(matrix[i, j])) for i, j in zip(*np.unravel_index(order, matrix.shape))]
