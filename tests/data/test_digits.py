"""The embedded data set: reproducible, disjoint, in COCO's layout, its boxes tight."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")

from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.errors import DataError

SMALL = {"train": 6, "val": 4}


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_bytes_from_the_same_seed(tmp_path):
    write_digits(tmp_path / "a", splits=SMALL)
    write_digits(tmp_path / "b", splits=SMALL)
    write_digits(tmp_path / "c", splits=SMALL, seed=1)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_splits_share_no_digit(tmp_path, monkeypatch):
    from detector.data import digits

    used = {}
    write_split = digits._write_split

    def record(folder, number, images, classes, *others):
        used[folder.name] = {image.tobytes() for image in images}
        assert len(images) > 100
        assert set(classes) == set(range(10))
        return write_split(folder, number, images, classes, *others)

    monkeypatch.setattr(digits, "_write_split", record)
    write_digits(tmp_path / "a", splits=SMALL)
    assert not used["train"] & used["val"]


def test_how_many_and_how_large(tmp_path):
    write_digits(tmp_path / "a", splits={"train": 40, "val": 4}, count=(1, 1), height=(100, 150))
    content = json.loads((tmp_path / "a" / "annotations" / "instances_train.json").read_text())
    heights = [annotation["bbox"][3] for annotation in content["annotations"]]
    assert 30 < len(heights) < 40
    assert len({annotation["image_id"] for annotation in content["annotations"]}) == len(heights)
    assert min(heights) >= 99
    assert max(heights) <= 151


def test_layout_and_boxes(tmp_path):
    write_digits(tmp_path / "a", splits={"train": 40, "val": 4})
    data = CocoDetection(tmp_path / "a" / "train", tmp_path / "a" / "annotations" / "instances_train.json")
    assert len(data) == 40
    assert data.category_names == [str(digit) for digit in range(10)]
    sizes, _ = data.shapes()
    assert sizes[:, 1].min() >= 19
    assert sizes[:, 1].max() > 70
    assert len({*data.counts().tolist()}) > 4
    assert (data.counts() == 0).any()


def test_box_is_tight_on_the_ink(monkeypatch):
    from PIL import Image
    from sklearn.datasets import load_digits

    from detector.data.digits import _bend, _paste

    rng = np.random.default_rng(0)
    for digit in load_digits().images[:20]:
        canvas = Image.new("RGB", (240, 192), (128, 128, 128))
        x1, y1, x2, y2 = _paste(canvas, _bend(digit, rng, (20, 96)), [], rng)
        changed = np.abs(np.asarray(canvas).astype(int) - 128).max(axis=2) > 40
        rows, columns = np.nonzero(changed)
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(found - [x1, y1, x2, y2]).max() <= 3


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):

    write_digits(tmp_path / "a", splits=SMALL)
    before = files(tmp_path / "a")
    with pytest.raises(DataError, match="is there already"):
        write_digits(tmp_path / "a", splits=SMALL)
    assert files(tmp_path / "a") == before

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "b", splits=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_masks_are_the_ink_that_is_seen(tmp_path):
    root = tmp_path / "a"
    write_digits(root, splits={"train": 30, "val": 2})
    path = root / "annotations" / "instances_train.json"
    data = CocoDetection(root / "train", path, annotation_types=["masks"])
    stored = data.annotations
    tight = total = 0
    for index in range(len(data)):
        image, target = data[index]
        masks, areas = target["masks"].bool(), stored.areas[stored.of(index)].tolist()
        assert (masks.sum(0) <= 1).all()  # what a digit on top covers is not seen
        assert masks.flatten(1).sum(1).tolist() == areas
        for mask, (x1, y1, x2, y2) in zip(masks, target["boxes"].int().tolist()):
            total += 1
            ink = image[:, mask]
            outside = mask.clone()
            outside[y1:y2, x1:x2] = False
            assert not outside.any()
            rows, columns = mask.nonzero().unbind(1)
            found = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
            tight += found == (x1, y1, x2, y2)
            # One colour with soft edges, unlike the blotches and noise around it.
            around = image[:, y1:y2, x1:x2][:, ~masks[:, y1:y2, x1:x2].any(0)]
            middle = ink.median(dim=1).values[:, None]
            near = ((ink - middle).abs() < 0.15).all(0).float().mean()
            assert near > 0.6
            assert not around.numel() or near > ((around - middle).abs() < 0.15).all(0).float().mean()
    assert total > 60
    assert tight > 0.6 * total
