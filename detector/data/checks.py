"""What can be wrong with a data set in COCO's format: all of it at once, each problem in one sentence."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detector.data.entries import RESULTS, CocoFile, Entries, kind_of
from detector.errors import short_repr

Level = Literal["error", "warning", "note"]
ROUNDING = 1.0  # pixels by which a box may reach outside its image: those of COCO's own files do, by less
NORMALISED = "annotation file whose boxes look normalised (0..1)"
CORNERS = "annotation file whose boxes look like corners (x1, y1, x2, y2)"
REACHING = "boxes that reach outside their image"
CENTRES = "annotation file whose boxes look like centres (cx, cy, width, height)"
FAR_FROM_BOX = "areas that are far from their boxes'"
IGNORED = "annotations with ignore 1"
NO_BOX = "no box to train on"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Args:
        kind: a short heading, such as "missing image files".
        level: "error": the file cannot be used; "warning": something is clipped, left out or counted wrong; "note".
        message: one sentence that names the file, the entry (its place in the list, and its id), field and value.
    """

    kind: str
    level: Level
    message: str


def check_annotations(file: CocoFile) -> Iterator[Finding]:
    """Say what is wrong with the content of an annotation file.

    :func:`~detector.data.annotations.read_annotations` takes a file without a problem of level "error". Masks and key
    points are checked in :mod:`~detector.data.mask_keypoint_checks`.
    """
    images, categories, annotations = file.images, file.categories, file.annotations
    for what in file.missing.values():
        yield Finding("not in COCO's format", "error", f"{file.path}: {what}")
    for entries in (images, categories, annotations):
        yield from _entry_problems(entries)
        yield from _repeated(entries, "id", "error")
    yield from _repeated(images, "file_name", "warning")
    yield from _repeated(categories, "name", "warning")
    if "images" not in file.missing:
        yield from _unknown(annotations, file.image_places, "image_id")
    if "categories" not in file.missing:
        yield from _unknown(annotations, file.category_places, "category_id")
    yield from _box_problems(file)
    yield from _ignored(annotations)
    if "annotations" not in file.missing:
        yield from _unused(categories, file.category_places, "name", "categories never used")
        yield from _unused(images, file.image_places, "file_name", "images without annotations")


def check_results(entries: Entries, image_ids: np.ndarray, category_ids: np.ndarray) -> Iterator[Finding]:
    """Say what is wrong with the entries of a results file, as errors; the ids are those that the annotations have."""
    yield from _entry_problems(entries)
    for field, known in (("image_id", image_ids), ("category_id", category_ids)):
        for position in np.flatnonzero(entries.has(field) & ~np.isin(entries[field], known)).tolist():
            what = f"has {field} {entries[field][position]}, which the annotations do not have"
            yield Finding(f"results of an unknown {field}", "error", f"{entries.path}: {RESULTS}[{position}] {what}")


def _entry_problems(entries: Entries) -> Iterator[Finding]:
    """Say which entries are no dicts, and which of their fields are missing or wrong."""
    name = entries.name
    for position, wrong in sorted(entries.wrong.items()):
        entry = entries.entry(position)
        if not wrong:
            message = f"{entries.path}: {name}[{position}] must be a dict, got {kind_of(entry)}"
            yield Finding(f"{name} that are no dicts", "error", message)
            continue
        at = entries.where(position)
        for field in wrong:
            meant = entries.fields[field].meant
            if field in entry:
                message = f"{at} has {field} {short_repr(entry[field])}, must be {meant}"
                yield Finding(f"{name} with a wrong {field}", "error", message)
            else:
                yield Finding(f"{name} without {field}", "error", f"{at}: {field!r} is missing, must be {meant}")


def _repeated(entries: Entries, field: str, level: Level) -> Iterator[Finding]:
    values, has = entries[field].tolist(), entries.has(field)
    if len(set(values)) == len(values):
        return
    first: dict[Any, int] = {}
    for position, value in enumerate(values):
        if has[position] and first.setdefault(value, position) != position:
            what = f"{field} {short_repr(value)} is used twice, first by {entries.name}[{first[value]}]"
            yield Finding(f"{entries.name} with the same {field}", level, f"{entries.where(position)}: {what}")


def _unknown(annotations: Entries, places: np.ndarray, field: str) -> Iterator[Finding]:
    one = field.removesuffix("_id")
    for position in np.flatnonzero(annotations.has(field) & (places < 0)).tolist():
        what = f"has {field} {annotations[field][position]}, and there is no such {one}"
        yield Finding(f"annotations of an unknown {one}", "error", f"{annotations.where(position)} {what}")


def _unused(entries: Entries, places: np.ndarray, name: str, kind: str) -> Iterator[Finding]:
    used = entries["id"][np.bincount(places[places >= 0], minlength=len(entries)) > 0]
    for position in np.flatnonzero(entries.has("id") & ~np.isin(entries["id"], used)).tolist():
        message = f"{entries.where(position)}, {short_repr(entries[name][position])}, has no annotation"
        yield Finding(kind, "note", message)


def _ignored(annotations: Entries) -> Iterator[Finding]:
    for position in np.flatnonzero(annotations["ignore"] == 1).tolist():
        message = f"{annotations.where(position)} has ignore 1: it is trained on and scored as any other"
        yield Finding(IGNORED, "note", f"{message}; iscrowd 1 takes it out of both")


def no_box(path: str | Path) -> Finding:
    """The error of a file without a box to learn from, for check and for training."""
    what = "there are no annotations, or each is a crowd or has a bbox that is empty or outside its image"
    return Finding(NO_BOX, "error", f"{path}: no box to train on: {what}")


def sizes_of_images(file: CocoFile) -> np.ndarray:
    """Width and height of each annotation's image, [L, 2] float64; NaN where they are not known."""
    images = file.images
    sizes = np.stack([np.where(images.has(side), images[side], np.nan) for side in ("width", "height")], axis=1)
    return np.append(sizes, [[np.nan, np.nan]], axis=0)[file.image_places]


def corners_in_images(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes as training has them: (x1, y1, x2, y2) clipped to their images, in pixels, [L, 4] float32.

    Args:
        boxes: [L, 4], x, y, width and height.
        sizes: [L, 2], width and height of the images.
    """
    corners = boxes.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    return np.minimum(corners.clip(min=0), np.tile(sizes.astype(np.float32), 2))


def far_from_boxes(areas: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which areas can be of no object in their box, [L]: 0 and 1 are placeholders of some exporters.

    Args:
        areas: [L], in square pixels; NaN where there is none.
        boxes: [L, 4], x, y, width and height in pixels.
    """
    of_boxes = boxes[:, 2:].prod(axis=1)
    small = (areas < of_boxes / 1000) | ((areas <= 1) & (of_boxes > 9))  # a thin diagonal has a thousandth
    return (small | (areas > 3 * of_boxes + 20)) & (boxes[:, 2:] > 0).all(axis=1)


def _box_problems(file: CocoFile) -> Iterator[Finding]:
    """Say what is wrong with boxes, in their images."""
    annotations, sizes = file.annotations, sizes_of_images(file)
    x, y, w, h, width, height = boxes = np.vstack([annotations["bbox"].T, sizes.T])  # no comparison with NaN is true
    yield from _misread_boxes(annotations.path, boxes)
    right, lower = x + w, y + h
    empty = (w <= 0) | (h <= 0)
    sized = ~empty & ~np.isnan(sizes).any(axis=1)
    outside = sized & ((x >= width) | (y >= height) | (right <= 0) | (lower <= 0))
    reaching = (x < -ROUNDING) | (y < -ROUNDING) | (right > width + ROUNDING) | (lower > height + ROUNDING)
    reaching &= sized & ~outside
    for kind, which, what in (
        ("empty boxes", empty, "without width or height: left out in training"),
        ("boxes outside their image", outside, "outside its image of {:.0f}x{:.0f} pixels: left out in training"),
        (REACHING, reaching, "reaching outside its image of {:.0f}x{:.0f} pixels: clipped in training"),
    ):
        for position in np.flatnonzero(which).tolist():
            value = f"{short_repr(annotations.entry(position)['bbox'])}, {what.format(*sizes[position])}"
            yield Finding(kind, "warning", f"{annotations.where(position)} has bbox {value}")
    far = far_from_boxes(annotations["area"], annotations["bbox"]) & ~annotations["iscrowd"]
    for position in np.flatnonzero(far).tolist():
        area, of_box = annotations["area"][position], boxes[2:4, position].prod()
        what = f"has area {area:.4g}, its box's is {of_box:.4g}: the area tells small objects from large ones in scores"
        yield Finding(FAR_FROM_BOX, "warning", f"{annotations.where(position)} {what}, and scales keypoints' errors")
    for position, same in _equal_boxes(annotations, file.image_places):
        value = short_repr(annotations.entry(position)["bbox"])
        what = f"has the image, category and bbox of annotations[{same}], {value}: one object counts twice in "
        yield Finding("duplicate boxes", "warning", f"{annotations.where(position)} {what}training and scoring")


def _equal_boxes(annotations: Entries, places: np.ndarray) -> Iterator[tuple[int, int]]:
    """The positions of objects of the same image, category and box as one before them, and of the first of these."""
    has = annotations.has("bbox") & annotations.has("category_id") & (places >= 0)
    objects = np.flatnonzero(has & ~annotations["iscrowd"])
    columns = [*annotations["bbox"].T, annotations["category_id"], places]
    # Equal boxes have equal sums; few others do.
    sums = sum(column[objects] * factor for column, factor in zip(columns, (1.1, 2.3, 3.7, 5.9, 7.1, 11.3)))
    _, numbers, counts = np.unique(sums, return_inverse=True, return_counts=True)
    first: dict[tuple[float, ...], int] = {}
    for position in objects[counts[numbers] > 1].tolist():
        same = first.setdefault(tuple(column[position] for column in columns), position)
        if same != position:
            yield position, same


def _misread_boxes(path: Any, boxes: np.ndarray) -> Iterator[Finding]:
    """Say if boxes, [6, L] with their images' sizes, would lie within these if their numbers meant something else."""
    x, y, w, h, width, height = boxes
    count, numbers = (~np.isnan(boxes).any(axis=0)).sum(), boxes[:4]
    right, lower = width + ROUNDING, height + ROUNDING
    outside = ((x + w > right) | (y + h > lower)).sum()
    # Whole numbers are place-holders, perhaps; in pixels, such a box lies in its image's very corner.
    small = ((numbers >= 0) & (numbers <= 1.0001)).all(0) & (numbers % 1 > 0).any(0)
    normalised = (small & (width > 10) & (height > 10)).sum()
    corners = ((x >= -ROUNDING) & (x < w) & (w <= right) & (y >= -ROUNDING) & (y < h) & (h <= lower)).sum()
    around_x = (w / 2 - ROUNDING <= x) & (x <= right - w / 2)
    centres = (around_x & (h / 2 - ROUNDING <= y) & (y <= lower - h / 2)).sum()
    coco = "COCO's bbox is x and y of the upper left corner, width and height, in pixels"
    begin = f"{path}: {outside:,} of {count:,} boxes reach outside their images, but"
    # From 10 boxes on; of fewer anything can be said. Almost all must fit the other reading. Where objects are large,
    # those of a right file fit that of corners.
    if normalised > count / 2:
        begin = f"{path}: {normalised:,} of {count:,} boxes look normalised, their numbers are all within 0..1"
        yield Finding(NORMALISED, "error", f"{begin}; {coco}: multiply by the image's width and height")
    elif outside >= 10 and corners >= 0.99 * count and outside > count / 2:
        begin += f" {corners:,} would not as corners, x1, y1, x2, y2, which is what they look like"
        yield Finding(CORNERS, "warning", f"{begin}; {coco}: subtract x1 from x2, and y1 from y2")
    elif outside >= 10 and centres >= 0.99 * count and outside > count / 20:
        begin += f" {centres:,} would not if x and y were of their centres, which is what it looks like"
        yield Finding(CENTRES, "warning", f"{begin}; {coco}: subtract half of width and height from x and y")
