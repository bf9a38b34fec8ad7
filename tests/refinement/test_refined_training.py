"""A refinement trained with its detector by the usual call: what it adds, and what its losses reach."""

import copy

import pytest
import torch
from support.refined_models import refined
from support.tiny_models import SIZE, batch, copies, losses_of, tiny_rcnn
from torchvision.ops import box_convert, box_iou

from detector import BoxGradient, swap_crop_head
from detector.evaluation.losses import detect_with_losses
from detector.refinement import losses, remove_refinement, roi_heads

ADDED = ("loss_refinement_box", "loss_refinement_iou")


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(losses, "BOXES_PER_IMAGE", 1000)
    monkeypatch.setattr(losses, "MIN_TRAINING_IOU", 0.3)
    return refined(tiny_rcnn().double().train(), std=0.5)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_usual_call_adds_two_losses_and_changes_no_other(kind, swap):
    model = refined(tiny_rcnn(kind).train())
    if swap:
        swap_crop_head(model)
    stock = losses_of(remove_refinement(copy.deepcopy(model)))
    found = losses_of(model)
    assert set(found) == set(stock) | set(ADDED)
    for name, loss in stock.items():
        assert torch.equal(found[name], loss), name
    assert all(found[name] > 0 for name in ADDED)
    sum(found.values()).backward()
    assert all(p.grad.any() for p in model.roi_heads.refinement.parameters())
    model.roi_heads.refinement.enabled = False
    assert set(losses_of(model)) == set(stock)
    model.roi_heads.refinement.enabled = True
    images, targets = batch()
    assert {"boxes", "labels", "scores"} <= model.eval()(images, copies(targets))[0].keys()


@pytest.mark.parametrize("swap", [False, True])
def test_its_losses_train_the_backbone_but_neither_rpn_nor_box_head(model, swap):
    if swap:
        swap_crop_head(model, BoxGradient.exact())
    loss = sum(losses_of(model, torch.float64)[name] for name in ADDED)
    loss.backward()
    assert model.backbone.body["a"][0].weight.grad.any()
    for part in (model.rpn, model.roi_heads.box_head, model.roi_heads.box_predictor):
        assert all(p.grad is None or not p.grad.any() for p in part.parameters())


@pytest.mark.parametrize("swap", [False, True])
def test_it_learns_from_the_boxes_that_the_box_head_decodes(model, swap, monkeypatch):
    """Those of the positive RoIs, by the deltas of their object's class, without a gradient."""
    if swap:
        swap_crop_head(model)
    heads, given, seen = model.roi_heads, [], {}
    sample = roi_heads.sample_training_boxes
    monkeypatch.setattr(roi_heads, "sample_training_boxes", lambda *all: (given.append(all[0]), sample(*all))[1])
    heads.box_roi_pool.register_forward_pre_hook(lambda module, one: (seen.setdefault("rois", one[1]), None)[1])
    heads.box_predictor.register_forward_hook(lambda module, one, out: (seen.setdefault("deltas", out[1]), None)[1])
    losses_of(model, torch.float64)
    (found,) = given
    rois, targets = seen["rois"], batch(torch.float64)[1]
    by_image = seen["deltas"].detach().split([len(b) for b in rois])
    for boxes, own, deltas, target, height in zip(found, rois, by_image, targets, (SIZE, SIZE - 8), strict=True):
        iou, match = box_iou(own.detach(), target["boxes"]).max(1)
        rows = torch.where(iou >= 0.5)[0]
        assert len(rows) >= 3
        assert not boxes.requires_grad
        boxes = boxes[boxes.any(1)]  # those of the background are 0
        labels = target["labels"][match]
        x, y, w, h = torch.stack([deltas[row].view(-1, 4)[labels[row]] for row in rows]).unbind(1)
        start = box_convert(own.detach()[rows], "xyxy", "cxcywh")
        moved = start[:, :2] + torch.stack([x, y], 1) / 10 * start[:, 2:]
        wanted = box_convert(torch.cat([moved, start[:, 2:] * (torch.stack([w, h], 1) / 5).exp()], 1), "cxcywh", "xyxy")
        torch.testing.assert_close(boxes, wanted.clamp(min=0).minimum(wanted.new_tensor([SIZE, height] * 2)))


def test_nothing_of_a_step_stays_in_the_heads(model):
    heads = model.roi_heads
    before = {name: set(vars(module)) for name, module in heads.named_modules()}
    losses_of(model, torch.float64)
    model.eval()
    detect_with_losses(model, *batch(torch.float64))
    assert {name: set(vars(module)) for name, module in heads.named_modules()} == before
    assert not heads.box_predictor._forward_hooks


def test_images_without_objects(model):
    images, targets = batch(torch.float64)
    targets = [{key: value[:0] for key, value in target.items()} for target in targets]
    found = swap_crop_head(model)(images, targets)
    assert not any(found[name].detach() for name in ADDED)
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.roi_heads.refinement.parameters())


@pytest.mark.parametrize("swap", [False, True])
def test_autocast(swap):
    model = refined(tiny_rcnn().train(), train_iterations=2)
    if swap:
        swap_crop_head(model)
    model.rpn.forward = lambda images, features, targets=None: ([torch.zeros(0, 4)] * 2, {})  # jittered boxes only
    wanted = losses_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_of(model)
    for name in ADDED:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], wanted[name], rtol=0.03, atol=0)
        assert found[name] != wanted[name]
