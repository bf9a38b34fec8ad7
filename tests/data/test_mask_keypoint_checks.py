"""Checks of masks and keypoints: findings are errors for detectors that learn them, else warnings."""

import copy
import math

import pytest
from support.annotation_files import VALID, write

from detector.data.annotation_types import FIELD
from detector.data.annotations import read_annotations
from detector.data.check_dataset import check_dataset
from detector.data.entries import CocoFile
from detector.data.mask_keypoint_checks import WARNINGS, check_annotation_type
from detector.errors import DataError, MissingAnnotationsError
from detector.evaluation.scoring import EFFECTS_ON

SQUARE = [[2, 3, 12, 3, 12, 13, 2, 13]]
POINTS = {"masks": SQUARE, "keypoints": [1, 2, 2, 3, 4, 1]}


def with_types(**change):
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
    ("masks", [[1, 2, 3, 4]], "broken segmentations", "[[1, 2, 3, 4]]"),
    ("masks", {"size": [30, 20], "counts": [600]}, "broken segmentations", "[30, 20]"),
    ("masks", "polygon", "broken segmentations", "got `str`"),
    ("masks", [[1, 2, 3, math.nan, 5, 6]], "broken segmentations", "at `$[0][3]`"),
    ("keypoints", [1, 2, 2], "broken keypoints", "3 numbers"),
    ("keypoints", [1, 2, 2, 3, 4, 7], "broken keypoints", "a visibility"),
    ("keypoints", [[]], "broken keypoints", "at `$[0]`"),
    ("keypoints", "points", "broken keypoints", "got `str`"),
]


@pytest.mark.parametrize(("annotation_type", "value", "kind", "words"), BROKEN)
def test_broken_ones_are_errors_where_they_are_read(tmp_path, annotation_type, value, kind, words):
    data = with_types(**{FIELD[annotation_type]: value})
    (finding,) = check_annotation_type(CocoFile(write(tmp_path, data)), annotation_type)
    assert (finding.level, finding.kind) == ("error", kind)
    assert finding.message.startswith(f"{tmp_path}/a.json: annotations[1] (id 2) has {FIELD[annotation_type]} ")
    assert words in finding.message
    assert "\n" not in finding.message
    path = write(tmp_path, data)
    with pytest.raises(DataError) as error:
        read_annotations(path, annotation_types=[annotation_type])
    assert words in str(error.value)
    (other,) = {*FIELD} - {annotation_type}
    read_annotations(path)  # not checked
    read_annotations(path, annotation_types=[other])
    (finding,) = check_dataset(path, tmp_path / "images").findings
    assert (finding.level, finding.kind) == ("warning", kind)
    assert words in finding.message
    assert str(path) in finding.message


def test_a_valid_file_has_no_findings(tmp_path):
    assert check_dataset(write(tmp_path, with_types()), tmp_path / "images").findings == []
    # Nobody has any: nothing is missing.
    assert check_dataset(write(tmp_path, VALID), tmp_path / "images").findings == []


def test_they_are_not_checked_where_boxes_are_wrong(tmp_path):
    path = write(tmp_path, with_types(segmentation=[[1]], bbox=None))
    (finding,) = check_dataset(path, tmp_path / "images").findings
    assert finding.kind == "annotations with a wrong bbox"


@pytest.mark.parametrize("nothing", ["gone", None, []])
def test_objects_without_are_counted(tmp_path, nothing):
    data = with_types(segmentation=nothing, keypoints=nothing)
    data["annotations"][2] |= {"segmentation": [], "keypoints": []}  # a crowd needs none
    warnings = {"masks": "objects without a segmentation", "keypoints": "objects without keypoints"}
    for annotation_type, warning in warnings.items():
        (finding,) = check_annotation_type(CocoFile(write(tmp_path, data)), annotation_type)
        assert (finding.level, finding.kind) == ("warning", warning)
        assert "annotations[1] (id 2)" in finding.message
        assert read_annotations(write(tmp_path, data), annotation_types=[annotation_type]).warnings == {warning: 1}
    assert [p.kind for p in check_dataset(write(tmp_path, data), tmp_path / "images").findings] == [*warnings.values()]


def test_polygons_without_a_point_are_none(tmp_path):
    data = with_types(segmentation=[[], []])
    assert read_annotations(write(tmp_path, data), annotation_types=["masks"]).warnings == {
        "objects without a segmentation": 1
    }
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[]]
    with pytest.raises(MissingAnnotationsError):
        read_annotations(write(tmp_path, data), annotation_types=["masks"])


@pytest.mark.parametrize("annotation_type", ["masks", "keypoints"])
def test_a_crowd_alone_is_nothing_to_learn_from(tmp_path, annotation_type):
    data = with_types()
    for annotation in data["annotations"]:
        if not annotation.get("iscrowd"):
            del annotation[FIELD[annotation_type]]
    assert any(FIELD[annotation_type] in annotation for annotation in data["annotations"])
    assert (
        list(check_annotation_type(CocoFile(write(tmp_path, data)), annotation_type)) == []
    )  # nobody has any: nothing is missing
    with pytest.raises(MissingAnnotationsError):
        read_annotations(write(tmp_path, data), annotation_types=[annotation_type])


def test_objects_that_have_no_labelled_point_are_counted(tmp_path):
    data = with_types(keypoints=[0] * 6)
    warnings = read_annotations(write(tmp_path, data), annotation_types=["keypoints"]).warnings
    assert warnings == {"objects whose keypoints are all unlabelled": 1}


@pytest.mark.parametrize("annotation_type", ["masks", "keypoints"])
def test_objects_without_an_area_are_counted_where_it_matters(tmp_path, annotation_type):
    path = write(tmp_path, with_types(area="gone"))
    kind = "masks without an area" if annotation_type == "masks" else "keypoints without an area"
    assert read_annotations(path, annotation_types=[annotation_type]).warnings == {kind: 1}
    assert read_annotations(path).warnings == {}  # of boxes it is their own


def test_classes_without_keypoints_need_none(tmp_path):
    data = with_types(keypoints="gone")  # a dog
    del data["categories"][1]["keypoints"]
    assert not read_annotations(write(tmp_path, data), annotation_types=["keypoints"]).warnings


@pytest.mark.parametrize(("annotation_type", "words"), [("masks", "polygons"), ("keypoints", "person_keypoints_")])
def test_files_without_any_are_refused_where_they_are_read(tmp_path, annotation_type, words):
    path = write(tmp_path)
    with pytest.raises(MissingAnnotationsError, match=words) as error:
        read_annotations(path, annotation_types=[annotation_type])
    assert str(error.value).startswith(f"{path}: no object has {annotation_type} ({FIELD[annotation_type]}): ")


def test_categories_that_name_other_points(tmp_path):
    data = with_types()
    data["categories"][0]["keypoints"] = ["nose", "tail"]
    path = write(tmp_path, data)
    with pytest.raises(DataError, match="different keypoints"):
        read_annotations(path, annotation_types=["keypoints"])
    (finding,) = check_dataset(path, tmp_path / "images").findings
    assert (finding.level, finding.kind) == ("warning", "categories with keypoints that do not fit")


def test_real_coco_is_right(coco_cc):
    path = coco_cc / "annotations" / "instances_val2017.json"
    assert list(check_annotation_type(CocoFile(path), "masks")) == []
    assert list(check_annotation_type(CocoFile(path), "keypoints")) == []


@pytest.mark.parametrize("annotation_type", FIELD)
def test_the_effects_on_scores_are_those_of_warnings(annotation_type):
    assert EFFECTS_ON[annotation_type].keys() <= WARNINGS[annotation_type].keys()
