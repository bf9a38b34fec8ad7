"""Which class is taken for which, and which images go well or badly: one match of detections with the truth."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO

from detector.evaluation.metric import Result, match


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


def confusion(
    truth: COCO, results: list[Result], image_ids: Iterable[int], *, min_score: float = 0.5, iou: float = 0.5
) -> tuple[np.ndarray, list[ImageOutcome]]:
    """Match detections with objects whatever their classes, the best score first, and count.

    pycocotools does the matching: crowds are neither right nor wrong.

    Args:
        truth: the annotations.
        results: COCO's results format.
        image_ids: the images that were looked at.
        min_score: detections below it are left out.
        iou: a detection covers an object from this IoU on.

    Returns:
        [n + 1, n + 1] counts for n classes in the order of their ids: the rows are the truth, the last one
        background (false detections); the columns what was detected, the last one nothing (missed). And the
        outcome of each image, the worst first.
    """
    image_ids = list(image_ids)
    place = {category: i for i, category in enumerate(sorted(truth.cats))}
    background = len(place)
    matrix = np.zeros((background + 1, background + 1), dtype=int)
    kept = [result for result in results if result["score"] >= min_score]
    most = max(len(kept), 1)  # no limit to an image's detections
    scorer = match(truth, kept, image_ids, by_class=False, iou=(iou,), max_detections=(most,), all_sizes=False)
    matched = {found["image_id"]: found for found in scorer.evalImgs if found is not None}
    found_class = {number: place[result["category_id"]] for number, result in enumerate(kept, start=1)}
    outcomes = []
    for image_id in image_ids:
        before = matrix.copy()
        match_of = matched.get(image_id)
        if match_of is not None:
            for object_id, detection, ignored in zip(
                match_of["gtIds"], match_of["gtMatches"][0], match_of["gtIgnore"], strict=True
            ):
                if not ignored:
                    column = found_class[int(detection)] if detection else background
                    matrix[place[truth.anns[object_id]["category_id"]], column] += 1
            for number, covered in zip(match_of["dtIds"], match_of["dtMatches"][0], strict=True):
                if not covered:  # what lies on a crowd is covered by it
                    matrix[background, found_class[number]] += 1
        change = matrix - before
        found = int(np.trace(change))
        objects, missed = int(change[:background].sum()), int(change[:background, background].sum())
        false = int(change[background].sum())
        outcomes.append(ImageOutcome(image_id, objects, found, objects - found - missed, missed, false))
    outcomes.sort(key=lambda one: (one.f1, -(one.missed + one.confused + one.false), one.id))
    return matrix, outcomes
