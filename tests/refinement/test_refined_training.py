"""A refinement trained with its detector by the usual call: what it adds, and what its losses reach."""

import copy

import pytest
import torch
from support.refined_models import refined
from support.tiny_models import assert_bounded, at_the_deltas, batch, copies, losses_of, tiny_rcnn

from detector import BoxGradient, swap_crop_head
from detector.refinement import losses, remove_refinement

ADDED = ("loss_refinement_box", "loss_refinement_iou")
RPN_LOSS = "loss_rpn_box_reg"


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


def test_its_losses_train_the_backbone_but_not_a_stock_rpn(model):
    loss = sum(losses_of(model, torch.float64)[name] for name in ADDED)
    assert torch.autograd.grad(loss, model.backbone.body["a"][0].weight)[0].any()
    assert not at_the_deltas(model, ADDED)[0].any()


@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_its_losses_reach_a_swapped_rpn_within_the_bound(model, bound):
    swap_crop_head(model, BoxGradient.exact())
    own, others = at_the_deltas(model, (RPN_LOSS,), ADDED)
    swap_crop_head(model, BoxGradient(bound=bound))
    found, alone = at_the_deltas(model, (RPN_LOSS, *ADDED), ADDED)
    assert_bounded(found, own, others, bound)
    assert not alone.any()  # without the RPN's own loss
    swap_crop_head(model, BoxGradient(crop=0, coder=0))
    assert not at_the_deltas(model, ADDED)[0].any()


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
