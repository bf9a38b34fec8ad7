"""Which class is taken for which, and which images go well or badly: detections are matched with the ground truth."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO

from detector.data.results import Result
from detector.evaluation.metric import match

Kind = Literal["found", "confused", "missed", "false", "crowd"]


@dataclass(frozen=True)
class BoxOutcome:
    """What became of an object and the detection that covers it, or of either where it is alone.

    Args:
        kind: "found" is an object detected as its class, "confused" one detected as another class, "missed" one that
            is not detected, "false" a detection of nothing, "crowd" a crowd, or a detection on one: these are not
            counted.
        truth: the object's annotation, if there is an object.
        detection: the result, if there is a detection.
    """

    kind: Kind
    truth: dict[str, Any] | None
    detection: Result | None


def match_boxes(
    truth: COCO, results: list[Result], image_ids: Iterable[int], *, min_score: float = 0.5, iou: float = 0.5
) -> dict[int, list[BoxOutcome]]:
    """Match detections with objects whatever their classes, the best score first.

    pycocotools does the matching: crowds are neither right nor wrong.

    Args:
        truth: the ground truth.
        results: detections in COCO's results format.
        image_ids: the images that were looked at.
        min_score: detections below it are left out.
        iou: a detection covers an object from this IoU on.

    Returns:
        For each image every object once, and every detection.
    """
    kept = [result for result in results if result["score"] >= min_score]
    most = max(len(kept), 1)  # no limit to an image's detections
    image_ids = list(image_ids)
    scorer = match(truth, kept, image_ids, by_class=False, iou=(iou,), max_detections=(most,), all_sizes=False)
    outcomes: dict[int, list[BoxOutcome]] = {image_id: [] for image_id in image_ids}
    for matched in scorer.evalImgs:
        if matched is None:
            continue
        of_image = outcomes[matched["image_id"]]
        paired = set()  # by the detections' numbers: pycocotools keeps ids as floats, which large ones do not survive
        for object_id, number, ignored in zip(
            matched["gtIds"], matched["gtMatches"][0], matched["gtIgnore"], strict=True
        ):
            annotation = truth.anns[object_id]
            if ignored:
                of_image.append(BoxOutcome("crowd", annotation, None))
            elif not number:
                of_image.append(BoxOutcome("missed", annotation, None))
            else:
                found = kept[int(number) - 1]
                paired.add(int(number))
                same = found["category_id"] == annotation["category_id"]
                of_image.append(BoxOutcome("found" if same else "confused", annotation, found))
        for number, covers in zip(matched["dtIds"], matched["dtMatches"][0], strict=True):
            if number not in paired:
                of_image.append(BoxOutcome("crowd" if covers else "false", None, kept[number - 1]))
    return outcomes


def confusion(
    truth: COCO, results: list[Result], image_ids: Iterable[int], *, min_score: float = 0.5, iou: float = 0.5
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Count the outcomes of :func:`match_boxes`, whose arguments these are.

    Returns:
        [n + 1, n + 1] counts for n classes in the order of their ids: the rows are the ground truth, the last one
        background (false detections); the columns what was detected, the last one nothing (missed). And of each
        image, the worst first, its ``id``, the number of its ``objects`` without crowds, how many of them are
        ``found``, ``confused`` and ``missed``, how many detections are ``false``, and ``f1``: 2 found / (objects +
        detections), or 1 where there is nothing and nothing was found.
    """
    place = {category: i for i, category in enumerate(sorted(truth.cats))}
    matrix = np.zeros((len(place) + 1, len(place) + 1), dtype=int)
    images: list[dict[str, Any]] = []
    for image_id, boxes in match_boxes(truth, results, image_ids, min_score=min_score, iou=iou).items():
        kinds = dict.fromkeys(("found", "confused", "missed", "false"), 0)
        for box in boxes:
            if box.kind != "crowd":
                kinds[box.kind] += 1
                row, column = (
                    len(place) if one is None else place[one["category_id"]] for one in (box.truth, box.detection)
                )
                matrix[row, column] += 1
        objects = kinds["found"] + kinds["confused"] + kinds["missed"]
        total = objects + kinds["found"] + kinds["confused"] + kinds["false"]
        f1 = 2 * kinds["found"] / total if total else 1.0
        images.append({"id": image_id, "objects": objects, **kinds, "f1": f1})
    images.sort(key=lambda one: (one["f1"], -(one["missed"] + one["confused"] + one["false"]), one["id"]))
    return matrix, images


def confused_pairs(confusion: Mapping[str, Any], most: int) -> list[tuple[str, str, int]]:
    """The most frequent confusions, as (truth, detected as, count).

    Args:
        confusion: ``names`` and ``matrix``, as in a report.
        most: how many, at most.
    """
    names, n = confusion["names"], len(confusion["names"])
    confused = np.array(confusion["matrix"], dtype=np.int64).reshape(n + 1, n + 1)[:-1, :-1]
    confused = confused * ~np.eye(n, dtype=bool)
    order = np.argsort(-confused, axis=None, kind="stable")[:most].tolist()
    return [(names[i // n], names[i % n], int(confused.flat[i])) for i in order if confused.flat[i]]
