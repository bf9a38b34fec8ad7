"""The settings of a detector: which values are valid, and what they build."""

import json
import math

import pytest
import torch
import torchvision
from torchvision.models.detection import FasterRCNN

from detector.errors import ModelError
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import settings_of, torchvision_detectors

NAMES = sorted(name for name in torchvision_detectors() if name.startswith("fasterrcnn"))
OTHER = {  # than the defaults
    "min_size": 96,
    "max_size": 128,
    "anchor_sizes": (8, 20, 50, 70, 90),
    "aspect_ratios": (0.25, 1.5, 4.0),
    "rpn_pre_nms_top_n": (70, 60),
    "rpn_post_nms_top_n": (50, 40),
    "rpn_nms_threshold": 0.65,
    "rpn_fg_iou_threshold": 0.6,
    "rpn_bg_iou_threshold": 0.25,
    "box_nms_threshold": 0.45,
    "box_fg_iou_threshold": 0.55,
    "box_bg_iou_threshold": 0.35,
    "rois_per_image": 30,
    "detections_per_image": 20,
    "score_threshold": 0.1,
}


def built(name, **settings):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
        return build_detector(DetectorConfig(name=name, fpn_channels=8, box_head_size=8, **settings), 2)
    with torch.device("meta"):  # fast
        return build_detector(DetectorConfig(name=name, **settings), 2, pretrained=False)


@pytest.mark.parametrize("name", [*NAMES, "timm/test_efficientnet"])
def test_settings_of_a_built_detector(name):
    assert settings_of(name, built(name, **OTHER)) == DetectorConfig(name=name, **OTHER)
    assert settings_of(name, built(name)) == DetectorConfig(name=name)


def assert_same_matching(ours, theirs):
    for stage in ("rpn", "roi_heads"):
        one, other = getattr(ours, stage), getattr(theirs, stage)
        assert one.nms_thresh == other.nms_thresh
        assert vars(one.proposal_matcher) == vars(other.proposal_matcher)


@pytest.mark.parametrize("name", NAMES)
def test_default_anchors_and_thresholds_are_those_of_torchvisions_builders(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    ours = built(name)
    assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert ours.rpn.anchor_generator.aspect_ratios == theirs.rpn.anchor_generator.aspect_ratios
    assert_same_matching(ours, theirs)


def test_thresholds_reach_torchvisions_arguments():
    ours = built("timm/test_efficientnet", **OTHER)
    names = [name for name in OTHER if name.endswith("threshold") and name != "score_threshold"]
    assert_same_matching(ours, FasterRCNN(ours.backbone, 3, **{n.removesuffix("old"): OTHER[n] for n in names}))


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "timm/test_efficientnet"])
def test_anchors_have_the_sizes_and_ratios_of_the_settings(name):
    pytest.importorskip("timm")
    sizes, ratios = OTHER["anchor_sizes"], OTHER["aspect_ratios"]
    model = build_detector(DetectorConfig(name=name, anchor_sizes=sizes, aspect_ratios=ratios), 2, pretrained=False)
    images, _ = model.eval().transform([torch.rand(3, 64, 64)])
    anchors = torch.cat(model.rpn.anchor_generator(images, list(model.backbone(images.tensors).values())))
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    # torchvision rounds half of each side.
    expected = {(2 * round(s / r**0.5 / 2), 2 * round(s * r**0.5 / 2)) for s in sizes for r in ratios}
    assert set(zip(width.tolist(), height.tolist())) == expected


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("aspect_ratios", [(1, 2), (1, 2, 0), (1, 2, math.nan), (1, 2, "3"), 1.0, None, (1, 2, 1e9), "abc"]),
        ("anchor_sizes", [(1,), (1, 2, 3, 4, 0), (1, 2, 3, 4, 5.0)]),
        ("rpn_nms_threshold", [-0.1, 1.1, math.nan, "0.5", None, True]),
        ("trainable_layers", [True, torch.zeros(2), False, 1.0, -1]),
        ("max_size", [0, 10**9, "64"]),
        ("frozen_batch_norm", [1, None]),
        ("name", [None]),
        ("weights", [3]),
        ("finds", ["mask", "boxes"]),
    ],
)
def test_invalid_values_are_refused(name, values):
    for value in values:
        with pytest.raises(ModelError) as error:
            DetectorConfig(**{name: value})
        assert error.value.setting == f"detector.{name}"
        assert error.value.value is value


def test_settings_that_contradict_each_other_are_refused():
    DetectorConfig(trainable_layers=0, rpn_bg_iou_threshold=0.4, rpn_fg_iou_threshold=0.4)
    for settings in (
        {"rpn_bg_iou_threshold": 0.5, "rpn_fg_iou_threshold": 0.4},
        {"box_bg_iou_threshold": 0.5, "box_fg_iou_threshold": 0.4},
        {"finds": "masks", "name": "fasterrcnn_resnet50_fpn"},  # which finds only boxes
    ):
        with pytest.raises(ModelError) as error:
            DetectorConfig(**settings)
        assert error.value.setting == f"detector.{next(iter(settings))}"


def test_settings_as_json():
    fields = {"name": "timm/test_efficientnet", **OTHER}
    assert DetectorConfig.from_dict(json.loads(json.dumps(fields))) == DetectorConfig(**fields)
    for wrong in ({"unheard_of": 1}, {"name": None}, {1: 2}):
        with pytest.raises(ModelError):
            DetectorConfig.from_dict(wrong)
