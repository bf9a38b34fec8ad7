"""A split of five images of coloured rectangles, of three classes."""

import json

import numpy as np
from PIL import Image

IDS, NAMES = [3, 5, 8], ["<b>3</b>", "<b>5</b>", "<b>8</b>"]


def truth_file(root):
    return root / "annotations" / "instances_val.json"


def write_shapes(root):
    (root / "val").mkdir(parents=True)
    (root / "annotations").mkdir()
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, 6):
        pixels = np.full((60, 80, 3), 40 * i, dtype=np.uint8)
        for category in IDS[: 1 + i % 3]:
            x, y = (int(v) for v in generator.integers(0, 40, 2))
            pixels[y : y + 20, x : x + 30] = 25 * category
            box = {"bbox": [x, y, 30, 20], "area": 600, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": category, **box})
        Image.fromarray(pixels).save(root / "val" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 60})
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    truth_file(root).write_text(json.dumps(content))
    return root
