"""Detections in image files, written as pictures and JSON."""

import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from detector.data.annotations import Annotations
from detector.data.images import FORMATS, Orientation, read_image_with_remarks
from detector.data.loading import make_loader
from detector.data.results import Result, to_results
from detector.errors import DataError
from detector.files import read_json, write_json
from detector.models.rle_detections import DetectionDict
from detector.pretrained.detector import Detector
from detector.pretrained.image_tensors import BATCH_PIXELS, batches_of_one_size
from detector.text import alike_file

MAX_JPEG_SIDE = 65500  # pixels
# Suffixes of images that are not read. Some builds of Pillow read the first ones.
UNREAD = (
    ".webp .jp2 .j2k .avif .heic .heif .hif .jxl .jxr .dng .cr2 .cr3 .crw .nef .nrw .arw .orf .raf .rw2 .pef .srw .svg "
    ".psd .psb .xcf .eps .tga .ico .dds .pcx .exr .dcm .fits"
)
NUMBERS, RESULTS, PICTURES = "predictions.json", "detections.json", "pictures"


@dataclass(frozen=True)
class ImageFile:
    """An image to detect objects in."""

    path: Path
    name: str  # relative to the folder that was given, or the file's name
    id: int  # the image id of its detections
    size: tuple[int, int] | None = None  # annotated (width, height) in pixels


@dataclass(frozen=True)
class FoundImages:
    """The images to detect objects in, and the files beside them in image formats that are not read."""

    files: list[ImageFile]
    skipped: list[Path]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How images are read, and what is written of them.

    Args:
        min_score: minimum score of detections in pictures and ``predictions.json``; one for all labels, or for each.
        pictures: whether pictures are written.
        batch_size: maximum number of images per batch. A batch holds images of one size, so nothing is padded.
        workers: number of processes that read images.
        orientation: see :func:`~detector.data.images.read_image`.
        max_pixels: see :func:`~detector.data.images.read_image`.
        category_ids: the category id of each label; ``None`` leaves a label out. Default: the detector's.
    """

    min_score: float | Sequence[float] = 0.5
    pictures: bool = True
    batch_size: int = 8
    workers: int = 2
    orientation: Orientation = "upright"
    max_pixels: int | None = None
    category_ids: Sequence[int | None] | None = None


@dataclass
class Predicted:
    """The detections in images."""

    images: list[dict[str, Any]] = field(default_factory=list)  # each image with its detections
    results: list[Result] = field(default_factory=list)  # all detections in COCO's results format
    broken: list[dict[str, str]] = field(default_factory=list)  # file_name, path and error of each unreadable image
    remarks: dict[str, list[Path]] = field(default_factory=dict)  # the images with each remark on how they were read
    stopped: bool = False  # by Ctrl-C


def find_images(given: Sequence[str | Path], annotations: Annotations | None = None) -> FoundImages:
    """Find the image files of paths, folders (with their subfolders) and patterns, each once.

    Args:
        given: "photo.jpg", "folder", "folder/*.png", "folder/**/*.png".
        annotations: source of the ids and sizes, by file name. Without it ids count from 1.

    Raises:
        DataError: a path does not exist, a folder has no image, or an image is not in the annotations.
    """
    names: dict[Path, tuple[Path, str]] = {}  # path and name by the resolved path
    skipped: dict[Path, None] = {}
    for one in map(str, given):
        path = Path(one)
        if path.is_dir() and one:  # "", a shell's empty variable, would be the current folder
            images, others = _images_in(path)
            skipped |= dict.fromkeys(others)
        else:
            matches = [path] if path.is_file() else sorted(map(Path, glob(one, recursive=True)))
            images = [(match, match.name) for match in matches if match.is_file()]
            if not images:
                raise DataError(f"{one}: no such image, folder or pattern of files")
        for image, name in images:
            names.setdefault(image.resolve(), (image, name))
    if annotations is not None:
        return FoundImages(_annotated(names.values(), annotations), list(skipped))
    return FoundImages([ImageFile(path, name, i) for i, (path, name) in enumerate(names.values(), 1)], list(skipped))


def _images_in(folder: Path) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Return the images in a folder, and the files of image formats that are not read. Hidden ones are ignored."""
    # Pillow's list depends on how it was built. macOS leaves hidden "._photo.jpg" files beside photographs.
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    files = [(path, path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [(path, name) for path, name in files if not any(part.startswith(".") for part in name.parts)]
    images = [(path, name.as_posix()) for path, name in files if path.suffix.lower() in suffixes]
    others = [path.resolve() for path, _ in files if path.suffix.lower() in {*UNREAD.split()} - suffixes]
    if not images:
        but = f", but {count_by_suffix(others)}: convert them to JPEG, PNG or TIFF" if others else ""
        raise DataError(f"{folder}: the folder has no image (.jpg, .png and others that Pillow reads){but}")
    return images, others


def _annotated(images: Iterable[tuple[Path, str]], annotations: Annotations) -> list[ImageFile]:
    known = {name: index for index, name in enumerate(annotations.file_names())}
    files: dict[str, ImageFile] = {}
    for path, name in images:
        if name not in known:
            alike = [other for other in known if alike_file(other) == alike_file(name)]
            hint = f"; they have {alike[0]!r}" if alike else ""
            raise DataError(
                f"{path}: the annotations have no image {name!r}{hint}. A file is matched by its name, a file in a "
                "folder by its path from there. Without annotations images are numbered"
            )
        if name in files:
            raise DataError(f"{path} and {files[name].path} are both {name!r} of the annotations; give one of them")
        width, height = annotations.sizes[known[name]].tolist()
        files[name] = ImageFile(path, name, int(annotations.image_ids[known[name]]), (width, height))
    return list(files.values())


def count_by_suffix(paths: Iterable[Path]) -> str:
    """Count files by suffix, most frequent first: "3 .heic, 1 .psd"."""
    counts = Counter(path.suffix.lower() for path in paths).most_common()
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts)


def predict_files(
    detector: Detector,
    files: Sequence[ImageFile],
    folder: Path,
    options: PredictOptions,
    *,
    head: Mapping[str, Any] | None = None,
) -> Predicted:
    """Detect objects in image files, and write the detections. A broken image is reported and skipped.

    ``folder`` gets ``pictures/``, ``predictions.json`` (the detections of each image, by class name) and
    ``detections.json`` (all detections in COCO's results format), even if the run is interrupted or fails. The
    pictures that an earlier ``predictions.json`` there names are deleted.

    Args:
        detector: runs on the device that it is on.
        files: see :func:`find_images`.
        folder: created if it does not exist.
        options: how images are read, and what is written.
        head: further entries of ``predictions.json``.

    Raises:
        DataError: a picture would replace an input image, or an input image is a picture of the earlier run.
        OSError: a file cannot be written.
    """
    labels = range(1, len(detector.category_names) + 1)
    own = detector.category_ids if any(i is not None for i in detector.category_ids) else labels
    ids = own if options.category_ids is None else options.category_ids
    one_score = isinstance(options.min_score, float | int)
    scores = torch.tensor(options.min_score, dtype=torch.float64).expand(len(labels)).tolist()
    categories = [
        {"id": i, "name": name} | ({} if one_score else {"min_score": score})
        for i, name, score in zip(ids, detector.category_names, scores, strict=True)
        if i is not None
    ]
    pictures = [f"{PICTURES}/{name}" for name in _picture_names(files)] if options.pictures else []
    _prepare(folder, files, pictures)
    done = Predicted()
    try:
        for file, read, found in _detect(detector, files, options):
            if read.error is not None:
                done.broken.append({"file_name": file.name, "path": str(file.path), "error": read.error})
                tqdm.write(f"skipped: {read.error}", file=sys.stderr)
                continue
            shown = detector.named(read.pixels, found, scores)
            detections = [{"category_id": ids[one.pop("label") - 1]} | one for one in shown]
            image = {"id": file.id, "file_name": file.name, "path": str(file.path), "width": read.pixels.shape[2]}
            image |= {"height": read.pixels.shape[1], "remarks": read.remarks, "detections": detections}
            if pictures:
                image["picture"] = pictures[read.number]
                _write_picture(folder / pictures[read.number], shown.draw())
            done.results += to_results([found], [file.id], ids)
            done.images.append(image)
            for remark in read.remarks:
                done.remarks.setdefault(remark, []).append(file.path)
    except KeyboardInterrupt:
        done.stopped = True
    finally:
        about = {**(head or {}), "min_score": min(scores, default=0), "categories": categories}
        write_json(folder / NUMBERS, about | {"images": done.images, "broken": done.broken}, indent=1)
        write_json(folder / RESULTS, done.results)
    return done


class _Read(NamedTuple):
    """An image file that was read. ``pixels`` has no element if it is broken."""

    number: int
    pixels: Tensor
    remarks: list[str]
    error: str | None = None


class _Files(Dataset[_Read]):
    def __init__(self, files: Sequence[ImageFile], options: PredictOptions) -> None:
        self.files = files
        self.how: dict[str, Any] = {"orientation": options.orientation, "max_pixels": options.max_pixels}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> _Read:
        file = self.files[index]
        try:
            return _Read(index, *read_image_with_remarks(file.path, size=file.size, **self.how))
        except DataError as error:
            return _Read(index, torch.zeros(3, 0, 0, dtype=torch.uint8), [], str(error))


def _detect(
    detector: Detector, files: Sequence[ImageFile], options: PredictOptions
) -> Iterator[tuple[ImageFile, _Read, DetectionDict]]:
    """Yield each file as it was read, with its detections, under a progress bar."""
    loader = make_loader(_Files(files, options), None, workers=options.workers)
    with tqdm(total=len(files), desc="detecting", unit="image", leave=False, disable=None) as bar:
        for batch in batches_of_one_size(loader, lambda read: read.pixels, options.batch_size, BATCH_PIXELS):
            broken = batch[0].error is not None  # broken images share a size, 0 x 0, that no other image has
            found = [{}] * len(batch) if broken else detector.detect_batch([read.pixels for read in batch])
            for read, one in zip(batch, found, strict=True):
                yield files[read.number], read, one
                bar.update()


def _prepare(folder: Path, files: Sequence[ImageFile], pictures: Sequence[str]) -> None:
    """Delete the files of an earlier run in a folder, unless they, or new pictures, are input images."""
    earlier, inputs = _earlier_pictures(folder), {file.path.resolve() for file in files}
    for picture in (*earlier, *pictures):
        if (folder / picture).resolve() in inputs:
            what = (
                "an earlier picture, which would be deleted" if picture in earlier else "its picture would replace it"
            )
            raise DataError(f"{folder / picture}: is an input image, and {what}: write to another folder")
    (folder / PICTURES if pictures else folder).mkdir(parents=True, exist_ok=True)
    for name in (*earlier, NUMBERS, RESULTS):
        (folder / name).unlink(missing_ok=True)


def _earlier_pictures(folder: Path) -> list[str]:
    """Return the existing pictures, relative to the folder, that its predictions.json names.

    Anybody may have written that file: names outside of ``pictures/`` and links are ignored.
    """
    home = folder.resolve() / PICTURES
    try:
        images = read_json(folder / NUMBERS)["images"]
        named = sorted({image["picture"] for image in images if image.get("picture", "").endswith(".jpg")})
        paths = {name: folder / name for name in named}
        files = {name: path for name, path in paths.items() if path.is_file() and not path.is_symlink()}
        return [name for name, path in files.items() if path.resolve().is_relative_to(home)]
    except (DataError, LookupError, TypeError, AttributeError, ValueError, OSError):  # missing, foreign or damaged
        return []


def _picture_names(files: Sequence[ImageFile]) -> list[str]:
    """Return a unique name for each picture, also on file systems that ignore case."""
    used = {str(parent).lower() for file in files for parent in Path(file.name).parents}  # names of folders
    names = []
    for file in files:
        base = str(Path(file.name).with_suffix(""))
        name, number = f"{base}.jpg", 2
        while name.lower() in used:
            name, number = f"{base}-{number}.jpg", number + 1
        used.add(name.lower())
        names.append(name)
    return names


def _write_picture(path: Path, picture: Image.Image) -> None:
    picture.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90)
    try:
        path.write_bytes(content.getbuffer())  # not atomic: waiting for the disk would slow down thousands of pictures
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, f"the picture cannot be written: {error.strerror}", str(path)) from None
