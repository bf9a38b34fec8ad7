"""Score thresholds: precision, recall and F1 at each, and the thresholds with the highest F1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from detector.data.results import Result
from detector.evaluation.metric import ALL_SIZES, class_names, match

IOU = 0.5
THRESHOLDS = [i / 100 for i in range(101)]  # of the curves
MEASURES = ("precision", "recall", "f1")


@dataclass(frozen=True)
class _Ranking:
    """Detections in the order of their scores, without those on crowds."""

    scores: np.ndarray  # [D], the highest first
    right: np.ndarray  # [D], whether each found an object of its class
    objects: int

    @classmethod
    def of(cls, matches: Sequence[Any], level: int) -> "_Ranking":
        """Rank the detections in entries of pycocotools' ``evalImgs`` at the IoU threshold of index ``level``."""
        scores = np.array([score for one in matches for score in one["dtScores"]], dtype=float)
        matched = np.concatenate([[], *(one["dtMatches"][level] for one in matches)]) != 0
        counts = np.concatenate([[], *(one["dtIgnore"][level] for one in matches)]) == 0
        order = np.argsort(-scores[counts], kind="stable")
        objects = sum(int((np.asarray(one["gtIgnore"]) == 0).sum()) for one in matches)
        return cls(scores[counts][order], matched[counts][order], objects)

    def measure(self, kept: np.ndarray) -> np.ndarray:
        """Return :data:`MEASURES` [3, K] of the first ``kept`` [K] detections; the precision of none is NaN."""
        hits = np.concatenate([[0], np.cumsum(self.right)])[kept]
        with np.errstate(invalid="ignore"):
            return np.stack([hits / kept, hits / self.objects, 2 * hits / (self.objects + kept)])

    def best(self) -> dict[str, float | None]:
        """Return the threshold with the highest F1, of equal ones the highest, and the measures there."""
        nothing: dict[str, float | None] = dict.fromkeys(("score", *MEASURES))
        if not self.objects or not self.right.any():
            return nothing | ({"recall": 0.0, "f1": 0.0} if self.objects else {})
        next_score = np.append(self.scores[1:], -np.inf)
        kept = np.flatnonzero(self.scores > next_score) + 1  # detections with equal scores are kept together
        measures = self.measure(kept)
        i = int(measures[2].argmax())
        score = _short_between(float(next_score[kept[i] - 1]), float(self.scores[kept[i] - 1]))
        return {"score": score, **dict(zip(MEASURES, measures[:, i].tolist()))}

    def curves(self) -> dict[str, list[float | None]]:
        """Return the measures at each of :data:`THRESHOLDS`; the precision of no detections is ``None``."""
        if not self.objects:
            return {}
        measures = self.measure(np.searchsorted(-self.scores, -np.array(THRESHOLDS), side="right"))
        return {name: [None if np.isnan(v) else float(v) for v in row] for name, row in zip(MEASURES, measures)}


def operating_points(scorer: COCOeval, results: list[Result]) -> dict[str, Any]:
    """Measure precision, recall and F1 over the score threshold, at IoU 0.50. Matching is the metric's.

    Args:
        scorer: see :func:`~detector.evaluation.metric.match`, with default settings.
        results: the results that were matched.

    Returns:
        ``iou``; ``mean``, the threshold (``score``) with the highest F1 of all detections together and ``precision``,
        ``recall`` and ``f1`` there, ``None`` if no object is found; ``by_class``, the same of each class; and
        ``curves``, the three over 101 thresholds. A detection is kept if ``score >= threshold``. Without an object, or
        a right detection, a number may be ``None``.
    """
    if not scorer.evalImgs:  # faster-coco-eval keeps no matches
        settings = {"iouThrs": np.array([IOU]), "maxDets": [100], **ALL_SIZES}
        scorer = match(scorer.cocoGt, results, scorer.params.imgIds, **settings)
    params = scorer.params
    level = int(np.flatnonzero(np.isclose(params.iouThrs, IOU))[0])
    matches: dict[int, list[Any]] = {int(category): [] for category in params.catIds}
    for one in scorer.evalImgs:
        if one is not None and one["aRng"] == params.areaRng[0]:  # all sizes
            matches[one["category_id"]].append(one)
    rankings = {category: _Ranking.of(of_class, level) for category, of_class in matches.items()}
    together = _Ranking.of([one for of_class in matches.values() for one in of_class], level)
    best = together.best()
    named = zip(class_names(scorer), rankings.values(), strict=True)
    return {
        "iou": IOU,
        "mean": best if best["score"] is not None else None,
        "by_class": [
            {"id": category, "name": scorer.cocoGt.cats[category]["name"], "objects": one.objects, **one.best()}
            for category, one in rankings.items()
        ],
        "curves": {
            "score": THRESHOLDS,
            "mean": together.curves(),
            "by_class": {name: one.curves() for name, one in named if one.objects},
        },
    }


def _short_between(low: float, high: float) -> float:
    """Return the number with the fewest decimals above ``low`` and up to ``high``."""
    for digits in range(2, 17):
        rounded = round(high, digits)
        if rounded > high:
            rounded = round(rounded - 10**-digits, digits)
        if rounded > low:
            return rounded
    return high
