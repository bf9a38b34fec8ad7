"""Small data sets in COCO's layout, written to a folder."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from detector.data.dataset import CocoDetection


def dataset(root: Path, *, images=None, annotations=None, categories=None) -> dict:
    """A small valid set on disk: two images, categories 3 and 7."""
    (root / "images").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(root / "images" / name)
    content = {
        "images": images
        or [
            {"id": 9, "file_name": "b.png", "width": 30, "height": 20},
            {"id": 4, "file_name": "a.png", "width": 30, "height": 20},
        ],
        "annotations": annotations
        if annotations is not None
        else [
            {"id": 1, "image_id": 4, "category_id": 7, "bbox": [1, 2, 10, 5], "area": 50, "iscrowd": 0},
            {"id": 2, "image_id": 4, "category_id": 3, "bbox": [5, 5, 40, 10], "area": 400, "iscrowd": 0},
            {"id": 3, "image_id": 4, "category_id": 3, "bbox": [0, 0, 30, 20], "area": 600, "iscrowd": 1},
            {"id": 5, "image_id": 4, "category_id": 3, "bbox": [3, 3, 0, 4], "area": 0, "iscrowd": 0},
            {"id": 6, "image_id": 4, "category_id": 3, "bbox": [31, 3, 5, 4], "area": 20, "iscrowd": 0},
        ],
        "categories": categories or [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    (root / "annotations.json").write_text(json.dumps(content))
    return content


def load(root: Path, **options) -> CocoDetection:
    return CocoDetection(root / "images", root / "annotations.json", **options)
