"""Checking a whole data set: its annotation file, its images, and what it shares with another split."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from detector.choices import Orientation
from detector.data import checks
from detector.data.annotation_types import AnnotationType
from detector.data.categories import difference, names_alike, no_shared_name, same_categories
from detector.data.checks import Finding, Level
from detector.data.entries import CocoFile, Entries
from detector.data.image_files import check_files, open_images
from detector.data.mask_keypoint_checks import check_annotation_type
from detector.data.shared_images import equal_files
from detector.errors import DataError, short_repr
from detector.text import alike

AnchorAdvice = Callable[[Tensor, Tensor], str | None]


@dataclass(frozen=True)
class DatasetReport:
    """The findings of :func:`check_dataset`, and what was checked, such as "92 images with 829 annotations"."""

    findings: Sequence[Finding]
    contents: str = ""  # of a file that could not be read

    @property
    def exit_code(self) -> int:
        """0, 1 with warnings, 2 with errors."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else 1 if "warning" in levels else 0

    def to_text(self, examples: int = 3) -> str:
        """Format errors, warnings, then notes, up to ``examples`` of each kind, and a one-line summary."""
        lines, counts = [], []
        for level in get_args(Level):
            found = [finding for finding in self.findings if finding.level == level]
            for kind in dict.fromkeys(finding.kind for finding in found):
                messages = [finding.message for finding in found if finding.kind == kind]
                more = [f"... and {len(messages) - examples:,} more"] if len(messages) > examples else []
                lines += [f"{_count(len(messages), level)}: {kind}"]
                lines += [f"    {text}" for text in messages[:examples] + more] + [""]
            if found:
                counts.append(_count(len(found), level))
            elif level == "warning" and not counts:
                counts.append("nothing wrong")
        return "\n".join([*lines, ", ".join(counts) + (f" in {self.contents}" if self.contents else "")])


def check_dataset(
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    decode: bool = True,
    orientation: Orientation = "upright",
    workers: int = 4,
    other: str | Path | None = None,
    other_images: str | Path | None = None,
    anchor_advice: AnchorAdvice | None = None,
) -> DatasetReport:
    """Check an annotation file and its images. Errors in the data are returned, not raised.

    Errors prevent training. Without errors, masks and keypoints are checked as well; broken ones are warnings.

    Args:
        annotations: the annotation file, see :func:`~detector.data.annotations.read_annotations`.
        images: the folder that ``file_name`` is relative to; ``None``: only the annotation file is checked.
        decode: open the images.
        orientation: "upright" applies EXIF orientations, see :func:`~detector.data.images.read_image`.
        workers: threads that open images, at least 1.
        other: the annotation file of another split, whose images must differ and whose category names must not.
        other_images: the folder of its images. With both folders and ``decode``, files are compared by their content,
            otherwise by name.
        anchor_advice: compares width and height of objects [L, 2] and of their images [L, 2], in pixels, with anchors,
            see :func:`~detector.models.anchors.anchor_advice`.
    """
    try:
        file = CocoFile(annotations)
    except DataError as error:
        return DatasetReport([Finding("unreadable annotation file", "error", str(error))])
    findings = list(checks.check_annotations(file))
    first: dict[str, str] = {}
    names = [name for _, name in _categories(file)]
    pairs = [(first.setdefault(alike(name), name), name) for name in names]
    findings += [_alike(file.path, *pair) for pair in pairs if pair[0] != pair[1]]
    if not any(finding.level == "error" for finding in findings):
        is_moved = any(finding.kind == checks.CENTRES for finding in findings)
        findings += _check_anchors(file, is_moved, anchor_advice)
        for annotation_type in get_args(AnnotationType):
            findings += check_annotation_type(file, annotation_type, broken="warning")
    entries = file.images
    missing = [] if images is None else list(check_files(entries["file_name"].tolist(), images, entries.where))
    findings += [finding for _, finding in missing]
    unusable = {position for position, _ in missing}
    if other is not None:
        by_content = images is not None and other_images is not None and decode
        ours = _places(entries, images or "", unusable) if by_content else _places(entries)
        try:
            findings += _compare(file, ours, CocoFile(other, fields=()), other_images if by_content else None)
        except DataError as error:
            findings.append(Finding("unreadable annotation file", "error", str(error)))
    if images is not None and decode and None not in unusable:
        usable = [i for i in range(len(entries)) if i not in unusable and i not in entries.wrong]
        described = [{field: entries[field][i] for field in ("file_name", "width", "height")} for i in usable]
        opened = open_images(images, described, orientation=orientation, workers=workers)
        findings += [finding for finding in opened if finding is not None]
    counts = (_count(len(one), one.name.removesuffix("s")) for one in (entries, file.annotations))
    return DatasetReport(findings, "{} with {} of {}".format(*counts, _count(len(file.categories), "category")))


def _check_anchors(file: CocoFile, is_moved: bool, anchor_advice: AnchorAdvice | None) -> Iterator[Finding]:
    objects = ~file.annotations["iscrowd"]
    sizes = checks.sizes_of_images(file)[objects]
    corners = checks.corners_in_images(file.annotations["bbox"][objects], sizes)
    shapes = corners[:, 2:] - corners[:, :2]
    kept = (shapes > 0).all(axis=1)
    if not kept.any():
        yield checks.no_box(file.path)
    elif anchor_advice is not None and not is_moved:
        advice = anchor_advice(torch.from_numpy(shapes[kept]), torch.from_numpy(sizes[kept]))
        if advice is not None:
            yield Finding("anchors that most objects lie outside of", "note", f"{file.path}: {advice}")


def _alike(where: Any, name: str, other: str) -> Finding:
    message = f"{where}: the categories {difference(name, other)}"
    return Finding("category names that are almost the same", "warning", message)


def _categories(file: CocoFile) -> list[tuple[int, str]]:
    known = np.flatnonzero(file.categories.has("id") & file.categories.has("name"))
    return [(int(file.categories["id"][at]), file.categories["name"][at]) for at in known.tolist()]


def _compare(file: CocoFile, ours: dict[Path, str], other: CocoFile, images: str | Path | None) -> Iterator[Finding]:
    """Compare the categories of two splits, and their images, by content or, without ``images``, by name."""
    if {"images", "file"} & other.missing.keys():
        yield Finding("not in COCO's format", "error", f"{other.path}: must hold a dict with images, a list")
        return
    here, there = _categories(file), _categories(other)
    names, others = [name for _, name in here], [name for _, name in there]
    if names and others and not set(names) & set(others):
        message = f"{file.path}: {no_shared_name(names, others, of=f'in {other.path}')}"
        yield Finding("no category of the other split", "error", message)
    try:
        for one, two in ((here, there), (there, here)):  # either may be trained on
            same_categories(one, two)
    except DataError as error:
        yield Finding("categories that cannot be matched", "error", f"{file.path} and {other.path}: {error}")
    yield from (_alike(f"{file.path} and {other.path}", *pair) for pair in names_alike(names, others))
    level: Level
    if images is None:
        theirs = _places(other.images)
        pairs = {name: name for name in ours if name in theirs}
        kind, level, what = "file names", "note", "has the name of {}: give both folders of images to compare the files"
    else:
        unusable = dict(check_files(other.images["file_name"].tolist(), images, other.images.where))
        if None in unusable:
            yield unusable[None]
        theirs = _places(other.images, images, unusable)
        pairs = equal_files(ours, theirs)
        kind, level, what = "images", "warning", "is identical to {}: scores on it are too high"
    for path, same in pairs.items():
        yield Finding(f"{kind} that the other split has, too", level, f"{ours[path]}, {what.format(theirs[same])}")


def _places(images: Entries, folder: str | Path = "", unusable: Container[int | None] = ()) -> dict[Path, str]:
    """Return the images of a file by their path in a folder, with their entry and name for messages."""
    if None in unusable:  # the folder itself
        return {}
    return {
        Path(folder, name): f"{images.where(position)}, {short_repr(name)}"
        for position, name in enumerate(images["file_name"].tolist())
        if name is not None and position not in unusable
    }


def _count(number: int, one: str) -> str:
    many = one.removesuffix("y") + "ies" if one.endswith("y") else f"{one}s"
    return f"{number:,} {one if number == 1 else many}"
