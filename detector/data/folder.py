"""Where a data set in COCO's layout lies, and what its splits are called there."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detector.data.dataset import CocoDetection
from detector.data.images import Orientation
from detector.errors import DataError

ROOT_VARIABLE = "DETECTOR_DATA"


@dataclass(frozen=True)
class DataFolder:
    """The folder of a data set, and the patterns of its splits' files; {split} stands for the split.

    Args:
        root: the folder.
        annotations: the annotation file of a split, relative to ``root``.
        images: the image folder of a split, relative to ``root``.
        orientation: whether EXIF orientations are applied, see :func:`~detector.data.images.read_image`.
    """

    root: Path
    annotations: str = "annotations/instances_{split}.json"
    images: str = "{split}"
    orientation: Orientation = "upright"

    def annotation_file(self, split: str) -> Path:
        """Return the annotation file of a split."""
        return self.root / self.annotations.replace("{split}", split)

    def image_folder(self, split: str) -> Path:
        """Return the image folder of a split."""
        return self.root / self.images.replace("{split}", split)

    def dataset(self, split: str, **options: Any) -> CocoDetection:
        """Read a split as a data set, with the options of :class:`~detector.data.dataset.CocoDetection`."""
        images, annotations = self.image_folder(split), self.annotation_file(split)
        return CocoDetection(images, annotations, orientation=self.orientation, **options)


def find_root(root: str | Path | None, dataset: str | None) -> Path:
    """Return the folder of a data set, by its path or by its name in the folder that DETECTOR_DATA names."""
    if root is not None:
        return Path(root)
    if dataset is None:
        raise DataError("the data set's folder is missing", hints=["give {root}"])
    if ROOT_VARIABLE not in os.environ:
        hint = f"set {ROOT_VARIABLE} to the folder that holds it"
        raise DataError(
            "the data set's folder is unknown", setting="dataset", value=dataset, hints=["give {root}", hint]
        )
    return Path(os.environ[ROOT_VARIABLE]) / dataset
