"""Checks of the splits of a training."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from torchvision.transforms import v2

from detector.data.checks import Finding
from detector.data.dataset import CocoDetection
from detector.data.image_files import ORIENTATION_KINDS, open_images
from detector.data.keypoints import PERSON, KeypointLayout
from detector.data.shared_images import equal_files
from detector.errors import DataError, short_repr
from detector.text import listed

MIN_PERSON_KEYPOINTS = 10  # labelled ones of a training image, of COCO's 17; scaled for other layouts
MAX_COMPARED_IMAGES = 20_000  # of both splits; a slow disk takes seconds for their sizes


def match_keypoints(train: CocoDetection, val: CocoDetection) -> list[str]:
    """Give two splits the same keypoint names. Returns notes on the train split.

    Raises:
        DataError: the splits have different keypoints.
    """
    ours, theirs = train.keypoints, val.keypoints
    if ours is None or theirs is None:  # both are: boxes or masks are learned
        return []
    if not ours.fits(theirs):
        raise DataError(f"the train split has other keypoints: {short_repr(theirs.names)}, {short_repr(ours.names)}")
    layout = theirs if ours == KeypointLayout.numbered(len(ours)) else ours  # names say more than numbers
    train.keypoints = val.keypoints = layout
    if len(layout) == 1 or layout.mirrored() != [*range(len(layout))] or not _flips(train.transform):
        return []
    return [
        f"images are mirrored in training, but no keypoint's name ({listed(layout.names)}) makes it the mirror image "
        "of another. If some are, name them left_... and right_... in the categories, or train without a flip "
        "(augmentation: [])"
    ]


def _flips(transform: Any) -> bool:
    """Return whether an augmentation, or one inside it, mirrors images."""
    flips = (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)
    return isinstance(transform, flips) or any(_flips(one) for one in getattr(transform, "transforms", ()))


def leave_out_without_keypoints(train: CocoDetection) -> list[str]:
    """Leave out training images with few keypoints, as torchvision's references do. Returns notes.

    Raises:
        DataError: no image is left.
    """
    if train.keypoints is None:
        return []
    total, counts = len(train), train.visible_keypoints()
    least = math.ceil(MIN_PERSON_KEYPOINTS * min(len(train.keypoints), len(PERSON)) / len(PERSON))
    train.keep([image_id for image_id, count in zip(train.image_ids, counts, strict=True) if count >= least])
    if len(train) == 0:
        raise DataError(
            f"{train.annotations.path}: no image has {least} or more labelled keypoints (visibility 1 or 2), and "
            "images with fewer are not trained on"
        )
    few = f"{total - len(train):,} of {total:,} images have fewer than {least} labelled keypoints"
    return [f"{few} and are not trained on"] if len(train) < total else []


def open_split(data: CocoDetection) -> dict[int, Finding]:
    """Open all images. Returns errors and notes by the ids of the images."""
    images = [data.annotations.image(index) for index in data.annotations.find(data.image_ids)]
    found = open_images(data.folder, images, orientation=data.orientation)
    return {image["id"]: finding for image, finding in zip(images, found, strict=True) if finding is not None}


def judge_images(
    splits: Sequence[tuple[str, CocoDetection]], found: Sequence[dict[int, Finding]], *, skip_broken: bool
) -> list[str]:
    """Refuse unreadable images, or leave them out. Returns notes on these and on doubtful orientations.

    Args:
        splits: name and content of each split.
        found: the findings of :func:`open_split` in each split.
        skip_broken: leave out images that cannot be read.

    Raises:
        DataError: an image cannot be read, and ``skip_broken`` is off.
    """
    notes: list[str] = []
    broken: dict[str, list[str]] = {}  # messages by the command that shows them
    for (name, data), findings in zip(splits, found, strict=True):
        for kind in ORIENTATION_KINDS.values():
            if doubts := [finding.message for finding in findings.values() if finding.kind == kind]:
                like = f"give eval and predict the same --orientation {data.orientation}"
                notes.append(f"{name}: {len(doubts):,} {kind}, such as {doubts[0]}; {like}")
        if errors := {i: finding.message for i, finding in findings.items() if finding.level == "error"}:
            broken[check_command(data)] = [*errors.values()]
            notes += [f"{name}: {data.leave_out(errors)}"] if skip_broken else []
    if broken and not skip_broken:
        first, *others = (message for messages in broken.values() for message in messages)
        more = f" (and {len(others):,} more image{'s' * (len(others) > 1)})" if others else ""
        hints = (f"{' and '.join(broken)} shows all", "train without them: {skip_broken} true")
        raise DataError(f"{first}{more}", hints=hints)
    return notes


def check_command(data: CocoDetection) -> str:
    """Return the command that checks a split."""
    return shlex.join(["python", "tools/check.py", str(data.annotations.path), "--images", str(data.folder)])


def shared_images(train: CocoDetection, val: CocoDetection) -> list[str]:
    """Return a note on val images that are also in the train split. Large splits are not compared."""
    few = len(train) + len(val) <= MAX_COMPARED_IMAGES
    if few and (shared := len(equal_files(val.files(), train.files()))):
        same = f"{shared:,} of {len(val):,} images are byte for byte in the train split, too, and score too high"
        return [f"{same}; tools/check.py --other names them"]
    return []
