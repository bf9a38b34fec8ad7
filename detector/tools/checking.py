"""What ``tools/check.py`` does: report all that is wrong with a data set at once."""

import argparse
import io
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from detector.data.annotation_types import AnnotationType
from detector.data.categories import difference, names_alike, no_shared_name, same_categories
from detector.data.checks import (
    CENTRES,
    CORNERS,
    Finding,
    Level,
    check_annotations,
    corners_in_images,
    no_box,
    sizes_of_images,
)
from detector.data.entries import CocoFile, Entries
from detector.data.image_files import ORIENTATION_KINDS, check_files, open_images
from detector.data.images import OVERRULED_ORIENTATION, Orientation
from detector.data.mask_keypoint_checks import check_annotation_type
from detector.data.shared_images import equal_files
from detector.errors import DataError, UsageError, UserError, exit_on_user_error, one_line, short_repr
from detector.models.anchors import anchor_advice
from detector.models.config import DetectorConfig
from detector.text import alike
from detector.tools.arguments import read_yaml

# Settings of a detector, by configuration and by flag.
ANCHORS = ("min_size", "max_size", "anchor_sizes", "aspect_ratios")


def detector_settings(options: argparse.Namespace) -> DetectorConfig:
    """Of the configuration and the flags, those that decide which anchors an object meets."""
    found: Any = {}
    if options.config is not None:
        found = read_yaml(options.config)
        for name in ("model", "detector"):
            if not isinstance(found, dict) or not isinstance(found.setdefault(name, {}), dict):
                raise DataError(f"{options.config}: not the settings of a training: {name} must be a dict")
            found = found[name]
    found |= {name: value for name in ANCHORS if (value := getattr(options, name)) is not None}
    return DetectorConfig(**{name: value for name, value in found.items() if name in ANCHORS})


def check(options: argparse.Namespace) -> int:
    """Print the report. Returns the exit code."""
    with exit_on_user_error():
        try:
            settings = detector_settings(options)
        except (UserError, OSError) as error:
            raise UsageError(one_line(error)) from None
        if options.other_images is not None and options.other is None:
            raise UsageError("--other_images needs --other")
        return _report_on(options, settings)


def _report_on(options: argparse.Namespace, settings: DetectorConfig) -> int:
    findings = check_dataset(
        options.annotations,
        options.images,
        decode=not options.quick,
        orientation=options.orientation,
        workers=options.workers,
        other=options.other,
        other_images=options.other_images,
        anchor_advice=partial(anchor_advice, settings=settings),
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names in letters that the terminal lacks
    if options.images is None:
        print("No image was looked at: that takes --images DIR.\n")
    elif options.quick:
        print("No image was opened: that takes a run without --quick.\n")
    if options.other is not None and (options.quick or None in (options.images, options.other_images)):
        print("Of the other split only names were compared: more takes --images and --other_images, without --quick.\n")
    print(report(findings, examples=options.examples))
    levels = {problem.level for problem in findings.problems}
    return 2 if "error" in levels else 1 if "warning" in levels else 0


AnchorAdvice = Callable[[Tensor, Tensor], str | None]


@dataclass(frozen=True)
class Findings:
    """Holds what :func:`check_dataset` found, and in how much: "92 images with 829 annotations of 80 categories"."""

    problems: Sequence[Finding]
    contents: str = ""  # of a file that could not be read


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
) -> Findings:
    """Look for all that can be wrong with an annotation file and its images. Raises nothing about the data.

    What training refuses is an error. Single masks and keypoints that are broken are warnings, for boxes can be trained
    without them; they are checked only if nothing else is an error.

    Args:
        annotations: the annotation file, see :func:`~detector.data.annotations.read_annotations`.
        images: the folder that ``file_name`` is relative to; ``None``: only the annotation file is checked.
        decode: also open every image whose entry is right and whose file is there.
        orientation: whether EXIF orientations are applied, see :func:`~detector.data.images.read_image`.
        workers: threads that open images, 1 or more.
        other: the annotation file of another split, which must not have the same images, and whose categories should be
            called the same; nothing else about it is checked.
        other_images: the folder of its images, to compare files by content. Without it, or ``images``, or ``decode``,
            only names are.
        anchor_advice: says whether a detector's anchors fit the objects, see
            :func:`~detector.models.anchors.anchor_advice`: from their width and height [L, 2] and those of each one's
            image [L, 2], in pixels; ``None``: they are not compared.

    Returns:
        The problems; a file that cannot be read is one of them.
    """
    try:
        file = CocoFile(annotations)
    except DataError as error:
        return Findings([Finding("unreadable annotation file", "error", str(error))])
    problems = list(check_annotations(file))
    problems += _alike_categories(file)
    if not any(problem.level == "error" for problem in problems):
        shapes, images_of = _objects(file)
        if not len(shapes):
            problems.append(no_box(file.path))
        elif anchor_advice is not None and not any(problem.kind in (CORNERS, CENTRES) for problem in problems):
            advice = anchor_advice(shapes, images_of)
            if advice is not None:
                problems.append(Finding("anchors that most objects lie outside of", "note", f"{file.path}: {advice}"))
        for part in get_args(AnnotationType):  # warnings: boxes can be trained without either
            problems += check_annotation_type(file, part, broken="warning")
    entries = file.images
    names = entries["file_name"].tolist()
    files = [] if images is None else list(check_files(names, images, entries.where))
    problems += [problem for _, problem in files]
    unusable = {position for position, _ in files}
    if other is not None:
        by_content = images is not None and other_images is not None and decode
        ours = _places(entries, images or "", unusable) if by_content else _places(entries)
        try:
            problems += _compared(file, ours, CocoFile(other, fields=()), other_images if by_content else None)
        except DataError as error:
            problems.append(Finding("unreadable annotation file", "error", str(error)))
    if images is not None and decode and None not in unusable:
        usable = [i for i in range(len(entries)) if i not in unusable and i not in entries.wrong]
        fields = ("file_name", "width", "height")
        described = [{field: entries[field][i] for field in fields} for i in usable]
        opened = open_images(images, described, orientation=orientation, workers=workers)
        found = [problem for problem in opened if problem is not None]
        problems += sorted(
            found, key=lambda problem: problem.kind == ORIENTATION_KINDS[OVERRULED_ORIENTATION]
        )  # those that matter less last
    counts = (_count(len(one), one.name.removesuffix("s")) for one in (entries, file.annotations))
    many = len(file.categories)
    return Findings(problems, "{} with {} of {}".format(*counts, _count(many, "category")))


def report(findings: Findings, *, examples: int = 3) -> str:
    """Format the problems: errors, warnings, then notes, up to ``examples`` of each kind, and a one-line summary."""
    lines: list[str] = []
    counts: list[str] = []
    level: Level
    for level in get_args(Level):
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
        elif level == "warning" and not counts:
            counts.append("nothing wrong")
    lines.append(", ".join(counts) + (f" in {findings.contents}" if findings.contents else ""))
    return "\n".join(lines)


def _objects(file: CocoFile) -> tuple[Tensor, Tensor]:
    """Width and height of the boxes that are trained on, [L, 2], and of the image of each, [L, 2], in pixels."""
    objects = ~file.annotations["iscrowd"]
    sizes = sizes_of_images(file)[objects]
    corners = corners_in_images(file.annotations["bbox"][objects], sizes)
    shapes = corners[:, 2:] - corners[:, :2]
    kept = (shapes > 0).all(axis=1)
    return torch.from_numpy(shapes[kept]), torch.from_numpy(sizes[kept])


def _alike_categories(file: CocoFile, other: CocoFile | None = None) -> Iterator[Finding]:
    """Say which categories have names that are easily mixed up, within a file or with those of another."""
    names = [name for name in file.categories["name"].tolist() if name is not None]
    if other is None:
        first: dict[str, str] = {}
        pairs = [(earlier, name) for name in names if (earlier := first.setdefault(alike(name), name)) != name]
        where = f"{file.path}: the categories"
    else:
        theirs = [name for name in other.categories["name"].tolist() if name is not None]
        pairs = names_alike(names, theirs)
        where = f"{file.path} and {other.path}: the categories"
        if names and theirs and not set(names) & set(theirs):
            what = no_shared_name(names, theirs, of=f"in {other.path}")
            yield Finding("no category of the other split", "error", f"{file.path}: {what}")
        try:
            for one, two in ((file, other), (other, file)):  # either may be what is trained on
                same_categories(_categories(one), _categories(two))
        except DataError as error:
            yield Finding("categories that cannot be matched", "error", f"{file.path} and {other.path}: {error}")
    for pair in pairs:
        yield Finding("category names that are almost the same", "warning", f"{where} {difference(*pair)}")


def _categories(file: CocoFile) -> list[tuple[int, str]]:
    known = np.flatnonzero(file.categories.has("id") & file.categories.has("name"))
    return [(int(file.categories["id"][at]), file.categories["name"][at]) for at in known.tolist()]


def _compared(file: CocoFile, ours: dict[Path, str], other: CocoFile, images: str | Path | None) -> Iterator[Finding]:
    """Compare a file, and its images, see :func:`_places`, with another split: byte for byte, or without a folder of
    images by their names.
    """
    if {"images", "file"} & other.missing.keys():
        yield Finding("not in COCO's format", "error", f"{other.path}: must hold a dict with images, a list")
        return
    yield from _alike_categories(file, other)
    if images is None:
        theirs = _places(other.images)
        for name in [name for name in ours if name in theirs]:
            message = f"{ours[name]}, is called like {theirs[name]}"
            what = "whether they are one image shows with both folders of images"
            yield Finding("file names that the other split has, too", "note", f"{message}: {what}")
        return
    unusable = dict(check_files(other.images["file_name"].tolist(), images, other.images.where))
    if None in unusable:
        yield unusable[None]
    theirs = _places(other.images, images, unusable)
    for path, same in equal_files(ours, theirs).items():
        message = f"{ours[path]}, is byte for byte {theirs[same]}"
        what = "trained on one, a detector scores too high on the other"
        yield Finding("images that the other split has, too", "warning", f"{message}: {what}")


def _places(images: Entries, folder: str | Path = "", unusable: Container[int | None] = ()) -> dict[Path, str]:
    """Say where each image stands in an annotation file, by its path, or without a folder by its name."""
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
