"""Detections in image files, written as pictures and JSON."""

import io
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from detector.data.annotations import Annotations
from detector.data.images import FORMATS, read_image_with_remarks
from detector.data.loading import make_loader
from detector.data.results import Result, to_results
from detector.errors import DataError
from detector.files import read_json, write_json
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


class ImageFiles(Dataset[Any]):
    """A data set of image files. Items are the index, the pixels (``None`` if broken), and remarks or the error.

    Args:
        files: see :func:`find_images`.
        options: ``orientation`` and ``max_pixels``, see :func:`~detector.data.images.read_image_with_remarks`.
    """

    def __init__(self, files: Sequence[ImageFile], **options: Any) -> None:
        self.files, self.options = files, options

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, list[str] | str]:
        file = self.files[index]
        try:
            return index, *read_image_with_remarks(file.path, size=file.size, **self.options)
        except DataError as error:
            return index, None, str(error)


@dataclass
class Predicted:
    """The detections in images."""

    images: list[dict[str, Any]] = field(default_factory=list)  # each image with its detections and remarks
    results: list[Result] = field(default_factory=list)  # all detections in COCO's results format
    broken: list[dict[str, str]] = field(default_factory=list)  # file_name, path and error of each unreadable image
    stopped: bool = False  # by Ctrl-C


def find_images(
    given: Sequence[str | Path], annotations: Annotations | None = None
) -> tuple[list[ImageFile], Counter[str]]:
    """Find the image files of paths, folders (with their subfolders) and patterns, each once.

    Args:
        given: "photo.jpg", "folder", "folder/*.png", "folder/**/*.png".
        annotations: source of the ids and sizes, by file name. Without it ids count from 1.

    Returns:
        The images, and the number of skipped files in other image formats, by suffix.

    Raises:
        DataError: a path does not exist, a folder has no image, or an image is not in the annotations.
    """
    names: dict[Path, tuple[Path, str]] = {}  # path and name by the resolved path
    skipped: dict[Path, str] = {}  # suffix by the resolved path
    for one in map(str, given):
        path = Path(one)
        if path.is_dir() and one:  # "", a shell's empty variable, would be the current folder
            images, others = _images_in(path)
            skipped |= others
        else:
            matches = [path] if path.is_file() else sorted(map(Path, glob(one, recursive=True)))
            images = [(match, match.name) for match in matches if match.is_file()]
            if not images:
                raise DataError(f"{one}: no such image, folder or pattern of files")
        for image, name in images:
            names.setdefault(image.resolve(), (image, name))
    files = [ImageFile(path, name, i) for i, (path, name) in enumerate(names.values(), start=1)]
    return files if annotations is None else _annotated(files, annotations), Counter(skipped.values())


def _images_in(folder: Path) -> tuple[list[tuple[Path, str]], dict[Path, str]]:
    """Return the images in a folder, and the files of image formats that are not read. Hidden ones are ignored."""
    # Pillow's list depends on how it was built. macOS leaves hidden "._photo.jpg" files beside photographs.
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    files = [(path, path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [(path, name) for path, name in files if not any(part.startswith(".") for part in name.parts)]
    images = [(path, name.as_posix()) for path, name in files if path.suffix.lower() in suffixes]
    unread = {*UNREAD.split()} - suffixes
    others = {path.resolve(): path.suffix.lower() for path, _ in files if path.suffix.lower() in unread}
    if not images:
        but = f", but {listed_suffixes(Counter(others.values()))}: convert them to JPEG, PNG or TIFF" if others else ""
        raise DataError(f"{folder}: the folder has no image (.jpg, .png and others that Pillow reads){but}")
    return images, others


def _annotated(files: Sequence[ImageFile], annotations: Annotations) -> list[ImageFile]:
    """Return the files with their annotated ids and sizes."""
    places = {name: place for place, name in enumerate(annotations.file_names())}
    found: dict[str, ImageFile] = {}
    for file in files:
        if file.name not in places:
            alike = [other for other in places if alike_file(other) == alike_file(file.name)]
            hint = f"; they have {alike[0]!r}" if alike else ""
            how = "A file is matched by its name, a file in a folder by its path from there"
            raise DataError(f"{file.path}: the annotations have no image {file.name!r}{hint}. {how}")
        if file.name in found:
            raise DataError(f"{file.path} and {found[file.name].path} are both {file.name!r}; give one of them")
        place = places[file.name]
        width, height = annotations.sizes[place].tolist()
        found[file.name] = replace(file, id=int(annotations.image_ids[place]), size=(width, height))
    return list(found.values())


def listed_suffixes(counts: Counter[str]) -> str:
    """List suffixes, most frequent first: "3 .heic, 1 .psd"."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


def predict_files(
    detector: Detector,
    images: ImageFiles,
    folder: Path,
    *,
    min_score: float | Sequence[float] = 0.5,
    pictures: bool = True,
    batch_size: int = 8,
    workers: int = 2,
    head: Mapping[str, Any] | None = None,
) -> Predicted:
    """Detect objects in image files, and write the detections. A broken image is reported and skipped.

    ``folder`` gets ``pictures/``, ``predictions.json`` (the detections of each image, by class name) and
    ``detections.json`` (all detections in COCO's results format), even if the run is interrupted or fails. The
    pictures that an earlier ``predictions.json`` there names are deleted.

    Args:
        detector: runs on its current device. If any label has a category id, labels without one are left out.
        images: the files.
        folder: created if it does not exist.
        min_score: minimum score of detections in pictures and ``predictions.json``; one for all labels, or for each.
        pictures: write pictures.
        batch_size: maximum number of images per batch. A batch holds images of one size, so nothing is padded.
        workers: number of processes that read images.
        head: further entries of ``predictions.json``.

    Raises:
        DataError: a picture would replace an input image, or an input image is a picture of the earlier run.
        OSError: a file cannot be written.
    """
    labels, files = range(1, len(detector.category_names) + 1), images.files
    ids = detector.category_ids if any(i is not None for i in detector.category_ids) else labels
    scores = torch.tensor(min_score, dtype=torch.float64).expand(len(labels)).tolist()
    rows = zip(ids, detector.category_names, scores, strict=True)
    categories = [{"id": i, "name": name, "min_score": score} for i, name, score in rows if i is not None]
    names = _prepare(folder, files, pictures)
    loader, done = make_loader(images, None, workers=workers), Predicted()

    def readable() -> Iterator[tuple[int, Tensor, list[str]]]:
        for number, pixels, remarks in tqdm(loader, desc="detecting", unit="image", leave=False, disable=None):
            if pixels is not None:
                yield number, pixels, remarks
            else:
                file = files[number]
                done.broken.append({"file_name": file.name, "path": str(file.path), "error": remarks})
                tqdm.write(f"skipped: {remarks}", file=sys.stderr)

    try:
        for batch in batches_of_one_size(readable(), itemgetter(1), batch_size, BATCH_PIXELS):
            found = detector.detect_batch([pixels for _, pixels, _ in batch])
            for (number, pixels, remarks), one in zip(batch, found, strict=True):
                file, shown = files[number], detector.named(pixels, one, scores)
                image = {"id": file.id, "file_name": file.name, "path": str(file.path)}
                image |= {"width": pixels.shape[2], "height": pixels.shape[1], "remarks": remarks}
                image["detections"] = [{"category_id": ids[row.pop("label") - 1]} | row for row in shown]
                if pictures:
                    image["picture"] = names[number]
                    _write_picture(folder / names[number], shown.draw())
                done.results += to_results([one], [file.id], ids)
                done.images.append(image)
    except KeyboardInterrupt:
        done.stopped = True
    finally:
        about = {**(head or {}), "min_score": min(scores, default=0), "categories": categories}
        write_json(folder / NUMBERS, about | {"images": done.images, "broken": done.broken}, indent=1)
        write_json(folder / RESULTS, done.results)
    return done


def _prepare(folder: Path, files: Sequence[ImageFile], pictures: bool) -> list[str]:
    """Delete the files of an earlier run in a folder, and return the names of the new pictures.

    Raises:
        DataError: an input image is a picture of the earlier run, or a new one would replace it.
    """
    names, earlier = _picture_names(files) if pictures else [], _earlier_pictures(folder)
    inputs = {file.path.resolve() for file in files}
    for name in (*earlier, *names):
        if (folder / name).resolve() in inputs:
            what = "an earlier picture, which would be deleted" if name in earlier else "its picture would replace it"
            raise DataError(f"{folder / name}: is an input image, and {what}: write to another folder")
    (folder / PICTURES if pictures else folder).mkdir(parents=True, exist_ok=True)
    for name in (*earlier, NUMBERS, RESULTS):
        (folder / name).unlink(missing_ok=True)
    return names


def _earlier_pictures(folder: Path) -> list[str]:
    """Return the existing pictures, relative to the folder, that its predictions.json names.

    Anybody may have written that file: names outside of ``pictures/`` and links are ignored.
    """
    home = folder.resolve() / PICTURES
    try:
        named = {image.get("picture", "") for image in read_json(folder / NUMBERS)["images"]}
        paths = {name: folder / name for name in sorted(named) if name.endswith(".jpg")}
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
        names.append(f"{PICTURES}/{name}")
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
