"""The folder of a data set in COCO's layout, and the files of its splits."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detector.choices import Orientation
from detector.data.dataset import CocoDetection
from detector.errors import DataError
from detector.text import clean

ROOT_VARIABLE = "DETECTOR_DATA"


@dataclass(frozen=True)
class DataFolder:
    """The folder of a data set.

    Args:
        root: the folder.
        annotations: annotation file of a split, relative to ``root``; {split} stands for its name.
        images: image folder of a split, likewise.
        orientation: see :func:`~detector.data.images.read_image_with_remarks`.
    """

    root: Path
    annotations: str = "annotations/instances_{split}.json"
    images: str = "{split}"
    orientation: Orientation = "upright"

    def annotation_file(self, split: str) -> Path:
        return self.root / self.annotations.replace("{split}", split)

    def image_folder(self, split: str) -> Path:
        return self.root / self.images.replace("{split}", split)

    def dataset(self, split: str, **options: Any) -> CocoDetection:
        """Read a split, with options of :class:`~detector.data.dataset.CocoDetection`."""
        images, annotations = self.image_folder(split), self.annotation_file(split)
        if not annotations.exists() and not self.root.is_dir():
            raise DataError("no such folder", setting="root", value=str(self.root))
        if not annotations.exists() and (others := sorted(path.name for path in annotations.parent.glob("*.json"))):
            raise DataError(f"{annotations}: no such file; the folder has {', '.join(map(clean, others[:10]))}")
        return CocoDetection(images, annotations, orientation=self.orientation, **options)


def find_root(root: str | Path | None, dataset: str | None) -> Path:
    """Return ``root``, or the folder ``dataset`` of the folder in the environment variable DETECTOR_DATA.

    Raises:
        DataError: neither is known.
    """
    if root is not None:
        return Path(root)
    if dataset is None:
        raise DataError("the data set's folder is missing", hints=["give {root}"])
    if ROOT_VARIABLE not in os.environ:
        hints = ["give {root}", f"set {ROOT_VARIABLE} to the folder that holds it"]
        raise DataError("the data set's folder is unknown", setting="dataset", value=dataset, hints=hints)
    return Path(os.environ[ROOT_VARIABLE]) / dataset
