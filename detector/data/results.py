"""Detections in COCO's results format: made, read and checked."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from torchvision.ops import box_convert

from detector.data.annotations import refuse
from detector.data.keypoints import keypoints_problem
from detector.data.masks import as_rle, encode_masks, mask_box, segmentation_problem
from detector.data.problems import RESULTS, Problem, result_problems
from detector.errors import shown
from detector.files import read_json

Result = dict[str, Any]


def to_results(
    detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> list[Result]:
    """Write detections in COCO's results format.

    Args:
        detections: per image ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels of the annotated image, ``labels`` [L]
            and ``scores`` [L], as torchvision's detectors return them; and, if there are any, ``masks`` [L, 1, H, W],
            or ``segmentations``, L RLE, see :func:`~detector.models.detecting.detect`, and ``keypoints`` [L, K, 3].
        image_ids: the images' ids.
        category_ids: the category id of each label, from label 1 on; ``None`` for one to leave out.

    Returns:
        One dict per detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``, of masks
        also ``segmentation`` (RLE), of key points ``keypoints`` (x, y and 1 of each, in one list).
    """
    results = []
    for detection, image_id in zip(detections, image_ids, strict=True):
        boxes = box_convert(detection["boxes"].detach().cpu().double(), "xyxy", "xywh")
        fields: dict[str, Sequence[Any]] = {"bbox": boxes.tolist(), "score": detection["scores"].tolist()}
        if "segmentations" in detection:
            fields["segmentation"] = detection["segmentations"]
        elif "masks" in detection:
            fields["segmentation"] = encode_masks(detection["masks"].detach().flatten(0, 1))
        if "keypoints" in detection:
            fields["keypoints"] = detection["keypoints"].detach().flatten(1).tolist()
        for number, label in enumerate(detection["labels"].tolist()):
            category_id = category_ids[label - 1] if label > 0 else None  # 0 is the background
            if category_id is not None:
                ids = {"image_id": image_id, "category_id": category_id}
                results.append(ids | {name: values[number] for name, values in fields.items()})
    return results


def read_results(path: str | Path, ground_truth: COCO, *, notes: list[str] | None = None) -> list[Result]:
    """Read a results file and check it against the annotations that it is to be scored with.

    It is a JSON list of dicts with ``image_id``, ``category_id``, ``score``, and one or several of ``bbox`` (x, y,
    width, height in pixels), ``segmentation`` (RLE or polygons) and ``keypoints``; all have what one of them has. What
    else they hold is left out. Without ``bbox`` it is the box around the mask, or the key points, and ``notes`` gets a
    sentence.

    Raises:
        DataError: the file cannot be read, is no such list, an entry has a wrong field, or is for an image or a
            category that the annotations do not have: the first problem, and how many more there are.
    """
    data = read_json(path)
    refuse(result_problems(path, data, ground_truth.imgs.keys(), ground_truth.cats.keys()))
    parts = [name for name in ("segmentation", "keypoints") if any(entry.get(name) for entry in data)]
    fields = ["bbox", *parts] if any("bbox" in entry for entry in data) else parts
    refuse(problem for field in fields for problem in _field_problems(path, data, field, ground_truth))
    if notes is not None and data and "bbox" not in fields:
        around = "masks" if "segmentation" in parts else "key points"
        notes.append(f"The results have no bbox: their boxes are those around the {around}.")
    results = []
    for entry in data:
        # Scores as floats: numpy would sort the largest integers by their negative, which is no integer of 64 bits.
        result = {"image_id": entry["image_id"], "category_id": entry["category_id"], "score": float(entry["score"])}
        result |= {name: entry[name] for name in parts}
        if "segmentation" in result:
            image = ground_truth.imgs[entry["image_id"]]
            result["segmentation"] = as_rle(result["segmentation"], image["height"], image["width"])
        result["bbox"] = entry["bbox"] if "bbox" in entry else _box_of(result)
        results.append(result)
    return results


def _field_problems(path: str | Path, data: list[Any], field: str, ground_truth: COCO) -> Iterator[Problem]:
    """Say which boxes, masks or key points are missing, and which of the latter two cannot be scored.

    The key points of a detector are all of one number: that which most have.
    """
    lists = (entry.get("keypoints") for entry in data if field == "keypoints")
    counts = Counter(len(points) // 3 for points in lists if isinstance(points, list) and points)
    count = counts.most_common(1)[0][0] if counts else 0
    for position, entry in enumerate(data):
        wrong: str | None = None
        if field == "segmentation" and field in entry:
            image = ground_truth.imgs[entry["image_id"]]
            wrong = segmentation_problem(entry[field], image["width"], image["height"])
        elif field == "keypoints" and field in entry:
            wrong = keypoints_problem(entry[field], max(count, 1), visibility=False)
        if field not in entry or wrong:
            what = f"has {field} {shown(entry[field])}, {wrong}" if wrong else f"has no {field}, which others have"
            yield Problem(f"results with a wrong {field}", "error", f"{path}: {RESULTS}[{position}] {what}")


def _box_of(result: Result) -> list[float]:
    """The box (x, y, width, height) around a result's mask, or its key points, as pycocotools takes it."""
    if "segmentation" in result:
        return mask_box(result["segmentation"])
    x, y = result["keypoints"][0::3], result["keypoints"][1::3]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def crowded(results: list[Result], most: int = 100) -> int:
    """Count the images that have more results of one class than COCO's metric looks at."""
    counts = Counter((result["image_id"], result["category_id"]) for result in results)
    return len({image for (image, _), count in counts.items() if count > most})
