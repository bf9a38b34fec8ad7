"""Anchors against the objects of a data set: overlaps as torchvision's, and advice that holds."""

import json
import re

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from detector.data.dataset import CocoDetection
from detector.models.anchors import SIZES, anchor_advice, best_ious
from detector.models.config import DetectorConfig

BCCD = DetectorConfig(min_size=320, max_size=320, anchor_sizes=(16, 32, 64, 96, 128))


def flags(advice):
    """The settings that a sentence recommends, as tools/train.py would read them."""
    found = re.findall(r'--model\.detector\.(\w+) "(\[[^"]*\])"', advice)
    return {name: tuple(json.loads(value)) for name, value in found}


def outside(shapes, settings):
    """The share of objects, by plain arithmetic, whose IoU with each anchor is below half."""
    count = 0
    for width, height in shapes.tolist():
        best = 0.0
        for size in settings.anchor_sizes:
            for ratio in settings.aspect_ratios:
                w, h = size / ratio**0.5, size * ratio**0.5
                common = min(w, width) * min(h, height)
                best = max(best, common / (w * h + width * height - common))
        count += best < 0.5
    return count / len(shapes)


def test_overlaps_are_those_of_torchvisions_anchors():
    shapes = torch.rand(200, 2, dtype=torch.float64).mul(6).exp()
    settings = DetectorConfig(anchor_sizes=(7, 20, 90, 250, 300), aspect_ratios=(0.2, 1.5, 3))
    anchors = torch.cat(settings.anchor_generator().cell_anchors).double()  # centred on 0
    boxes = torch.cat([-shapes / 2, shapes / 2], 1)
    torch.testing.assert_close(best_ious(shapes, settings), box_iou(boxes, anchors).amax(1))


def test_half_is_what_anchors_an_octave_apart_reach_between_them():
    sides = torch.linspace(32, 512, 300, dtype=torch.float64)
    assert best_ious(torch.stack([sides, sides], 1), DetectorConfig()).min() == pytest.approx(0.5, abs=0.01)


def test_objects_are_compared_as_the_detector_sees_them():
    """Also where the longer side decides; with torchvision's own resizing."""
    settings = DetectorConfig(min_size=60, max_size=100, anchor_sizes=(30, 32, 34, 36, 38))
    resize = GeneralizedRCNNTransform(settings.min_size, settings.max_size, [0.0] * 3, [1.0] * 3).eval()
    for width, height in ((200, 100), (90, 120), (400, 100)):
        box = torch.tensor([[10.0, 10.0, 40.0, 60.0]])
        _, (target,) = resize([torch.zeros(3, height, width)], [{"boxes": box}])
        seen = (target["boxes"][:, 2:] - target["boxes"][:, :2]).double()
        advice = anchor_advice(box[:, 2:] - box[:, :2], torch.tensor([[width, height]]), settings)
        assert (advice is not None) == (best_ious(seen, settings).item() < 0.5)
        if advice:
            assert f"median {seen.prod().sqrt().item():.2f}"[:9] in advice


def test_the_advice_holds():
    """What it says of anchors now and of those it names, by plain arithmetic; following it, nothing is left to say."""
    generator = torch.Generator().manual_seed(1)
    images = torch.full((400, 2), 320)
    for middle, spread, ratio in ((190, 0.3, 1), (5, 0.2, 1), (60, 0.3, 9), (60, 0.3, 1 / 12), (700, 0.2, 1)):
        sides = middle * torch.randn(400, generator=generator, dtype=torch.float64).mul(spread).exp()
        shapes = torch.stack([sides / ratio**0.5, sides * ratio**0.5], 1)
        now = BCCD if middle != 60 else DetectorConfig(min_size=320, max_size=320)
        advice = anchor_advice(shapes, images, now)
        before = outside(shapes, now)
        assert before > 0.5
        assert advice.startswith(f"{before:.0%} of 400 objects")
        then = DetectorConfig(min_size=320, max_size=320, **flags(advice))
        assert list(then.anchor_sizes) == sorted(set(then.anchor_sizes))
        assert list(then.aspect_ratios) == sorted(set(then.aspect_ratios))
        after = outside(shapes, then)
        assert after < 0.1
        assert float(advice.split("would be ")[1].split("%")[0]) == pytest.approx(100 * after, abs=1)
        assert anchor_advice(shapes, images, then) is None
        assert ("aspect_ratios" in flags(advice)) == (ratio != 1)  # not where sizes do


def test_nothing_is_said_where_half_of_the_objects_fit_or_there_are_none():
    images = torch.full((4, 2), 320)
    for big, said in ((0, False), (2, False), (3, True), (4, True)):
        shapes = torch.tensor([[300.0, 300.0]] * big + [[50.0, 50.0]] * (4 - big))
        assert (anchor_advice(shapes, images, BCCD) is not None) == said
    assert anchor_advice(torch.empty(0, 2), torch.empty(0, 2), BCCD) is None


def test_no_anchors_are_named_that_are_not_better():
    images = torch.full((3, 2), 320)
    for side in (0.5, 1e-100, 1e9):
        advice = anchor_advice(torch.full((3, 2), side, dtype=torch.float64), images, BCCD)
        assert advice.startswith("100% of 3 objects")
        assert "--model" not in advice


def test_sizes_to_choose_from_are_five_ascending():
    assert all(len(sizes) == 5 and list(sizes) == sorted(set(sizes)) for sizes in SIZES)


def test_shapes_of_a_data_set_are_those_of_its_targets(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "width": 30 + i, "height": 20} for i in range(3)]
    boxes = [(2, [1, 2, 3, 4], 0), (0, [25, 5, 40, 2], 0), (2, [0, 0, 9, 9], 1), (0, [0, 0, 0, 4], 0)]
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": crowd}
        for i, (image, box, crowd) in enumerate(boxes)
    ]
    for image in images:
        (tmp_path / image["file_name"]).touch()
    categories = [{"id": 1, "name": "a"}]
    for kept in (annotations, []):
        content = {"images": images, "annotations": kept, "categories": categories}
        (tmp_path / "a.json").write_text(json.dumps(content))
        shapes, sizes = CocoDetection(tmp_path, tmp_path / "a.json").shapes()
        assert shapes.tolist() == ([[5, 2], [3, 4]] if kept else [])
        assert sizes.tolist() == ([[30, 20], [32, 20]] if kept else [])
        assert shapes.shape == sizes.shape == (len(shapes), 2)
