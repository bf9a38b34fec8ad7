"""Keypoints: names, mirror images, skeletons, and lists that are not COCO's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights

from detector.data.keypoints import PERSON, KeypointLayout, keypoints_error, layout_of
from detector.errors import DataError


def test_a_persons_keypoints_are_those_of_torchvision():
    assert list(PERSON.names) == KeypointRCNN_ResNet50_FPN_Weights.DEFAULT.meta["keypoint_names"]
    # The references' table of flipped keypoints.
    assert PERSON.mirrored() == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    for start, end in PERSON.skeleton:  # no line joins a left arm or leg with a right one
        (side, *part), (other_side, *other) = (PERSON.names[place].split("_") for place in (start, end))
        assert {side, other_side} != {"left", "right"} or part == other
    assert KeypointLayout.from_dict(json.loads(json.dumps(PERSON.to_dict()))) == PERSON


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
        (("eye_left", "tail"), [0, 1]),  # the other side is missing
        (("left_eye", "Left_Eye", "right_eye"), [0, 2, 1]),  # the last of the same name
        (("1", "2", "3"), [0, 1, 2]),
    ],
)
def test_mirror_images_by_name(names, mirrored):
    assert KeypointLayout(names).mirrored() == mirrored


@given(
    st.lists(
        st.sampled_from(["left_a", "right_a", "a", "LEFT_A", "r_b", "l_b", "Left B", "rightb"]),
        min_size=1,
        unique=True,
    )
)
def test_mirroring_twice_changes_nothing(names):
    mirrored = KeypointLayout(tuple(names)).mirrored()
    assert [mirrored[other] for other in mirrored] == list(range(len(names)))


def category(number=1, **fields):
    return {"id": number, "name": f"kind {number}", **fields}


def test_the_layout_of_a_file():
    named = category(keypoints=["a", "b"], skeleton=[[1, 2]])
    assert layout_of("f.json", [category(2), named], []) == KeypointLayout(("a", "b"), ((0, 1),))
    assert layout_of("f.json", [named, category(2, keypoints=["a", "b"])], []).skeleton == ((0, 1),)
    # Without names, an annotation gives their number.
    points = [None, [], 3, [1, 2, 2] * 4]
    assert layout_of("f.json", [category()], points) == KeypointLayout(("1", "2", "3", "4"))
    assert layout_of("f.json", [category()], points[:3]) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"keypoints": "abc"},
        {"keypoints": [1, 2]},
        {"keypoints": ["a", "b", "a"]},
        {"keypoints": ["a"] * 1001},
        {"keypoints": {"a": 1}},
        *(
            {"keypoints": ["a", "b"], "skeleton": skeleton}
            for skeleton in ([[0, 1]], [[1, 3]], [[1]], [["1", "2"]], 5, [[1.0, 2.0]])
        ),
        {"keypoints": ["a", "c"]},  # others than those of the first category
    ],
)
def test_keypoints_of_categories_that_are_refused(fields):
    first = category(keypoints=["a", "b"]) if fields["keypoints"] == ["a", "c"] else category()
    with pytest.raises(DataError, match=r"^f\.json: .*kind 2"):
        layout_of("f.json", [first, category(2, **fields)], [])


def problem(points, **options):
    return keypoints_error(json.dumps(points).replace("NaN", '"NaN"').encode(), 2, **options)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("points", "finite numbers"),
        ([1, 2, 2], "3 numbers"),
        ([1, 2, 2, 3, 4, None], "finite numbers"),
        ([1, 2, 2, 3, 4, True], "finite numbers"),
        ([1, float("nan"), 2, 3, 4, 2], "finite numbers"),
        ([1, 2, 2, 2e9, 4, 2], "1000000000"),
        ([1, 2, 2, 10**400, 4, 2], "out of range"),
        ([1, 2, 2, 1e-200, 4, 2], "1e-100"),
        ([1, 2, 3, 3, 4, 2], "visibility"),
        ([1, 2, 1.5, 3, 4, 2], "visibility"),
    ],
)
def test_broken_lists(value, words):
    assert words in problem(value)


def test_valid_lists():
    assert problem([1, 2, 2, 0, 0, 0]) is None
    assert problem([-1.5, 2, 2.0, 1e9, 4, 1]) is None
    assert problem([1, 2, 0.7, 0, 0, -3], visibility=False) is None


def test_layouts_fit_by_their_names_in_order():
    named, swapped, numbered = (KeypointLayout(names) for names in (("a", "b"), ("b", "a"), ("1", "2")))
    assert named.fits(named)
    assert named.fits(numbered)
    assert numbered.fits(named)
    assert not named.fits(swapped)
    assert not named.fits(KeypointLayout(("a", "b", "c")))
