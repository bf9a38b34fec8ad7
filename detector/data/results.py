"""Detections in COCO's results format: made, read and checked."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import box_convert

from detector.data.annotations import refuse
from detector.data.problems import result_problems
from detector.files import read_json

Result = dict[str, Any]


def to_results(
    detections: Sequence[dict[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> list[Result]:
    """Write detections in COCO's results format.

    Args:
        detections: per image ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels of the annotated image, ``labels`` [L]
            and ``scores`` [L], as torchvision's detectors return them.
        image_ids: the images' ids.
        category_ids: the category id of each label, from label 1 on; ``None`` for one to leave out.

    Returns:
        One dict per detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``.
    """
    results = []
    for detection, image_id in zip(detections, image_ids, strict=True):
        boxes = box_convert(detection["boxes"].detach().cpu().double(), "xyxy", "xywh")
        rows = zip(boxes.tolist(), detection["labels"].tolist(), detection["scores"].tolist())
        for box, label, score in rows:
            category_id = category_ids[label - 1] if label > 0 else None  # 0 is the background
            if category_id is not None:
                results.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
    return results


def read_results(path: str | Path, ground_truth: COCO) -> list[Result]:
    """Read a results file and check it against the annotations that it is to be scored with.

    It is a JSON list of dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and
    ``score``; what else they hold is left out.

    Raises:
        DataError: the file cannot be read, is no such list, an entry has a wrong field, or is for an image or a
            category that the annotations do not have: the first problem, and how many more there are.
    """
    data = read_json(path)
    refuse(result_problems(path, data, ground_truth.imgs.keys(), ground_truth.cats.keys()))
    # Scores as floats: numpy would sort the largest integers by their negative, which is no integer of 64 bits.
    return [
        {**{name: entry[name] for name in ("image_id", "category_id", "bbox")}, "score": float(entry["score"])}
        for entry in data
    ]


def crowded(results: list[Result], most: int = 100) -> int:
    """Count the images that have more results of one class than COCO's metric looks at."""
    counts = Counter((result["image_id"], result["category_id"]) for result in results)
    return len({image for (image, _), count in counts.items() if count > most})
