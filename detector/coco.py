"""Images and boxes in COCO's layout, read with pycocotools and checked before anything is computed from them."""

import contextlib
import io
import json
import logging
import os
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from detector.checks import MOST_AREA, Problem, annotation_problems, file_problems
from detector.errors import DataError, ImageError, SizeError
from detector.names import listed
from detector.seeding import drawn_from, seed_of

ROOT_VARIABLE = "DETECTOR_DATA"
# What a file may be, whatever it is called. Pillow knows more, and runs Ghostscript on a file that says it is an EPS.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
TOO_LARGE = (
    "a small file may say that, and fill the memory; one that is meant is let through by --max_pixels of "
    "tools/predict.py, max_pixels of detect, and takes about 40 bytes of memory a pixel"
)
_opening = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # or it writes on stderr what is wrong with a file

Target = dict[str, Tensor]
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises :class:`DataError` if it is missing, unreadable, cut off or no JSON."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a byte-order mark
            return json.load(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise DataError(f"{path}: not valid JSON (cut off, or not an annotation file?): {error}") from None


def read_coco(path: str | Path) -> COCO:
    """Read an annotation file of COCO's instances format.

    ``iscrowd`` may be missing (0 is meant), and ``area`` (the box's is taken; COCO's own files give the mask's).

    Args:
        path: ``instances_*.json``: a dict with ``images``, ``annotations`` and ``categories``.

    Returns:
        pycocotools' index of the file; its attribute ``flaws`` counts what is left out or clipped, by kind.

    Raises:
        DataError: the file cannot be read, a field is missing or of the wrong type, an id is used twice, or an
            annotation names an image or a category that is not there: the first "error" of
            :func:`~detector.checks.annotation_problems`, and how many more there are.
    """
    data = read_json(path)
    flaws = refuse(annotation_problems(path, data), f"{path}")
    for annotation in data["annotations"]:
        _, _, width, height = annotation["bbox"]
        annotation.setdefault("iscrowd", 0)
        # A box of a negative size is an object that nobody can find, as one without a size is.
        annotation.setdefault("area", min(max(width, 0) * max(height, 0), MOST_AREA))
    if any(annotation["id"] == 0 for annotation in data["annotations"]):
        for number, annotation in enumerate(data["annotations"], start=1):
            annotation["id"] = number  # pycocotools takes 0 for none; nothing else reads the ids
    coco = index_coco(data)
    coco.flaws = flaws
    return coco


def index_coco(data: dict[str, Any]) -> COCO:
    """pycocotools' index of a dict in COCO's format, without what its constructor prints."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def read_image(
    path: str | Path,
    *,
    width: int | None = None,
    height: int | None = None,
    max_pixels: int | None = None,
    remarks: list[str] | None = None,
) -> Tensor:
    """Read an image as RGB, whatever its mode: grey, palette, 16 bits, floats, or with an alpha channel (dropped).

    Integers of more than 8 bits and floats are scaled as :func:`as_rgb` says. Of several frames or pages the first is
    taken.

    Photographs may carry an EXIF orientation, which a viewer applies and an annotation tool may have applied or
    not. The annotation's size decides: the pixels as stored if they fit it, else the pixels turned upright.

    Args:
        path: one of :data:`FORMATS`, so far as this Pillow reads them.
        width: the annotation's width, in pixels; ``None``: turn upright, as a viewer does.
        height: the annotation's height.
        max_pixels: the most that it may have; ``None``: Pillow's ``Image.MAX_IMAGE_PIXELS``.
        remarks: gets a phrase for each thing that a user may want to know: that the values were scaled, that there
            are more frames.

    Returns:
        [3, H, W], uint8.

    Raises:
        DataError: the file is missing, broken or cut off, has more pixels than may be, values that are no colours, or
            another size than the annotation says.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    most = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a folder; a pipe, of which nothing would ever come
            raise ImageError(f"{path}: cannot be read as an image: it is no regular file")
        with without_pillows_warnings(), _open(path, formats, max_pixels) as image:
            if most is not None and image.size[0] * image.size[1] > most:  # Pillow only warns, up to twice as many
                raise ImageError(
                    f"{path}: the image has {image.size[0]}x{image.size[1]} pixels, more than the {most:,} that are "
                    f"read: {TOO_LARGE}"
                )
            deep = image.mode[0] not in "IF" and ";16" in str(getattr(image, "tile", ""))  # Pillow drops the lower 8
            upright = ImageOps.exif_transpose(image) if width is None or image.size != (width, height) else image
            if width is not None and upright.size != (width, height):
                raise SizeError(
                    f"{path}: the image has {image.size[0]}x{image.size[1]} pixels, its annotation says "
                    f"{width}x{height} (width x height)"
                )
            try:
                pixels = v2.functional.pil_to_tensor(as_rgb(upright, remarks))
            except DataError as error:
                raise ImageError(f"{path}: {error}") from None
            if remarks is not None:
                if deep and 0 < int(pixels.max()) < 64:
                    remarks.append("dark colours of 16 bits, of which only the upper 8 are read; save them with 8")
                if _has_more_frames(image):
                    remarks.append("several frames or pages, of which the first was taken")
            return pixels
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {str(error).rstrip('.')}: {TOO_LARGE}") from None
    except Exception as error:  # decoders raise what they like: struct.error, TypeError, SyntaxError, ...
        if isinstance(error, DataError):
            raise
        raise ImageError(f"{path}: cannot be read as an image (broken or cut off): {error}") from None


def _open(path: str | Path, formats: list[str], max_pixels: int | None) -> Image.Image:
    """Pillow's own limit is the whole process's: another one holds while the head of the file is read, no longer."""
    if max_pixels is None:
        return Image.open(path, formats=formats)
    with _opening:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            return Image.open(path, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _has_more_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # a phone's photograph, with a second view or a preview behind it
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # as above: what comes behind the first frame is broken
        return False


@contextlib.contextmanager
def without_pillows_warnings() -> Iterator[None]:
    """Within, Pillow's remarks about an image (its EXIF data, its size) do not reach the terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def as_rgb(image: Image.Image, remarks: list[str] | None = None) -> Image.Image:
    """A PIL image of any mode as RGB; an alpha channel is dropped.

    Of integers of 16 or 32 bits the largest decides: they have the fewest of 8, 10, 12, 14 or 16 bits that hold it (a
    microscope's or an X-ray's 12 come in 16), of which the upper 8 are taken. Floats up to 1 are scaled to 0 to 255,
    others are taken as they are, without what follows the point.

    Args:
        image: of any mode and size.
        remarks: gets a phrase if the values were scaled.

    Raises:
        DataError: integers outside of 0 to 65535, floats outside of 0 to 255, or NaN.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise DataError(
                f"the image has integers from {low} to {high}: 0 to 65535 are read; save it with 8 or 16 bits"
            )
        bits = max(high.bit_length() + high.bit_length() % 2, 8)
        if remarks is not None and high and bits < 16:
            remarks.append(f"values of 16 bits or more that use at most {bits}, scaled by those {bits}")
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        least, largest = float(values.min()), float(values.max())
        if not (least >= 0 and largest <= 255):  # also NaN
            raise DataError(
                f"the image has floats from {least:.4g} to {largest:.4g}: 0 to 1 or 0 to 255 are read; scale them, or "
                "save it with 8 or 16 bits"
            )
        if largest <= 1:
            if remarks is not None:
                remarks.append("floats from 0 to 1, scaled to 0 to 255")
            image = Image.fromarray((values * 255).round().astype(np.uint8))
    return image.convert("RGB")


def find_root(root: str | None, dataset: str | None, *, flag: str = "--data.root") -> Path:
    """The folder of a data set, by its path, or by its name in the folder that DETECTOR_DATA names.

    Raises:
        DataError: neither is told.
    """
    if root is not None:
        return Path(root)
    if dataset is None:
        raise DataError(f"where is the data? Give its folder with {flag} FOLDER")
    if ROOT_VARIABLE not in os.environ:
        raise DataError(
            f"where is the data? Give its folder with {flag} FOLDER, or set {ROOT_VARIABLE} to the folder "
            f"that {dataset!r} lies in"
        )
    return Path(os.environ[ROOT_VARIABLE]) / dataset


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images of different sizes stay a list; the detector pads them to one batch."""
    images, targets = zip(*samples)
    return list(images), list(targets)


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """A detection data set in COCO's layout: images, and boxes with labels.

    Labels are 1 to the number of categories, in the order of the category ids, which may have gaps; 0 is
    background. :attr:`category_ids` maps back: label ``n`` is ``category_ids[n - 1]``. :meth:`relabel` gives them
    others.

    Crowd regions and boxes of zero size (also: outside the image) are not in the targets; :attr:`dropped_boxes`
    counts the latter. The evaluation reads :attr:`coco`, where everything still is.

    Args:
        images: the folder that ``file_name`` is relative to.
        annotations: an annotation file, see :func:`read_coco`.
        transform: takes and returns (image, target), both torchvision ``tv_tensors``: any transform of
            ``torchvision.transforms.v2``.
        seed: with the epoch and the index, all that the transform's random choices depend on.
        skip_missing: take images whose file is missing as well; reading one fails.

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
        skip_missing: bool = False,
    ) -> None:
        self.folder = Path(images)
        self.coco = read_coco(annotations)
        self.transform = transform
        self.seed = seed
        self.category_ids: list[int | None] = sorted(self.coco.cats)
        self.category_names: list[str] = [self.coco.cats[i]["name"] for i in sorted(self.coco.cats)]
        self.image_ids: list[int] = sorted(self.coco.imgs)
        self._label = {category: label for label, category in enumerate(sorted(self.coco.cats), start=1)}
        files = file_problems(annotations, self.coco.imgs.values(), self.folder)
        refuse(
            (file for file in files if not skip_missing or file.kind != "missing image files"),
            f"{annotations} --images {self.folder}",
        )
        kept = [self._boxes(image_id) for image_id in self.image_ids]
        self.targets = [(boxes, labels) for boxes, labels, _ in kept]
        self.dropped_boxes = sum(dropped for _, _, dropped in kept)

    def __len__(self) -> int:
        return len(self.image_ids)

    def relabel(self, category_ids: Sequence[int | None], category_names: Sequence[str]) -> None:
        """Let labels 1, 2, ... stand for these categories; objects of others are in the targets no longer.

        Args:
            category_ids: of this data set; ``None`` for a label of which it has no category.
            category_names: of the labels.
        """
        labels = {category: label for label, category in enumerate(category_ids, start=1)}
        label_of = torch.tensor([0, *(labels.get(category, 0) for category in self.category_ids)])  # by that of now
        self.targets = [(boxes[label_of[old] > 0], label_of[old][label_of[old] > 0]) for boxes, old in self.targets]
        self.category_ids, self.category_names = list(category_ids), list(category_names)

    def leave_out(self, broken: Mapping[int, str]) -> str:
        """Go on without some images, of which only :attr:`coco` still knows.

        Args:
            broken: why each cannot be read, by the image's id.

        Returns:
            A sentence that says so.
        """
        names = listed([self.coco.imgs[image_id]["file_name"] for image_id in broken])
        objects = sum(not a["iscrowd"] for image_id in broken for a in self.coco.imgToAnns[image_id])
        what = (
            f"{len(broken):,} of {len(self):,} images cannot be read and are left out with their objects ({objects:,})"
        )
        kept = [index for index, image_id in enumerate(self.image_ids) if image_id not in broken]
        self.image_ids = [self.image_ids[index] for index in kept]
        self.targets = [self.targets[index] for index in kept]
        return f"{what}: {names} ({next(iter(broken.values()))})"

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
            try:
                with drawn_from(seed_of(self.seed, epoch, index)):
                    image, target = self.transform(image, target)
            except (ValueError, TypeError, RuntimeError) as error:
                path = self.folder / info["file_name"]
                reason = " ".join(str(error).split())  # in one line, or a worker's report would lose its beginning
                raise DataError(f"{path}: the augmentation fails on this image: {reason}") from error
        image = v2.functional.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor)
        # A crop or a rotation leaves parts of boxes outside.
        target["boxes"] = v2.functional.clamp_bounding_boxes(target["boxes"])
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        # Some are gone whole, or lost their size to rounding; torchvision's detectors refuse such a box.
        kept = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(dim=1)
        target["boxes"], target["labels"] = target["boxes"][kept], target["labels"][kept]
        return image, target

    def files(self) -> list[Path]:
        """The image files, in order."""
        return [self.folder / self.coco.imgs[image_id]["file_name"] for image_id in self.image_ids]

    def shapes(self) -> tuple[Tensor, Tensor]:
        """Width and height in pixels of all boxes in the targets, [L, 2], and of the image of each, [L, 2]."""
        images = [self.coco.imgs[image_id] for image_id in self.image_ids]
        boxes = torch.cat([torch.empty(0, 4), *(boxes for boxes, _ in self.targets)])
        sizes = torch.tensor([(image["width"], image["height"]) for image in images], dtype=torch.float64).reshape(
            -1, 2
        )
        counts = torch.tensor([len(labels) for _, labels in self.targets], dtype=torch.int64)
        return boxes[:, 2:] - boxes[:, :2], sizes.repeat_interleave(counts, dim=0)

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


def refuse(problems: Iterable[Problem], checked: str | None = None) -> Counter[str]:
    """Raise the first error among problems; count the flaws. ``checked``: the arguments that make the tool list all."""
    problems = list(problems)
    messages = [problem.message for problem in problems if problem.level == "error"]
    if messages:
        more = len(messages) - 1
        lists = "" if checked is None else f": tools/check.py {checked} lists them"
        raise DataError(messages[0] + (f" (and {more:,} more problem{'s' * (more > 1)}{lists})" if more else ""))
    return Counter(problem.kind for problem in problems if problem.level == "flaw")
