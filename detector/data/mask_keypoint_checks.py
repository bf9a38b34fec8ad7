"""Errors and warnings in the masks and keypoints of COCO's annotation files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from detector.data.annotation_types import FIELD, AnnotationType
from detector.data.checks import ROUNDING, Finding, Level, far_from_boxes, findings_at, sizes_of_images
from detector.data.entries import CocoFile, value_of
from detector.data.keypoints import keypoints_error, layout_of
from detector.data.masks import is_empty
from detector.data.placement import placement_of
from detector.data.segmentations import measure_mask, read_segmentation, spans_a_pixel
from detector.errors import DataError, short_repr

MAX_MEASURED = 50_000  # annotations up to which every mask is measured
# Messages by kind, in the order of the conditions in check_annotation_type.
WARNINGS: dict[AnnotationType, dict[str, str]] = {
    "masks": {
        "objects without a segmentation": "has no segmentation: its mask is trained as empty and scored as missed",
        "masks without a pixel": "has a segmentation without a pixel in its image: trained as empty, scored as missed",
        "masks without an area": "has no area: segm AP by size uses the area of its box",
        "masks outside their boxes": "has a segmentation outside its bbox {bbox}",
        "masks that reach outside their image": "has a segmentation that reaches outside its image: clipped",
        "areas that are far from their masks'": "has area {area:.4g}, its mask has {mask:.4g}: segm AP by size uses it",
    },
    "keypoints": {
        "objects without keypoints": "has no keypoints: only its box is learned",
        "objects whose keypoints are all unlabelled": "has keypoints of visibility 0 alone: only its box is learned",
        "keypoints without an area": "has no area: its box's larger one is used, which makes keypoint scores too high",
        "keypoints outside their boxes": "has keypoints of which most lie outside its bbox {bbox}",
        "keypoints outside their image": "has labelled keypoints outside its image: unlabelled in training",
        "labelled keypoints at (0, 0) or (-1, -1)": "has labelled keypoints at (0, 0) or (-1, -1), which are scored: "
        "placeholders have visibility 0",
    },
}


def has_any(file: CocoFile, annotation_type: AnnotationType) -> bool:
    """Return whether any object has a mask, or keypoints. Crowds do not count: they are not trained on."""
    objects = file.annotations[FIELD[annotation_type]][~file.annotations["iscrowd"]]
    return any(not _is_missing(value_of(raw), annotation_type) for raw in filter(bytes, objects))


def _is_missing(value: Any, annotation_type: AnnotationType) -> bool:
    return is_empty(value) if annotation_type == "masks" else not value


@dataclass(frozen=True)
class _Read:
    """The masks, or the keypoints, of a file."""

    wrong: list[str | None]  # why each cannot be read, L of them; also set where it is missing
    points: np.ndarray  # [L, P, 2], x and y in pixels; for a mask the upper left and the lower right corner around it
    labelled: np.ndarray  # [L, P] bool; without placeholders where there are other points
    is_empty: np.ndarray  # [L] bool: without a pixel, or a labelled point; false where it is wrong
    areas: np.ndarray  # [L], of masks in pixels; NaN for keypoints
    expected: np.ndarray  # [L] bool, whether objects of its category have them
    placeholders: np.ndarray  # [L] bool, whether a labelled point is at (0, 0) or (-1, -1)


def check_annotation_type(
    file: CocoFile, annotation_type: AnnotationType, *, broken: Level = "error"
) -> Iterator[Finding]:
    """Check the masks, or the keypoints, of annotations that are valid otherwise.

    A file without any has no findings. It is an error if most lie outside their boxes, or if no mask has a pixel.
    ``broken`` is the level of findings on masks or keypoints that cannot be read.
    """
    if not has_any(file, annotation_type):
        return
    field, annotations, objects = FIELD[annotation_type], file.annotations, ~file.annotations["iscrowd"]
    without = "" if broken == "error" else f" (boxes can be trained, {annotation_type} cannot)"
    try:
        read = _read_masks(file) if annotation_type == "masks" else _read_keypoints(file)
    except DataError as error:
        yield Finding("categories with keypoints that do not fit", broken, f"{error}{without}")
        return
    missing = np.zeros(len(annotations), dtype=bool)
    for position in [at for at, what in enumerate(read.wrong) if what is not None]:
        value = value_of(annotations[field][position])
        missing[position] = _is_missing(value, annotation_type)
        if not missing[position]:
            what = f"has {field} {short_repr(value)}, {read.wrong[position]}{without}"
            yield Finding(f"broken {field.rstrip('s')}s", broken, f"{annotations.where(position)} {what}")
    areas, boxes, sizes = annotations["area"], annotations["bbox"], sizes_of_images(file)
    placed = placement_of(annotation_type, read.points, read.labelled & objects[:, None], boxes, sizes)
    if placed.wrong:
        kind = f"annotation file whose {annotation_type} lie outside boxes"
        looks = f"look like {placed.looks}" if placed.looks else "may be of other objects, or images of another size"
        what = f"most {annotation_type} of {placed.compared:,} annotations do not lie in their bbox"
        yield Finding(kind, "error", f"{file.path}: {what}; they {looks}")
        return
    valid = objects & np.array([what is None for what in read.wrong], dtype=bool)
    if annotation_type == "masks" and valid.any() and read.is_empty[valid].all():
        message = f"{file.path}: no segmentation has a pixel in its image: there is no mask to learn or to score"
        yield Finding("annotation file whose masks have no pixel", "error", message)
    beyond = ((read.points < -ROUNDING) | (read.points > sizes[:, None] + ROUNDING)).any(axis=2) & read.labelled
    most = 3 * np.maximum(read.areas, boxes[:, 2:].prod(axis=1)) + 20  # some tools write the area of the box
    far = ((areas < read.areas / 3 - 10) | (areas > most)) & (read.areas > 0) & ~far_from_boxes(areas, boxes)
    conditions = [
        missing & read.expected,
        read.is_empty,
        np.isnan(areas) & ~missing,
        placed.outside & ~read.is_empty,
        beyond.any(axis=1) & ~read.is_empty,
        far if annotation_type == "masks" else read.placeholders,
    ]
    columns = {"bbox": boxes, "area": areas, "mask": read.areas}
    for (kind, message), which in zip(WARNINGS[annotation_type].items(), conditions, strict=True):
        yield from findings_at(annotations, objects & which, kind, "warning", message, **columns)


def _read_masks(file: CocoFile) -> _Read:
    annotations, sizes = file.annotations, sizes_of_images(file)
    raws, (x, y, w, h) = annotations["segmentation"], annotations["bbox"].T
    # Three points within these boxes (x1, y1, x2, y2) prove a mask right. Measuring it takes much longer.
    limits = np.stack([x.clip(min=0), y.clip(min=0), np.minimum(x + w, sizes[:, 0]), np.minimum(y + h, sizes[:, 1])], 1)
    limits[(annotations["area"] < 0.3 * w * h) | (len(raws) <= MAX_MEASURED)] = np.nan  # measured
    wrong, measures = [], []
    columns = zip(raws, annotations["iscrowd"].tolist(), sizes.astype(int).tolist(), limits.tolist())
    for raw, is_crowd, size, limit in columns:
        value, reason = read_segmentation(raw, *size)
        wrong.append(reason)
        proven = is_crowd or spans_a_pixel(value, *limit)
        measures.append((*limit, np.nan) if proven else measure_mask(value, *size))
    boxes, areas = np.split(np.reshape(measures, (-1, 5)), [4], axis=1)
    points, areas, expected = boxes.reshape(-1, 2, 2), areas[:, 0], np.ones(len(wrong), dtype=bool)
    return _Read(wrong, points, np.isfinite(points[..., 0]), areas == 0, areas, expected, ~expected)


def _read_keypoints(file: CocoFile) -> _Read:
    """Read all keypoints. Raises DataError if the categories name different ones."""
    raws = file.annotations["keypoints"]
    categories = [file.categories.entry(position) for position in range(len(file.categories))]
    layout = layout_of(file.path, categories, map(value_of, raws))
    count = len(layout) if layout else 1
    named = [bool(entry.get("keypoints")) for entry in categories]
    expected = np.isin(file.annotations["category_id"], file.categories["id"][named if any(named) else slice(None)])
    wrong = [keypoints_error(raw, count) for raw in raws]
    nothing = [0] * (3 * count)
    values = [nothing if what is not None else value_of(raw) for raw, what in zip(raws, wrong)]
    points = np.array(values, dtype=np.float64).reshape(-1, count, 3)
    at, visible = points[..., :2], points[..., 2] > 0
    placeholders = visible & ((at == 0).all(axis=2) | (at == -1).all(axis=2))
    others = visible & ~placeholders
    labelled = np.where(others.any(axis=1, keepdims=True), others, visible)
    empty = np.array([what is None for what in wrong], dtype=bool) & ~visible.any(axis=1)
    return _Read(wrong, at, labelled, empty, np.full(len(raws), np.nan), expected, placeholders.any(axis=1))
