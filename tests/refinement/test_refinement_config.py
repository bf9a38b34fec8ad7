import dataclasses
import json
import math

import pytest

from detector import BoxGradient, RefinementConfig
from detector.errors import ModelError


@pytest.mark.parametrize(
    "config",
    [
        RefinementConfig(),
        RefinementConfig(0, 1, 100, 0.0, BoxGradient(crop=0.5, losses=["box", "mask"])),
        RefinementConfig(100, 100, 0, 10, BoxGradient(bound=2.0)),
    ],
)
def test_dict_and_json_give_the_settings_back(config):
    fields = dataclasses.asdict(config)
    for same in (fields, json.loads(json.dumps(fields))):
        assert RefinementConfig.from_dict(same) == config
        assert hash(RefinementConfig.from_dict(same)) == hash(config)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("iterations", (-1, 101, 2.5, True, None, "2")),
        ("train_iterations", (0, 101)),
        ("ascent_steps", (-1, 101)),
        ("iou_power", (-1e-9, 10.1, math.nan, True, "0.5")),
        ("box_gradient", (None, {"crop": 1})),
    ],
)
def test_invalid_values_are_named(name, values):
    for value in values:
        with pytest.raises(ModelError) as caught:
            RefinementConfig(**{name: value})
        assert caught.value.setting == f"refinement.{name}"


@pytest.mark.parametrize(
    "change",
    [{"unknown": 1}, {"box_gradient": None}, {"box_gradient": {"crop": 1, "losses": None}}, {"iterations": -1}],
)
def test_invalid_dicts(change):
    with pytest.raises((ValueError, TypeError, LookupError)):
        RefinementConfig.from_dict(dataclasses.asdict(RefinementConfig()) | change)
