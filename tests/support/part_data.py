"""Small data sets with masks and keypoints, made of the digits."""

import json
from pathlib import Path

from detector.data.digits import write_digits

# Of a digit's box; the first two are each other's mirror image, and so are the next two.
POINTS = ["top_left", "top_right", "bottom_left", "bottom_right", "middle"]
SKELETON = [[1, 5], [2, 5], [3, 5], [4, 5]]


def write_digits_with_parts(root: Path, **options) -> Path:
    """Digits, whose masks are there already, with keypoints: the corners of their boxes, and the middle."""
    write_digits(root, **options)
    for path in (root / "annotations").iterdir():
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category |= {"keypoints": POINTS, "skeleton": SKELETON}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            left, top, right, bottom = x + 2, y + 2, x + width - 3, y + height - 3
            points = [left, top, 2, right, top, 2, left, bottom, 1, right, bottom, 2, x + width / 2, y + height / 2, 2]
            annotation |= {"keypoints": points, "num_keypoints": 5}
        path.write_text(json.dumps(content))
    return root
