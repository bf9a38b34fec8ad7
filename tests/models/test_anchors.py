"""Advice on anchors: IoUs like torchvision's, and suggestions that hold."""

import json
import re

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from detector.models.anchors import SIZES, anchor_advice, best_ious
from detector.models.config import DetectorConfig

BCCD = DetectorConfig(min_size=320, max_size=320, anchor_sizes=(16, 32, 64, 96, 128))


def flags(advice):
    """The settings that the advice suggests, as tools/train.py would read them."""
    found = re.findall(r'--model\.detector\.(\w+) "(\[[^"]*\])"', advice)
    return {name: tuple(json.loads(value)) for name, value in found}


def unfitting(shapes, settings):
    """The share of objects whose best IoU is below 0.5, by torchvision's anchors and box_iou."""
    anchors = torch.cat(settings.anchor_generator().cell_anchors).double()  # centred on 0
    return (box_iou(torch.cat([-shapes / 2, shapes / 2], 1), anchors).amax(1) < 0.5).double().mean().item()


def test_ious_are_those_of_torchvisions_anchors():
    shapes = torch.rand(200, 2, dtype=torch.float64).mul(6).exp()
    settings = DetectorConfig(anchor_sizes=(7, 20, 90, 250, 300), aspect_ratios=(0.2, 1.5, 3))
    anchors = torch.cat(settings.anchor_generator().cell_anchors).double()
    boxes = torch.cat([-shapes / 2, shapes / 2], 1)
    torch.testing.assert_close(best_ious(shapes, settings), box_iou(boxes, anchors).amax(1))


def test_objects_are_resized_like_their_images():
    """Also where the longer side decides."""
    settings = DetectorConfig(min_size=60, max_size=100, anchor_sizes=(30, 32, 34, 36, 38))
    resize = GeneralizedRCNNTransform(settings.min_size, settings.max_size, [0.0] * 3, [1.0] * 3).eval()
    for width, height in ((200, 100), (90, 120), (400, 100)):
        box = torch.tensor([[10.0, 10.0, 40.0, 60.0]])
        _, (target,) = resize([torch.zeros(3, height, width)], [{"boxes": box}])
        resized = (target["boxes"][:, 2:] - target["boxes"][:, :2]).double()
        advice = anchor_advice(box[:, 2:] - box[:, :2], torch.tensor([[width, height]]), settings)
        assert (advice is not None) == (best_ious(resized, settings).item() < 0.5)


@pytest.mark.parametrize(
    ("size", "spread", "ratio"), [(190, 0.3, 1), (5, 0.2, 1), (60, 0.3, 9), (60, 0.3, 1 / 12), (700, 0.2, 1)]
)
def test_suggested_anchors_fit(size, spread, ratio):
    generator = torch.Generator().manual_seed(1)
    images = torch.full((400, 2), 320)
    sides = size * torch.randn(400, generator=generator, dtype=torch.float64).mul(spread).exp()
    shapes = torch.stack([sides / ratio**0.5, sides * ratio**0.5], 1)
    before = BCCD if size != 60 else DetectorConfig(min_size=320, max_size=320)
    advice = anchor_advice(shapes, images, before)
    assert advice.startswith(f"{unfitting(shapes, before):.0%} of 400 objects")
    suggested = flags(advice)
    assert ("aspect_ratios" in suggested) == (ratio != 1)  # only if sizes do not suffice
    after = DetectorConfig(min_size=320, max_size=320, **suggested)
    assert unfitting(shapes, after) < 0.1
    assert f"{unfitting(shapes, after):.0%}" in advice
    assert anchor_advice(shapes, images, after) is None


def test_no_advice_if_half_of_the_objects_fit_or_there_are_none():
    images = torch.full((4, 2), 320)
    for large, advised in ((0, False), (2, False), (3, True), (4, True)):
        shapes = torch.tensor([[300.0, 300.0]] * large + [[50.0, 50.0]] * (4 - large))
        assert (anchor_advice(shapes, images, BCCD) is not None) == advised
    assert anchor_advice(torch.empty(0, 2), torch.empty(0, 2), BCCD) is None


@pytest.mark.parametrize("side", [0.5, 1e-100, 1e9])
def test_no_anchors_are_suggested_that_are_not_better(side):
    advice = anchor_advice(torch.full((3, 2), side, dtype=torch.float64), torch.full((3, 2), 320), BCCD)
    assert advice.startswith("100% of 3 objects")
    assert not flags(advice)


def test_candidate_sizes_are_five_ascending_ones():
    assert all(len(sizes) == 5 and list(sizes) == sorted(set(sizes)) for sizes in SIZES)
