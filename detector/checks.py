"""What can be wrong with a data set in COCO's format: all of it at once, each problem in one sentence."""

import os
import sys
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detector.errors import DataError, SizeError, shown
from detector.shared_images import equal_files

if TYPE_CHECKING:
    from detector.models import DetectorConfig

# detector.coco takes its problems from here. What needs it in turn, to open files, imports it when called.

Level = Literal["error", "flaw", "note"]
LEVELS: tuple[Level, ...] = ("error", "flaw", "note")
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


@dataclass(frozen=True)
class Findings:
    """What :func:`check_dataset` found.

    Args:
        problems: all of them, those in the annotation file first.
        contents: how much was looked at: "92 images with 829 annotations of 80 categories". Empty if the file
            could not be read.
    """

    problems: Sequence[Problem]
    contents: str = ""


def check_dataset(
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    decode: bool = True,
    workers: int = 4,
    on_image: Callable[[int], Any] = lambda left: None,
    other: str | Path | None = None,
    other_images: str | Path | None = None,
    detector: "DetectorConfig | None" = None,
) -> Findings:
    """Look for all that can be wrong with an annotation file and its images. Raises nothing about the data.

    Args:
        annotations: the annotation file, see :func:`~detector.coco.read_coco`.
        images: the folder that ``file_name`` is relative to; ``None``: only the annotation file is checked.
        decode: also open every image whose entry is right and whose file is there.
        workers: threads that open images, 1 or more.
        on_image: for a progress bar, called with the number of images still to open: with all, then after each.
        other: the annotation file of another split, which must not have the same images; nothing else about it is
            checked.
        other_images: the folder of its images, to compare files by content. Without it, or ``images``, or ``decode``,
            only names are.
        detector: compare the boxes with its anchors, in images resized as it does.

    Returns:
        The problems; a file that cannot be read is one of them.
    """
    from detector.coco import read_json

    try:
        data = read_json(annotations)
    except DataError as error:
        return Findings([Problem("unreadable annotation file", "error", str(error))])
    problems = list(annotation_problems(annotations, data))
    entries = _list(data, "images")
    boxes_are_right = not any(p.level == "error" or p.kind in (CORNERS, CENTRES) for p in problems)
    if detector is not None and boxes_are_right:
        problems += _anchor_problems(annotations, data, detector)
    if other is not None:
        by_content = images is not None and other_images is not None and decode
        problems += _shared_images((annotations, entries, images), other, other_images, by_content=by_content)
    if images is not None:
        unusable: set[int | None] = set()
        for position, problem in _file_problems(annotations, entries, Path(images)):
            problems.append(problem)
            unusable.add(position)
        if decode and None not in unusable:
            usable = [image for i, image in enumerate(entries) if i not in unusable and _is_right(image, "images")]
            problems += _image_problems(Path(images), usable, workers, on_image)
    contents = (
        f"{_count(len(entries), 'image')} with {_count(len(_list(data, 'annotations')), 'annotation')} of "
        f"{_count(len(_list(data, 'categories')), 'category', 'categories')}"
    )
    return Findings(problems, contents)


def annotation_problems(path: str | Path, data: Any) -> Iterator[Problem]:
    """What is wrong with the content of an annotation file. ``segmentation`` is not looked at.

    Args:
        path: the file's name, for the messages.
        data: what ``json.load`` made of it, whatever that is.

    Yields:
        Problems. :func:`~detector.coco.read_coco` takes a file that has none of level "error".
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
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in images if "id" in image}
    category_ids = {category["id"] for category in categories if "id" in category}
    readings, box_problems = _Readings(), []
    first: dict[Any, int] = {}  # of the boxes
    # Where the list itself is not there, that has been said.
    has_images, has_categories, has_annotations = (isinstance(data.get(name), list) for name in LISTS)
    for position, annotation in enumerate(annotations):
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if image_id is not None and image_id not in sizes and has_images:
            message = f"{_where(path, 'annotations', position, annotation)} has image_id {image_id}"
            yield Problem("annotations of an unknown image", "error", f"{message}, and there is no such image")
        if category_id is not None and category_id not in category_ids and has_categories:
            message = f"{_where(path, 'annotations', position, annotation)} has category_id {category_id}"
            yield Problem("annotations of an unknown category", "error", f"{message}, and there is no such category")
        if annotation.get("id") == 0:
            message = f"{_where(path, 'annotations', position, annotation)} has id 0, which pycocotools takes for none"
            what = "what detects it would count as a false detection; here annotations are numbered anew"
            yield Problem("annotations with id 0", "note", f"{message}: {what}")
        if "bbox" in annotation:
            width, height = sizes.get(image_id, (None, None))
            found = _box_problem(annotation["bbox"], width, height)
            if found is not None:
                kind, what = found
                message = f"{_where(path, 'annotations', position, annotation)} has bbox {shown(annotation['bbox'])}"
                box_problems.append(Problem(kind, "flaw", f"{message}, {what}"))
            if width is not None and height is not None:
                readings.count(annotation["bbox"], width, height)
            if image_id is not None and category_id is not None and not annotation.get("iscrowd"):
                same = first.setdefault((image_id, category_id, *annotation["bbox"]), position)
                if same != position:
                    message = f"{_where(path, 'annotations', position, annotation)} has the image, category and bbox of"
                    what = "one object counts twice in training and scoring"
                    box_problems.append(
                        Problem(
                            "duplicate boxes",
                            "flaw",
                            f"{message} annotations[{same}], {shown(annotation['bbox'])}: {what}",
                        )
                    )
    yield from readings.problems(path)
    yield from box_problems
    if has_annotations:
        used = {annotation.get("category_id") for annotation in annotations}
        yield from _unused(path, "categories", categories, used, "categories never used")
        used = {annotation.get("image_id") for annotation in annotations}
        yield from _unused(path, "images", images, used, "images without annotations")


def result_problems(
    path: str | Path, data: Any, image_ids: Container[int], category_ids: Container[int]
) -> Iterator[Problem]:
    """What is wrong with the content of a results file, all of level "error".

    Args:
        path: the file's name, for the messages.
        data: what ``json.load`` made of it, whatever that is.
        image_ids: of the annotations that it is to be scored with,
        category_ids: likewise.
    """
    if not isinstance(data, list):
        what = f"must hold a list of detections, not a {_kind(data)}"
        if isinstance(data, dict) and "annotations" in data:
            what += " (this is an annotation file)"
        yield Problem("not a results file", "error", f"{path}: not a results file: it {what}")
        return
    for position, entry in enumerate(data):
        if not _is_right(entry, RESULTS):
            yield from _entry_problems(path, RESULTS, position, entry)
            continue
        for field, known in (("image_id", image_ids), ("category_id", category_ids)):
            if entry[field] not in known:
                message = f"{path}: {RESULTS}[{position}] has {field} {entry[field]}, which the annotations do not have"
                yield Problem(f"results of an unknown {field}", "error", message)


def file_problems(annotations_path: str | Path, images: Iterable[Entry], folder: str | Path) -> Iterator[Problem]:
    """Which image files are not there. A look at names only, quick.

    Args:
        annotations_path: the annotation file's name, for the messages.
        images: its ``images``, in order; entries without a ``file_name`` are passed over.
        folder: the folder that ``file_name`` is relative to.

    Yields:
        Problems, all of level "error".
    """
    for _, problem in _file_problems(annotations_path, images, Path(folder)):
        yield problem


def image_problem(folder: str | Path, image: Entry) -> Problem | None:
    """What keeps an image from being read: it is decoded whole, as for training.

    Args:
        folder: the folder that ``file_name`` is relative to.
        image: an entry of ``images``, with ``file_name``, ``width`` and ``height``.
    """
    from detector.coco import read_image

    try:
        read_image(Path(folder) / image["file_name"], width=image["width"], height=image["height"])
    except DataError as error:
        kind = "sizes that differ" if isinstance(error, SizeError) else "unreadable images"
        return Problem(kind, "error", " ".join(str(error).split()))
    return None


def open_images(folder: str | Path, images: Sequence[Entry], *, workers: int = 4) -> Iterator[Problem | None]:
    """Open images, in threads: :func:`image_problem` of each, in order."""
    from detector.coco import without_pillows_warnings

    # Also around all threads: what each of them sets and takes back is all threads' own.
    with without_pillows_warnings(), ThreadPoolExecutor(workers) as executor:
        try:
            yield from executor.map(partial(image_problem, folder), images)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the images in the queue


def report(findings: Findings, *, examples: int = 3) -> str:
    """Problems as text, by kind: errors first, then flaws, then notes; a summary in the last line.

    Args:
        findings: what :func:`check_dataset` found.
        examples: problems of each kind to show; of the rest, the number.
    """
    lines: list[str] = []
    counts: list[str] = []
    for level in LEVELS:
        kinds: dict[str, list[str]] = {}
        for problem in findings.problems:
            if problem.level == level:
                kinds.setdefault(problem.kind, []).append(problem.message)
        for kind, messages in kinds.items():
            lines.append(f"{_count(len(messages), level)}: {kind}")
            lines += [f"    {message}" for message in messages[:examples]]
            if len(messages) > examples:
                lines.append(f"    ... and {len(messages) - examples:,} more")
            lines.append("")
        if kinds:
            counts.append(_count(sum(map(len, kinds.values())), level))
        elif level == "flaw" and not counts:
            counts.append("nothing wrong")
    lines.append(", ".join(counts) + (f" in {findings.contents}" if findings.contents else ""))
    return "\n".join(lines)


def _is_integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63  # ids become tensors


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_number(value: Any) -> bool:
    # Not math.isfinite: JSON's integers may be too large for a float.
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def _is_coordinate(value: Any) -> bool:
    # Beyond, areas overflow, or vanish, and an IoU is no number, which pycocotools counts as a match.
    return _is_number(value) and (value == 0 or 1e-100 <= abs(value) <= 1e9)


def _is_area(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= MOST_AREA


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_coordinate, value))


def _is_box_of_size(value: Any) -> bool:
    return _is_box(value) and min(value[2:]) >= 0


def _is_flag(value: Any) -> bool:
    return value in (0, 1)  # also true and false


# What each entry must have: a test, and what it asks for.
INTEGER = (_is_integer, "an integer of 64 bits")
SIZE = (_is_size, "an integer of at least 1")
TEXT = (_is_text, "a string")
BOX = (_is_box, "4 finite numbers, x, y, width and height, each 0 or from 1e-100 to 1e9 in size")
LISTS, RESULTS = ("images", "categories", "annotations"), "results"  # of an annotation file; the list of a results file
FIELDS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {"id": INTEGER, "file_name": TEXT, "width": SIZE, "height": SIZE},
    "categories": {"id": INTEGER, "name": TEXT},
    "annotations": {
        "id": INTEGER,
        "image_id": INTEGER,
        "category_id": INTEGER,
        "bbox": BOX,
        "area": (_is_area, "a number from 0 to 1e10"),
        "iscrowd": (_is_flag, "0 or 1"),
    },
    RESULTS: {
        "image_id": INTEGER,
        "category_id": INTEGER,
        "bbox": (_is_box_of_size, f"{BOX[1]}, the latter two not negative"),
        "score": (_is_number, "a finite number"),
    },
}
OPTIONAL = ("area", "iscrowd")


def _entries(path: str | Path, data: Entry, name: str) -> Generator[Problem, None, list[Entry]]:
    """Yield what is wrong with the entries of one list. Return them all, without the fields that are wrong."""
    if not isinstance(data.get(name), list):
        yield Problem("not in COCO's format", "error", f"{path}: {name!r} must be a list, got {_kind(data.get(name))}")
        return []
    entries = []
    for position, entry in enumerate(data[name]):
        if _is_right(entry, name):
            entries.append(entry)
            continue
        yield from _entry_problems(path, name, position, entry)
        fields = FIELDS[name].items() if isinstance(entry, dict) else ()
        entries.append({field: entry[field] for field, (fits, _) in fields if field in entry and fits(entry[field])})
    yield from _repeated(path, name, entries, "id", "error")
    return entries


def _entry_problems(path: str | Path, name: str, position: int, entry: Any) -> Iterator[Problem]:
    """What is wrong with one entry of a list, field by field."""
    if not isinstance(entry, dict):
        message = f"{path}: {name}[{position}] must be a dict, got {_kind(entry)}"
        yield Problem(f"{name} that are no dicts", "error", message)
        return
    where = _where(path, name, position, entry)
    for field, (fits, meant) in FIELDS[name].items():
        if field not in entry:
            if field not in OPTIONAL:
                message = f"{where}: {field!r} is missing, must be {meant}"
                yield Problem(f"{name} without {field}", "error", message)
        elif not fits(entry[field]):
            message = f"{where} has {field} {shown(entry[field])}, must be {meant}"
            yield Problem(f"{name} with a wrong {field}", "error", message)


def _is_right(entry: Any, name: str) -> bool:
    if not isinstance(entry, dict):
        return False
    for field, (fits, _) in FIELDS[name].items():
        if not fits(entry[field]) if field in entry else field not in OPTIONAL:
            return False
    return True


def _repeated(path: str | Path, name: str, entries: list[Entry], field: str, level: Level) -> Iterator[Problem]:
    first: dict[Any, int] = {}
    for position, entry in enumerate(entries):
        if field in entry and first.setdefault(entry[field], position) != position:
            message = (
                f"{_where(path, name, position, entry)}: {field} {shown(entry[field])} is used twice, first by "
                f"{name}[{first[entry[field]]}]"
            )
            yield Problem(f"{name} with the same {field}", level, message)


def _unused(path: str | Path, name: str, entries: list[Entry], used: set[Any], kind: str) -> Iterator[Problem]:
    for position, entry in enumerate(entries):
        if "id" in entry and entry["id"] not in used:
            called = shown(entry.get("name", entry.get("file_name")))
            yield Problem(kind, "note", f"{_where(path, name, position, entry)}, {called}, has no annotation")


def _box_problem(box: list[float], width: int | None, height: int | None) -> tuple[str, str] | None:
    """Kind and description of what is wrong with a box, in an image of that size if it is known."""
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


class _Readings:
    """Counts the boxes of a file that would lie in their images if their four numbers meant something else."""

    boxes = normalised = outside = corners = centres = 0

    def count(self, box: list[float], width: int, height: int) -> None:
        x, y, w, h = box
        right, lower = width + ROUNDING, height + ROUNDING
        self.boxes += 1
        # Whole numbers are a place-holder, perhaps; in pixels, such a box lies in its image's very corner.
        self.normalised += (
            min(box) >= 0 and max(box) <= 1.0001 and any(value % 1 for value in box) and min(width, height) > 10
        )
        self.outside += x + w > right or y + h > lower
        self.corners += -ROUNDING <= x < w <= right and -ROUNDING <= y < h <= lower
        self.centres += w / 2 - ROUNDING <= x <= right - w / 2 and h / 2 - ROUNDING <= y <= lower - h / 2

    def problems(self, path: str | Path) -> Iterator[Problem]:
        many = f"of {self.boxes:,} boxes"
        coco = "COCO's bbox is x and y of the upper left corner, width and height, in pixels"
        if self.normalised > self.boxes / 2:
            message = f"{path}: {self.normalised:,} {many} look normalised, their numbers are all within 0..1"
            what = f"{coco}: multiply by the image's width and height"
            yield Problem(NORMALISED, "error", f"{message}; {what}")
            return
        if self.outside < 10:  # of a few boxes anything can be said
            return
        message = f"{path}: {self.outside:,} {many} reach outside their images, but"
        # Almost all must fit the other reading. Where objects are large, those of a right file fit that of corners.
        if self.corners >= 0.99 * self.boxes and self.outside > self.boxes / 2:
            message += f" {self.corners:,} would not as corners, x1, y1, x2, y2, which is what they look like"
            yield Problem(CORNERS, "flaw", f"{message}; {coco}: subtract x1 from x2, and y1 from y2")
        elif self.centres >= 0.99 * self.boxes and self.outside > self.boxes / 20:
            message += f" {self.centres:,} would not if x and y were of their centres, which is what it looks like"
            yield Problem(CENTRES, "flaw", f"{message}; {coco}: subtract half of width and height from x and y")


def _anchor_problems(path: str | Path, data: Entry, detector: "DetectorConfig") -> Iterator[Problem]:
    """Of a file without errors."""
    import torch

    from detector.anchors import anchor_advice

    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    objects = []
    for annotation in data["annotations"]:
        if not annotation.get("iscrowd"):
            (x, y, w, h), (width, height) = annotation["bbox"], sizes[annotation["image_id"]]
            w, h = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)  # as training clips it
            if w > 0 and h > 0:
                objects.append((w, h, width, height))
    numbers = torch.tensor(objects, dtype=torch.float64).reshape(-1, 4)
    advice = anchor_advice(numbers[:, :2], numbers[:, 2:], detector)
    if advice is not None:
        yield Problem("anchors that most objects lie outside of", "note", f"{path}: {advice}")


def _shared_images(
    ours: tuple[str | Path, list[Any], str | Path | None],
    other: str | Path,
    other_images: str | Path | None,
    *,
    by_content: bool,
) -> Iterator[Problem]:
    """Images that another split has as well: their files byte for byte, or else their names alone.

    Args:
        ours: an annotation file, its images and their folder.
        other: the annotation file of the other split,
        other_images: and its folder.
        by_content: compare files; both folders are given.
    """
    from detector.coco import read_json

    try:
        data = read_json(other)
    except DataError as error:
        yield Problem("unreadable annotation file", "error", str(error))
        return
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        yield Problem("not in COCO's format", "error", f"{other}: must hold a dict with images, a list")
        return
    where: tuple[dict[Path, str], dict[Path, str]] = ({}, {})
    for (path, images, folder), files in zip((ours, (other, data["images"], other_images)), where):
        unusable = dict(_file_problems(path, images, Path(folder or ""))) if by_content else {}
        if None in unusable and files is where[1]:  # of ours it is said anyway
            yield unusable[None]
        for position, image in enumerate(images):
            name = image.get("file_name") if isinstance(image, dict) else None
            if isinstance(name, str) and position not in unusable and None not in unusable:
                file = Path(folder or "", name) if by_content else Path(name)
                files[file] = f"{_where(path, 'images', position, image)}, {shown(name)}"
    if by_content:
        for file, same in equal_files(*where).items():
            message = f"{where[0][file]}, is byte for byte {where[1][same]}"
            what = "trained on one, a detector scores too high on the other"
            yield Problem("images that the other split has, too", "flaw", f"{message}: {what}")
        return
    for file in where[0]:
        if file in where[1]:
            message = f"{where[0][file]}, is called like {where[1][file]}"
            what = "whether they are one image shows with both folders of images"
            yield Problem("file names that the other split has, too", "note", f"{message}: {what}")


def _file_problems(path: str | Path, images: Iterable[Any], folder: Path) -> Iterator[tuple[int | None, Problem]]:
    """Problems with the positions of their images; ``None`` for the folder's."""
    try:
        present = set(os.listdir(folder))  # one look, not one a file: COCO has 118,000
    except OSError as error:
        message = f"{folder}: no such image folder, or it cannot be read: {error.strerror}"
        yield None, Problem("missing image folder", "error", message)
        return
    root = folder.resolve()
    for position, image in enumerate(images):
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str) or name in present:
            continue
        inside, there = True, False
        try:
            file = (root / name).resolve()
            inside, there = file.is_relative_to(root), file.is_file()
        except (OSError, ValueError):  # a name that no file can have: too long, with a NUL byte
            pass
        where = f"{_where(path, 'images', position, image)} has file_name {shown(name)}"
        if not inside:
            yield position, Problem("image files outside their folder", "error", f"{where}, outside {folder}")
        elif not there:
            yield position, Problem("missing image files", "error", f"{where}, not in {folder}")


def _image_problems(
    folder: Path, images: list[Entry], workers: int, on_image: Callable[[int], Any]
) -> Iterator[Problem]:
    on_image(len(images))
    for left, problem in zip(reversed(range(len(images))), open_images(folder, images, workers=workers)):
        on_image(left)
        if problem is not None:
            yield problem


def _list(data: Any, name: str) -> list[Any]:
    entries = data.get(name) if isinstance(data, dict) else None
    return entries if isinstance(entries, list) else []


def _where(path: str | Path, name: str, position: int, entry: Entry) -> str:
    return f"{path}: {name}[{position}]" + (f" (id {shown(entry['id'])})" if "id" in entry else "")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
