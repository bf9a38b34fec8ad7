"""Running a detector on a split: losses, memory, and the times of its stages."""

import weakref

import pytest
import torch
import torchvision
from support.refined_models import refined
from support.shapes import truth_file, write_shapes
from support.tiny_models import SIZE, batch, copies, tiny_rcnn
from torchvision.models.detection import RetinaNet

from detector import swap_crop_head
from detector.data.dataset import CocoDetection
from detector.errors import DataError
from detector.evaluation import detect_with_losses
from detector.evaluation.running import EvaluationOptions, run_detector
from detector.evaluation.timing import STAGES, measure_stages

UNREFINED = [stage for stage in (*STAGES, "total") if stage != "refinement"]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = write_shapes(tmp_path_factory.mktemp("data") / "shapes")
    return CocoDetection(root / "val", truth_file(root))


def test_losses_of_a_one_stage_detector_are_those_of_training():
    model = RetinaNet(tiny_rcnn().backbone, 3, min_size=SIZE, max_size=SIZE, score_thresh=0.0)
    model.anchor_generator = tiny_rcnn().rpn.anchor_generator
    model.head = torchvision.models.detection.retinanet.RetinaNetHead(8, 2, 3)
    images, targets = batch()
    model.train()
    with torch.no_grad():
        expected = model(images, copies(targets))
    detections, losses = detect_with_losses(model, images, copies(targets))
    torch.testing.assert_close(losses, dict(expected))
    assert model.training
    with torch.no_grad():
        assert torch.equal(detections[0]["boxes"], model.eval()(images)[0]["boxes"])


@pytest.mark.parametrize("stop", [DataError("broken"), KeyboardInterrupt()])
def test_a_training_scores_all_images_or_none(split, monkeypatch, stop):
    """With a part of the images, the other objects would count as missed."""
    get = CocoDetection.__getitem__

    def fail(self, index):
        if index == 3:
            raise stop
        return get(self, index)

    monkeypatch.setattr(CocoDetection, "__getitem__", fail)
    with pytest.raises(type(stop)):
        run_detector(tiny_rcnn(), split, [3, 5], EvaluationOptions(workers=0))


def test_nothing_of_an_images_size_is_kept(split):
    """Memory stays flat: while a batch is computed, the images of those before are gone."""
    alive = []

    class Watching(torch.nn.Module):
        def forward(self, images):
            assert not self.training
            assert not torch.is_grad_enabled()
            before = [reference() for reference in alive]
            assert sum(image is not None for image in before[:-1]) == 0
            alive.extend(weakref.ref(image) for image in images)
            boxes = torch.tensor([[1.0, 2, 30, 40]], requires_grad=True) + images[0].sum() * 0
            return [{"boxes": boxes, "labels": torch.ones(1).long(), "scores": torch.ones(1)}]

    model = Watching().train()
    found = run_detector(model, split, split.category_ids, EvaluationOptions(workers=0))
    assert model.training
    assert len(alive) == 5
    assert found.image_ids == [1, 2, 3, 4, 5]
    assert all(isinstance(result["bbox"][0], float) for result in found.results)


@pytest.fixture
def ticks(monkeypatch):
    """A clock that ticks once per reading: nothing is measured twice, nothing is left out."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    return ticks


@pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
def test_stages_add_up_to_the_total(split, kind, ticks, monkeypatch):
    read, get = set(), CocoDetection.__getitem__
    monkeypatch.setattr(CocoDetection, "__getitem__", lambda self, index: read.add(index) or get(self, index))
    model = swap_crop_head(tiny_rcnn(kind)).train()
    found = measure_stages(model, split, images=4, among=2)
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())
    assert found["images"] == 4
    assert read == {0, 1}  # only images that were scored
    rows = {row["stage"]: row["ms"] for row in found["rows"]}
    assert list(rows) == UNREFINED
    assert sum(rows.values()) - rows["total"] == pytest.approx(rows["total"])
    pools = {"box": 1, "mask": 2, "keypoint": 2}[kind]
    assert (rows["crop"], rows["head"]) == (1000 * pools, 2000 * pools)  # one tick for each module
    assert rows["decode and transform"] == 2000
    for row in found["rows"]:
        assert 0 <= row["low"] <= row["ms"] <= row["high"]
        assert row["images_per_second"] == pytest.approx(1000 / row["ms"])


@pytest.mark.parametrize(("iou_power", "wanted"), [(0.0, (11000, 1000, 2000)), (0.5, (13000, 1000, 4000))])
def test_the_refinement_is_a_stage(split, monkeypatch, ticks, iou_power, wanted):
    """The whole refinement, once, but for its call of the box head, which is of the stage of the head."""
    model = refined(swap_crop_head(tiny_rcnn()), iterations=2, ascent_steps=2, iou_power=iou_power)
    refine = type(model.roi_heads).refined

    def slow(*arguments, **options):
        for _ in range(10):
            next(ticks)
        return refine(*arguments, **options)

    monkeypatch.setattr(type(model.roi_heads), "refined", staticmethod(slow))
    rows = {row["stage"]: row["ms"] for row in measure_stages(model, split, images=2)["rows"]}
    assert list(rows) == [*STAGES, "total"]
    assert (rows["refinement"], rows["crop"], rows["head"]) == wanted
    assert "refined" not in vars(model.roi_heads)
    model.roi_heads.refinement.enabled = False
    assert [row["stage"] for row in measure_stages(model, split, images=2)["rows"]] == UNREFINED
