"""Which class is taken for which, and which images go well or badly: one match of detections with the truth."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO

from detector.evaluation.metric import Result, match

Kind = Literal["found", "confused", "missed", "false", "crowd"]


@dataclass(frozen=True)
class BoxOutcome:
    """What became of an object and the detection that covers it, or of one that has no other.

    Args:
        kind: "found": an object detected as its class; "confused": as another class; "missed": not detected;
            "false": a detection of nothing; "crowd": a crowd, or a detection on one, which are not counted.
        truth: the annotation; ``None``: there is no object.
        detection: the result; ``None``: there is no detection.
    """

    kind: Kind
    truth: dict[str, Any] | None
    detection: Result | None


@dataclass(frozen=True)
class ImageOutcome:
    """What became of an image's objects and detections.

    Args:
        id: the image's.
        objects: of the truth, without crowds.
        found: objects detected as their class.
        confused: objects detected as another class.
        missed: objects not detected.
        false: detections of nothing. Those on crowds are not counted.
    """

    id: int
    objects: int
    found: int
    confused: int
    missed: int
    false: int

    @property
    def f1(self) -> float:
        """2 found / (objects + detections); 1 if there is nothing, and nothing was found."""
        total = self.objects + self.found + self.confused + self.false
        return 2 * self.found / total if total else 1.0


def match_boxes(
    truth: COCO, results: list[Result], image_ids: Iterable[int], *, min_score: float = 0.5, iou: float = 0.5
) -> dict[int, list[BoxOutcome]]:
    """Match detections with objects whatever their classes, the best score first.

    pycocotools does the matching: crowds are neither right nor wrong.

    Args:
        truth: the annotations.
        results: COCO's results format.
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
) -> tuple[np.ndarray, list[ImageOutcome]]:
    """Count what :func:`match_boxes` says, of which the arguments are.

    Returns:
        [n + 1, n + 1] counts for n classes in the order of their ids: the rows are the truth, the last one
        background (false detections); the columns what was detected, the last one nothing (missed). And the
        outcome of each image, the worst first.
    """
    place = {category: i for i, category in enumerate(sorted(truth.cats))}
    matrix = np.zeros((len(place) + 1, len(place) + 1), dtype=int)
    outcomes = []
    for image_id, boxes in match_boxes(truth, results, image_ids, min_score=min_score, iou=iou).items():
        for box in boxes:
            if box.kind != "crowd":
                row, column = (
                    len(place) if one is None else place[one["category_id"]] for one in (box.truth, box.detection)
                )
                matrix[row, column] += 1
        kinds = Counter(box.kind for box in boxes)
        found, confused, missed = kinds["found"], kinds["confused"], kinds["missed"]
        outcomes.append(ImageOutcome(image_id, found + confused + missed, found, confused, missed, kinds["false"]))
    outcomes.sort(key=lambda one: (one.f1, -(one.missed + one.confused + one.false), one.id))
    return matrix, outcomes
