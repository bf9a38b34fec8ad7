"""What is wrong with masks and keypoints: an error where they are read, a warning where boxes alone are."""

import copy
import math

import pytest
from support.annotation_files import VALID, write

from detector.data.annotations import read_annotations
from detector.data.check_dataset import check_dataset
from detector.data.entries import CocoFile
from detector.data.mask_keypoint_checks import check_annotation_type
from detector.errors import DataError, MissingAnnotationsError

SQUARE = [[2, 3, 12, 3, 12, 13, 2, 13]]
POINTS = {"masks": SQUARE, "keypoints": [1, 2, 2, 3, 4, 1]}
FIELD = {"masks": "segmentation", "keypoints": "keypoints"}


def with_parts(**change):
    """The valid file with a mask and two keypoints of each object, but for the second's fields."""
    data = copy.deepcopy(VALID)
    for category in data["categories"]:
        category["keypoints"] = ["left", "right"]
    for annotation in data["annotations"]:
        annotation |= {"segmentation": SQUARE, "keypoints": POINTS["keypoints"], "area": 100}
    data["annotations"][1] |= change
    data["annotations"][1] = {name: value for name, value in data["annotations"][1].items() if value != "gone"}
    return data


BROKEN = [
    ("masks", [[1, 2, 3, 4]], "broken segmentations", "[[1, 2, 3, 4]], neither polygons"),
    ("masks", {"size": [30, 20], "counts": [600]}, "broken segmentations", "an RLE of size [30, 20]"),
    ("masks", "polygon", "broken segmentations", "got `str`"),
    ("masks", [[1, 2, 3, math.nan, 5, 6]], "broken segmentations", "at `$[0][3]`"),
    ("keypoints", [1, 2, 2], "broken keypoints", "3 numbers: 2 keypoints are 6"),
    ("keypoints", [1, 2, 2, 3, 4, 7], "broken keypoints", "a visibility"),
    ("keypoints", [[]], "broken keypoints", "at `$[0]`"),
    ("keypoints", "points", "broken keypoints", "got `str`"),
]


@pytest.mark.parametrize(("part", "value", "kind", "words"), BROKEN)
def test_what_is_broken_is_refused_where_it_is_read(tmp_path, part, value, kind, words):
    data = with_parts(**{FIELD[part]: value})
    (problem,) = check_annotation_type(CocoFile(write(tmp_path, data)), part)
    assert (problem.level, problem.kind) == ("error", kind)
    assert problem.message.startswith(f"{tmp_path}/a.json: annotations[1] (id 2) has {FIELD[part]} ")
    assert words in problem.message
    assert "\n" not in problem.message
    path = write(tmp_path, data)
    with pytest.raises(DataError) as error:
        read_annotations(path, annotation_types=[part])
    assert words in str(error.value)
    (other,) = {*FIELD} - {part}
    read_annotations(path)  # not looked at
    read_annotations(path, annotation_types=[other])


@pytest.mark.parametrize(("part", "value", "kind", "words"), BROKEN)
def test_check_names_it_as_a_flaw(tmp_path, part, value, kind, words):
    path = write(tmp_path, with_parts(**{FIELD[part]: value}))
    (problem,) = check_dataset(path, tmp_path / "images").findings
    assert (problem.level, problem.kind) == ("warning", kind)
    assert words in problem.message
    assert problem.message.endswith("cannot)")
    assert str(path) in problem.message


def test_a_right_file_has_neither(tmp_path):
    assert check_dataset(write(tmp_path, with_parts()), tmp_path / "images").findings == []
    # Nobody has any: nothing is missing.
    assert check_dataset(write(tmp_path, VALID), tmp_path / "images").findings == []


def test_check_says_nothing_of_them_where_boxes_are_wrong(tmp_path):
    path = write(tmp_path, with_parts(segmentation=[[1]], bbox=None))
    (problem,) = check_dataset(path, tmp_path / "images").findings
    assert problem.kind == "annotations with a wrong bbox"


@pytest.mark.parametrize("nothing", ["gone", None, []])
def test_objects_without_are_counted(tmp_path, nothing):
    data = with_parts(segmentation=nothing, keypoints=nothing)
    data["annotations"][2] |= {"segmentation": [], "keypoints": []}  # a crowd needs none
    warnings = {"masks": "objects without a segmentation", "keypoints": "objects without keypoints"}
    for part, warning in warnings.items():
        (problem,) = check_annotation_type(CocoFile(write(tmp_path, data)), part)
        assert (problem.level, problem.kind) == ("warning", warning)
        assert "annotations[1] (id 2)" in problem.message
        assert read_annotations(write(tmp_path, data), annotation_types=[part]).warnings == {warning: 1}
    assert [p.kind for p in check_dataset(write(tmp_path, data), tmp_path / "images").findings] == [*warnings.values()]


def test_polygons_without_a_point_are_none(tmp_path):
    data = with_parts(segmentation=[[], []])
    assert read_annotations(write(tmp_path, data), annotation_types=["masks"]).warnings == {
        "objects without a segmentation": 1
    }
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[]]
    with pytest.raises(MissingAnnotationsError):
        read_annotations(write(tmp_path, data), annotation_types=["masks"])


@pytest.mark.parametrize("part", ["masks", "keypoints"])
def test_a_crowd_alone_is_nothing_to_learn_from(tmp_path, part):
    data = with_parts()
    for annotation in data["annotations"]:
        if not annotation.get("iscrowd"):
            del annotation[FIELD[part]]
    assert any(FIELD[part] in annotation for annotation in data["annotations"])
    assert (
        list(check_annotation_type(CocoFile(write(tmp_path, data)), part)) == []
    )  # nobody has any: nothing is missing
    with pytest.raises(MissingAnnotationsError):
        read_annotations(write(tmp_path, data), annotation_types=[part])


def test_objects_that_have_no_labelled_point_are_counted(tmp_path):
    data = with_parts(keypoints=[0] * 6)
    warnings = read_annotations(write(tmp_path, data), annotation_types=["keypoints"]).warnings
    assert warnings == {"objects whose keypoints are all unlabelled": 1}


@pytest.mark.parametrize("part", ["masks", "keypoints"])
def test_objects_without_an_area_are_counted_where_it_matters(tmp_path, part):
    path = write(tmp_path, with_parts(area="gone"))
    kind = "masks without an area" if part == "masks" else "keypoints without an area"
    assert read_annotations(path, annotation_types=[part]).warnings == {kind: 1}
    assert read_annotations(path).warnings == {}  # of boxes it is their own


def test_classes_without_key_points_need_none(tmp_path):
    data = with_parts(keypoints="gone")  # a dog
    del data["categories"][1]["keypoints"]
    assert not read_annotations(write(tmp_path, data), annotation_types=["keypoints"]).warnings


@pytest.mark.parametrize(("part", "words"), [("masks", "polygons or an RLE"), ("keypoints", "person_keypoints_")])
def test_files_without_any_are_refused_where_they_are_read(tmp_path, part, words):
    path = write(tmp_path)
    with pytest.raises(MissingAnnotationsError, match=words) as error:
        read_annotations(path, annotation_types=[part])
    assert str(error.value).startswith(f"{path}: no object has {part} ({FIELD[part]}): ")


def test_categories_that_name_other_points(tmp_path):
    data = with_parts()
    data["categories"][0]["keypoints"] = ["nose", "tail"]
    path = write(tmp_path, data)
    with pytest.raises(DataError, match="different keypoints"):
        read_annotations(path, annotation_types=["keypoints"])
    (problem,) = check_dataset(path, tmp_path / "images").findings
    assert (problem.level, problem.kind) == ("warning", "categories with keypoints that do not fit")


def test_real_coco_is_right(coco_cc):
    path = coco_cc / "annotations" / "instances_val2017.json"
    assert list(check_annotation_type(CocoFile(path), "masks")) == []
    assert list(check_annotation_type(CocoFile(path), "keypoints")) == []
