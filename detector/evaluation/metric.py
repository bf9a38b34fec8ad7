"""COCO's own metric: detections in COCO's results format, scored by pycocotools."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, Literal, get_args

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from detector.choices import Evaluator
from detector.data.annotation_types import AnnotationType
from detector.data.keypoints import PERSON, layout_of
from detector.data.masks import as_rle, mask_area
from detector.data.results import Result
from detector.errors import DataError, ModelError
from detector.evaluation.truth import index_coco

IouType = Literal["bbox", "segm", "keypoints"]  # pycocotools' word for what is compared
# pycocotools' 12 summary numbers, in its order. AP is averaged over IoU 0.50 to 0.95, AR is at that many detections.
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SUMMARIES: dict[IouType, tuple[str, ...]] = {
    "bbox": SUMMARY,
    "segm": SUMMARY,
    # Of keypoints 10: by object keypoint similarity (OKS), at 20 detections an image; COCO labels no small persons.
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"),
}
MASKS_AND_KEYPOINTS: dict[IouType, str] = {"segm": "Masks", "keypoints": "Keypoints"}  # in titles
IOU_TYPES: dict[AnnotationType, IouType] = {"masks": "segm", "keypoints": "keypoints"}
# COCO measured one for each of its 17 points; of others nobody did, and all get the mean of these.
SIGMA = float(Params("keypoints").kpt_oks_sigmas.mean())


def evaluate(
    truth: COCO,
    results: list[Result],
    image_ids: Iterable[int] | None = None,
    *,
    evaluator: Evaluator = "pycocotools",
    iou_type: IouType = "bbox",
) -> tuple[dict[str, float], str]:
    """Score results with pycocotools' COCOeval: boxes, masks or keypoints.

    Args:
        truth: the ground truth: annotations, crowds and all.
        results: detections in COCO's results format; none at all is a score of 0.
        image_ids: the images to score; all of ``truth`` by default. Results for others are not counted.
        evaluator: what computes the scores; "faster-coco-eval" does the same in C++.
        iou_type: what is compared: "bbox", "segm" (masks) or "keypoints". Objects without a mask count as missed, those
            without a labelled keypoint as neither. COCO's 17 keypoints have COCO's own tolerances, all
            others the mean of these.

    Returns:
        The numbers of :data:`SUMMARIES` and AP90 (at IoU 0.90), -1 where no object is of that size, as in
        pycocotools; and pycocotools' own table with a line of AP90.

    Raises:
        DataError: a result is for an image or a category that ``truth`` does not have.
        ModelError: the evaluator's package is missing.
    """
    return summary(match(truth, results, image_ids, evaluator=evaluator, iou_type=iou_type))


def evaluate_types(
    truth: COCO, results: list[Result], image_ids: Iterable[int], *, annotation_types: Sequence[AnnotationType] = ()
) -> dict[str, float]:
    """The scores of boxes, see :func:`evaluate`, and of masks and keypoints as "segm/AP", "keypoints/AP" and so on."""
    return scores_of(match_types(truth, results, list(image_ids), annotation_types=annotation_types))


def match_types(
    truth: COCO,
    results: list[Result],
    image_ids: Sequence[int],
    *,
    annotation_types: Sequence[AnnotationType] = (),
    evaluator: Evaluator = "pycocotools",
) -> list[COCOeval]:
    """The scorers of :func:`match` of boxes, and of masks and keypoints."""
    kinds: list[IouType] = ["bbox", *(IOU_TYPES[part] for part in annotation_types)]
    return [match(truth, results, image_ids, evaluator=evaluator, iou_type=kind) for kind in kinds]


def scores_of(scorers: Iterable[COCOeval]) -> dict[str, float]:
    """The scores of several scorers: of boxes as in :func:`evaluate`, of others as "segm/AP", "keypoints/AP", ..."""
    scores: dict[str, float] = {}
    for scorer in scorers:
        before = "" if scorer.params.iouType == "bbox" else f"{scorer.params.iouType}/"
        scores |= {f"{before}{name}": score for name, score in summary(scorer)[0].items()}
    return scores


def summary_tables(scorers: Iterable[COCOeval]) -> str:
    """Return pycocotools' tables of several scorers."""
    tables = []
    for scorer in scorers:
        name, table = scorer.params.iouType, summary(scorer)[1]
        tables.append(table if name == "bbox" else f"{MASKS_AND_KEYPOINTS[name]} ({name})\n{table}")
    return "\n\n".join(tables)


def match(
    truth: COCO,
    results: list[Result],
    image_ids: Iterable[int] | None = None,
    *,
    evaluator: Evaluator = "pycocotools",
    iou_type: IouType = "bbox",
    by_class: bool = True,
    iou: Sequence[float] | None = None,
    max_detections: Sequence[int] | None = None,
    all_sizes: bool = True,
) -> COCOeval:
    """Match results with the ground truth.

    Args:
        truth, results, image_ids, evaluator, iou_type: see :func:`evaluate`.
        by_class: whether a detection only matches an object of its own class.
        iou: the IoU thresholds; 0.50 to 0.95 by default.
        max_detections: how many detections count, the best ones of each image, and, with ``by_class``, of each class;
            by default 1, 10 and 100, of keypoints 20.
        all_sizes: whether small, medium and large objects are also matched apart.

    Returns:
        pycocotools' scorer, evaluated and accumulated.
    """
    for result in results:
        if result["image_id"] not in truth.imgs:
            raise DataError(f"a result has image_id {result['image_id']}, which the annotations do not have")
        if result["category_id"] not in truth.cats:
            raise DataError(f"a result has category_id {result['category_id']}, which the annotations do not have")
    # COCO.loadRes cannot take an empty list; this is what it does with a list of one kind.
    annotations = [
        {**result, "id": number, "area": _area(result, iou_type), "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    truth = _prepared(truth, iou_type)
    found = index_coco({**truth.dataset, "annotations": annotations})
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(truth, found, iouType=iou_type)
        settings = scorer.params
        settings.imgIds = sorted(truth.imgs if image_ids is None else set(image_ids))
        settings.useCats = int(by_class)
        if max_detections is not None:
            settings.maxDets = list(max_detections)
        if iou_type == "keypoints":
            _set_keypoints(settings, truth)
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


def _area(result: Result, iou_type: IouType) -> float:
    """The area of a detection, as pycocotools takes it, by which it is small, medium or large."""
    if iou_type == "segm":
        return mask_area(result["segmentation"])
    if iou_type == "bbox":
        return result["bbox"][2] * result["bbox"][3]
    x, y = result["keypoints"][0::3], result["keypoints"][1::3]
    return (max(x) - min(x)) * (max(y) - min(y))


def _prepared(truth: COCO, iou_type: IouType) -> COCO:
    """A copy with a mask, or keypoints, of each object: pycocotools fails where one is missing, and changes masks."""
    if iou_type == "bbox":
        return truth
    annotations = []
    given: dict[str, Any]
    for annotation in truth.dataset["annotations"]:
        if iou_type == "segm":
            image = truth.imgs[annotation["image_id"]]
            given = {"segmentation": as_rle(annotation.get("segmentation"), image["height"], image["width"])}
        else:
            points = annotation.get("keypoints") or []
            given = {"keypoints": points, "num_keypoints": sum(seen > 0 for seen in points[2::3])}
        annotations.append({**annotation, **given})
    return index_coco({**truth.dataset, "annotations": annotations})


def _set_keypoints(settings: Any, truth: COCO) -> None:
    """Compare the keypoints of the classes that have any, with a tolerance for each."""
    points = (annotation["keypoints"] for annotation in truth.anns.values())
    layout = truth.dataset.get("layout") or layout_of("the annotations", truth.cats.values(), points)
    if layout is None:
        raise DataError("the annotations have no keypoints to score with")
    nothing = [0] * (3 * len(layout))
    having = {category["id"] for category in truth.cats.values() if category.get("keypoints")}
    for annotation in truth.dataset["annotations"]:
        if annotation["keypoints"]:
            having.add(annotation["category_id"])
        else:
            annotation["keypoints"] = nothing
    settings.catIds = sorted(having)
    if not layout.fits(PERSON):
        settings.kpt_oks_sigmas = np.full(len(layout), SIGMA)


def summary(scorer: COCOeval) -> tuple[dict[str, float], str]:
    """The scores and the table, see :func:`evaluate`, of what :func:`match` returned by its defaults."""
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        scorer.summarize()
    scores = dict(zip(SUMMARIES[scorer.params.iouType], (float(number) for number in scorer.stats)))
    precision = scorer.eval["precision"][np.isclose(scorer.params.iouThrs, 0.9), ..., 0, -1]
    precision = precision[precision > -1]
    scores["AP90"] = float(precision.mean()) if precision.size else -1.0
    most = scorer.params.maxDets[-1]
    row = f" Average Precision  (AP) @[ IoU=0.90      | area=   all | maxDets={most:3} ] = {scores['AP90']:0.3f}"
    return scores, f"{table.getvalue().rstrip()}\n{row}"


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

    kind = scorer.params.iouType
    fast = COCOeval_faster(None, None, iouType=kind, print_function=lambda *words: None)
    fast.cocoGt, fast.cocoDt = scorer.cocoGt, scorer.cocoDt  # given above, keypoints would ask for its own class
    names = ("imgIds", "catIds", "iouThrs", "recThrs", "maxDets", "areaRng", "areaRngLbl", "useCats")
    for name in (*names, "kpt_oks_sigmas") if kind == "keypoints" else names:
        setattr(fast.params, name, getattr(scorer.params, name))
    fast.evaluate()
    fast.accumulate()
    return {**fast.eval, "params": scorer.params}
