"""Images, boxes, masks and keypoints of a split in COCO's layout, as torchvision's detectors are trained on them."""

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

from detector.data.annotation_types import AnnotationType
from detector.data.annotations import Annotations, raise_errors, read_annotations
from detector.data.checks import corners_in_images
from detector.data.entries import find
from detector.data.image_files import check_files
from detector.data.images import Orientation, read_image
from detector.data.masks import MaskLayers
from detector.errors import DataError
from detector.seeds import seed_of, seeded
from detector.text import listed

Target = dict[str, Any]  # tensors, and masks that are not told apart yet, see CocoDetection.with_layers
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]
AXES = "axes"  # of the image, in a target on its way through the augmentation
LEAVE_OUT = "leave SanitizeBoundingBoxes and the like out, for objects whose box is gone are left out here"


def as_float(image: Tensor) -> Tensor:
    """Convert an image to float32, on its device. Integers are scaled to 0..1, floats are only cast."""
    return v2.functional.to_dtype(image, torch.float32, scale=True)


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """A detection data set in COCO's layout: images, and boxes with labels.

    Labels are 1 to the number of categories, in the order of the category ids, which may have gaps; 0 is background.
    Label ``n`` is category ``category_ids[n - 1]``; :meth:`relabel` gives other labels.

    Crowds and boxes without a size in the image are left out of the targets, but kept in :attr:`annotations`, which
    scoring uses. Masks and keypoints are decoded with their image. An object without a mask has an empty one, and one
    without keypoints has none that are labelled, as in torchvision's references.

    Args:
        images: the folder that ``file_name`` is relative to.
        annotations: an annotation file, or what :func:`read_annotations` made of it, with ``annotation_types``.
        annotation_types: what is read besides boxes: "masks", "keypoints" or both.
        transform: takes and returns (image, target), both torchvision ``tv_tensors``: any transform of
            ``torchvision.transforms.v2``. Where it mirrors an image, left and right keypoints are exchanged. Where
            masks are read it is told to fill them with 0, whatever it fills images with.
        seed: with the epoch and the index, all that the transform's random choices depend on.
        skip_missing: take images whose file is missing as well; reading one fails.
        orientation: whether EXIF orientations are applied, see :func:`~detector.data.images.read_image`.

    Raises:
        DataError: as :func:`read_annotations`, or an image file is missing.
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
            raise ValueError(
                f"the annotations must be read with annotation_types={self.annotation_types}, got "
                f"{tuple(annotations.annotation_types)}"
            )
        self.annotations = annotations
        self._images = np.arange(len(annotations))  # those of the annotations that are here
        self._boxes = corners_in_images(annotations.boxes, annotations.sizes[annotations.image_of])  # of all, [L, 4]
        ids = np.array([category["id"] for category in annotations.categories])
        empty = ~(self._boxes[:, 2:] > self._boxes[:, :2]).all(axis=1)
        # The label of each annotation, [L]; 0 for those that are in no target.
        self._labels = np.where(annotations.crowds | empty, 0, find(ids, annotations.category_ids) + 1)
        self.dropped_boxes = int((empty & ~annotations.crowds).sum())
        self.keypoints = annotations.keypoint_layout() if "keypoints" in self.annotation_types else None
        self.layered = self.in_bytes = False  # see with_layers and as_bytes
        self.transform = transform
        if "masks" in self.annotation_types:
            _paint_no_masks(transform)
        self.seed = seed
        self.orientation = orientation
        self.category_ids: list[int | None] = [category["id"] for category in self.annotations.categories]
        self.category_names: list[str] = [category["name"] for category in self.annotations.categories]
        problems = [problem for _, problem in check_files(annotations.file_names(), self.folder, self._where)]
        if skip_missing:
            problems = [problem for problem in problems if problem.kind != "missing image files"]
        raise_errors(problems, f"{annotations.path} --images {self.folder}")

    def __len__(self) -> int:
        return len(self._images)

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images, in order; a new list each time."""
        return self.annotations.image_ids[self._images].tolist()

    def sizes(self) -> np.ndarray:
        """Return width and height in pixels of each image, [N, 2] int64."""
        return self.annotations.sizes[self._images]

    def counts(self) -> np.ndarray:
        """Return how many boxes each image's target has, [N]."""
        in_target = self.annotations.image_of[self._labels > 0]
        return np.bincount(in_target, minlength=len(self.annotations))[self._images]

    def label_counts(self) -> dict[int, int]:
        """Return how many objects of each label the targets have."""
        labels, counts = np.unique(self._labels[self._rows()], return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist()))

    def _rows(self) -> np.ndarray:
        """The annotations in the targets, image by image."""
        return np.flatnonzero(np.isin(self.annotations.image_of, self._images) & (self._labels > 0))

    def _rows_of(self, index: int) -> np.ndarray:
        """The annotations in the target of an image of the annotations."""
        here = self.annotations.of(index)
        return here.start + np.flatnonzero(self._labels[here])

    def relabel(self, category_ids: Sequence[int | None], category_names: Sequence[str]) -> None:
        """Let labels 1, 2, ... stand for these categories; objects of others are in the targets no longer.

        The id is ``None`` for a label that is of no category of this data set.
        """
        labels = {category: label for label, category in enumerate(category_ids, start=1)}
        label_of = np.array([0, *(labels.get(category, 0) for category in self.category_ids)])  # by that of now
        self._labels = label_of[self._labels]
        self.category_ids, self.category_names = list(category_ids), list(category_names)

    def keep(self, image_ids: Collection[int]) -> None:
        """Go on with these images alone, in the order that they have here; :attr:`annotations` has all of them."""
        wanted = self.annotations.find(image_ids)
        self._images = self._images[np.isin(self._images, wanted)]

    def with_layers(self) -> "CocoDetection":
        """The same, with masks as :class:`~detector.data.masks.MaskLayers`, for images that are resized afterwards."""
        return self._with(layered=True)

    def as_bytes(self) -> "CocoDetection":
        """The same, but images that the transform leaves as uint8 stay so: a quarter of the bytes to send."""
        return self._with(in_bytes=True)

    def boxes_alone(self) -> "CocoDetection":
        """The same images and boxes, read without masks and keypoints."""
        return self._with(annotation_types=(), keypoints=None)

    def _with(self, **attributes: Any) -> "CocoDetection":
        other = copy(self)
        vars(other).update(attributes)
        return other

    def leave_out(self, broken: Mapping[int, str]) -> str:
        """Leave out images that cannot be read; :attr:`annotations` keeps them. Returns a sentence that says so.

        Args:
            broken: why each cannot be read, by the image's id.
        """
        indices = self.annotations.find(broken).tolist()
        names = listed([self.annotations.image(index)["file_name"] for index in indices])
        objects = sum(int((~self.annotations.crowds[self.annotations.of(index)]).sum()) for index in indices)
        what = f"{len(broken):,} of {len(self):,} images cannot be read and are left out"
        self.keep([image_id for image_id in self.image_ids if image_id not in broken])
        return f"{what} with their objects ({objects:,}): {names} ({next(iter(broken.values()))})"

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """Read one image and its target.

        Args:
            index: the image, or (epoch, image): the same pair gives the same augmentation.

        Returns:
            The image, [3, H, W] float32 in 0..1, and a dict: ``boxes`` [L, 4] float32 (x1, y1, x2, y2) in pixels,
            ``labels`` [L] int64, ``image_id`` [] int64, and, if they are read, ``masks`` [L, H, W] uint8, 0 or 1, and
            ``keypoints`` [L, K, 3] float32: x and y in pixels, and whether the point is labelled and in the image.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        known = int(self._images[index])
        info, rows = self.annotations.image(known), self._rows_of(known)
        path, size = self.folder / info["file_name"], (info["height"], info["width"])
        pixels = read_image(path, size=(info["width"], info["height"]), orientation=self.orientation)
        image: Tensor = tv_tensors.Image(pixels)
        boxes, labels = torch.from_numpy(self._boxes[rows]), torch.from_numpy(self._labels[rows])
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": labels,
            "image_id": torch.tensor(info["id"]),
        }
        layers = None
        if "masks" in self.annotation_types:
            layers = MaskLayers.of([self.annotations.value("masks", row) for row in rows], *size)
            target["masks"] = tv_tensors.Mask(layers.maps)
        labelled = torch.empty(0)
        if self.keypoints is not None:
            points, labelled = self._keypoints(rows).split([2, 1], dim=2)
            target["keypoints"] = tv_tensors.KeyPoints(points, canvas_size=size)
            target[AXES] = tv_tensors.KeyPoints(_axes(size), canvas_size=size)
        if self.transform is not None:
            try:
                with seeded(seed_of(self.seed, epoch, index)):
                    image, target = self.transform(image, target)
            except (LookupError, ValueError, TypeError, RuntimeError) as error:
                reason = " ".join(str(error).split())  # in one line, or a worker's report would lose its beginning
                if self.annotation_types and isinstance(error, IndexError):
                    reason += f": {LEAVE_OUT}"
                raise DataError(f"{path}: the augmentation fails on this image: {reason}") from error
        image = (image if self.in_bytes else as_float(image)).as_subclass(Tensor)
        if image.untyped_storage().nbytes() > image.nbytes:  # a crop, which would be sent with all of its image
            image = image.clone()
        # A crop or a rotation leaves parts of boxes outside.
        target["boxes"] = v2.functional.clamp_bounding_boxes(target["boxes"])
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        if self.annotation_types and len(target["boxes"]) != len(boxes):
            left = f"of {len(boxes)} objects the augmentation left {len(target['boxes'])}"
            raise DataError(f"{path}: {left}: {LEAVE_OUT}")
        if self.keypoints is not None:
            turn = _turn(target.pop(AXES))
            if turn == 0:
                raise DataError(
                    f"{path}: the augmentation takes keypoints away or moves them onto "
                    "each other: leave SanitizeKeyPoints and ClampKeyPoints out, for points that are outside the image "
                    "are left out here"
                )
            target["keypoints"] = self._with_visibility(target["keypoints"], labelled, image, mirrored=turn < 0)
        # Some are gone whole, or lost their size to rounding; torchvision's detectors refuse such a box.
        kept = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(dim=1)
        if layers is not None:
            places = tuple(place for place, stays in zip(layers.places, kept.tolist()) if stays)
            layers = MaskLayers(target["masks"], places)
            target["masks"] = layers if self.layered else layers.masks()
        for field in target.keys() & {"boxes", "labels", "keypoints"}:
            target[field] = target[field][kept]
        return image, target

    def visible_keypoints(self) -> list[int]:
        """Count the labelled keypoints of each image's objects."""
        return [int((self._keypoints(self._rows_of(index))[..., 2] > 0).sum()) for index in self._images.tolist()]

    def _keypoints(self, rows: Iterable[int]) -> Tensor:
        """The keypoints of some annotations, [L, K, 3]: x, y and visibility, or zeros."""
        assert self.keypoints is not None
        count = len(self.keypoints)
        points = [self.annotations.value("keypoints", row) or [0.0] * (3 * count) for row in rows]
        return torch.tensor(points, dtype=torch.float32).reshape(-1, count, 3)

    def _with_visibility(self, points: Tensor, labelled: Tensor, image: Tensor, *, mirrored: bool) -> Tensor:
        """Keypoints [L, K, 3] of what an augmentation made of points [L, K, 2]; those outside the image are not there.

        Args:
            labelled: [L, K, 1], above 0 where they were, before it.
            image: [3, H, W].
            mirrored: whether left is right now.
        """
        assert self.keypoints is not None
        height, width = image.shape[1:]
        x, y = points[..., 0], points[..., 1]
        inside = (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
        found = torch.cat([points.float(), ((labelled[..., 0] > 0) & inside)[..., None].float()], dim=2)
        return found[:, self.keypoints.mirrored()] if mirrored else found

    def files(self) -> list[Path]:
        """Return the image files, in order."""
        return [self.folder / self.annotations.names[index] for index in self._images.tolist()]

    def shapes(self) -> tuple[Tensor, Tensor]:
        """Return width and height in pixels of all boxes in the targets, [L, 2], and of the image of each, [L, 2]."""
        boxes = torch.from_numpy(self._boxes[self._rows()])
        sizes = np.repeat(self.sizes().astype(np.float64), self.counts(), axis=0)
        return boxes[:, 2:] - boxes[:, :2], torch.from_numpy(sizes)

    def _where(self, index: int) -> str:
        """Name an image of the annotations in a message."""
        known = self.annotations
        return f"{known.path}: images[{known.places[index]}] (id {known.image_ids[index]})"


def _paint_no_masks(transform: Any) -> None:
    """Let an augmentation add zeros to the maps of masks: torchvision's transforms fill them as they fill the image."""
    if isinstance(getattr(transform, "_fill", None), dict):
        transform._fill[tv_tensors.Mask] = 0
    for inner in getattr(transform, "transforms", ()):
        _paint_no_masks(inner)


def _axes(size: tuple[int, int]) -> Tensor:
    """Three points of an image, [3, 2], of which an augmentation shows whether it mirrors."""
    height, width = size
    return torch.tensor([[2.0, 2.0], [3.0, 2.0], [2.0, 3.0]]) / 4 * torch.tensor([width, height])


def _turn(axes: Tensor) -> float:
    """Below 0 if the two axes of :func:`_axes` have changed sides, 0 if they are no longer there."""
    if len(axes) != 3:
        return 0.0
    right, down = (axes[1:] - axes[0]).double()
    return float(right[0] * down[1] - right[1] * down[0])
