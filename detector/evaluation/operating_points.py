"""Score thresholds: precision, recall and F1 at each, and the thresholds with the highest F1."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from detector.data.results import Result
from detector.evaluation.metric import ALL_SIZES, match

IOU = 0.5
THRESHOLDS = [i / 100 for i in range(101)]  # of the curves
Ranking = tuple[np.ndarray, np.ndarray, int]  # scores [D] in order, whether each is right [D], number of objects
MEASURES = ("precision", "recall", "f1")


def operating_points(scorer: COCOeval, results: list[Result]) -> dict[str, Any]:
    """Measure precision, recall and F1 over the score threshold, at IoU 0.50. Matching is the metric's.

    Args:
        scorer: see :func:`~detector.evaluation.metric.match`, with default settings.
        results: the results that were matched.

    Returns:
        A dict. ``iou`` is the IoU threshold. ``mean`` has the threshold with the highest F1 over all classes
        (``score``) and its ``precision``, ``recall`` and ``f1``; it is ``None`` if no object is found. ``by_class`` has
        the same for each class. ``curves`` has the three measures over all classes (``mean``) at 101 thresholds
        (``score``). Detections with ``score >= threshold`` are kept. Undefined numbers are ``None``.
    """
    if not scorer.evalImgs:  # faster-coco-eval keeps no matches
        settings = {"iouThrs": np.array([IOU]), "maxDets": [100], **ALL_SIZES}
        scorer = match(scorer.cocoGt, results, scorer.params.imgIds, **settings)
    params, classes = scorer.params, scorer.cocoGt.cats
    level = int(np.flatnonzero(np.isclose(params.iouThrs, IOU))[0])
    # evalImgs is ordered by class, size and image; the first size is all.
    images, step = len(params.imgIds), len(params.imgIds) * len(params.areaRng)
    matches = {
        int(category): [one for one in scorer.evalImgs[k * step : k * step + images] if one is not None]
        for k, category in enumerate(params.catIds)
    }
    together = _rank([one for of_class in matches.values() for one in of_class], level)
    rankings = {category: _rank(of_class, level) for category, of_class in matches.items()}
    by_class = [
        {"id": category, "name": classes[category]["name"], "objects": ranking[2], **_best(ranking)}
        for category, ranking in rankings.items()
    ]
    measures = _measure(together, np.array(THRESHOLDS)) if together[2] else ()
    curves = {name: [None if np.isnan(v) else float(v) for v in row] for name, row in zip(MEASURES, measures)}
    mean, over_score = _best(together) if together[1].any() else None, {"score": THRESHOLDS, "mean": curves}
    return {"iou": IOU, "mean": mean, "by_class": by_class, "curves": over_score}


def _rank(matches: Sequence[Any], level: int) -> Ranking:
    """Rank the detections in entries of pycocotools' ``evalImgs`` at the IoU threshold of index ``level``."""
    scores, ignored = (np.concatenate([[], *(one[name] for one in matches)]) for name in ("dtScores", "gtIgnore"))
    matched, on_crowds = (
        np.concatenate([[], *(one[name][level] for one in matches)]) != 0 for name in ("dtMatches", "dtIgnore")
    )
    order = np.flatnonzero(~on_crowds)[np.argsort(-scores[~on_crowds], kind="stable")]
    return scores[order], matched[order], int((ignored == 0).sum())


def _measure(ranking: Ranking, thresholds: np.ndarray) -> np.ndarray:
    """Return :data:`MEASURES` [3, T] at thresholds [T]; the precision without detections is NaN."""
    scores, right, objects = ranking
    kept = np.searchsorted(-scores, -thresholds, side="right")
    hits = np.concatenate([[0], np.cumsum(right)])[kept]
    with np.errstate(invalid="ignore"):
        return np.stack([hits / kept, hits / objects, 2 * hits / (objects + kept)])


def _best(ranking: Ranking) -> dict[str, float | None]:
    """Return the threshold with the highest F1 (the highest one on a tie) and its measures."""
    scores, right, objects = ranking
    if not right.any():
        return dict.fromkeys(("score", *MEASURES)) | ({"recall": 0.0, "f1": 0.0} if objects else {})
    thresholds = np.unique(scores)[::-1]
    measures = _measure(ranking, thresholds)
    i = int(measures[2].argmax())
    low, high = np.append(thresholds, -np.inf)[[i + 1, i]].tolist()
    return {"score": _short_between(low, high), **dict(zip(MEASURES, measures[:, i].tolist()))}


def _short_between(low: float, high: float) -> float:
    """Return the number with the fewest decimals above ``low`` and up to ``high``."""
    for digits in range(2, 17):
        rounded = round(high, digits)
        for number in (rounded, round(rounded - 10**-digits, digits)):
            if low < number <= high:
                return number
    return high
