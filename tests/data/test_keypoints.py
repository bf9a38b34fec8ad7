"""Keypoints: COCO's names and lines, which of them a mirror exchanges, and lists that are not COCO's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights

from detector.data.keypoints import PERSON, KeypointLayout, keypoints_problem, layout_of
from detector.errors import DataError


def test_a_persons_are_those_of_torchvisions_published_weights():
    assert list(PERSON.names) == KeypointRCNN_ResNet50_FPN_Weights.DEFAULT.meta["keypoint_names"]
    assert len(PERSON) == 17
    # COCO's published skeleton, from 1 on: no arm or leg crosses the middle.
    for start, end in PERSON.skeleton:
        sides = {PERSON.names[start].split("_")[0], PERSON.names[end].split("_")[0]}
        assert sides != {"left", "right"} or PERSON.names[start].split("_")[1] == PERSON.names[end].split("_")[1]


def test_a_persons_mirror_is_the_table_of_the_references():
    # FLIP_INDICES of COCO's 17 points, as detection references list them.
    assert PERSON.mirrored() == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


@pytest.mark.parametrize(
    ("names", "mirrored"),
    [
        (("nose", "left_eye", "right_eye"), [0, 2, 1]),
        (("LeftEye", "RightEye", "tail"), [1, 0, 2]),
        (("l-hip", "r-hip", "tail", "ear"), [1, 0, 2, 3]),  # a letter within a word is no side
        (("LHip", "RHip"), [1, 0]),
        (("Lhip", "Rhip", "Lip"), [1, 0, 2]),
        (("EyeL", "EyeR", "kneeL", "kneeR"), [1, 0, 3, 2]),
        (("lt_eye", "rt_eye", "art", "alt"), [1, 0, 2, 3]),
        (("eye_left", "tail"), [0, 1]),  # its other side is no point
        (("left_eye", "Left_Eye", "right_eye"), [0, 2, 1]),  # the last of the same name
        (("1", "2", "3"), [0, 1, 2]),
        (("top_left", "top_right", "bottom_left", "bottom_right"), [1, 0, 3, 2]),
    ],
)
def test_left_and_right_by_name(names, mirrored):
    assert KeypointLayout(names).mirrored() == mirrored


NAMES = ["left_a", "right_a", "a", "LEFT_A", "r_b", "l_b", "Left B", "rightb"]


@given(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
def test_twice_in_a_mirror_is_as_before(names):
    mirrored = KeypointLayout(tuple(names)).mirrored()
    assert [mirrored[other] for other in mirrored] == list(range(len(names)))


def category(number=1, **fields):
    return {"id": number, "name": f"kind {number}", **fields}


def test_the_layout_of_a_file():
    named = category(keypoints=["a", "b"], skeleton=[[1, 2]])
    assert layout_of("f.json", [category(2), named], []) == KeypointLayout(("a", "b"), ((0, 1),))
    assert layout_of("f.json", [named, category(2, keypoints=["a", "b"])], []).skeleton == ((0, 1),)
    # Nobody names them: numbered by how many an annotation has.
    without = [None, [], 3, [1, 2, 2] * 4]
    assert layout_of("f.json", [category()], without) == KeypointLayout(("1", "2", "3", "4"))
    assert layout_of("f.json", [category()], without[:3]) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keypoints": "abc"}, "got 'abc'"),
        ({"keypoints": [1, 2]}, "names"),
        ({"keypoints": ["a", "b", "a"]}, "the name 'a' is that of several keypoints"),
        ({"keypoints": ["a"] * 1001}, "1 to 1000"),
        ({"keypoints": {"a": 1}}, "got {'a': 1}"),
        ({"keypoints": ["a", "b"], "skeleton": [[0, 1]]}, "must join two of 2 points"),
        ({"keypoints": ["a", "b"], "skeleton": [[1, 3]]}, "must join two of 2 points"),
        ({"keypoints": ["a", "b"], "skeleton": [[1]]}, "skeleton"),
        ({"keypoints": ["a", "b"], "skeleton": [["1", "2"]]}, "skeleton"),
        ({"keypoints": ["a", "b"], "skeleton": 5}, "skeleton"),
        ({"keypoints": ["a", "b"], "skeleton": [[1.0, 2.0]]}, "must join"),
    ],
)
def test_categories_that_are_not_cocos(fields, words):
    with pytest.raises(DataError) as error:
        layout_of("f.json", [category(), category(2, **fields)], [])
    assert str(error.value).startswith("f.json: the category 'kind 2' has keypoints that are not COCO's")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_one_detector_finds_the_same_points_of_all_classes():
    with pytest.raises(DataError, match=r"kind 1, kind 2.*different keypoints"):
        layout_of("f.json", [category(keypoints=["a"]), category(2, keypoints=["b"])], [])


def problem(points, **options):
    return keypoints_problem(json.dumps(points).replace("NaN", '"NaN"').encode(), 2, **options)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("points", "not a list of finite numbers"),
        ([1, 2, 2], "3 numbers: 2 keypoints are 6"),
        ([1, 2, 2, 3, 4, None], "not a list of finite numbers"),
        ([1, 2, 2, 3, 4, True], "not a list of finite numbers"),
        ([1, float("nan"), 2, 3, 4, 2], "not a list of finite numbers"),
        ([1, 2, 2, 2e9, 4, 2], "1000000000"),
        ([1, 2, 2, 10**400, 4, 2], "out of range"),
        ([1, 2, 2, 1e-200, 4, 2], "1e-100"),
        ([1, 2, 3, 3, 4, 2], "a visibility that is not 0"),
        ([1, 2, 1.5, 3, 4, 2], "a visibility"),
    ],
)
def test_broken_lists_are_named(value, words):
    assert words in problem(value)


def test_right_lists_have_no_problem():
    assert problem([1, 2, 2, 0, 0, 0]) is None
    assert problem([-1.5, 2, 2.0, 1e9, 4, 1]) is None
    assert problem([1, 2, 0.7, 0, 0, -3], visibility=False) is None  # a detection's third is a score


def test_layouts_as_json():
    assert KeypointLayout.from_dict(json.loads(json.dumps(PERSON.to_dict()))) == PERSON


def test_layouts_fit_by_their_names_in_order():
    named, swapped, numbered = (KeypointLayout(names) for names in (("a", "b"), ("b", "a"), ("1", "2")))
    assert named.fits(named)
    assert named.fits(numbered)
    assert numbered.fits(named)
    assert not named.fits(swapped)
    assert not named.fits(KeypointLayout(("a", "b", "c")))
