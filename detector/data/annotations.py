"""The annotations of a split as a few arrays, checked."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from detector.data.annotation_types import FIELD, AnnotationType
from detector.data.checks import IGNORED, Finding, check_annotations
from detector.data.entries import MOST_AREA, CocoFile, find
from detector.data.keypoints import KeypointLayout, layout_of
from detector.data.mask_keypoint_checks import check_annotation_type, has_any
from detector.errors import DataError, MissingAnnotationsError


class Packed:
    """Many strings in one block that forked workers share; Python's would be copied as their reference counts change.

    Args:
        pieces: in UTF-8.
        order: number ``i`` is the piece ``order[i]``.
    """

    def __init__(self, pieces: Sequence[Any] | np.ndarray, order: np.ndarray) -> None:
        self._block = b"".join(pieces)
        lengths = np.fromiter(map(len, map(bytes, pieces)), np.int64, len(pieces))
        self._ends = np.cumsum(lengths)[order]
        self._starts = self._ends - lengths[order]

    def __getitem__(self, number: int) -> str:
        return self._block[self._starts[number] : self._ends[number]].decode()


@dataclass(frozen=True, eq=False)
class Annotations:
    """An annotation file without errors, as arrays: images in the order of their ids, and annotations by image."""

    path: Path
    categories: list[dict[str, Any]]  # whole entries, in the order of their ids
    image_ids: np.ndarray  # [N] int64
    sizes: np.ndarray  # width and height in pixels, [N, 2] int64
    names: Packed  # the ``file_name`` of each image
    places: np.ndarray  # where each image stands in the file, [N]
    image_of: np.ndarray  # the index of each annotation's image, ascending, [L]
    ids: np.ndarray  # [L] int64
    category_ids: np.ndarray  # [L] int64
    boxes: np.ndarray  # x, y, width and height in pixels, as in the file, [L, 4] float64
    areas: np.ndarray  # square pixels, the box's where the file has none, [L] float64
    crowds: np.ndarray  # [L] bool
    annotation_types: dict[AnnotationType, Packed]  # the JSON of each annotation\'s mask or keypoints
    warnings: Counter[str]  # how many boxes and parts are left out, clipped or counted wrong, by kind

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_names(self) -> list[str]:
        """The file name of each image."""
        return [self.names[index] for index in range(len(self))]

    def image(self, index: int) -> dict[str, Any]:
        """An image's entry: its ``id``, ``file_name``, ``width`` and ``height``."""
        width, height = self.sizes[index].tolist()
        return {"id": int(self.image_ids[index]), "file_name": self.names[index], "width": width, "height": height}

    def find(self, image_ids: Iterable[int]) -> np.ndarray:
        """The index of each image; -1 where there is none of that id."""
        return find(self.image_ids, np.fromiter(image_ids, np.int64))

    def of(self, index: int) -> slice:
        """The annotations of an image."""
        return slice(*np.searchsorted(self.image_of, (index, index + 1)).tolist())

    def value(self, part: AnnotationType, row: int) -> Any:
        """The ``segmentation`` or the ``keypoints`` of an annotation; ``None`` if it has none."""
        raw = self.annotation_types[part][row]
        return msgspec.json.decode(raw) if raw else None

    def keypoint_layout(self) -> KeypointLayout | None:
        """The layout of the keypoints, see :func:`~detector.data.keypoints.layout_of`; ``None`` if none are read."""
        points = (self.value("keypoints", row) for row in range(len(self.ids)))
        return layout_of(self.path, self.categories, points) if "keypoints" in self.annotation_types else None


def read_annotations(
    path: str | Path, *, annotation_types: Collection[AnnotationType] = (), needed: bool = True, labelled: bool = True
) -> Annotations:
    """Read an annotation file of COCO's instances format.

    ``iscrowd`` may be missing (0 is meant), and ``area`` (the box's is taken; COCO's own is the mask's).

    Args:
        path: ``instances_*.json``: a dict with ``images``, ``annotations`` and ``categories``.
        annotation_types: what is read besides boxes: "masks", "keypoints" or both. Others are not looked at.
        needed: if false, parts that no object has are left out; else they are an error.
        labelled: if false, annotations are not read, and may be missing, as in COCO's ``image_info_test-dev2017``.

    Raises:
        DataError: the file cannot be read; or the first "error" of
            :func:`~detector.data.checks.check_annotations` or of
            :func:`~detector.data.mask_keypoint_checks.check_annotation_type`, and how many more there are.
        MissingAnnotationsError: no object has one of ``annotation_types``.
    """
    file = CocoFile(path, fields=[FIELD[part] for part in annotation_types], labelled=labelled)
    warnings = refuse(check_annotations(file), f"{path}")
    found = [part for part in annotation_types if has_any(file, part)]
    for part in annotation_types:
        if part not in found and needed:
            what = "polygons or an RLE are needed" if part == "masks" else "COCO has them in person_keypoints_*.json"
            raise MissingAnnotationsError(f"{path}: no object has {part} ({FIELD[part]}): {what}")
    for part in found:
        warnings += refuse(check_annotation_type(file, part), f"{path}")
    images, annotations = file.images, file.annotations
    by_id = np.argsort(images["id"])
    index_of = np.argsort(by_id)[file.image_places]
    rows = np.argsort(index_of, kind="stable")
    boxes, areas = annotations["bbox"][rows], annotations["area"][rows]
    # A box of a negative size is an object that nobody can find, as one without a size is.
    of_boxes = boxes[:, 2:].clip(min=0).prod(axis=1).clip(max=MOST_AREA)
    return Annotations(
        path=Path(path),
        categories=[file.categories.entry(position) for position in np.argsort(file.categories["id"])],
        image_ids=images["id"][by_id],
        sizes=np.stack([images["width"], images["height"]], axis=1)[by_id],
        names=Packed([name.encode() for name in images["file_name"]], by_id),
        places=by_id,
        image_of=index_of[rows],
        ids=annotations["id"][rows],
        category_ids=annotations["category_id"][rows],
        boxes=boxes,
        areas=np.where(np.isnan(areas), of_boxes, areas),
        crowds=annotations["iscrowd"][rows],
        annotation_types={part: Packed(annotations[FIELD[part]], rows) for part in found},
        warnings=warnings,
    )


def refuse(problems: Iterable[Finding], checked: str | None = None) -> Counter[str]:
    """Raise the first error among problems, or count the warnings, and annotations with ``ignore``, for the report.

    Args:
        problems: see :class:`~detector.data.checks.Finding`.
        checked: the arguments with which ``tools/check.py`` lists them all.
    """
    warnings: Counter[str] = Counter()
    first, more = None, -1
    for problem in problems:
        if problem.level == "error":
            first, more = first or problem.message, more + 1
        elif problem.level == "warning" or problem.kind == IGNORED:
            warnings[problem.kind] += 1
    if first is not None:
        lists = "" if checked is None else f": tools/check.py {checked} lists them"
        raise DataError(first + (f" (and {more:,} more problem{'s' * (more > 1)}{lists})" if more else ""))
    return warnings
