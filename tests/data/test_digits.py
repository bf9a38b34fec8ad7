"""The synthetic data set: reproducible, disjoint splits, exact masks."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")

from detector.data import digits
from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.errors import DataError

SMALL = {"train": 6, "val": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "a"
    write_digits(root, splits={"train": 30, "val": 2})
    return root


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_seed_determines_every_byte_and_splits_share_no_digit(tmp_path, monkeypatch):
    used = []
    draw_canvas = digits._draw_canvas

    def record(shapes, *others):
        used.append({shape.tobytes() for shape in shapes})
        return draw_canvas(shapes, *others)

    monkeypatch.setattr(digits, "_draw_canvas", record)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_digits(tmp_path / name, splits=SMALL, seed=seed)
        assert len(used) == sum(SMALL.values())
        assert not used.pop() & used[0]  # of val and of train
        used.clear()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_count_and_height(tmp_path):
    write_digits(tmp_path / "a", splits={"train": 40, "val": 4}, count=(1, 1), height=(100, 150))
    content = json.loads((tmp_path / "a" / "annotations" / "instances_train.json").read_text())
    heights = [annotation["bbox"][3] for annotation in content["annotations"]]
    assert 30 < len(heights) < 40
    assert len({annotation["image_id"] for annotation in content["annotations"]}) == len(heights)
    assert min(heights) >= 99
    assert max(heights) <= 151


def test_nothing_is_overwritten_and_nothing_incomplete_is_left(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path / 'a'}"):
        write_digits(tmp_path / "a", splits=SMALL)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "b", splits=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_masks_are_the_visible_ink(root):
    path = root / "annotations" / "instances_train.json"
    data = CocoDetection(root / "train", path, annotation_types=["masks"])
    assert data.category_names == [str(digit) for digit in range(10)]
    assert len({*data.counts().tolist()}) > 4
    assert (data.counts() == 0).any()
    stored = data.annotations
    tight = total = 0
    for index in range(len(data)):
        image, target = data[index]
        masks, areas = target["masks"].bool(), stored.areas[stored.of(index)].tolist()
        assert (masks.sum(0) <= 1).all()  # no mask contains what a higher digit covers
        assert masks.flatten(1).sum(1).tolist() == areas
        for mask, (x1, y1, x2, y2) in zip(masks, target["boxes"].int().tolist()):
            total += 1
            outside = mask.clone()
            outside[y1:y2, x1:x2] = False
            assert not outside.any()
            rows, columns = mask.nonzero().unbind(1)
            found = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
            tight += found == (x1, y1, x2, y2)
            # The ink has one colour with soft edges, unlike the background.
            ink, around = image[:, mask], image[:, y1:y2, x1:x2][:, ~masks[:, y1:y2, x1:x2].any(0)]
            middle = ink.median(dim=1).values[:, None]
            near = ((ink - middle).abs() < 0.15).all(0).float().mean()
            assert near > 0.6
            assert not around.numel() or near > ((around - middle).abs() < 0.15).all(0).float().mean()
    assert total > 60
    assert tight > 0.6 * total
    heights = np.array([box[3] for box in stored.boxes])
    assert heights.min() >= 19
    assert heights.max() > 70
