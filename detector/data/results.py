"""Writing, reading and checking detections in COCO's results format."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Raw
from torchvision.ops import box_convert

from detector.data.annotation_types import FIELD, AnnotationType
from detector.data.annotations import Annotations, raise_errors
from detector.data.checks import Finding, check_results
from detector.data.conventions import boxes_look_like
from detector.data.entries import RESULTS, Entries, type_name, value_of
from detector.data.keypoints import keypoints_error
from detector.data.masks import as_rle, encode_masks, mask_box
from detector.data.placement import placement_of
from detector.data.segmentations import MAX_PIXELS, measure_mask, read_segmentation
from detector.errors import DataError, short_repr
from detector.files import decode_json

Result = dict[str, Any]
MAX_COMPARED = 10_000  # maximum number of masks, or keypoints, that are compared with their boxes


def to_results(
    detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> list[Result]:
    """Convert detections to COCO's results format.

    Args:
        detections: torchvision's dict for each image: ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels, ``labels`` [L],
            ``scores`` [L], and optionally ``keypoints`` [L, K, 3] and ``masks`` [L, 1, H, W], or ``segmentations``, L
            RLE.
        image_ids: the images' ids.
        category_ids: the category id of each label, from label 1 on; ``None``: its detections are left out.

    Returns:
        One dict per detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels), ``score``, and
        optionally ``segmentation`` (RLE) and ``keypoints`` (x, y and 1 of each, in one list).
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
        for label, *values in zip(detection["labels"].tolist(), *fields.values(), strict=True):
            category_id = category_ids[label - 1] if label > 0 else None  # 0 is the background
            if category_id is not None:
                results.append({"image_id": image_id, "category_id": category_id, **dict(zip(fields, values))})
    return results


def results_file(path: str | Path) -> Entries:
    """Read the entries of a results file. Raises DataError if it cannot be read or is no list."""
    content = decode_json(path, list[Raw] | dict[str, Raw] | str | float | bool | None)
    if not isinstance(content, list):
        what = " (this is an annotation file)" if isinstance(content, dict) and "annotations" in content else ""
        must = f"it must hold a list of detections, not a {type_name(content)}"
        raise DataError(f"{path}: not a results file: {must}{what}")
    return Entries(path, RESULTS, content)


def annotation_types_in(results: Entries) -> list[AnnotationType]:
    """Return the annotation types that results have besides boxes."""
    return [kind for kind, field in FIELD.items() if any(value_of(raw) for raw in results[field])]


def read_results(entries: Entries, truth: Annotations) -> tuple[list[Result], list[str]]:
    """Check the entries of a results file against the annotations that they are scored with.

    An entry has ``image_id``, ``category_id``, ``score``, and at least one of ``bbox`` (x, y, width, height in pixels),
    ``segmentation`` (RLE or polygons) and ``keypoints``. All entries have the same of these. Other fields are dropped.

    Returns:
        The results, and notes on boxes that are missing, which become those around the masks or keypoints, and on
        numbers that seem to follow another convention.

    Raises:
        DataError: an entry has a wrong field, or an image or category that the annotations do not have.
    """
    category_ids = np.array([category["id"] for category in truth.categories], dtype=np.int64)
    raise_errors(check_results(entries, truth.image_ids, category_ids))
    kinds = annotation_types_in(entries)
    lazy = [FIELD[kind] for kind in kinds]
    has_box = ~np.isnan(entries["bbox"]).any(axis=1)
    fields = ["bbox", *lazy] if has_box.any() or not lazy else lazy
    sizes = truth.sizes[truth.find(entries["image_id"])].tolist()
    raise_errors(finding for field in fields for finding in _check_field(entries, field, has_box, sizes))
    results = []
    names = ("image_id", "category_id", "score", "bbox")
    for number, row in enumerate(zip(*(entries[name].tolist() for name in names))):
        result = dict(zip(names, row)) | {field: value_of(entries[field][number]) for field in lazy}
        if "segmentation" in lazy:
            result["segmentation"] = as_rle(result["segmentation"], *sizes[number][::-1])
        if "bbox" not in fields:
            points = np.reshape(result.get("keypoints", ()), (-1, 3))[:, :2]
            around = np.hstack([points.min(axis=0), np.ptp(points, axis=0)]).tolist() if "masks" not in kinds else None
            result["bbox"] = around or mask_box(result["segmentation"])
        results.append(result)
    if not results:
        return [], []
    if "bbox" not in fields:
        return results, [f"The results have no bbox: the boxes around their {kinds[0]} are used."]
    return results, list(_misread(entries, results, truth))


def _misread(entries: Entries, results: Sequence[Result], truth: Annotations) -> Iterator[str]:
    """Return notes on boxes, masks and keypoints that seem to follow another convention."""
    boxes, image_ids = entries["bbox"], entries["image_id"]
    looks = boxes_look_like(boxes, entries["score"], image_ids, truth)
    if looks is not None:
        yield f"The boxes look like {looks}. COCO's bbox is x, y, width and height in pixels of the image."
        return
    some = slice(None, None, len(results) // MAX_COMPARED + 1)
    results, boxes = results[some], boxes[some]
    sizes = truth.sizes[truth.find(image_ids[some])]
    for kind in annotation_types_in(entries):
        if kind == "masks":
            pairs = zip((result["segmentation"] for result in results), sizes.tolist())
            measured = np.array([measure_mask(mask, *size) for mask, size in pairs])
            empty = (measured[:, 4] == 0).sum()
            if 2 * empty > len(results):
                yield f"{empty:,} of {len(results):,} masks that were compared have no pixel in their image."
            points = measured[:, :4].reshape(-1, 2, 2)
        else:
            points = np.array([result["keypoints"] for result in results]).reshape(len(results), -1, 3)[..., :2]
        placement = placement_of(kind, points, np.isfinite(points[..., 0]), boxes, sizes)
        if placement.wrong:
            looks = f"; they look like {placement.looks}" if placement.looks else ""
            yield f"Most {kind} do not lie in their boxes{looks}."


def _check_field(
    entries: Entries, field: str, has_box: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> Iterator[Finding]:
    """Check that all results have a field, and that masks or keypoints can be scored."""
    values = [value_of(raw) for raw in entries[field]] if field != "bbox" else []
    lengths = Counter(len(value) // 3 for value in values if isinstance(value, list) and value)
    count = max(lengths, key=lambda length: lengths[length], default=1)  # keypoints of an object
    for number, (raw, size) in enumerate(zip(entries[field], sizes)):
        reason = None
        if not (has_box[number] if field == "bbox" else bytes(raw)):
            others = has_box.any() or field != "bbox"
            what = f"no {field}, which others have" if others else "no bbox, segmentation or keypoints: one is needed"
            yield Finding(f"results without {field}", "error", f"{entries.where(number)} has {what}")
            continue
        if field == "segmentation" and (values[number] != [] or size[0] * size[1] > MAX_PIXELS):  # []: no pixel
            _, reason = read_segmentation(raw, *size)
        elif field == "keypoints":
            reason = keypoints_error(raw, max(count, 1), visibility=False)
        if reason is not None:
            message = f"{entries.where(number)} has {field} {short_repr(values[number])}, {reason}"
            yield Finding(f"results with a wrong {field}", "error", message)
