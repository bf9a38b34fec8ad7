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
def test_there_and_back(settings):
    description = DetectorDescription(settings, "roi_align", [3, None], ["a", "b"], {"bn": 0.25})
    content = description.to_dict()
    assert DetectorDescription.from_dict(content) == description
    assert DetectorDescription.from_dict(json.loads(json.dumps(content | {"optimizer": {}}))) == description
    assert list(content) == ["detector", "crop", "categories", "batch_norm_eps"]
    assert content["categories"] == [{"id": 3, "name": "a"}, {"id": None, "name": "b"}]


def test_ids_and_names_apart_as_in_earlier_checkpoints():
    content = DESCRIPTION.to_dict()
    del content["categories"]
    assert DetectorDescription.from_dict(content | {"category_ids": IDS, "category_names": NAMES}) == DESCRIPTION
    with pytest.raises(ValueError, match="zip"):
        DetectorDescription.from_dict(content | {"category_ids": IDS[1:], "category_names": NAMES})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": "pooled"}, "crop must be affine or roi_align, got 'pooled'"),
        ({"categories": [{"id": "1", "name": "a"}]}, "a category must have an id and a name, got '1' and 'a'"),
        ({"categories": [{"id": 1, "name": None}]}, "a category must have an id and a name, got 1 and None"),
        ({"batch_norm_eps": {"bn": 2}}, "batch_norm_eps must be numbers from 0 to 1"),
        ({"batch_norm_eps": [1e-5]}, "batch_norm_eps must be numbers from 0 to 1"),
        ({"detector": asdict(SETTINGS) | {"min_size": 0}}, r"detector\.min_size 0"),
    ],
)
def test_a_value_that_cannot_be_right(change, message):
    with pytest.raises(ModelError, match=message):
        DetectorDescription.from_dict(DESCRIPTION.to_dict() | change)
    with pytest.raises(ModelError, match="it must hold a dict, not a list"):
        DetectorDescription.from_dict([])


def test_the_detector_is_built_as_it_is_described():
    network = build_detector(SETTINGS, 3, pretrained=False)
    eps = dict.fromkeys(batch_norm_eps(network), 0.125)
    built = DetectorDescription(SETTINGS, "affine", IDS, NAMES, eps).build(network.state_dict())
    assert batch_norm_eps(built) == eps
    assert type(built.roi_heads.box_roi_pool).__name__ == "MultiScaleAffineCrop"
    with pytest.raises(ModelError, match="batch_norm_eps does not name the model's batch norms"):
        DESCRIPTION.build(network.state_dict())
    with pytest.raises(ModelError, match=r"cls_score.* is \[4, 16\] in the file, \[3, 16\] in the model"):
        DetectorDescription(SETTINGS, "affine", IDS[1:], NAMES[1:], eps).build(network.state_dict())
