"""Detections in COCO's results format: made, read and checked."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Raw
from torchvision.ops import box_convert

from detector.data.annotation_types import FIELD, AnnotationType
from detector.data.annotations import Annotations, refuse
from detector.data.checks import Finding, check_results
from detector.data.conventions import boxes_look_like
from detector.data.entries import RESULTS, Entries, kind_of, value_of
from detector.data.keypoints import keypoints_problem
from detector.data.masks import as_rle, encode_masks, mask_box
from detector.data.placement import Placement, keypoint_placement, mask_placement
from detector.data.segmentations import MOST_PIXELS, measure_masks, read_segmentation
from detector.errors import DataError, short_repr
from detector.files import decode_json

Result = dict[str, Any]
MOST_COMPARED = 10_000  # masks, or keypoints, that are compared with their boxes: a second


def to_results(
    detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> list[Result]:
    """Write detections in COCO's results format.

    Args:
        detections: per image ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels of the annotated image, ``labels`` [L]
            and ``scores`` [L], as torchvision's detectors return them; and, if there are any, ``masks`` [L, 1, H, W],
            or ``segmentations``, L RLE, and ``keypoints`` [L, K, 3].
        image_ids: the images' ids.
        category_ids: the category id of each label, from label 1 on; ``None`` for one to leave out.

    Returns:
        One dict per detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score``, and perhaps
        ``segmentation`` (RLE) and ``keypoints`` (x, y and 1 of each, in one list).
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


def results_file(path: str | Path) -> Entries:
    """Read a results file, see :func:`read_results`.

    Raises:
        DataError: the file cannot be read, or is no list.
    """
    content = decode_json(path, list[Raw] | dict[str, Raw] | str | float | bool | None)
    if not isinstance(content, list):
        what = " (this is an annotation file)" if isinstance(content, dict) and "annotations" in content else ""
        raise DataError(
            f"{path}: not a results file: it must hold a list of detections, not a {kind_of(content)}{what}"
        )
    return Entries(path, RESULTS, content)


def annotation_types_in(results: Entries) -> list[AnnotationType]:
    """What a results file has besides boxes: "masks", "keypoints"."""
    return [part for part, field in FIELD.items() if any(value_of(raw) for raw in results[field])]


def read_results(entries: Entries, truth: Annotations) -> tuple[list[Result], list[str]]:
    """Check the entries of a results file against the annotations that they are to be scored with.

    The file is a JSON list of dicts with ``image_id``, ``category_id``, ``score``, and one or several of ``bbox``
    (x, y, width, height in pixels), ``segmentation`` (RLE or polygons) and ``keypoints``; all have what one of them
    has. What else they hold is left out. Without ``bbox`` it is the box around the mask, or the keypoints.

    Returns:
        The results, and notes: on boxes that are missing, and on numbers that look like those of another convention.

    Raises:
        DataError: an entry has a wrong field, or is for an image or a category that the annotations do not have: the
            first problem, and how many more there are.
    """
    category_ids = np.array([category["id"] for category in truth.categories], dtype=np.int64)
    refuse(check_results(entries, truth.image_ids, category_ids))
    parts = [FIELD[part] for part in annotation_types_in(entries)]
    has_box = ~np.isnan(entries["bbox"]).any(axis=1)
    fields = ["bbox", *parts] if has_box.any() or not parts else parts
    sizes = truth.sizes[truth.find(entries["image_id"])].tolist()
    refuse(problem for field in fields for problem in _field_problems(entries, field, has_box, sizes))
    notes = []
    if len(entries) and "bbox" not in fields:
        around = "masks" if "segmentation" in parts else "keypoints"
        notes.append(f"The results have no bbox: their boxes are those around the {around}.")
    results = []
    names = ("image_id", "category_id", "score", "bbox")
    for number, row in enumerate(zip(*(entries[name].tolist() for name in names))):
        result = dict(zip(names, row)) | {part: value_of(entries[part][number]) for part in parts}
        if "segmentation" in parts:
            width, height = sizes[number]
            result["segmentation"] = as_rle(result["segmentation"], height, width)
        if "bbox" not in fields and "segmentation" in parts:
            result["bbox"] = mask_box(result["segmentation"])
        elif "bbox" not in fields:
            x, y = result["keypoints"][0::3], result["keypoints"][1::3]
            result["bbox"] = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
        results.append(result)
    if results and "bbox" in fields:
        notes += _misread(entries, results, truth)
    return results, notes


def _misread(entries: Entries, results: Sequence[Result], truth: Annotations) -> Iterator[str]:
    """Say if boxes, masks or keypoints look like something else than COCO's."""
    boxes, image_ids = entries["bbox"].copy(), entries["image_id"]
    looks = boxes_look_like(boxes, entries["score"], image_ids, truth)
    if looks is not None:
        yield f"The boxes look like {looks}. COCO's bbox is x, y, width and height in pixels of the image."
        return
    some = slice(None, None, len(results) // MOST_COMPARED + 1)
    results, boxes, image_ids = results[some], boxes[some], image_ids[some]
    sizes, sized = truth.sizes[truth.find(image_ids)], (boxes[:, 2:] > 0).all(axis=1)
    boxes[:, 2:] += boxes[:, :2]
    if "segmentation" in results[0]:
        around, areas = measure_masks([one["segmentation"] for one in results], sizes.tolist())
        if 2 * (areas == 0).sum() > len(results):
            yield f"{(areas == 0).sum():,} of {len(results):,} masks that were looked at have no pixel in their image."
        rows = np.flatnonzero(sized & (areas > 0))
        yield from _misplaced("masks", mask_placement(around[rows].reshape(-1, 2, 2), boxes[rows], sizes[rows]))
    if "keypoints" in results[0]:
        points = np.array([one["keypoints"] for one in results]).reshape(len(results), -1, 3)[sized, :, :2]
        found = np.ones(points.shape[:2], dtype=bool)
        yield from _misplaced("keypoints", keypoint_placement(points, found, boxes[sized], sizes[sized]))


def _misplaced(name: str, placed: Placement) -> Iterator[str]:
    if placed.wrong:
        yield f"Most {name} do not lie in their boxes{f'; they look like {placed.looks}' if placed.looks else ''}."


def _field_problems(
    entries: Entries, field: str, has_box: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> Iterator[Finding]:
    """Say which boxes, masks or keypoints are missing, and which of the latter two cannot be scored."""
    values = [value_of(raw) for raw in entries[field]] if field != "bbox" else []
    lengths = Counter(len(value) // 3 for value in values if isinstance(value, list) and value)
    most = max(lengths, key=lambda length: lengths[length], default=1)  # keypoints of an object
    for number, (raw, size) in enumerate(zip(entries[field], sizes)):
        what = None
        missing = not (has_box[number] if field == "bbox" else bytes(raw))
        if missing:
            others = has_box.any() or field != "bbox"
            what = f"no {field}, which others have" if others else "no bbox, segmentation or keypoints: one is needed"
        elif field == "segmentation" and (values[number] != [] or size[0] * size[1] > MOST_PIXELS):  # []: no pixel
            _, what = read_segmentation(raw, *size)
        elif field == "keypoints":
            what = keypoints_problem(raw, max(most, 1), visibility=False)
        if what is not None:
            what = what if missing else f"{field} {short_repr(values[number])}, {what}"
            message = f"{entries.path}: {RESULTS}[{number}] has {what}"
            yield Finding(f"results with a wrong {field}", "error", message)
