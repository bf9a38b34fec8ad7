"""Readings of the box gradient's watch, against gradients taken one by one."""

import copy

import pytest
import torch
from support.tiny_models import batch, copies, tiny_rcnn
from torchvision.ops import box_iou

from detector import BoxGradient, restore_roi_align, swap_crop_head, watch_box_gradient

SETTINGS = BoxGradient(bound=None)
ALL_ROIS = {"box_batch_size_per_image": 2000, "box_positive_fraction": 1.0}


@pytest.fixture
def model():
    return swap_crop_head(tiny_rcnn(**ALL_ROIS).double().train(), SETTINGS)


def step(model, images, targets):
    torch.manual_seed(0)
    with watch_box_gradient(model) as watch:
        sum(model(images, copies(targets)).values()).backward()
    return watch.reading()


def test_readings(model):
    images, targets = batch(torch.float64)
    seen = {}
    model.rpn.register_forward_hook(lambda _, given, result: seen.update(proposals=result[0]))
    model.rpn.head.register_forward_hook(lambda _, given, result: seen.update(deltas=result[1]))
    torch.manual_seed(0)
    losses = model(images, copies(targets))
    norms = []
    for name in ("loss_box_reg", "loss_rpn_box_reg"):
        gradients = torch.autograd.grad(losses[name], seen["deltas"], retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    cosines = []
    gradients = torch.autograd.grad(losses["loss_box_reg"], seen["proposals"])
    for boxes, gradient, target in zip(seen["proposals"], gradients, targets):
        overlap, truth = box_iou(boxes.detach(), target["boxes"]).max(1)
        for box, slope, goal, iou in zip(boxes.detach(), gradient, target["boxes"][truth], overlap):
            if iou >= 0.5:
                sides = (box[2:] - box[:2]).repeat(2)
                cosines.append(torch.cosine_similarity(-slope * sides, (goal - box) / sides, dim=0).item())
    found = step(model, images, targets)
    assert found["ratio"] == found["passed"] == pytest.approx(float(norms[0] / norms[1]), rel=1e-9)
    assert found["cosine"] == pytest.approx(sum(cosines) / len(cosines))
    assert found["away"] == pytest.approx(sum(c < 0 for c in cosines) / len(cosines))
    assert 0 < found["away"] < 1


@pytest.mark.parametrize("bound", [0.5, 1e-4])
def test_what_the_bound_lets_pass(model, bound):
    free = step(model, *batch(torch.float64))
    bounded = step(swap_crop_head(model, BoxGradient(bound=bound)), *batch(torch.float64))
    assert 0 < bounded.pop("passed") <= bound * (1 + 1e-9)
    free.pop("passed")
    assert bounded == pytest.approx(free, rel=1e-9)


@pytest.mark.parametrize("settings", [SETTINGS, BoxGradient(), BoxGradient(crop=0, coder=0)], ids=str)
def test_watching_changes_no_gradient(model, settings):
    images, targets = batch(torch.float64)
    twin = copy.deepcopy(swap_crop_head(model, settings))
    assert bool(step(model, images, targets)) == settings.enabled
    torch.manual_seed(0)
    sum(twin(images, copies(targets)).values()).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(a.grad, b.grad), name


def test_nothing_to_read(model):
    images, targets = batch(torch.float64)
    empty = [{"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0).long()} for _ in targets]
    assert step(model, images, empty) == {}
    model.requires_grad_(False).roi_heads.requires_grad_(True)
    assert step(model, images, targets) == {}


def test_after_the_block_nothing_is_watched(model):
    with pytest.raises(RuntimeError), watch_box_gradient(model) as watch:
        raise RuntimeError
    sum(model(*batch(torch.float64)).values()).backward()
    assert watch.reading() == {}


def test_a_model_that_is_not_swapped(model):
    for other in (restore_roi_align(copy.deepcopy(model)), torch.nn.DataParallel(model), torch.nn.Identity()):
        with pytest.raises(TypeError, match="swap_crop_head"), watch_box_gradient(other):
            pass
