"""Errors and warnings in the content of COCO's annotation and results files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detector.data.entries import CocoFile, Entries, type_name
from detector.errors import short_repr

Level = Literal["error", "warning", "note"]
ROUNDING = 1.0  # pixels by which a box may reach outside its image, as in COCO's own files
NORMALISED = "annotation file whose boxes look normalised (0..1)"
CORNERS = "annotation file whose boxes look like corners (x1, y1, x2, y2)"
CENTRES = "annotation file whose boxes look like centres (cx, cy, width, height)"
FAR_FROM_BOX = "areas that are far from their boxes'"
IGNORED = "annotations with ignore 1"


@dataclass(frozen=True)
class Finding:
    """An error, a warning or a note on a data set."""

    kind: str  # a short heading, such as "missing image files"
    level: Level  # "error": the file cannot be used; "warning": something is clipped, left out or counted wrong
    message: str  # names the file, the entry (its place in the list, and its id), the field and the value


def check_annotations(file: CocoFile) -> Iterator[Finding]:
    """Check an annotation file except its masks and keypoints; ``read_annotations`` needs one without errors."""
    annotations = file.annotations
    for message in file.missing.values():
        yield Finding("not in COCO's format", "error", f"{file.path}: {message}")
    for entries in (file.images, file.categories, annotations):
        yield from _wrong_fields(entries)
        yield from _repeated(entries, "id", "error")
    yield from _repeated(file.images, "file_name", "warning")
    yield from _repeated(file.categories, "name", "warning")
    if "images" not in file.missing:
        yield from _unknown(annotations, "image_id", file.image_places >= 0, "and there is no such image")
    if "categories" not in file.missing:
        yield from _unknown(annotations, "category_id", file.category_places >= 0, "and there is no such category")
    yield from _check_boxes(file)
    ignored = "has ignore 1: it is trained on and scored like any other; iscrowd 1 excludes it from both"
    yield from findings_at(annotations, annotations["ignore"] == 1, IGNORED, "note", ignored)
    if "annotations" not in file.missing:
        yield from _unused(file.categories, file.category_places, "name", "categories never used")
        yield from _unused(file.images, file.image_places, "file_name", "images without annotations")


def check_results(entries: Entries, image_ids: np.ndarray, category_ids: np.ndarray) -> Iterator[Finding]:
    """Check the entries of a results file against the ids of the annotations. All findings are errors."""
    yield from _wrong_fields(entries)
    for field, known in (("image_id", image_ids), ("category_id", category_ids)):
        yield from _unknown(entries, field, np.isin(entries[field], known), "which the annotations do not have")


def no_box(path: str | Path, use: str = "train on") -> Finding:
    """Return the error for a file without a box to train on, or to score."""
    what = "there are no annotations, or each is a crowd or has a bbox that is empty or outside its image"
    return Finding(f"no box to {use}", "error", f"{path}: no box to {use}: {what}")


def _wrong_fields(entries: Entries) -> Iterator[Finding]:
    name = entries.name
    for position, wrong in sorted(entries.wrong.items()):
        entry, where = entries.entry(position), entries.where(position)
        if not wrong:
            yield Finding(f"{name} that are no dicts", "error", f"{where} must be a dict, got {type_name(entry)}")
        for field in wrong:
            given = f"{field} {short_repr(entry[field])}" if field in entry else f"no {field}"
            kind = f"{name} with a wrong {field}" if field in entry else f"{name} without {field}"
            yield Finding(kind, "error", f"{where} has {given}, must be {entries.fields[field].meant}")


def _repeated(entries: Entries, field: str, level: Level) -> Iterator[Finding]:
    values, has = entries[field].tolist(), entries.has(field)
    first: dict[Any, int] = {}
    for position, value in enumerate(values if len(set(values)) < len(values) else ()):
        if has[position] and first.setdefault(value, position) != position:
            what = f"{field} {short_repr(value)} is used twice, first by {entries.name}[{first[value]}]"
            yield Finding(f"{entries.name} with the same {field}", level, f"{entries.where(position)}: {what}")


def _unknown(entries: Entries, field: str, is_known: np.ndarray, what: str) -> Iterator[Finding]:
    kind, message = f"{entries.name} of an unknown {field.removesuffix('_id')}", f"has {field} {{value}}, {what}"
    yield from findings_at(entries, entries.has(field) & ~is_known, kind, "error", message, value=entries[field])


def _unused(entries: Entries, places: np.ndarray, name: str, kind: str) -> Iterator[Finding]:
    unused = entries.has("id") & ~np.isin(entries["id"], entries["id"][places[places >= 0]])
    for position in np.flatnonzero(unused).tolist():
        what = f"{short_repr(entries[name][position])}, has no annotation"
        yield Finding(kind, "note", f"{entries.where(position)}, {what}")


def findings_at(
    entries: Entries, which: np.ndarray, kind: str, level: Level, message: str, **columns: np.ndarray
) -> Iterator[Finding]:
    """Yield a finding for each entry where ``which``, [N] bool; ``message`` names its values in ``columns``."""
    for position in np.flatnonzero(which).tolist():
        values = {name: column[position] for name, column in columns.items()}
        shown = {"bbox": short_repr(values["bbox"].tolist())} if "bbox" in values else {}
        yield Finding(kind, level, f"{entries.where(position)} {message.format(**values | shown)}")


def sizes_of_images(file: CocoFile) -> np.ndarray:
    """Return the width and height of each annotation's image, [L, 2] float64; NaN where they are not known."""
    images = file.images
    sizes = np.stack([np.where(images.has(side), images[side], np.nan) for side in ("width", "height")], axis=1)
    return np.append(sizes, [[np.nan, np.nan]], axis=0)[file.image_places]


def corners_in_images(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Convert boxes (x, y, width, height) to (x1, y1, x2, y2) clipped to their images, [L, 4] float32 in pixels.

    ``sizes`` are width and height of the image of each, [L, 2].
    """
    corners = boxes.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    return np.minimum(corners.clip(min=0), np.tile(sizes.astype(np.float32), 2))


def far_from_boxes(areas: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return whether no object in the box (x, y, width, height) can have the area, [L] bool; false for NaN."""
    of_boxes = boxes[:, 2:].prod(axis=1)
    small = (areas < of_boxes / 1000) | ((areas <= 1) & (of_boxes > 9))  # thin diagonals may have this little
    return (small | (areas > 3 * of_boxes + 20)) & (boxes[:, 2:] > 0).all(axis=1)


def _check_boxes(file: CocoFile) -> Iterator[Finding]:
    annotations, sizes = file.annotations, sizes_of_images(file)
    x, y, w, h, width, height = boxes = np.vstack([annotations["bbox"].T, sizes.T])  # comparisons with NaN are false
    yield from _check_convention(annotations.path, boxes)
    right, lower = x + w, y + h
    empty = (w <= 0) | (h <= 0)
    sized = ~empty & ~np.isnan(sizes).any(axis=1)
    outside = sized & ((x >= width) | (y >= height) | (right <= 0) | (lower <= 0))
    reaching = (x < -ROUNDING) | (y < -ROUNDING) | (right > width + ROUNDING) | (lower > height + ROUNDING)
    reaching &= sized & ~outside
    far = far_from_boxes(annotations["area"], annotations["bbox"]) & ~annotations["iscrowd"]
    image = "its image of {width:.0f}x{height:.0f} pixels"
    columns = {"bbox": annotations["bbox"], "area": annotations["area"], "box": w * h, "width": width, "height": height}
    for kind, which, message in (
        ("empty boxes", empty, "has bbox {bbox}, without width or height: left out in training"),
        ("boxes outside their image", outside, f"has bbox {{bbox}}, outside {image}: left out in training"),
        ("boxes that reach outside their image", reaching, f"has bbox {{bbox}}, reaching outside {image}: clipped"),
        (FAR_FROM_BOX, far, "has area {area:.4g}, its box {box:.4g}: AP by size and keypoint scores use the area"),
    ):
        yield from findings_at(annotations, which, kind, "warning", message, **columns)
    columns["first"] = first = _first_equal_boxes(file)
    message = "has the image, category and bbox of annotations[{first}], {bbox}: one object counts twice"
    yield from findings_at(annotations, first >= 0, "duplicate boxes", "warning", message, **columns)


def _first_equal_boxes(file: CocoFile) -> np.ndarray:
    """Return the position of the first object with each later one's image, category and box, [L]; -1 elsewhere."""
    annotations, images = file.annotations, file.image_places
    has = annotations.has("bbox") & annotations.has("category_id") & (images >= 0) & ~annotations["iscrowd"]
    columns = np.column_stack([annotations["bbox"], annotations["category_id"], images])
    objects, first = np.flatnonzero(has), np.full(len(annotations), -1)
    # Sorting by one sum of irrational multiples is faster than by six columns.
    sums = (columns[objects] * np.sqrt([2, 3, 5, 7, 11, 13])).sum(axis=1)
    order = objects[np.argsort(sums, kind="stable")]
    same = np.append(False, (columns[order[1:]] == columns[order[:-1]]).all(axis=1))[: len(order)]
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    first[order[same]] = order[starts[same]]
    return first


def _check_convention(path: Any, boxes: np.ndarray) -> Iterator[Finding]:
    """Check whether boxes, [6, L] with their images' sizes, would lie inside if their numbers meant something else."""
    (x, y, w, h, width, height), numbers = boxes, boxes[:4]
    count, right, lower = (~np.isnan(boxes).any(axis=0)).sum(), width + ROUNDING, height + ROUNDING
    outside = ((x + w > right) | (y + h > lower)).sum()
    # Whole numbers may be placeholders.
    small = ((numbers >= 0) & (numbers <= 1.0001)).all(0) & (numbers % 1 > 0).any(0)
    normalised = (small & (width > 10) & (height > 10)).sum()
    corners = ((x >= -ROUNDING) & (x < w) & (w <= right) & (y >= -ROUNDING) & (y < h) & (h <= lower)).sum()
    around_x = (w / 2 - ROUNDING <= x) & (x <= right - w / 2)
    centres = (around_x & (h / 2 - ROUNDING <= y) & (y <= lower - h / 2)).sum()
    coco = "COCO's bbox is x and y of the upper left corner, width and height, in pixels"
    begin = f"{path}: {outside:,} of {count:,} boxes reach outside their images, but"
    # Large boxes of a valid file fit as corners, too, so most boxes must be outside as they are.
    if normalised > count / 2:
        begin = f"{path}: {normalised:,} of {count:,} boxes look normalised, their numbers are all within 0..1"
        yield Finding(NORMALISED, "error", f"{begin}; {coco}: multiply by the image's width and height")
    elif outside >= 10 and corners >= 0.99 * count and outside > count / 2:
        begin += f" {corners:,} would not as corners x1, y1, x2, y2"
        yield Finding(CORNERS, "error", f"{begin}; {coco}: subtract x1 from x2, and y1 from y2")
    elif outside >= 10 and centres >= 0.99 * count and outside > count / 20:
        begin += f" {centres:,} would not if x and y were their centres"
        yield Finding(CENTRES, "warning", f"{begin}; {coco}: subtract half of width and height from x and y")
