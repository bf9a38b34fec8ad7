"""Detections in any number of image files: pictures, and the numbers as JSON."""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from detector.data.annotations import Annotations
from detector.data.drawing import draw
from detector.data.images import FORMATS, Orientation, read_image_with_remarks
from detector.data.loading import make_loader
from detector.data.results import Result, to_results
from detector.errors import DataError
from detector.files import read_json, write_json
from detector.models.detecting import Found, kept
from detector.pretrained.detections import parts_as_values
from detector.pretrained.detector import Detector
from detector.pretrained.image_tensors import BATCH_PIXELS, batches_of_one_size
from detector.text import alike_file

JPEG_SIDE = 65500  # pixels, the format's limit
# Of images that are not read, in folders; the first ones only where this Pillow cannot.
UNREAD = (
    ".webp .jp2 .j2k .avif .heic .heif .hif .jxl .jxr .dng .cr2 .cr3 .crw .nef .nrw .arw .orf .raf .rw2 .pef .srw .svg "
    ".psd .psb .xcf .eps .tga .ico .dds .pcx .exr .dcm .fits"
)
NUMBERS, RESULTS, PICTURES = "predictions.json", "detections.json", "pictures"


@dataclass(frozen=True)
class ImageFile:
    """An image to find objects in.

    Args:
        path: of the file.
        name: what it is called in the results: as it was given, within a folder relative to it.
        id: the id that its detections get.
        size: (width, height) that it must have, in pixels, if annotations say so.
    """

    path: Path
    name: str
    id: int
    size: tuple[int, int] | None = None


@dataclass
class Predicted:
    """What became of the images.

    Args:
        images: a dict for each that was read, with its detections.
        results: all detections in COCO's results format.
        broken: name and reason of each that could not be read.
        remarks: the paths of those of which something is to be said, by what that is.
        stopped: by Ctrl-C, before the end.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    broken: list[dict[str, str]] = field(default_factory=list)
    remarks: dict[str, list[Path]] = field(default_factory=dict)
    stopped: bool = False


def image_suffixes() -> set[str]:
    """The suffixes, in lower case, of the files in a folder that are taken for images: of what this Pillow reads."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def find_images(
    given: Sequence[str | Path], annotations: Annotations | None = None, *, left_out: set[Path] | None = None
) -> list[ImageFile]:
    """The image files that paths, folders (with all below them) and patterns name, each once.

    Args:
        given: "photo.jpg", "folder", "folder/*.png", "folder/**/*.png".
        annotations: gives the ids and sizes, by file name; without it ids count from 1.
        left_out: gets the files in folders that are images by their suffix, of a kind that is not read.

    Raises:
        DataError: one of them is not there or holds no image, or an image is not in the annotations.
    """
    found: dict[Path, tuple[Path, str]] = {}  # by where it really lies: path and name
    suffixes = image_suffixes()
    left_out = set() if left_out is None else left_out
    for one in map(str, given):
        path = Path(one)
        if path.is_dir() and one:  # "", a shell's empty variable, is not the folder that one is in
            inside = [(p, p.relative_to(path)) for p in sorted(path.rglob("*")) if p.is_file()]
            # Hidden files and folders are not meant: a Mac leaves "._photo.jpg" beside "photo.jpg".
            inside = [(p, name) for p, name in inside if not any(part.startswith(".") for part in name.parts)]
            named = [(p, name.as_posix()) for p, name in inside if p.suffix.lower() in suffixes]
            others = {p.resolve() for p, _ in inside if p.suffix.lower() in {*UNREAD.split()} - suffixes}
            if not named:
                but = f", but {by_suffix(others)}: convert them to JPEG, PNG or TIFF" if others else ""
                raise DataError(f"{one}: the folder holds no image (.jpg, .png and others that Pillow reads){but}")
            left_out |= others
        else:
            named = [(p, p.name) for p in ([path] if path.is_file() else sorted(map(Path, glob(one, recursive=True))))]
            named = [(p, name) for p, name in named if p.is_file()]
            if not named:
                raise DataError(f"{one}: no such image, folder or pattern of files")
        for image, name in named:
            found.setdefault(image.resolve(), (image, name))
    if annotations is None:
        return [ImageFile(path, name, number) for number, (path, name) in enumerate(found.values(), start=1)]
    known = {name: index for index, name in enumerate(annotations.file_names())}
    files: dict[str, ImageFile] = {}
    for path, name in found.values():
        if name not in known:
            key = alike_file(name)
            alike = [other for other in known if alike_file(other) == key]
            raise DataError(
                f"{path}: the annotations have no image {name!r} (a file goes by its name, a file in a folder by its "
                f"path from there){f'; they have {alike[0]!r}' if alike else ''}; without annotations images are "
                "numbered"
            )
        if name in files:
            raise DataError(f"{path} and {files[name].path} are both {name!r} of the annotations; give one of them")
        width, height = annotations.sizes[known[name]].tolist()
        files[name] = ImageFile(path, name, int(annotations.image_ids[known[name]]), (width, height))
    return list(files.values())


def by_suffix(paths: Iterable[Path]) -> str:
    """How many files of each suffix there are, most first: "3 .heic, 1 .psd"."""
    counts = Counter(path.suffix.lower() for path in paths).most_common()
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts)


def predict_files(
    detector: Detector,
    files: Sequence[ImageFile],
    folder: Path,
    *,
    min_score: float | Sequence[float] = 0.5,
    pictures: bool = True,
    batch_size: int = 8,
    workers: int = 2,
    orientation: Orientation = "upright",
    max_pixels: int | None = None,
    category_ids: Sequence[int | None] | None = None,
    about: dict[str, Any] | None = None,
    on_image: Callable[[str | None], Any] = lambda broken: None,
) -> Predicted:
    """Detect, draw and write, image by image; a broken image is left out and named.

    Args:
        detector: what detects, on its device.
        files: see :func:`find_images`.
        folder: gets ``pictures/``, ``predictions.json`` (what is found in each image from ``min_score`` on, by name)
            and ``detections.json`` (all detections in COCO's results format), the latter two also when it is
            interrupted or fails. Of an earlier run there the pictures that its ``predictions.json`` names are removed,
            and nothing else.
        min_score: of detections in pictures and in ``predictions.json``; one, or that of each label, from 1 on.
        pictures: ``False``: the numbers alone.
        batch_size: at most so many images at a time, fewer of large ones. Only images of one size go together, of
            those that follow one another, so nothing is padded and the results do not depend on it.
        workers: processes that read images.
        orientation: whether EXIF orientations are applied, see :func:`~detector.data.images.read_image`.
        max_pixels: the most that an image may have; ``None``: Pillow's ``Image.MAX_IMAGE_PIXELS``.
        category_ids: of each label, ``None`` for one that is no result; the detector's own by default.
        about: more for the head of ``predictions.json``.
        on_image: called after each image, with a sentence if it is broken.

    Raises:
        DataError: a picture would be written over one of the images, or one of the images is an earlier run's picture.
        OSError: something cannot be written.
    """
    if category_ids is None:
        # Where no category belongs to a label, the label stands for itself.
        unknown = not any(category is not None for category in detector.category_ids)
        category_ids = [label if unknown else i for label, i in enumerate(detector.category_ids, start=1)]
    alike = isinstance(min_score, float | int)
    by_label: Sequence[float] = [min_score] * len(category_ids) if isinstance(min_score, float | int) else min_score
    least = torch.tensor([0.0, *by_label], dtype=torch.float64)
    picture_of = [f"{PICTURES}/{name}" for name in _picture_names(files)] if pictures else []
    earlier = _earlier_pictures(folder)
    originals = {file.path.resolve() for file in files}
    for picture in (*earlier, *picture_of):
        if (folder / picture).resolve() in originals:
            what = "a picture of the run before, which goes" if picture in earlier else "its picture would replace it"
            raise DataError(f"{folder / picture}: is one of the images, and {what}; write to another folder")
    categories = [
        {"id": i, "name": name} | ({} if alike else {"min_score": score})
        for i, name, score in zip(category_ids, detector.category_names, by_label, strict=True)
        if i is not None
    ]
    head = {**(about or {}), "min_score": min(by_label, default=0), "categories": categories}
    loader = make_loader(_Files(files, orientation, max_pixels), None, workers=workers)
    done = Predicted()
    (folder / PICTURES if pictures else folder).mkdir(parents=True, exist_ok=True)
    for name in (*earlier, NUMBERS, RESULTS):
        (folder / name).unlink(missing_ok=True)
    try:
        for batch in batches_of_one_size(loader, lambda read: read.pixels, batch_size, BATCH_PIXELS):
            if batch[0].broken is not None:  # and all others, since a broken image has a size of its own: none
                for read in batch:
                    file = files[read.index]
                    done.broken.append({"file_name": file.name, "path": str(file.path), "error": read.broken})
                    on_image(read.broken)
                continue
            found = detector.detect_batch([read.pixels for read in batch])
            for read, detections in zip(batch, found, strict=True):
                file = files[read.index]
                shown = kept(detections, detections["scores"].double() >= least[detections["labels"]])
                of_image = _as_dict(file, read, shown, detector, category_ids)
                if pictures:
                    of_image["picture"] = picture_of[read.index]
                    layout = detector.keypoints
                    drawn = draw(read.pixels, shown, detector.category_names, min_score=0, layout=layout)
                    _write_picture(folder / picture_of[read.index], drawn)
                done.results += to_results([detections], [file.id], category_ids)
                done.images.append(of_image)
                for remark in read.remarks:
                    done.remarks.setdefault(remark, []).append(file.path)
                on_image(None)
    except KeyboardInterrupt:
        done.stopped = True
    finally:
        write_json(folder / NUMBERS, head | {"images": done.images, "broken": done.broken}, indent=1)
        write_json(folder / RESULTS, done.results)
    return done


def _earlier_pictures(folder: Path) -> list[str]:
    """The pictures, relative to the folder, that its predictions.json names and that are there.

    Anybody may have written that file: what lies elsewhere than in ``pictures/``, or behind a link, is none.
    """
    home = folder.resolve() / PICTURES
    try:
        found = read_json(folder / NUMBERS)
        named = {image["picture"] for image in found["images"] if "picture" in image}
        return [
            name
            for name in sorted(name for name in named if name.endswith(".jpg"))
            if (path := folder / name).is_file() and not path.is_symlink() and path.resolve().is_relative_to(home)
        ]
    except (DataError, LookupError, TypeError, AttributeError, ValueError, OSError):  # none, another program's, damaged
        return []


def _write_picture(path: Path, picture: Image.Image) -> None:
    picture.thumbnail((JPEG_SIDE, JPEG_SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90)
    try:
        path.write_bytes(content.getbuffer())  # not write_atomically: thousands of pictures need not wait for the disk
    except OSError as error:
        path.unlink(missing_ok=True)  # a half of it
        raise OSError(error.errno, f"the picture cannot be written: {error.strerror}", str(path)) from None


@dataclass(frozen=True)
class _Read:
    """An image file that was read: its number, its pixels, of no size if it is broken, and what is to be said of it."""

    index: int
    pixels: Tensor
    remarks: Sequence[str] = ()
    broken: str | None = None


class _Files(Dataset[_Read]):
    def __init__(self, files: Sequence[ImageFile], orientation: Orientation, max_pixels: int | None) -> None:
        self.files, self.orientation, self.max_pixels = files, orientation, max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> _Read:
        file = self.files[index]
        try:
            pixels, remarks = read_image_with_remarks(
                file.path, size=file.size, orientation=self.orientation, max_pixels=self.max_pixels
            )
        except DataError as error:
            return _Read(index, torch.zeros(3, 0, 0, dtype=torch.uint8), broken=str(error))
        return _Read(index, pixels, remarks)


def _picture_names(files: Sequence[ImageFile]) -> list[str]:
    """A name for each picture, none twice, whatever the file system thinks of upper and lower case."""
    used = {str(parent).lower() for file in files for parent in Path(file.name).parents}  # those are folders
    names = []
    for file in files:
        base = str(Path(file.name).with_suffix(""))
        name, number = f"{base}.jpg", 2
        while name.lower() in used:
            name, number = f"{base}-{number}.jpg", number + 1
        used.add(name.lower())
        names.append(name)
    return names


def _as_dict(
    file: ImageFile, read: _Read, found: Found, detector: Detector, ids: Sequence[int | None]
) -> dict[str, Any]:
    height, width = read.pixels.shape[1:]
    rows = enumerate(zip(*(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True))
    return {
        "id": file.id,
        "file_name": file.name,
        "path": str(file.path),
        "width": width,
        "height": height,
        "remarks": list(read.remarks),
        "detections": [  # boxes: x1, y1, x2, y2 in pixels
            {"name": detector.category_names[label - 1], "category_id": ids[label - 1], "score": score, "box": box}
            | parts_as_values(number, found, detector.keypoints)
            for number, (box, label, score) in rows
        ],
    }
