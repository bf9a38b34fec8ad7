"""What can be wrong with the masks and the keypoints of a file in COCO's format, which not every training reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from detector.data.annotation_types import FIELD, AnnotationType
from detector.data.checks import ROUNDING, Finding, Level, far_from_boxes, sizes_of_images
from detector.data.entries import CocoFile, Entries, value_of
from detector.data.keypoints import keypoints_problem, layout_of
from detector.data.masks import is_empty
from detector.data.placement import keypoint_placement, mask_placement
from detector.data.segmentations import measure_masks, read_segmentation, spans_a_pixel
from detector.errors import DataError, short_repr

MISSING: dict[AnnotationType, tuple[str, str]] = {
    "masks": (
        "objects without a segmentation",
        "has no segmentation: its mask is trained as an empty one, and scored as missed",
    ),
    "keypoints": ("objects without keypoints", "has no keypoints: its box is learned, keypoints are not"),
}
EMPTY: dict[AnnotationType, tuple[str, str]] = {
    "masks": (
        "masks without a pixel",
        "has a segmentation without a pixel in its image: it is trained as an empty mask, and scored as missed",
    ),
    "keypoints": (
        "objects whose keypoints are all unlabelled",
        "has keypoints that are all unlabelled (visibility 0): its box is learned, keypoints are not",
    ),
}
NO_AREA: dict[AnnotationType, tuple[str, str]] = {
    "masks": (
        "masks without an area",
        "has no area: its box's area decides whether its mask is scored as small or large",
    ),
    "keypoints": (
        "keypoints without an area",
        "has no area: its box's, which is larger, is used, so that its keypoints are matched too easily",
    ),
}
OUTSIDE_BOX: dict[AnnotationType, tuple[str, str]] = {
    "masks": ("masks outside their boxes", "has a segmentation outside its bbox {bbox}"),
    "keypoints": ("keypoints outside their boxes", "has keypoints of which most lie outside its bbox {bbox}"),
}
OUTSIDE_IMAGE: dict[AnnotationType, tuple[str, str]] = {
    "masks": ("masks that reach outside their image", "has a segmentation that reaches outside its image: clipped"),
    "keypoints": (
        "keypoints outside their image",
        "has labelled keypoints outside its image: training takes them as not labelled",
    ),
}
FAR_FROM_MASK = (
    "areas that are far from their masks'",
    "has area {area:.4g}, its mask's is {mask:.4g}: segm scores tell small objects from large ones by it",
)
PLACEHOLDERS = (
    "labelled keypoints at (0, 0) or (-1, -1)",
    "has labelled keypoints at (0, 0) or (-1, -1), which are scored: placeholders have visibility 0",
)
MOST_MEASURED = 50_000  # annotations of a file, up to which every mask is measured
AT_ONCE = 256  # masks that are measured together: more lists slow down Python's garbage collection


def has_any(file: CocoFile, part: AnnotationType) -> bool:
    """Whether any object has a mask, or keypoints; crowds do not count, from which nothing is learned."""
    objects = file.annotations[FIELD[part]][~file.annotations["iscrowd"]]
    return any(not _is_empty(value_of(raw), part) for raw in filter(bytes, objects))


def _is_empty(value: Any, part: AnnotationType) -> bool:
    return is_empty(value) if part == "masks" else not value


@dataclass(frozen=True)
class _Read:
    """The masks, or the keypoints, of a file, [L] of each."""

    wrong: list[str | None]  # what is wrong with it; something, where there is none
    points: np.ndarray  # [L, P, 2], x and y in pixels: of a mask two corners of the box around it
    labelled: np.ndarray  # [L, P], bool: which of them are there; no placeholders beside others
    is_empty: np.ndarray  # without a pixel, or a labelled point; false where it is wrong
    areas: np.ndarray  # of masks, in pixels; NaN of keypoints
    expected: np.ndarray  # whether objects of its category have them
    placeholders: np.ndarray  # with a labelled point at (0, 0), or (-1, -1)


def check_annotation_type(file: CocoFile, part: AnnotationType, *, broken: Level = "error") -> Iterator[Finding]:
    """Say what is wrong with the masks, or the keypoints, of annotations that are right otherwise.

    Args:
        file: one without errors, see :func:`~detector.data.checks.check_annotations`.
        part: which of them.
        broken: the level of those that cannot be read: an "error" where they are needed.

    Yields:
        The problems; none where no object has the part. Objects without it are a warning where others have it. It is an
        error if most have nothing to do with their boxes, or if no mask has a pixel.
    """
    if not has_any(file, part):
        return
    annotations, objects = file.annotations, ~file.annotations["iscrowd"]
    without = "" if broken == "error" else f" (boxes can be trained all the same, {part} cannot)"
    try:
        read = _read_masks(file) if part == "masks" else _read_keypoints(file)
    except DataError as error:
        yield Finding("categories with keypoints that do not fit", broken, f"{error}{without}")
        return
    missing = np.zeros(len(annotations), dtype=bool)
    for position in [at for at, what in enumerate(read.wrong) if what is not None]:
        value = value_of(annotations[FIELD[part]][position])
        missing[position] = _is_empty(value, part)
        if not missing[position]:
            what = f"has {FIELD[part]} {short_repr(value)}, {read.wrong[position]}{without}"
            kind = f"broken {'segmentations' if part == 'masks' else 'keypoints'}"
            yield Finding(kind, broken, f"{annotations.where(position)} {what}")
    outside, whole = _outside_boxes(file, part, read, objects)
    if whole is not None:
        yield whole
        return
    there = objects & np.array([what is None for what in read.wrong], dtype=bool)
    if part == "masks" and there.any() and read.is_empty[there].all():
        message = f"{file.path}: no segmentation has a pixel in its image: there is no mask to learn or to score"
        yield Finding("annotation file whose masks have no pixel", "error", message)
    warnings = [
        (MISSING[part], missing & read.expected),
        (EMPTY[part], read.is_empty),
        (NO_AREA[part], np.isnan(annotations["area"]) & ~missing),
        (OUTSIDE_BOX[part], outside & ~read.is_empty),
        (OUTSIDE_IMAGE[part], _outside_image(file, read) & ~read.is_empty),
        (PLACEHOLDERS, read.placeholders),
        (FAR_FROM_MASK, _far_from_masks(annotations, read.areas)),
    ]
    for (kind, what), which in warnings:
        for position in np.flatnonzero(objects & which).tolist():
            values = {"area": annotations["area"][position], "mask": read.areas[position]}
            said = what.format(bbox=short_repr(annotations["bbox"][position].tolist()), **values)
            yield Finding(kind, "warning", f"{annotations.where(position)} {said}")


def _read_masks(file: CocoFile) -> _Read:
    """Read all masks. At most :data:`AT_ONCE` are held at a time: COCO's would take gigabytes as lists."""
    raws, sizes = file.annotations["segmentation"], sizes_of_images(file)
    limits = _limits(file.annotations, sizes)
    boxes, areas = limits.copy(), np.full(len(raws), np.nan)
    wrong: list[str | None] = []
    doubtful: dict[int, Any] = {}
    crowds = file.annotations["iscrowd"].tolist()  # of which nothing is said but what is broken
    columns = zip(raws, crowds, *sizes.astype(int).T.tolist(), *limits.T.tolist())
    for row, (raw, is_crowd, width, height, *limit) in enumerate(columns):
        value, problem = read_segmentation(raw, width, height)
        wrong.append(problem)
        if problem is not None or not (is_crowd or spans_a_pixel(value, *limit)):
            doubtful[row] = value
        if len(doubtful) == AT_ONCE or row == len(raws) - 1:
            rows = list(doubtful)
            boxes[rows], areas[rows] = measure_masks(list(doubtful.values()), sizes[rows].astype(int).tolist())
            doubtful.clear()
    expected = np.ones(len(raws), dtype=bool)
    corners, there = boxes.reshape(-1, 2, 2), np.isfinite(boxes[:, ::2])
    return _Read(wrong, corners, there, areas == 0, areas, expected, np.zeros(len(raws), dtype=bool))


def _limits(annotations: Entries, sizes: np.ndarray) -> np.ndarray:
    """The boxes in which three points prove a mask right, [L, 4] (x1, y1, x2, y2); NaN: the mask is measured.

    Measuring takes ten times as long. In files of up to :data:`MOST_MEASURED` annotations all masks are measured.
    """
    x, y, w, h = annotations["bbox"].T
    limits = np.stack([x.clip(min=0), y.clip(min=0), np.minimum(x + w, sizes[:, 0]), np.minimum(y + h, sizes[:, 1])], 1)
    far = annotations["area"] < 0.3 * w * h  # perhaps from the mask's
    limits[far | (len(annotations) <= MOST_MEASURED)] = np.nan
    return limits


def _read_keypoints(file: CocoFile) -> _Read:
    """Read all keypoints. Raises :class:`DataError` if the categories name different ones."""
    raws = file.annotations["keypoints"]
    categories = [file.categories.entry(position) for position in range(len(file.categories))]
    layout = layout_of(file.path, categories, map(value_of, raws))
    count = len(layout) if layout else 1
    having = [bool(entry.get("keypoints")) for entry in categories]
    having = having if any(having) else [True] * len(having)
    expected = np.isin(file.annotations["category_id"], file.categories["id"][having])
    wrong = [keypoints_problem(raw, count) for raw in raws]
    nothing = [0] * (3 * count)
    values = [nothing if what is not None else value_of(raw) for raw, what in zip(raws, wrong)]
    points = np.array(values, dtype=np.float64).reshape(-1, count, 3)
    visible = points[..., 2] > 0
    at = points[..., :2]
    placeholders = visible & ((at == 0).all(axis=2) | (at == -1).all(axis=2))
    others = visible & ~placeholders
    judged = np.where(others.any(axis=1, keepdims=True), others, visible)
    right = np.array([what is None for what in wrong], dtype=bool)
    empty, areas = right & ~visible.any(axis=1), np.full(len(raws), np.nan)
    return _Read(wrong, points[..., :2], judged, empty, areas, expected, np.any(placeholders, axis=1))


def _outside_boxes(
    file: CocoFile, part: AnnotationType, read: _Read, which: np.ndarray
) -> tuple[np.ndarray, Finding | None]:
    """Find those that lie outside their boxes, [L]; where most numbers are wrong, that is a problem of the file."""
    boxes, sizes = file.annotations["bbox"].copy(), sizes_of_images(file)
    rows = np.flatnonzero(which & read.labelled.any(axis=1) & (boxes[:, 2:] > 0).all(axis=1))
    boxes[:, 2:] += boxes[:, :2]
    if part == "masks":
        placed = mask_placement(read.points[rows], boxes[rows], sizes[rows])
    else:
        placed = keypoint_placement(read.points[rows], read.labelled[rows], boxes[rows], sizes[rows])
    outside = np.zeros(len(boxes), dtype=bool)
    outside[rows[placed.outside]] = True
    if not placed.wrong:
        return outside, None
    begin = f"{file.path}: most {part} of {len(rows):,} annotations do not lie in their bbox"
    other = "; they may belong to other objects, or to images of another size"
    what = f"; they look like {placed.looks}" if placed.looks else other
    return outside, Finding(f"annotation file whose {part} lie outside boxes", "error", f"{begin}{what}")


def _outside_image(file: CocoFile, read: _Read) -> np.ndarray:
    """Which objects have labelled points outside their image, [L]."""
    sizes = sizes_of_images(file)[:, None]
    beyond = np.any((read.points < -ROUNDING) | (read.points > sizes + ROUNDING), axis=2)
    return np.any(beyond & read.labelled, axis=1)


def _far_from_masks(annotations: Entries, of_masks: np.ndarray) -> np.ndarray:
    """Which areas are neither like that of their mask nor between it and their box's, [L]."""
    areas, boxes = annotations["area"], annotations["bbox"]
    most = 3 * np.maximum(of_masks, boxes[:, 2:].prod(axis=1)) + 20
    far: np.ndarray = (areas < of_masks / 3 - 10) | (areas > most)
    return far & (of_masks > 0) & ~far_from_boxes(areas, boxes)
