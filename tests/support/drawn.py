"""Pictures: colours, masks, and a split to draw."""

import json

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from detector.data.dataset import CocoDetection
from detector.data.drawing import LEFT, MIDDLE
from detector.data.keypoints import KeypointLayout

GREY = "#808080"
TRIO = KeypointLayout(("nose", "left_eye", "right_eye"), ((0, 1), (1, 2)))
POINTS = [300, 150, 2, 500, 150, 1, 0, 0, 0]


def rgb(color):
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def over(color, ground=GREY):
    """The colour of a mask over a background."""
    return torch.tensor(rgb(ground)) * 0.55 + torch.tensor(rgb(color)) * 0.45


def pixels_of(picture):
    return torch.from_numpy(np.array(picture))


def changed(picture, ground=GREY):
    """Return which pixels differ from the background, [H, W]."""
    return (pixels_of(picture) != torch.tensor(rgb(ground))).any(dim=2)


def rectangle(height, width, x1, y1, x2, y2):
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def as_rle(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.numpy()))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def write_split(root, *annotation_types, **options):
    """A split of one grey image, 1000 x 500, with a cat, which has a mask and keypoints, a dog and a crowd."""
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 1000, "height": 500}],
        "categories": [
            {"id": 3, "name": "cat", "keypoints": TRIO.names, "skeleton": [[1, 2], [2, 3]]},
            {"id": 8, "name": "dog"},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [200, 100, 400, 300], "keypoints": POINTS}
            | {"segmentation": [[200, 200, 600, 200, 600, 400, 200, 400]]},
            {"id": 2, "image_id": 1, "category_id": 8, "bbox": [20, 20, 30, 30]},
            {"id": 3, "image_id": 1, "category_id": 3, "bbox": [800, 0, 200, 500], "iscrowd": 1}
            | {"segmentation": {"size": [500, 1000], "counts": [400000, 100000]}},
        ],
    }
    (root / "a.json").write_text(json.dumps(content))
    Image.new("RGB", (1000, 500), GREY).save(root / "1.png")
    return CocoDetection(root, root / "a.json", annotation_types=annotation_types, **options)


def assert_cat(picture, scale, corner, color, *, mask=True, points=True):
    """The cat's mask and keypoints are drawn, or not, in the part of a picture that starts at a corner."""
    pixels, (left, top) = pixels_of(picture), corner

    def at(x, y):
        return pixels[top + round(y * scale), left + round(x * scale)]

    assert (at(250, 120) == 128).all()
    assert (at(250, 300) - (over(color) if mask else 128)).abs().max() <= 1
    assert (at(700, 300) == 128).all()
    for (x, y), ink in (((300, 150), MIDDLE), ((500, 150), LEFT), ((400, 150), color)):
        assert at(x, y).tolist() == (rgb(ink) if points else [128] * 3)
