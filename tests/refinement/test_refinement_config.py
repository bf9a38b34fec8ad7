import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector import BoxGradient
from detector.refinement import RefinementConfig

WHOLE = {
    "looks": (0, 100),
    "climbs": (0, 100),
    "stages": (1, 100),
    "train_looks": (1, 100),
    "boxes_per_object": (1, 100),
    "train_boxes": (1, 10_000),
    "boxes_per_image": (1, 10_000),
}
NUMBERS = {"step_size": 10, "score_threshold": 1, "fit_power": 10, "jitter": 1, "min_iou": 1}
NUMBERS |= {"look_scale": 1, "least_overlap": 1}

shares = st.floats(0, 1)


def with_stages_that_learn(stages, train_looks, **others):
    return RefinementConfig(stages=min(stages, train_looks), train_looks=train_looks, **others)


configs = st.builds(
    with_stages_that_learn,
    **{name: st.integers(*ends) for name, ends in WHOLE.items()},
    **{name: st.floats(0, most) for name, most in NUMBERS.items()},
    fit_nms=st.booleans(),
    sampling=st.sampled_from(["points", "exact"]),
    box_gradient=st.builds(BoxGradient, crop=shares, coder=shares, bound=st.none() | st.floats(0.001, 10)),
)


@given(configs)
def test_a_dict_and_a_json_file_give_it_back(config):
    fields = dataclasses.asdict(config)
    assert RefinementConfig.from_dict(fields) == config
    assert RefinementConfig.from_dict(json.loads(json.dumps(fields))) == config
    assert hash(RefinementConfig.from_dict(fields)) == hash(config)


@given(st.data())
def test_a_whole_number_out_of_its_range_is_named(data):
    name = data.draw(st.sampled_from(sorted(WHOLE)))
    low, high = WHOLE[name]
    wrong = data.draw(st.integers(max_value=low - 1) | st.integers(min_value=high + 1))
    with pytest.raises(ValueError, match=f"refinement.{name} must be a whole number from {low} to {high}, got {wrong}"):
        RefinementConfig(**{name: wrong})


@given(st.data())
def test_a_number_out_of_its_range_is_named(data):
    name = data.draw(st.sampled_from(sorted(NUMBERS)))
    wrong = data.draw(st.floats(max_value=-1e-9) | st.floats(min_value=NUMBERS[name] + 1e-6) | st.just(math.nan))
    with pytest.raises(ValueError, match=f"refinement.{name} must be a number from 0 to {NUMBERS[name]}, got "):
        RefinementConfig(**{name: wrong})


@pytest.mark.parametrize("wrong", [None, "2", True, [2], 2.5])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_no_whole_number(name, wrong):
    with pytest.raises(ValueError, match=f"refinement.{name} must be a whole number"):
        RefinementConfig(**{name: wrong})


@pytest.mark.parametrize("wrong", [None, "0.5", True, [0.5]])
@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_no_number(name, wrong):
    with pytest.raises(ValueError, match=f"refinement.{name} must be a number"):
        RefinementConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling": "fine"}, "refinement.sampling must be points or exact, got 'fine'"),
        ({"box_gradient": 0.1}, "refinement.box_gradient must be a BoxGradient, got 0.1"),
        ({"fit_nms": "no"}, "refinement.fit_nms must be True or False, got 'no'"),
    ],
)
def test_a_wrong_value_of_another_field(fields, message):
    with pytest.raises(ValueError, match=message):
        RefinementConfig(**fields)


def test_stages_that_no_look_of_the_training_comes_to():
    RefinementConfig(stages=3)
    RefinementConfig(stages=4, train_looks=4)
    words = r"refinement\.stages must be no more than refinement\.train_looks \(3\), got 4"
    with pytest.raises(ValueError, match=words):
        RefinementConfig(stages=4)


@pytest.mark.parametrize(
    "change",
    [
        {"looks": -1},
        {"far": 1},
        {"box_gradient": None},
        {"box_gradient": {"crop": 1}},
        {"box_gradient": {"crop": 1, "losses": ["rpn"]}},
        {"box_gradient": {"crop": 1, "losses": None}},
        {"fit_nms": "no"},
    ],
)
def test_a_dict_that_was_none_of_it(change):
    fields = dataclasses.asdict(RefinementConfig()) | change
    with pytest.raises((ValueError, TypeError, LookupError)):
        RefinementConfig.from_dict(fields)
