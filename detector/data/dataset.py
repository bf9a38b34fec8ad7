"""Data sets in COCO's layout, with targets for torchvision's detectors."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from detector.choices import Orientation
from detector.data.annotation_types import AnnotationType
from detector.data.annotations import Annotations, raise_errors, read_annotations
from detector.data.checks import corners_in_images
from detector.data.entries import find
from detector.data.image_files import check_files
from detector.data.images import read_image
from detector.data.masks import MaskLayers
from detector.errors import DataError, one_line
from detector.seeds import seed_of, seeded
from detector.text import listed

Target = dict[str, Any]  # tensors, or MaskLayers in place of "masks"
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]
KEPT = {"boxes", "labels", "keypoints"}  # fields of a target with an entry per object
AXES = "axes"  # target of three points that show whether a transform mirrors the image
REMOVES_OBJECTS = "leave out SanitizeBoundingBoxes and the like, because objects without a box are removed anyway"
REMOVES_KEYPOINTS = (
    "the augmentation removes or merges keypoints: leave out SanitizeKeyPoints and ClampKeyPoints, because keypoints "
    "outside the image are removed anyway"
)


def as_float(image: Tensor) -> Tensor:
    """Convert an image to float32; integers are scaled to 0..1."""
    return v2.functional.to_dtype(image, torch.float32, scale=True)


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images and targets of a data set in COCO's layout.

    Boxes are (x1, y1, x2, y2) in pixels. Labels are 1 to the number of categories, in the order of the category ids; 0
    is the background. Label ``n`` is category ``category_ids[n - 1]``, and :meth:`relabel` changes that.

    Targets contain neither crowds nor boxes without an area inside the image; :attr:`annotations`, which scoring uses,
    contains both. As in torchvision's references, an object without a mask has an empty one, and an object without
    keypoints has only unlabelled ones.

    Args:
        images: folder of the images.
        annotations: an annotation file, or its content as :func:`read_annotations` returns it.
        annotation_types: what is read besides boxes.
        transform: maps (image, target) of ``tv_tensors``, such as the transforms of ``torchvision.transforms.v2``. It
            is changed to fill masks with 0. Left and right keypoints are swapped if it mirrors the image.
        seed: seed of the transform, together with the epoch and the index.
        skip_missing: accept missing image files; reading them raises an error.
        orientation: see :func:`~detector.data.images.read_image_with_remarks`.

    Raises:
        DataError: see :func:`read_annotations`; or an image file is missing.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path | Annotations,
        *,
        annotation_types: Collection[AnnotationType] = (),
        transform: Transform | None = None,
        seed: int = 0,
        skip_missing: bool = False,
        orientation: Orientation = "upright",
    ) -> None:
        self.folder = Path(images)
        self.annotation_types = tuple(annotation_types)
        if not isinstance(annotations, Annotations):
            annotations = read_annotations(annotations, annotation_types=self.annotation_types)
        if set(self.annotation_types) - annotations.annotation_types.keys():
            got = tuple(annotations.annotation_types)
            raise ValueError(f"the annotations must be read with annotation_types={self.annotation_types}, got {got}")
        self.annotations = annotations
        self._images = np.arange(len(annotations))  # indices of the images in the annotations
        self._boxes = corners_in_images(annotations.boxes, annotations.sizes[annotations.image_of])  # all, [L, 4]
        ids = np.array([category["id"] for category in annotations.categories])
        empty = ~(self._boxes[:, 2:] > self._boxes[:, :2]).all(axis=1)
        # Label of each annotation, [L]; 0 for those in no target.
        self._labels = np.where(annotations.crowds | empty, 0, find(ids, annotations.category_ids) + 1)
        self.keypoints = annotations.keypoint_layout() if "keypoints" in self.annotation_types else None
        self.layered = self.in_bytes = False  # see with_layers and as_bytes
        self.transform, self.seed, self.orientation = transform, seed, orientation
        if "masks" in self.annotation_types:
            _fill_masks_with_zeros(transform)
        self.category_ids: list[int | None] = [category["id"] for category in annotations.categories]
        self.category_names: list[str] = [category["name"] for category in annotations.categories]
        problems = [problem for _, problem in check_files(annotations.file_names(), self.folder, self._name_of)]
        if skip_missing:
            problems = [problem for problem in problems if problem.kind != "missing image files"]
        raise_errors(problems, f"{annotations.path} --images {self.folder}")

    def _name_of(self, index: int) -> str:
        known = self.annotations
        return f"{known.path}: images[{known.places[index]}] (id {known.image_ids[index]})"

    def __len__(self) -> int:
        return len(self._images)

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images, in order; a new list each time."""
        return self.annotations.image_ids[self._images].tolist()

    def files(self) -> list[Path]:
        """Return the image files, in order."""
        return [self.folder / self.annotations.names[index] for index in self._images.tolist()]

    def sizes(self) -> np.ndarray:
        """Return the width and height of each image in pixels, [N, 2] int64."""
        return self.annotations.sizes[self._images]

    def counts(self) -> np.ndarray:
        """Return the number of objects in each target, [N]."""
        images = self.annotations.image_of[self._labels > 0]
        return np.bincount(images, minlength=len(self.annotations))[self._images]

    def label_counts(self) -> dict[int, int]:
        """Return the number of objects of each label in all targets."""
        labels, counts = np.unique(self._labels[self._rows()], return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist()))

    def shapes(self) -> tuple[Tensor, Tensor]:
        """Return width and height in pixels of all boxes in the targets, [L, 2], and of their images, [L, 2]."""
        boxes = torch.from_numpy(self._boxes[self._rows()])
        sizes = np.repeat(self.sizes().astype(np.float64), self.counts(), axis=0)
        return boxes[:, 2:] - boxes[:, :2], torch.from_numpy(sizes)

    def visible_keypoints(self) -> list[int]:
        """Return the number of labelled keypoints of each image's objects."""
        return [int((self._keypoints(self._rows_of(index))[..., 2] > 0).sum()) for index in self._images.tolist()]

    def _rows(self) -> np.ndarray:
        """Return the annotations in all targets, image by image."""
        return np.flatnonzero(np.isin(self.annotations.image_of, self._images) & (self._labels > 0))

    def _rows_of(self, index: int) -> np.ndarray:
        """Return the annotations in the target of an image of the annotations."""
        rows = self.annotations.of(index)
        return rows.start + np.flatnonzero(self._labels[rows])

    def relabel(self, category_ids: Sequence[int | None], category_names: Sequence[str]) -> None:
        """Assign labels 1, 2, ... to these categories. Objects of other categories leave the targets.

        An id is ``None`` for a label without a category in this data set.
        """
        labels = {category: label for label, category in enumerate(category_ids, start=1)}
        label_of = np.array([0, *(labels.get(category, 0) for category in self.category_ids)])  # by current label
        self._labels = label_of[self._labels]
        self.category_ids, self.category_names = list(category_ids), list(category_names)

    def keep(self, image_ids: Collection[int]) -> None:
        """Keep only these images, in the current order. :attr:`annotations` does not change."""
        self._images = self._images[np.isin(self._images, self.annotations.find(image_ids))]

    def leave_out(self, broken: Mapping[int, str]) -> str:
        """Remove unreadable images, and return a message about them. :attr:`annotations` does not change.

        Args:
            broken: the reason for each image, by its id.
        """
        indices = self.annotations.find(broken).tolist()
        names = listed([self.annotations.image(index)["file_name"] for index in indices])
        objects = sum(int((~self.annotations.crowds[self.annotations.of(index)]).sum()) for index in indices)
        message = f"{len(broken):,} of {len(self):,} images cannot be read and are left out"
        self.keep([image_id for image_id in self.image_ids if image_id not in broken])
        return f"{message} with their objects ({objects:,}): {names} ({next(iter(broken.values()))})"

    def with_layers(self) -> "CocoDetection":
        """Return a copy whose masks are :class:`~detector.data.masks.MaskLayers`."""
        return self._with(layered=True)

    def as_bytes(self) -> "CocoDetection":
        """Return a copy that leaves uint8 images as they are, which is faster to send between processes."""
        return self._with(in_bytes=True)

    def boxes_alone(self) -> "CocoDetection":
        """Return a copy without masks and keypoints."""
        return self._with(annotation_types=(), keypoints=None)

    def _with(self, **attributes: Any) -> "CocoDetection":
        other = copy(self)
        vars(other).update(attributes)
        return other

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """Read one image and its target.

        Args:
            index: index of the image, or (epoch, index). The pair determines the augmentation.

        Returns:
            The image, [3, H, W] float32 in 0..1, and a dict: ``boxes`` [L, 4] float32 (x1, y1, x2, y2) in pixels,
            ``labels`` [L] int64, ``image_id`` [] int64, and, if they are read, ``masks`` [L, H, W] uint8, 0 or 1, and
            ``keypoints`` [L, K, 3] float32: x and y in pixels, and 1 if the keypoint is labelled and in the image.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        place = int(self._images[index])
        info, rows = self.annotations.image(place), self._rows_of(place)
        path, size = self.folder / info["file_name"], (info["height"], info["width"])
        image: Tensor = tv_tensors.Image(read_image(path, size=size[::-1], orientation=self.orientation))
        boxes = torch.from_numpy(self._boxes[rows])
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(self._labels[rows]),
            "image_id": torch.tensor(info["id"]),
        }
        layers = labelled = None
        if "masks" in self.annotation_types:
            layers = MaskLayers.of([self.annotations.value("masks", row) for row in rows], *size)
            target["masks"] = tv_tensors.Mask(layers.maps)
        if self.keypoints is not None:
            points, labelled = self._keypoints(rows).split([2, 1], dim=2)
            target["keypoints"] = tv_tensors.KeyPoints(points, canvas_size=size)
            axes = torch.tensor([[2.0, 2.0], [3.0, 2.0], [2.0, 3.0]]) / 4 * torch.tensor(size[::-1])
            target[AXES] = tv_tensors.KeyPoints(axes, canvas_size=size)
        if self.transform is not None:
            try:
                with seeded(seed_of(self.seed, epoch, index)):
                    image, target = self.transform(image, target)
            except (LookupError, ValueError, TypeError, RuntimeError) as error:
                hint = f": {REMOVES_OBJECTS}" if self.annotation_types and isinstance(error, IndexError) else ""
                raise DataError(f"{path}: the augmentation fails on this image: {one_line(error)}{hint}") from error
        image = (image if self.in_bytes else as_float(image)).as_subclass(Tensor)
        if image.untyped_storage().nbytes() > image.nbytes:  # a crop would be sent with its whole image
            image = image.clone()
        target["boxes"] = v2.functional.clamp_bounding_boxes(target["boxes"])
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        if self.annotation_types and len(target["boxes"]) != len(rows):
            counts = f"{len(target['boxes'])} of {len(rows)}"
            raise DataError(f"{path}: after the augmentation {counts} objects are left: {REMOVES_OBJECTS}")
        if labelled is not None:
            target["keypoints"] = self._transformed(path, target["keypoints"], target.pop(AXES), labelled, image)
        # The augmentation may move a box out of the image; torchvision's detectors refuse empty boxes.
        kept = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(dim=1)
        if layers is not None:
            places = tuple(place for place, stays in zip(layers.places, kept.tolist()) if stays)
            layers = MaskLayers(target["masks"], places)
            target["masks"] = layers if self.layered else layers.masks()
        return image, target | {field: target[field][kept] for field in target.keys() & KEPT}

    def _keypoints(self, rows: Iterable[int]) -> Tensor:
        """Return the keypoints of annotations, [L, K, 3]: x, y and visibility."""
        assert self.keypoints is not None
        count = len(self.keypoints)
        points = [self.annotations.value("keypoints", row) or [0.0] * (3 * count) for row in rows]
        return torch.tensor(points, dtype=torch.float32).reshape(-1, count, 3)

    def _transformed(self, path: Path, points: Tensor, axes: Tensor, labelled: Tensor, image: Tensor) -> Tensor:
        """Return keypoints [L, K, 3] for transformed points [L, K, 2] and their former visibility [L, K, 1]."""
        assert self.keypoints is not None
        right, down = (axes[1:] - axes[0]).double() if len(axes) == 3 else torch.zeros(2, 2)
        turn = right[0] * down[1] - right[1] * down[0]  # negative if the image is mirrored
        if turn == 0:
            raise DataError(f"{path}: {REMOVES_KEYPOINTS}")
        inside = ((points >= 0) & (points <= torch.tensor(image.shape[:0:-1]))).all(dim=2, keepdim=True)
        found = torch.cat([points.float(), ((labelled > 0) & inside).float()], dim=2)
        return found[:, self.keypoints.mirrored()] if turn < 0 else found


def _fill_masks_with_zeros(transform: Any) -> None:
    """Make a transform and those in it fill masks with 0 instead of the fill value of images."""
    if isinstance(getattr(transform, "_fill", None), dict):
        transform._fill[tv_tensors.Mask] = 0
    for inner in getattr(transform, "transforms", ()):
        _fill_masks_with_zeros(inner)
