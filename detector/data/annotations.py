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
from detector.data.entries import MAX_AREA, CocoFile, find
from detector.data.keypoints import KeypointLayout, layout_of
from detector.data.mask_keypoint_checks import check_annotation_type, has_any
from detector.errors import DataError, MissingAnnotationsError


class PackedStrings:
    """UTF-8 strings in one block of memory, which forked workers share. String ``i`` is ``pieces[order[i]]``."""

    def __init__(self, pieces: Sequence[Any] | np.ndarray, order: np.ndarray) -> None:
        self._block = b"".join(pieces)
        lengths = np.fromiter(map(len, map(bytes, pieces)), np.int64, len(pieces))
        self._ends = np.cumsum(lengths)[order]
        self._starts = self._ends - lengths[order]

    def __getitem__(self, number: int) -> str:
        return self._block[self._starts[number] : self._ends[number]].decode()


@dataclass(frozen=True, eq=False)
class Annotations:
    """An annotation file without errors, as arrays: images ordered by id, and L annotations ordered by image."""

    path: Path
    categories: list[dict[str, Any]]  # whole entries, ordered by id
    image_ids: np.ndarray  # [N] int64
    sizes: np.ndarray  # [N, 2] int64, width and height in pixels
    names: PackedStrings  # the ``file_name`` of each image
    places: np.ndarray  # [N], the position of each image in the file
    image_of: np.ndarray  # [L], the index of each annotation's image, ascending
    ids: np.ndarray  # [L] int64
    category_ids: np.ndarray  # [L] int64
    boxes: np.ndarray  # [L, 4] float64, x, y, width and height in pixels, as in the file
    areas: np.ndarray  # [L] float64, in square pixels; the box's where the file has none
    crowds: np.ndarray  # [L] bool
    annotation_types: dict[AnnotationType, PackedStrings]  # the JSON of each annotation's mask or keypoints
    warnings: Counter[str]  # warnings, and annotations with ignore 1, by kind

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
        """Return the index of each image id; -1 for unknown ids."""
        return find(self.image_ids, np.fromiter(image_ids, np.int64))

    def of(self, index: int) -> slice:
        """Return the annotations of an image."""
        return slice(*np.searchsorted(self.image_of, (index, index + 1)).tolist())

    def value(self, annotation_type: AnnotationType, row: int) -> Any:
        """Return the ``segmentation`` or the ``keypoints`` of an annotation; ``None`` if it has none."""
        raw = self.annotation_types[annotation_type][row]
        return msgspec.json.decode(raw) if raw else None

    def keypoint_layout(self) -> KeypointLayout | None:
        """The layout of the keypoints; ``None`` if none are read."""
        points = (self.value("keypoints", row) for row in range(len(self.ids)))
        return layout_of(self.path, self.categories, points) if "keypoints" in self.annotation_types else None


def read_annotations(
    path: str | Path, *, annotation_types: Collection[AnnotationType] = (), needed: bool = True, labelled: bool = True
) -> Annotations:
    """Read an annotation file of COCO's instances format. Only ``area`` and ``iscrowd`` may be missing.

    Args:
        path: ``instances_*.json``: a dict with ``images``, ``annotations`` and ``categories``.
        annotation_types: what is read and checked besides boxes.
        needed: raise an error for annotation types that no object has, instead of leaving them out.
        labelled: read the annotations. COCO's ``image_info_test-dev2017`` has none.

    Raises:
        DataError: the file cannot be read, or has errors; see :func:`~detector.data.checks.check_annotations` and
            :func:`~detector.data.mask_keypoint_checks.check_annotation_type`.
        MissingAnnotationsError: no object has one of ``annotation_types``.
    """
    file = CocoFile(path, fields=[FIELD[kind] for kind in annotation_types], labelled=labelled)
    warnings = raise_errors(check_annotations(file), f"{path}")
    found = [kind for kind in annotation_types if has_any(file, kind)]
    for kind in annotation_types:
        if kind not in found and needed:
            what = "polygons or an RLE are needed" if kind == "masks" else "COCO has them in person_keypoints_*.json"
            raise MissingAnnotationsError(f"{path}: no object has {kind} ({FIELD[kind]}): {what}")
    for kind in found:
        warnings += raise_errors(check_annotation_type(file, kind), f"{path}")
    images, annotations = file.images, file.annotations
    by_id = np.argsort(images["id"])
    index_of = np.argsort(by_id)[file.image_places]
    rows = np.argsort(index_of, kind="stable")
    boxes, areas = annotations["bbox"][rows], annotations["area"][rows]
    box_areas = boxes[:, 2:].clip(min=0).prod(axis=1).clip(max=MAX_AREA)
    return Annotations(
        path=Path(path),
        categories=[file.categories.entry(position) for position in np.argsort(file.categories["id"])],
        image_ids=images["id"][by_id],
        sizes=np.stack([images["width"], images["height"]], axis=1)[by_id],
        names=PackedStrings([name.encode() for name in images["file_name"]], by_id),
        places=by_id,
        image_of=index_of[rows],
        ids=annotations["id"][rows],
        category_ids=annotations["category_id"][rows],
        boxes=boxes,
        areas=np.where(np.isnan(areas), box_areas, areas),
        crowds=annotations["iscrowd"][rows],
        annotation_types={kind: PackedStrings(annotations[FIELD[kind]], rows) for kind in found},
        warnings=warnings,
    )


def raise_errors(findings: Iterable[Finding], checked: str | None = None) -> Counter[str]:
    """Raise the first error with the number of others, or count warnings and annotations with ``ignore`` by kind.

    ``checked`` are the arguments with which ``tools/check.py`` lists all errors.
    """
    warnings: Counter[str] = Counter()
    first, more = None, -1
    for finding in findings:
        if finding.level == "error":
            first, more = first or finding.message, more + 1
        elif finding.level == "warning" or finding.kind == IGNORED:
            warnings[finding.kind] += 1
    if first is not None:
        lists = "" if checked is None else f": tools/check.py {checked} lists them"
        raise DataError(first + (f" (and {more:,} more error{'s' * (more > 1)}{lists})" if more else ""))
    return warnings
