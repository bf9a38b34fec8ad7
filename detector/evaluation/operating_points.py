"""From which score on to take detections: precision, recall and F1 over the score, and where F1 is highest."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from detector.data.results import Result
from detector.evaluation.metric import match
from detector.text import told_apart

IOU = 0.5
THRESHOLDS = [i / 100 for i in range(101)]  # of the curves


@dataclass(frozen=True)
class _Ranking:
    """Detections in the order of their scores, those on crowds left out.

    Args:
        scores: [D], the highest first.
        right: [D], whether each found an object of its class.
        objects: how many objects there are to be found.
    """

    scores: np.ndarray
    right: np.ndarray
    objects: int

    def measure(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision (NaN of none), recall and F1 of the first ``kept`` [K] detections, [K] each."""
        hits = np.concatenate([[0], np.cumsum(self.right)])[kept]
        with np.errstate(invalid="ignore"):
            return hits / kept, hits / self.objects, 2 * hits / (self.objects + kept)

    def best(self) -> dict[str, float | None]:
        """The score from which on F1 is highest (the highest of several), with precision, recall and F1 there."""
        nothing: dict[str, float | None] = dict.fromkeys(("score", "precision", "recall", "f1"))
        if not self.objects:
            return nothing
        if not self.right.any():
            return nothing | {"recall": 0.0, "f1": 0.0}
        next_score = np.append(self.scores[1:], -np.inf)
        kept = np.flatnonzero(self.scores > next_score) + 1  # of equal scores all are taken or none
        precision, recall, f1 = self.measure(kept)
        i = int(f1.argmax())
        last = kept[i] - 1
        return {
            "score": _between(float(next_score[last]), float(self.scores[last])),
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
        }

    def curves(self) -> dict[str, list[float | None]]:
        """Precision, recall and F1 at each of :data:`THRESHOLDS`; the precision of no detections is ``None``."""
        if not self.objects:
            return {}
        measured = self.measure(np.searchsorted(-self.scores, -np.array(THRESHOLDS), side="right"))
        return {
            name: [None if np.isnan(value) else float(value) for value in values]
            for name, values in zip(("precision", "recall", "f1"), measured)
        }


def operating_points(scorer: COCOeval, results: list[Result]) -> dict[str, Any]:
    """What comes of taking detections from a score on, at IoU 0.50.

    Matched as in the metric: class by class, the best 100 of an image. A detection counts if ``score >= threshold``.

    Args:
        scorer: what :func:`~detector.evaluation.metric.match` returned by its defaults.
        results: what was matched.

    Returns:
        ``iou``; ``mean``, of all classes' detections together, and ``by_class``: the threshold (``score``) with the
        highest F1, of equal ones the highest, then cut to few decimals as far as no other detection passes, and
        ``precision``, ``recall`` and ``f1`` there. Of a class of which nothing is found there is no ``score`` and
        ``precision``, of one without objects none of the four (``None``); ``mean`` is ``None`` in both cases. And
        ``curves``, over 101 thresholds (``score``): the three of ``mean``, and of each class with objects.
    """
    if not scorer.evalImgs:  # faster-coco-eval keeps no matches
        images = scorer.params.imgIds
        scorer = match(scorer.cocoGt, results, images, iou=(IOU,), max_detections=(100,), all_sizes=False)
    settings = scorer.params
    level = int(np.flatnonzero(np.isclose(settings.iouThrs, IOU))[0])
    matches: dict[int, list[Any]] = {category: [] for category in settings.catIds}
    for one in scorer.evalImgs:
        if one is not None and one["aRng"] == settings.areaRng[0]:  # all sizes
            matches[one["category_id"]].append(one)
    rankings = [_ranking(matches[category], level) for category in settings.catIds]
    together = _ranking([one for of_class in matches.values() for one in of_class], level)
    categories = [scorer.cocoGt.cats[category] for category in settings.catIds]
    best = together.best()
    return {
        "iou": IOU,
        "mean": best if best["score"] is not None else None,
        "by_class": [
            {"id": category["id"], "name": category["name"], "objects": ranking.objects, **ranking.best()}
            for category, ranking in zip(categories, rankings, strict=True)
        ],
        "curves": {
            "score": THRESHOLDS,
            "mean": together.curves(),
            "by_class": {
                name: ranking.curves()
                for name, ranking in zip(told_apart(categories), rankings, strict=True)
                if ranking.objects
            },
        },
    }


def _ranking(matches: list[Any], level: int) -> _Ranking:
    """The detections of pycocotools' matches of some images.

    Args:
        matches: entries of ``evalImgs``.
        level: the index of the IoU threshold.
    """
    scores = np.array([score for one in matches for score in one["dtScores"]], dtype=float)
    matched = np.concatenate([[], *(one["dtMatches"][level] for one in matches)]) != 0
    counts = np.concatenate([[], *(one["dtIgnore"][level] for one in matches)]) == 0
    order = np.argsort(-scores[counts], kind="stable")
    objects = sum(int((np.asarray(one["gtIgnore"]) == 0).sum()) for one in matches)
    return _Ranking(scores[counts][order], matched[counts][order], objects)


def _between(low: float, high: float) -> float:
    """A number of few decimals above ``low``, up to ``high``."""
    for digits in range(2, 17):
        rounded = round(high, digits)
        if rounded > high:
            rounded = round(rounded - 10**-digits, digits)
        if rounded > low:
            return rounded
    return high
