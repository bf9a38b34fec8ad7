"""Images and boxes in COCO's layout, read with pycocotools and checked before anything is computed from them."""

import contextlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

Target = dict[str, Tensor]
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]


class DataError(ValueError):
    """What is wrong with a data set: names the file, the entry, the field and the value."""


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises :class:`DataError` if it is missing, unreadable, cut off or no JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON (cut off, or not an annotation file?): {error}") from None


def read_coco(path: str | Path) -> COCO:
    """Read an annotation file of COCO's instances format.

    ``iscrowd`` may be missing (0 is meant), and ``area`` (the box's is taken; COCO's own files give the mask's).

    Args:
        path: ``instances_*.json``: a dict with ``images``, ``annotations`` and ``categories``.

    Returns:
        pycocotools' index of the file.

    Raises:
        DataError: the file cannot be read, a field is missing or of the wrong type, an id is used twice, or an
            annotation names an image or a category that is not there.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: must hold a dict with images, annotations and categories, not a {_kind(data)}")
    images = _entries(path, data, "images", {"id": int, "file_name": str, "width": int, "height": int})
    categories = _entries(path, data, "categories", {"id": int, "name": str})
    annotations = _entries(path, data, "annotations", {"id": int, "image_id": int, "category_id": int, "bbox": list})
    for image in images.values():
        if image["width"] < 1 or image["height"] < 1:
            raise DataError(
                f"{path}: image {image['id']} ({image['file_name']}) has width {image['width']} and height "
                f"{image['height']}: both must be at least 1"
            )
    for annotation in annotations.values():
        where = f"{path}: annotation {annotation['id']}"
        if annotation["image_id"] not in images:
            raise DataError(f"{where} has image_id {annotation['image_id']}, and there is no such image")
        if annotation["category_id"] not in categories:
            raise DataError(f"{where} has category_id {annotation['category_id']}, and there is no such category")
        box = annotation["bbox"]
        if len(box) != 4 or not all(_is_number(value) and math.isfinite(value) for value in box):
            raise DataError(f"{where} has bbox {box}: must be 4 finite numbers, x, y, width and height")
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", box[2] * box[3])
    return index_coco(data)


def index_coco(data: dict[str, Any]) -> COCO:
    """pycocotools' index of a dict in COCO's format, without what its constructor prints."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def read_image(path: str | Path, *, width: int | None = None, height: int | None = None) -> Tensor:
    """Read an image as RGB, whatever its mode: grey, palette, 16 bit, or with an alpha channel (dropped).

    Photographs may carry an EXIF orientation, which a viewer applies and an annotation tool may have applied or
    not. The annotation's size decides: the pixels as stored if they fit it, else the pixels turned upright.

    Args:
        path: any format that Pillow reads.
        width: the annotation's width, in pixels; ``None``: turn upright, as a viewer does.
        height: the annotation's height.

    Returns:
        [3, H, W], uint8.

    Raises:
        DataError: the file is missing, broken or cut off, or has another size than the annotation says.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image) if width is None or image.size != (width, height) else image
            if width is not None and upright.size != (width, height):
                raise DataError(
                    f"{path}: the image has {image.size[0]}x{image.size[1]} pixels, its annotation says "
                    f"{width}x{height} (width x height)"
                )
            if upright.mode.startswith("I"):  # Pillow would clip it to white
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return v2.functional.pil_to_tensor(upright.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as an image (broken or cut off): {error}") from None


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """A detection data set in COCO's layout: images, and boxes with labels.

    Labels are 1 to the number of categories, in the order of the category ids, which may have gaps; 0 is
    background. :attr:`category_ids` maps back: label ``n`` is ``category_ids[n - 1]``.

    Crowd regions and boxes of zero size (also: outside the image) are not in the targets; :attr:`dropped_boxes`
    counts the latter. The evaluation reads :attr:`coco`, where everything still is.

    Args:
        images: the folder that ``file_name`` is relative to.
        annotations: an annotation file, see :func:`read_coco`.
        transform: takes and returns (image, target), both torchvision ``tv_tensors``: any transform of
            ``torchvision.transforms.v2``.
        seed: with the epoch and the index, all that the transform's random choices depend on.

    Raises:
        DataError: as :func:`read_coco`, or an image file is missing.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        self.folder = Path(images)
        self.coco = read_coco(annotations)
        self.transform = transform
        self.seed = seed
        self.category_ids: list[int] = sorted(self.coco.cats)
        self.category_names: list[str] = [self.coco.cats[i]["name"] for i in self.category_ids]
        self.image_ids: list[int] = sorted(self.coco.imgs)
        self._label = {category: label for label, category in enumerate(self.category_ids, start=1)}
        self._check_files(annotations)
        kept = [self._boxes(image_id) for image_id in self.image_ids]
        self.targets = [(boxes, labels) for boxes, labels, _ in kept]
        self.dropped_boxes = sum(dropped for _, _, dropped in kept)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """One image and its target.

        Args:
            index: the image, or (epoch, image): the same pair gives the same augmentation.

        Returns:
            The image, [3, H, W] float32 in 0..1, and a dict of ``boxes`` [L, 4] float32 (x1, y1, x2, y2) in
            pixels, ``labels`` [L] int64 and ``image_id`` [] int64.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        info = self.coco.imgs[self.image_ids[index]]
        size = (info["height"], info["width"])
        pixels = read_image(self.folder / info["file_name"], width=info["width"], height=info["height"])
        boxes, labels = self.targets[index]
        image: Tensor = tv_tensors.Image(pixels)
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": labels,
            "image_id": torch.tensor(info["id"]),
        }
        if self.transform is not None:
            (state,) = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(state))
                image, target = self.transform(image, target)
        image = v2.functional.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor)
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        # A speck can lose its size to the transform's rounding; torchvision's detectors refuse such a box.
        kept = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(dim=1)
        target["boxes"], target["labels"] = target["boxes"][kept], target["labels"][kept]
        return image, target

    def _boxes(self, image_id: int) -> tuple[Tensor, Tensor, int]:
        """Boxes [L, 4] (x1, y1, x2, y2) within the image, labels [L], and how many boxes of no size were dropped."""
        info = self.coco.imgs[image_id]
        annotations = [a for a in self.coco.imgToAnns[image_id] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([self._label[a["category_id"]] for a in annotations], dtype=torch.int64)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clamp(min=0).minimum(torch.tensor([info["width"], info["height"]] * 2))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return boxes[kept], labels[kept], int((~kept).sum())

    def _check_files(self, annotations: str | Path) -> None:
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such image folder")
        folder = self.folder.resolve()
        present = {entry.name for entry in folder.iterdir()}  # one look, not one a file: COCO has 118,000
        for image in self.coco.imgs.values():
            name = image["file_name"]
            if name in present:
                continue
            path = (folder / name).resolve()
            if not path.is_relative_to(folder):
                raise DataError(f"{annotations}: image {image['id']} has file_name {name!r}, outside {self.folder}")
            if not path.is_file():
                raise DataError(f"{annotations}: image {image['id']} has file_name {name!r}, not in {self.folder}")


def _entries(path: str | Path, data: dict[str, Any], name: str, fields: dict[str, type]) -> dict[int, dict[str, Any]]:
    """The entries of one list of an annotation file by id, each checked to have the fields."""
    if not isinstance(data.get(name), list):
        raise DataError(f"{path}: {name!r} must be a list, got {_kind(data.get(name))}")
    entries: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(data[name]):
        where = f"{path}: {name}[{position}]"
        if not isinstance(entry, dict):
            raise DataError(f"{where} must be a dict, got {_kind(entry)}")
        for field, kind in fields.items():
            value = entry.get(field)
            if not isinstance(value, kind) or isinstance(value, bool):
                has = f"is {value!r}" if field in entry else "is missing"
                raise DataError(f"{where} (id {entry.get('id')}): {field!r} {has}, must be {_article(kind)}")
        if entry["id"] in entries:
            raise DataError(f"{where}: id {entry['id']} is used twice")
        entries[entry["id"]] = entry
    return entries


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _article(kind: type) -> str:
    return {int: "an integer", str: "a string", list: "a list"}[kind]
