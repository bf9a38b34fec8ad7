"""Results files: what is read, and what is refused."""

import json

import pytest
from pycocotools import mask as coco_mask
from support.scored import annotations_of, result, truth

from detector.data.masks import as_rle
from detector.data.results import read_results, results_file
from detector.errors import DataError
from detector.evaluation import evaluate

GOOD = result(1, [0, 0.5, 20, 0])
MASK = as_rle([[0, 0, 30, 0, 30, 20, 0, 20]], 100, 100)
POINTS = [5.0, 6.0, 1.0, 15.0, 9.0, 1.0]


@pytest.fixture
def read_content(tmp_path):
    def read_one(content):
        path = tmp_path / "found.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_results(results_file(path), annotations_of(truth([(1, 5, [0, 0, 20, 20])]).dataset))

    return read_one


def test_fields_that_are_kept(read_content):
    assert read_content([{**GOOD, "segmentation": [], "id": 9}]) == ([GOOD], [])
    assert read_content([]) == ([], [])
    lowest = result(1, [0, 0, 20, 20], -(2**63))
    found, _ = read_content([lowest, *[result(1, [50, 50, 20, 20], -n) for n in range(5)]])
    assert all(type(one["score"]) is float for one in found)
    assert evaluate(truth([(1, 5, [0, 0, 20, 20])]), found)[0]["AP50"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("fields", "box"),
    [
        ({"segmentation": MASK}, coco_mask.toBbox(MASK).tolist()),
        ({"keypoints": POINTS}, [5, 6, 10, 3]),
        ({"segmentation": MASK, "keypoints": POINTS, "bbox": [1, 1, 28, 18]}, [1, 1, 28, 18]),
    ],
)
def test_masks_and_keypoints(read_content, fields, box):
    """Without a box, it is the one around the mask, or the keypoints, which a note says."""
    entry = {name: GOOD[name] for name in ("image_id", "category_id", "score")} | fields
    found, notes = read_content([entry, entry])
    assert found == [entry | {"bbox": box}] * 2
    assert len(notes) == ("bbox" not in fields)


WRONG = {
    "image_id": [7, "1", True, ...],  # ...: the field is missing
    "category_id": [6],
    "score": [float("nan"), "0.5", None, ...],
    # An IoU of the last two boxes with anything would be no number, and match.
    "bbox": [[1, 2, 3], [1, 2, -3, 4], [1, 2, float("inf"), 4], ..., [0, 0, 1e200, 1e200], [0, 0, 1e-200, 1e-200]],
    "segmentation": [..., MASK | {"size": [4, 4]}, MASK | {"counts": "zz"}],
    "keypoints": [POINTS[:5], [*POINTS, 1, 1, 1], [], [float("nan"), *POINTS[1:]]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_wrong_fields_are_named(read_content, field, value):
    good = result(1, [0, 0, 20, 20]) | {"segmentation": MASK, "keypoints": POINTS}
    bad = {name: value for name, value in (good | {field: value}).items() if value is not ...}
    with pytest.raises(DataError, match=rf"\[2\].*{field}"):
        read_content([good, good, bad, good])


@pytest.mark.parametrize(
    "content", [{"images": [], "annotations": [], "categories": []}, "3", [[1]], '[{"image_id": 1', None]
)
def test_other_files(read_content, tmp_path, content):
    with pytest.raises(DataError):
        read_content(content) if content is not None else results_file(tmp_path / "nothing.json")
