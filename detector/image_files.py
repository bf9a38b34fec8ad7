"""Detections in any number of image files: pictures, and the numbers as JSON."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detector.coco import leave_ctrl_c_alone, read_image
from detector.drawing import draw
from detector.errors import DataError
from detector.evaluation.metric import Result, to_results
from detector.files import write_json
from detector.pretrained import PretrainedDetector

BATCH_PIXELS = 2**25  # of a batch of more than one image: 400 MB as floats
JPEG_SIDE = 65500  # pixels, the format's limit
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")  # in folders


@dataclass(frozen=True)
class ImageFile:
    """An image to look at.

    Args:
        path: of the file.
        name: what it is called in the results: as it was given, within a folder relative to it.
        id: the id that its detections get.
        size: (width, height) that it must have, in pixels, if annotations say so; ``None``: turned upright by its EXIF
            orientation.
    """

    path: Path
    name: str
    id: int
    size: tuple[int, int] | None = None


@dataclass
class Predicted:
    """What became of the images.

    Args:
        images: a dict for each that was looked at, with its detections.
        results: all detections in COCO's results format.
        broken: name and reason of each that could not be read.
        stopped: by Ctrl-C, before the end.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    broken: list[dict[str, str]] = field(default_factory=list)
    stopped: bool = False


def find_images(given: Sequence[str | Path], annotations: COCO | None = None) -> list[ImageFile]:
    """The image files that paths, folders (with all below them) and patterns name, each once.

    Args:
        given: "photo.jpg", "folder", "folder/*.png", "folder/**/*.png".
        annotations: gives the ids and sizes, by file name; without it ids count from 1.

    Raises:
        DataError: one of them is not there or holds no image, or an image is not in the annotations.
    """
    found: dict[Path, tuple[Path, str]] = {}  # by where it really lies: path and name
    for one in map(str, given):
        path = Path(one)
        if path.is_dir() and one:  # "", a shell's empty variable, is not the folder that one is in
            images = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            named = [(p, p.relative_to(path).as_posix()) for p in images]
            # Hidden files and folders are not meant: a Mac leaves "._photo.jpg" beside "photo.jpg".
            named = [(p, name) for p, name in named if not any(part.startswith(".") for part in name.split("/"))]
            if not named:
                raise DataError(f"{one}: the folder holds no image ({', '.join(SUFFIXES)})")
        elif path.is_file():
            named = [(path, path.name)]
        else:
            named = [(p, p.name) for p in sorted(map(Path, glob(one, recursive=True))) if p.is_file()]
            if not named:
                raise DataError(f"{one}: no such image, folder or pattern of files")
        for image, name in named:
            found.setdefault(image.resolve(), (image, name))
    if annotations is None:
        return [ImageFile(path, name, number) for number, (path, name) in enumerate(found.values(), start=1)]
    known = {image["file_name"]: image for image in annotations.imgs.values()}
    files: dict[str, ImageFile] = {}
    for path, name in found.values():
        if name not in known:
            raise DataError(
                f"{path}: the annotations have no image {name!r} (a file goes by its name, a file in a folder by its "
                "path from there); without annotations images are numbered"
            )
        if name in files:
            raise DataError(f"{path} and {files[name].path} are both {name!r} of the annotations; give one of them")
        files[name] = ImageFile(path, name, known[name]["id"], (known[name]["width"], known[name]["height"]))
    return list(files.values())


def predict_images(
    detector: PretrainedDetector,
    files: Sequence[ImageFile],
    folder: Path,
    *,
    min_score: float = 0.5,
    pictures: bool = True,
    batch_size: int = 8,
    workers: int = 2,
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
            interrupted or fails.
        min_score: of detections in pictures and in ``predictions.json``.
        pictures: ``False``: the numbers alone.
        batch_size: at most so many images at a time, fewer of large ones. Only images of one size go together, of
            those that follow one another, so nothing is padded and the results do not depend on it.
        workers: processes that read images.
        category_ids: of each label, ``None`` for one that is no result; the detector's own by default.
        about: more for the head of ``predictions.json``.
        on_image: called after each image, with a sentence if it is broken.

    Raises:
        DataError: a picture would be written over one of the images.
        OSError: something cannot be written.
    """
    done = Predicted()
    if category_ids is None:
        # Where no category belongs to a label, the label stands for itself.
        unknown = not any(category is not None for category in detector.category_ids)
        category_ids = [label if unknown else i for label, i in enumerate(detector.category_ids, start=1)]
    picture_of = [folder / "pictures" / name for name in _picture_names(files)] if pictures else []
    originals = {file.path.resolve() for file in files}
    for picture in picture_of:
        if picture.resolve() in originals:
            raise DataError(f"{picture}: is one of the images, and its picture would be written over it")
    loader: DataLoader[Any] = DataLoader(
        _Files(files), batch_size=None, num_workers=workers, worker_init_fn=leave_ctrl_c_alone
    )

    def put_aside(index: int, reason: str) -> None:
        file = files[index]
        done.broken.append({"file_name": file.name, "path": str(file.path), "error": reason})
        on_image(reason)

    (folder / "pictures" if pictures else folder).mkdir(parents=True, exist_ok=True)
    try:
        for batch in _of_one_size(loader, batch_size):
            if isinstance(batch, _Broken):
                put_aside(batch.index, batch.reason)
                continue
            try:
                found = detector.look_at([pixels for _, pixels in batch])
            except DataError as error:
                for index, _ in batch:
                    put_aside(index, f"{files[index].path}: {error}")
                continue
            for (index, pixels), detections in zip(batch, found, strict=True):
                file = files[index]
                if pictures:
                    _write_picture(
                        picture_of[index], draw(pixels, detections, detector.category_names, min_score=min_score)
                    )
                done.results += to_results([detections], [file.id], category_ids)
                done.images.append(_as_dict(file, pixels, detections, detector, category_ids, min_score))
                on_image(None)
    except KeyboardInterrupt:
        done.stopped = True
    finally:
        categories = [
            {"id": i, "name": name} for i, name in zip(category_ids, detector.category_names) if i is not None
        ]
        head = {**(about or {}), "min_score": min_score, "categories": categories}
        try:
            _write_numbers(folder, head, done)
        except KeyboardInterrupt:  # so late, or once more
            done.stopped = True
            _write_numbers(folder, head, done)
    return done


def _write_numbers(folder: Path, head: dict[str, Any], done: Predicted) -> None:
    write_json(folder / "predictions.json", head | {"images": done.images, "broken": done.broken}, indent=1)
    write_json(folder / "detections.json", done.results)


def _write_picture(path: Path, picture: Image.Image) -> None:
    picture.thumbnail((JPEG_SIDE, JPEG_SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90)
    try:
        path.write_bytes(content.getbuffer())  # not write_whole: thousands of pictures need not wait for the disk
    except OSError as error:
        path.unlink(missing_ok=True)  # a half of it
        raise OSError(error.errno, f"the picture cannot be written: {error.strerror}", str(path)) from None


@dataclass(frozen=True)
class _Broken:
    index: int
    reason: str


Item = tuple[int, Tensor]  # the file's number, and its pixels, [3, H, W] uint8


class _Files(Dataset[Item | _Broken]):
    def __init__(self, files: Sequence[ImageFile]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item | _Broken:
        file = self.files[index]
        width, height = file.size or (None, None)
        try:
            return index, read_image(file.path, width=width, height=height)
        except DataError as error:
            return _Broken(index, str(error))


def _of_one_size(items: Iterable[Item | _Broken], most: int) -> Iterator[list[Item] | _Broken]:
    """Neighbours of one size together, in order; what is broken on its own."""
    batch: list[Item] = []
    for item in items:
        if batch and (
            isinstance(item, _Broken)
            or len(batch) == most
            or batch[0][1].shape != item[1].shape
            or (len(batch) + 1) * item[1][0].numel() > BATCH_PIXELS
        ):
            yield batch
            batch = []
        if isinstance(item, _Broken):
            yield item
        else:
            batch.append(item)
    if batch:
        yield batch


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
    file: ImageFile,
    pixels: Tensor,
    detections: dict[str, Tensor],
    detector: PretrainedDetector,
    category_ids: Sequence[int | None],
    min_score: float,
) -> dict[str, Any]:
    height, width = pixels.shape[1:]
    rows = zip(*(detections[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
    return {
        "id": file.id,
        "file_name": file.name,
        "path": str(file.path),
        "width": width,
        "height": height,
        "detections": [
            {
                "name": detector.category_names[label - 1],
                "category_id": category_ids[label - 1],
                "score": score,
                "box": box,  # x1, y1, x2, y2 in pixels
            }
            for box, label, score in rows
            if score >= min_score
        ],
    }
