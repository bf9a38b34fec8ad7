"""What can be wrong with a data set in COCO's format: all of it at once, each problem in one sentence."""

import sys
from array import array
from collections.abc import Callable, Container, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detector.errors import shown

Level = Literal["error", "flaw", "note"]
MOST_AREA = 1e10  # square pixels: COCO's metric passes over objects of a larger area, or of one below 0
ROUNDING = 1.0  # pixels by which a box may reach outside its image: those of COCO's own files do, by less
NORMALISED = "annotation file whose boxes look normalised (0..1)"
CORNERS = "annotation file whose boxes look like corners (x1, y1, x2, y2)"
CENTRES = "annotation file whose boxes look like centres (cx, cy, width, height)"

Entry = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, or worth knowing.

    Args:
        kind: a short heading, the same for all problems of the kind, such as "missing image files".
        level: "error": training or scoring cannot use the file. "flaw": they can, but something is clipped, left
            out or counted wrong. "note": nothing is wrong.
        message: one sentence that names the file, the entry (its place in the list, and its id), field and value.
    """

    kind: str
    level: Level
    message: str


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_coordinate, value))


def _is_coordinate(value: Any) -> bool:
    # Beyond, areas overflow, or vanish, and an IoU is no number, which pycocotools counts as a match.
    return type(value) in (int, float) and (value == 0 or 1e-100 <= abs(value) <= 1e9)


# What each entry must have: a test, and what it asks for. Ids become tensors of 64 bits.
Field = tuple[Callable[[Any], bool], str]
ID: Field = (lambda value: type(value) is int and -(2**63) <= value < 2**63, "an integer of 64 bits")
SIZE: Field = (lambda value: type(value) is int and 1 <= value < 2**63, "an integer of at least 1")
TEXT: Field = (lambda value: type(value) is str, "a string")
BOX: Field = (_is_box, "4 finite numbers, x, y, width and height, each 0 or from 1e-100 to 1e9 in size")
NOT_NEGATIVE: Field = (lambda value: _is_box(value) and min(value[2:]) >= 0, f"{BOX[1]}, the latter two not negative")
AREA: Field = (lambda value: type(value) in (int, float) and 0 <= value <= MOST_AREA, "a number from 0 to 1e10")
FLAG: Field = (lambda value: value in (0, 1), "0 or 1")  # also true and false
# Not math.isfinite: JSON's integers may be too large for a float.
NUMBER: Field = (lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max, "a finite number")
RESULTS = "results"  # the list of a results file
FIELDS: dict[str, dict[str, Field]] = {
    "images": {"id": ID, "file_name": TEXT, "width": SIZE, "height": SIZE},
    "categories": {"id": ID, "name": TEXT},
    "annotations": {"id": ID, "image_id": ID, "category_id": ID, "bbox": BOX, "area": AREA, "iscrowd": FLAG},
    RESULTS: {"image_id": ID, "category_id": ID, "bbox": NOT_NEGATIVE, "score": NUMBER},
}
OPTIONAL = ("area", "iscrowd")
INSTEAD_OF_BOX = ("segmentation", "keypoints")  # of a result: its box is the one around them


def annotation_problems(path: str | Path, data: Any) -> Iterator[Problem]:
    """Say what is wrong with the content of an annotation file, whatever ``json.load`` made of it.

    :func:`~detector.data.annotations.read_coco` takes a file without a problem of level "error". Masks and key points
    are looked at in :mod:`~detector.data.part_problems`. ``path`` names the file in the messages.
    """
    if not isinstance(data, dict):
        what = f"must hold a dict with images, annotations and categories, not a {_kind(data)}"
        yield Problem("not in COCO's format", "error", f"{path}: {what}")
        return
    images = yield from _entries(path, data, "images")
    categories = yield from _entries(path, data, "categories")
    annotations = yield from _entries(path, data, "annotations")
    yield from _repeated(path, "images", images, "file_name", "flaw")
    yield from _repeated(path, "categories", categories, "name", "flaw")

    def problem(kind: str, level: Level, position: int, what: str) -> Problem:
        return Problem(kind, level, f"{where(path, 'annotations', position, annotations[position])} has {what}")

    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in images if "id" in image}
    known: dict[str, Container[Any]] = {}
    if isinstance(data.get("images"), list):  # that it is not there has been said
        known["image"] = sizes
    if isinstance(data.get("categories"), list):
        known["category"] = {category["id"] for category in categories if "id" in category}
    in_images = array("d")  # boxes, each with the size of its image
    box_problems: list[Problem] = []
    first: dict[Any, int] = {}  # of equal boxes
    for position, annotation in enumerate(annotations):
        for one, ids in known.items():
            if (found_id := annotation.get(f"{one}_id")) is not None and found_id not in ids:
                what = f"{one}_id {found_id}, and there is no such {one}"
                yield problem(f"annotations of an unknown {one}", "error", position, what)
        if annotation.get("id") == 0:
            what = "id 0, which pycocotools takes for none: what detects it would count as a false detection; here "
            yield problem("annotations with id 0", "note", position, f"{what}annotations are numbered anew")
        box, image_id, category_id = (annotation.get(field) for field in ("bbox", "image_id", "category_id"))
        if box is None:
            continue
        width, height = sizes.get(image_id, (None, None))
        if (found := _box_problem(box, width, height)) is not None:
            kind, what = found
            box_problems.append(problem(kind, "flaw", position, f"bbox {shown(box)}, {what}"))
        if width is not None and height is not None:
            in_images.extend((*box, width, height))
        if image_id is not None and category_id is not None and not annotation.get("iscrowd"):
            same = first.setdefault((image_id, category_id, *box), position)
            if same != position:
                what = f"the image, category and bbox of annotations[{same}], {shown(box)}: one object counts twice in "
                box_problems.append(problem("duplicate boxes", "flaw", position, f"{what}training and scoring"))
    yield from _misread_boxes(path, np.asarray(in_images).reshape(-1, 6))
    yield from box_problems  # which the former explain
    if isinstance(data.get("annotations"), list):
        used = {annotation.get("category_id") for annotation in annotations}
        yield from _unused(path, "categories", categories, used, "categories never used")
        used = {annotation.get("image_id") for annotation in annotations}
        yield from _unused(path, "images", images, used, "images without annotations")


def result_problems(
    path: str | Path, data: Any, image_ids: Container[int], category_ids: Container[int]
) -> Iterator[Problem]:
    """Say what is wrong with the content of a results file, as errors; the ids are those that the annotations have."""
    if not isinstance(data, list):
        what = f"must hold a list of detections, not a {_kind(data)}"
        if isinstance(data, dict) and "annotations" in data:
            what += " (this is an annotation file)"
        yield Problem("not a results file", "error", f"{path}: not a results file: it {what}")
        return
    for position, entry in enumerate(data):
        if wrong_fields(RESULTS, entry):
            yield from _entry_problems(path, RESULTS, position, entry)
            continue
        for field, known in (("image_id", image_ids), ("category_id", category_ids)):
            if entry[field] not in known:
                message = f"{path}: {RESULTS}[{position}] has {field} {entry[field]}, which the annotations do not have"
                yield Problem(f"results of an unknown {field}", "error", message)


def wrong_fields(name: str, entry: Any) -> list[str]:
    """Name the fields of an entry of a list that are missing or wrong: all of them if it is no dict."""
    if not isinstance(entry, dict):
        return list(FIELDS[name])
    optional: tuple[str, ...] = OPTIONAL
    if name == RESULTS and any(entry.get(part) for part in INSTEAD_OF_BOX):
        optional = (*OPTIONAL, "bbox")
    return [
        field
        for field, (fits, _) in FIELDS[name].items()
        if (not fits(entry[field]) if field in entry else field not in optional)
    ]


def where(path: str | Path, name: str, position: int, entry: Entry) -> str:
    """Name an entry of a list in a file, for messages."""
    return f"{path}: {name}[{position}]" + (f" (id {shown(entry['id'])})" if "id" in entry else "")


def _entries(path: str | Path, data: Entry, name: str) -> Generator[Problem, None, list[Entry]]:
    """Yield what is wrong with the entries of one list. Return them all, without the fields that are wrong."""
    if not isinstance(data.get(name), list):
        yield Problem("not in COCO's format", "error", f"{path}: {name!r} must be a list, got {_kind(data.get(name))}")
        return []
    entries = []
    for position, entry in enumerate(data[name]):
        if wrong := wrong_fields(name, entry):
            yield from _entry_problems(path, name, position, entry)
            fields = FIELDS[name] if isinstance(entry, dict) else ()
            entries.append({field: entry[field] for field in fields if field in entry and field not in wrong})
        else:
            entries.append(entry)
    yield from _repeated(path, name, entries, "id", "error")
    return entries


def _entry_problems(path: str | Path, name: str, position: int, entry: Any) -> Iterator[Problem]:
    """Say what is wrong with one entry of a list, field by field."""
    if not isinstance(entry, dict):
        message = f"{path}: {name}[{position}] must be a dict, got {_kind(entry)}"
        yield Problem(f"{name} that are no dicts", "error", message)
        return
    for field in wrong_fields(name, entry):
        at, (_, meant) = where(path, name, position, entry), FIELDS[name][field]
        if field in entry:
            message = f"{at} has {field} {shown(entry[field])}, must be {meant}"
            yield Problem(f"{name} with a wrong {field}", "error", message)
        else:
            yield Problem(f"{name} without {field}", "error", f"{at}: {field!r} is missing, must be {meant}")


def _repeated(path: str | Path, name: str, entries: list[Entry], field: str, level: Level) -> Iterator[Problem]:
    first: dict[Any, int] = {}
    for position, entry in enumerate(entries):
        if field in entry and first.setdefault(entry[field], position) != position:
            what = f"{field} {shown(entry[field])} is used twice, first by {name}[{first[entry[field]]}]"
            yield Problem(f"{name} with the same {field}", level, f"{where(path, name, position, entry)}: {what}")


def _unused(path: str | Path, name: str, entries: list[Entry], used: set[Any], kind: str) -> Iterator[Problem]:
    for position, entry in enumerate(entries):
        if "id" in entry and entry["id"] not in used:
            called = shown(entry.get("name", entry.get("file_name")))
            yield Problem(kind, "note", f"{where(path, name, position, entry)}, {called}, has no annotation")


def _box_problem(box: list[float], width: int | None, height: int | None) -> tuple[str, str] | None:
    """Return kind and description of what is wrong with a box, in an image of that size if it is known."""
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "empty boxes", "without width or height: left out in training"
    if width is None or height is None:
        return None
    right, lower = x + w, y + h
    if x >= width or y >= height or right <= 0 or lower <= 0:
        return "boxes outside their image", f"outside its image of {width}x{height} pixels: left out in training"
    if min(x, y) < -ROUNDING or right > width + ROUNDING or lower > height + ROUNDING:
        kind = "boxes that reach outside their image"
        return kind, f"reaching outside its image of {width}x{height} pixels: clipped in training"
    return None


def _misread_boxes(path: str | Path, boxes: np.ndarray) -> Iterator[Problem]:
    """Say if boxes, [L, 6] with their images' sizes, would lie within these if their numbers meant something else."""
    x, y, w, h, width, height = boxes.T
    right, lower, numbers = width + ROUNDING, height + ROUNDING, boxes[:, :4]
    outside = ((x + w > right) | (y + h > lower)).sum()
    # Whole numbers are place-holders, perhaps; in pixels, such a box lies in its image's very corner.
    small = ((numbers >= 0) & (numbers <= 1.0001)).all(1) & (numbers % 1 > 0).any(1)
    normalised = (small & (width > 10) & (height > 10)).sum()
    corners = ((x >= -ROUNDING) & (x < w) & (w <= right) & (y >= -ROUNDING) & (y < h) & (h <= lower)).sum()
    around_x = (w / 2 - ROUNDING <= x) & (x <= right - w / 2)
    centres = (around_x & (h / 2 - ROUNDING <= y) & (y <= lower - h / 2)).sum()
    coco = "COCO's bbox is x and y of the upper left corner, width and height, in pixels"
    begin = f"{path}: {outside:,} of {len(boxes):,} boxes reach outside their images, but"
    # From 10 boxes on; of fewer anything can be said. Almost all must fit the other reading. Where objects are large,
    # those of a right file fit that of corners.
    if normalised > len(boxes) / 2:
        begin = f"{path}: {normalised:,} of {len(boxes):,} boxes look normalised, their numbers are all within 0..1"
        yield Problem(NORMALISED, "error", f"{begin}; {coco}: multiply by the image's width and height")
    elif outside >= 10 and corners >= 0.99 * len(boxes) and outside > len(boxes) / 2:
        begin += f" {corners:,} would not as corners, x1, y1, x2, y2, which is what they look like"
        yield Problem(CORNERS, "flaw", f"{begin}; {coco}: subtract x1 from x2, and y1 from y2")
    elif outside >= 10 and centres >= 0.99 * len(boxes) and outside > len(boxes) / 20:
        begin += f" {centres:,} would not if x and y were of their centres, which is what it looks like"
        yield Problem(CENTRES, "flaw", f"{begin}; {coco}: subtract half of width and height from x and y")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
