"""COCO's own metric: detections in COCO's results format, scored by pycocotools."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, Literal, get_args

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector.data.annotations import index_coco
from detector.data.results import Result
from detector.errors import DataError, ModelError

# pycocotools' 12 summary numbers, in its order. AP is averaged over IoU 0.50 to 0.95, AR is at that many detections.
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
Evaluator = Literal["pycocotools", "faster-coco-eval"]


def evaluate(
    truth: COCO,
    results: list[Result],
    image_ids: Iterable[int] | None = None,
    *,
    evaluator: Evaluator = "pycocotools",
) -> tuple[dict[str, float], str]:
    """Score results with pycocotools' COCOeval, boxes.

    Args:
        truth: the ground truth: annotations, crowds and all.
        results: detections in COCO's results format; none at all is a score of 0.
        image_ids: the images to score; all of ``truth`` by default. Results for others are not counted.
        evaluator: what computes the scores; "faster-coco-eval" does the same in C++.

    Returns:
        The 12 numbers of :data:`SUMMARY` and AP90 (at IoU 0.90), -1 where no object is of that size, as in
        pycocotools; and pycocotools' own table.

    Raises:
        DataError: a result is for an image or a category that ``truth`` does not have.
        ModelError: the evaluator's package is missing.
    """
    return summary(match(truth, results, image_ids, evaluator=evaluator))


def match(
    truth: COCO,
    results: list[Result],
    image_ids: Iterable[int] | None = None,
    *,
    evaluator: Evaluator = "pycocotools",
    by_class: bool = True,
    iou: Sequence[float] | None = None,
    max_detections: Sequence[int] = (1, 10, 100),
    all_sizes: bool = True,
) -> COCOeval:
    """Match results with the ground truth.

    Args:
        truth, results, image_ids, evaluator: see :func:`evaluate`.
        by_class: whether a detection only matches an object of its own class.
        iou: the IoU thresholds; 0.50 to 0.95 by default.
        max_detections: how many detections count, the best ones of each image, and, with ``by_class``, of each class.
        all_sizes: whether small, medium and large objects are also matched apart.

    Returns:
        pycocotools' scorer, evaluated and accumulated.
    """
    for result in results:
        if result["image_id"] not in truth.imgs:
            raise DataError(f"a result has image_id {result['image_id']}, which the annotations do not have")
        if result["category_id"] not in truth.cats:
            raise DataError(f"a result has category_id {result['category_id']}, which the annotations do not have")
    # COCO.loadRes cannot take an empty list; this is what it does with a list of boxes.
    annotations = [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    found = index_coco({**truth.dataset, "annotations": annotations})
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(truth, found, iouType="bbox")
        settings = scorer.params
        settings.imgIds = sorted(truth.imgs if image_ids is None else set(image_ids))
        settings.useCats = int(by_class)
        settings.maxDets = list(max_detections)
        if iou is not None:
            settings.iouThrs = np.array(iou)
        if not all_sizes:
            settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
        if evaluator == "pycocotools":
            scorer.evaluate()
            scorer.accumulate()
        else:
            scorer.eval = _accumulated_fast(scorer)
    return scorer


def summary(scorer: COCOeval) -> tuple[dict[str, float], str]:
    """The scores and pycocotools' table, see :func:`evaluate`, of what :func:`match` returned by its defaults."""
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        scorer.summarize()
    scores = dict(zip(SUMMARY, (float(number) for number in scorer.stats)))
    precision = scorer.eval["precision"][np.isclose(scorer.params.iouThrs, 0.9), ..., 0, -1]
    precision = precision[precision > -1]
    scores["AP90"] = float(precision.mean()) if precision.size else -1.0
    return scores, table.getvalue().rstrip()


def evaluator_version(evaluator: Evaluator) -> str:
    """The name and version of an evaluator, as in "pycocotools 2.0.11".

    Raises:
        ModelError: there is none of that name, or its package is missing.
    """
    if evaluator not in get_args(Evaluator):
        raise ModelError(f"the evaluator must be one of {', '.join(get_args(Evaluator))}, got {evaluator!r}")
    try:
        return f"{evaluator} {metadata.version(evaluator)}"
    except metadata.PackageNotFoundError:
        raise ModelError(f'{evaluator} is not installed: pip install "affine-crop-rcnn[faster]"') from None


def _accumulated_fast(scorer: COCOeval) -> dict[str, Any]:
    """What ``scorer.accumulate()`` would leave in ``scorer.eval``, by faster-coco-eval."""
    evaluator_version("faster-coco-eval")  # raises where it is missing
    from faster_coco_eval import COCOeval_faster

    fast = COCOeval_faster(scorer.cocoGt, scorer.cocoDt, iouType="bbox", print_function=lambda *words: None)
    for name in ("imgIds", "catIds", "iouThrs", "recThrs", "maxDets", "areaRng", "areaRngLbl", "useCats"):
        setattr(fast.params, name, getattr(scorer.params, name))
    fast.evaluate()
    fast.accumulate()
    return {**fast.eval, "params": scorer.params}
