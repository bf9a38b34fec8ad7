"""COCO's metric: detections in COCO's results format, scored by pycocotools."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from detector.choices import Evaluator
from detector.data.annotation_types import AnnotationType
from detector.data.keypoints import PERSON, layout_of
from detector.data.masks import as_rle
from detector.data.results import Result
from detector.errors import DataError, ModelError
from detector.evaluation.truth import index_coco

IouType = Literal["bbox", "segm", "keypoints"]  # pycocotools' name of what is compared
# pycocotools' summary numbers, in its order. AP is the mean over IoU 0.50 to 0.95; AR100 uses 100 detections.
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SUMMARIES: dict[IouType, tuple[str, ...]] = {
    "bbox": SUMMARY,
    "segm": SUMMARY,
    # By object keypoint similarity (OKS), at 20 detections per image. COCO has no small objects with keypoints.
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"),
}
IOU_TYPES: dict[AnnotationType, IouType] = {"masks": "segm", "keypoints": "keypoints"}
TITLES: dict[IouType, str] = {"segm": "Masks", "keypoints": "Keypoints"}
ALL_SIZES: dict[str, Any] = {"areaRng": [[0, 1e10]], "areaRngLbl": ["all"]}  # settings without small, medium and large
# COCO measured a tolerance for each of its 17 keypoints. All others get the mean of these.
SIGMA = float(Params("keypoints").kpt_oks_sigmas.mean())


def evaluate(
    truth: COCO,
    results: list[Result],
    image_ids: Iterable[int] | None = None,
    *,
    evaluator: Evaluator = "pycocotools",
    iou_type: IouType = "bbox",
) -> tuple[dict[str, float], str]:
    """Score results with pycocotools' COCOeval.

    Args:
        truth: the ground truth, with crowds.
        results: detections in COCO's results format; an empty list scores 0.
        image_ids: the images to score; all of ``truth`` by default. Results on others are ignored.
        evaluator: "faster-coco-eval" computes the same numbers in C++.
        iou_type: "bbox", "segm" (masks) or "keypoints". Objects without a mask count as missed, those without a
            labelled keypoint do not count.

    Returns:
        The numbers of :data:`SUMMARIES` and AP90 (at IoU 0.90), -1 where no object has the size, and pycocotools' table
        with a line of AP90.

    Raises:
        DataError: a result is for an image or a category that ``truth`` does not have.
        ModelError: the evaluator's package is not installed.
    """
    if 0 in truth.anns:  # pycocotools treats 0 as no match
        annotations = [one | {"id": number} for number, one in enumerate(truth.dataset["annotations"], start=1)]
        truth = index_coco({**truth.dataset, "annotations": annotations})
    return summary(match(truth, results, image_ids, evaluator=evaluator, iou_type=iou_type))


def match_types(
    truth: COCO,
    results: list[Result],
    image_ids: Sequence[int],
    *,
    annotation_types: Sequence[AnnotationType] = (),
    evaluator: Evaluator = "pycocotools",
) -> list[COCOeval]:
    """Return the scorers, see :func:`match`, of boxes and of each annotation type."""
    iou_types: list[IouType] = ["bbox", *(IOU_TYPES[name] for name in annotation_types)]
    return [match(truth, results, image_ids, evaluator=evaluator, iou_type=iou_type) for iou_type in iou_types]


def summaries(scorers: Iterable[COCOeval]) -> tuple[dict[str, float], str]:
    """Return the scores and the tables of the scorers of :func:`match_types`.

    Scores of boxes have the names of :func:`evaluate`, others are "segm/AP", "keypoints/AP", ...
    """
    scores: dict[str, float] = {}
    tables = []
    for scorer in scorers:
        name = scorer.params.iouType
        of_type, table = summary(scorer)
        scores |= of_type if name == "bbox" else {f"{name}/{key}": score for key, score in of_type.items()}
        tables.append(table if name == "bbox" else f"{TITLES[name]} ({name})\n{table}")
    return scores, "\n\n".join(tables)


def match(
    truth: COCO,
    results: list[Result],
    image_ids: Iterable[int] | None = None,
    *,
    evaluator: Evaluator = "pycocotools",
    iou_type: IouType = "bbox",
    by_class: bool = True,
    **settings: Any,
) -> COCOeval:
    """Match results with the ground truth. Returns pycocotools' scorer, evaluated and accumulated.

    Args:
        truth, results, image_ids, evaluator, iou_type: see :func:`evaluate`.
        by_class: whether a detection only matches objects of its own class.
        settings: of pycocotools' ``Params``, such as ``iouThrs``, ``maxDets`` and :data:`ALL_SIZES`.
    """
    for result in results:
        for name, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
            if result[name] not in known:
                raise DataError(f"a result has {name} {result[name]}, which the annotations do not have")
    # loadRes scores by the first field that it knows.
    fields = ("image_id", "category_id", "score", "segmentation" if iou_type == "segm" else iou_type)
    listed = [{name: one[name] for name in fields} for one in results]
    truth = _complete(truth, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(listed) if listed else index_coco({**truth.dataset, "annotations": []})
        scorer = COCOeval(truth, found, iouType=iou_type)
        scorer.params.imgIds = sorted(truth.imgs if image_ids is None else set(image_ids))
        scorer.params.useCats = int(by_class)
        if iou_type == "keypoints":
            _set_keypoints(scorer.params, truth)
        vars(scorer.params).update(settings)
        if evaluator == "pycocotools":
            scorer.evaluate()
            scorer.accumulate()
        else:
            scorer.eval = _accumulate_fast(scorer)
    return scorer


def _complete(truth: COCO, iou_type: IouType) -> COCO:
    """Give each object of a copy a mask, or keypoints: pycocotools needs them, and changes masks in place."""
    if iou_type == "bbox":
        return truth
    annotations = [dict(annotation) for annotation in truth.dataset["annotations"]]
    for one in annotations:
        if iou_type == "segm":
            image = truth.imgs[one["image_id"]]
            one["segmentation"] = as_rle(one.get("segmentation"), image["height"], image["width"])
        else:
            one["keypoints"] = one.get("keypoints") or []
            one["num_keypoints"] = sum(visibility > 0 for visibility in one["keypoints"][2::3])
    return index_coco({**truth.dataset, "annotations": annotations})


def _set_keypoints(params: Any, truth: COCO) -> None:
    """Compare the keypoints of the classes that have any, with their tolerances."""
    annotations = truth.dataset["annotations"]
    points = (annotation["keypoints"] for annotation in annotations)
    layout = truth.dataset.get("layout") or layout_of("the annotations", truth.cats.values(), points)
    if layout is None:
        raise DataError("the annotations have no keypoints to score with")
    with_keypoints = {category["id"] for category in truth.cats.values() if category.get("keypoints")}
    with_keypoints |= {annotation["category_id"] for annotation in annotations if annotation["keypoints"]}
    params.catIds = sorted(with_keypoints)
    for annotation in annotations:
        annotation["keypoints"] = annotation["keypoints"] or [0] * (3 * len(layout))
    if not layout.fits(PERSON):
        params.kpt_oks_sigmas = np.full(len(layout), SIGMA)


def summary(scorer: COCOeval) -> tuple[dict[str, float], str]:
    """Return the scores and the table of :func:`evaluate` from a scorer with default settings."""
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        scorer.summarize()
    scores = dict(zip(SUMMARIES[scorer.params.iouType], scorer.stats.tolist()))
    precision = scorer.eval["precision"][np.isclose(scorer.params.iouThrs, 0.9), ..., 0, -1]
    precision = precision[precision > -1]
    scores["AP90"] = float(precision.mean()) if precision.size else -1.0
    limit = scorer.params.maxDets[-1]
    row = f" Average Precision  (AP) @[ IoU=0.90      | area=   all | maxDets={limit:3} ] = {scores['AP90']:0.3f}"
    return scores, f"{table.getvalue().rstrip()}\n{row}"


def class_names(scorer: COCOeval) -> list[str]:
    """Return the names of the scored classes, with the id where several have the same name."""
    categories = [scorer.cocoGt.cats[category] for category in scorer.params.catIds]
    counts = Counter(category["name"] for category in categories)
    return [one["name"] if counts[one["name"]] == 1 else f"{one['name']} ({one['id']})" for one in categories]


def evaluator_version(evaluator: Evaluator) -> str:
    """Return the name and version of an evaluator, as in "pycocotools 2.0.11".

    Raises:
        ModelError: it is not installed.
    """
    try:
        return f"{evaluator} {metadata.version(evaluator)}"
    except metadata.PackageNotFoundError:
        raise ModelError(f'{evaluator} is not installed: pip install "affine-crop-rcnn[faster]"') from None


def _accumulate_fast(scorer: COCOeval) -> dict[str, Any]:
    """Return what ``scorer.accumulate()`` leaves in ``scorer.eval``, computed by faster-coco-eval."""
    evaluator_version("faster-coco-eval")  # raises if it is not installed
    from faster_coco_eval import COCOeval_faster

    fast = COCOeval_faster(None, None, iouType=scorer.params.iouType, print_function=lambda *words: None)
    fast.cocoGt, fast.cocoDt = scorer.cocoGt, scorer.cocoDt  # given above, keypoints would need its own COCO class
    known = {name: value for name, value in vars(scorer.params).items() if name not in ("iouType", "useSegm")}
    vars(fast.params).update(known)
    fast.evaluate()
    fast.accumulate()
    return {**fast.eval, "params": scorer.params}
