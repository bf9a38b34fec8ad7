"""The description of a detector that checkpoints and saved folders hold."""

import json
from dataclasses import asdict

import pytest

pytest.importorskip("timm")

from support.tiny_detector import IDS, NAMES, SETTINGS

from detector.errors import ModelError
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps
from detector.pretrained import DetectorDescription

DESCRIPTION = DetectorDescription(SETTINGS, "affine", IDS, NAMES, {"backbone.bn": 1e-5})


@pytest.mark.parametrize("settings", [SETTINGS, DetectorConfig(weights="a.pth", weights_backbone="DEFAULT")])
def test_to_dict_and_back(settings):
    description = DetectorDescription(settings, "roi_align", [3, None], ["a", "b"], {"bn": 0.25})
    content = description.to_dict()
    assert DetectorDescription.from_dict(json.loads(json.dumps(content | {"optimizer": {}}))) == description
    assert list(content) == ["detector", "crop", "categories", "batch_norm_eps"]
    assert content["categories"] == [{"id": 3, "name": "a"}, {"id": None, "name": "b"}]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"crop": "pooled"}, "crop"),
        ({"categories": [{"id": "1", "name": "a"}]}, "categories"),
        ({"batch_norm_eps": {"bn": 2}}, "batch_norm_eps"),
        ({"batch_norm_eps": {"bn": float("nan")}}, "batch_norm_eps"),
        ({"batch_norm_eps": [1e-5]}, "batch_norm_eps"),
        ({"detector": asdict(SETTINGS) | {"min_size": 0}}, "min_size"),
        ({"refinement": 3}, "refinement"),
    ],
)
def test_an_invalid_value_is_named(change, field):
    with pytest.raises(ModelError, match=field):
        DetectorDescription.from_dict(DESCRIPTION.to_dict() | change)


def test_a_description_is_a_dict():
    with pytest.raises(ModelError, match="list"):
        DetectorDescription.from_dict([])


def test_the_detector_is_built_as_it_is_described():
    network = build_detector(SETTINGS, 3, pretrained=False)
    eps = dict.fromkeys(batch_norm_eps(network), 0.125)
    built = DetectorDescription(SETTINGS, "affine", IDS, NAMES, eps).build(network.state_dict())
    assert batch_norm_eps(built) == eps
    assert type(built.roi_heads.box_roi_pool).__name__ == "MultiScaleAffineCrop"
    with pytest.raises(ModelError, match="batch_norm_eps"):
        DESCRIPTION.build(network.state_dict())
    with pytest.raises(ModelError, match="cls_score"):
        DetectorDescription(SETTINGS, "affine", IDS[1:], NAMES[1:], eps).build(network.state_dict())
