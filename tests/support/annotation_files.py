"""Annotation files, right ones to be broken."""

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image

from detector.data.checks import Finding, check_annotations
from detector.data.dataset import CocoDetection
from detector.data.entries import CocoFile

VALID = {
    "images": [
        {"id": 4, "file_name": "a.png", "width": 30, "height": 20},
        {"id": 9, "file_name": "b.png", "width": 30, "height": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 4, "category_id": 7, "bbox": [1, 2, 10.5, 5], "area": 50, "iscrowd": 0},
        {"id": 2, "image_id": 4, "category_id": 3, "bbox": [5, 5, 20, 10]},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [-0.9, -0.9, 31.8, 21.8], "area": 600, "iscrowd": 1},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
}


def nodes(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nodes(value[key], (*path, key))


def write(root: Path, data=VALID) -> Path:
    """The valid file with its images on disk."""
    (root / "images").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(root / "images" / name)
    (root / "a.json").write_text(json.dumps(data))
    return root / "a.json"


def dataset(root: Path, **lists) -> dict:
    """A small valid set on disk: the lists of a file, of which some are given."""
    boxes = {1: (7, [1, 2, 10, 5], 50), 2: (3, [5, 5, 40, 10], 400), 3: (3, [0, 0, 30, 20], 600)}
    boxes |= {5: (3, [3, 3, 0, 4], 0), 6: (3, [31, 3, 5, 4], 20)}
    annotations = [
        {"id": i, "image_id": 4, "category_id": category, "bbox": box, "area": area, "iscrowd": int(i == 3)}
        for i, (category, box, area) in boxes.items()
    ]
    lists = {name: entries for name, entries in lists.items() if entries is not None}
    write(root, content := VALID | {"images": VALID["images"][::-1], "annotations": annotations} | lists)
    return content


def load(root: Path, **options) -> CocoDetection:
    return CocoDetection(root / "images", root / "a.json", **options)


def findings_in(root: Path, data) -> list[Finding]:
    """Write ``a.json`` with this content, and return its findings."""
    (root / "a.json").write_text(json.dumps(data))
    return list(check_annotations(CocoFile(root / "a.json")))


GONE = object()


def changed(*path, value):
    """The valid file with one node replaced, deleted (GONE), or given to a function."""
    data = copy.deepcopy(VALID)
    node = data
    for key in path[:-1]:
        node = node[key]
    if value is GONE:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return data


def added(name, /, **fields):
    """The valid file with one entry more: the first of the list with other fields."""
    data = copy.deepcopy(VALID)
    data[name].append({**data[name][0], **fields})
    return data


def boxed(*box):
    return changed("annotations", 1, "bbox", value=list(box))


def scattered(box, *, count=60, size=(640, 480)):
    """A file with boxes in random places, each the result of ``box`` for x, y, w, h, W, H."""
    rng = np.random.default_rng(0)
    annotations = []
    for i in range(count):
        w, h = rng.uniform(20, 150, 2)
        x, y = rng.uniform(0, size[0] - w), rng.uniform(0, size[1] - h)
        annotations.append(
            {"id": i + 1, "image_id": i % 2, "category_id": 7, "bbox": [float(v) for v in box(x, y, w, h, *size)]}
        )
    images = [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(2)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "cat"}]}


def coco_box(x, y, w, h, width, height):
    return x, y, w, h


def write_splits(root: Path) -> tuple[Path, Path, Path, Path]:
    """A val split of a.png and b.png, and a train split of which one file has the pixels of b.png."""
    val = write(root)
    (root / "train").mkdir()
    (root / "train" / "a.png").write_bytes((root / "images" / "b.png").read_bytes())
    (root / "train" / "c.png").write_bytes(b"another")
    train = root / "train.json"
    images = [{**VALID["images"][0], "id": i, "file_name": f"{name}.png"} for i, name in enumerate("cagone")]
    train.write_text(json.dumps({**VALID, "images": [*images, 3, {"id": 9}]}))
    return val, root / "images", train, root / "train"
