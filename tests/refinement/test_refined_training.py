"""A refinement trained beside its detector, by the usual call: what it adds, and how far its losses reach."""

import copy

import pytest
import torch
from support.refined_models import refined
from support.tiny_models import batch, copies, tiny_rcnn

from detector import BoxGradient, swap_crop_head
from detector.rcnn.watch import watch_box_gradient
from detector.refinement import remove_refinement

OFF = BoxGradient(crop=0, coder=0)
ADDED = ("loss_refinement_box", "loss_refinement_fit")
RPN_LOSS = "loss_rpn_box_reg"


def losses_of(model, dtype=torch.float64):
    torch.manual_seed(1)
    images, targets = batch(dtype)
    return model(images, copies(targets))


def at_the_deltas(model, *groups):
    """The gradients of sums of losses at the deltas that the RPN's head returns, [anchors, 4]; zeros for none."""
    seen = []
    handle = model.rpn.head.register_forward_hook(lambda _, given, result: seen.extend(result[1]))
    losses = losses_of(model)
    handle.remove()
    found = []
    for names in groups:
        total = sum(losses[name] for name in names)
        gradients = torch.autograd.grad(total, seen, retain_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(s) if g is None else g for g, s in zip(gradients, seen)]
        found.append(torch.cat([g.unflatten(1, (-1, 4)).movedim(2, -1).flatten(0, -2) for g in gradients]))
    return found


@pytest.fixture
def model():
    return refined(tiny_rcnn().double().train(), train_boxes=1000, min_iou=0.3)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_usual_call_adds_two_losses_and_changes_no_other(kind, swap):
    model = refined(tiny_rcnn(kind).double().train())
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


def test_in_eval_mode_there_are_no_losses(model):
    torch.manual_seed(0)
    images, targets = batch(torch.float64)
    assert set(model.eval()(images, copies(targets))[0]) == {"boxes", "labels", "scores"}


def test_its_losses_train_the_backbone(model):
    loss = sum(losses_of(model)[name] for name in ADDED)
    (gradient,) = torch.autograd.grad(loss, model.backbone.body["a"][0].weight)
    assert gradient.any()


def test_in_a_stock_detector_no_loss_of_it_reaches_the_deltas(model):
    (found,) = at_the_deltas(model, ADDED)
    assert not found.any()


@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_in_a_swapped_detector_its_losses_reach_the_deltas_through_the_bound_alone(model, bound):
    swap_crop_head(model, BoxGradient.exact())
    own, others = at_the_deltas(model, (RPN_LOSS,), ADDED)
    swap_crop_head(model, BoxGradient(bound=bound))
    found, alone = at_the_deltas(model, (RPN_LOSS, *ADDED), ADDED)
    wanted, held = own.clone(), 0
    for k, (a, b) in enumerate(zip(own, others)):
        if b.any():
            share = float(bound * a.norm() / b.norm())
            held += a.any() and share < 1
            wanted[k] += min(1, share) * b
    assert held >= 3
    assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()
    assert not alone.any()  # without the RPN's own loss there is nothing to compare it with


def test_with_the_box_gradient_off_its_losses_reach_no_proposal(model):
    swap_crop_head(model, OFF)
    assert not at_the_deltas(model, ADDED)[0].any()
    swap_crop_head(model, BoxGradient(warmup_steps=1, bound=None))
    found = [at_the_deltas(model, ADDED)[0] for _ in range(2)]
    assert not found[0].any()
    assert found[1].any()


def test_what_it_sends_is_seen_by_the_watch(model):
    swap_crop_head(model, BoxGradient(bound=None))
    ratios = []
    for enabled in (False, True):
        model.roi_heads.refinement.enabled = enabled
        with watch_box_gradient(model) as watch:
            sum(losses_of(model).values()).backward()
        ratios.append(watch.reading()["ratio"])
    assert abs(ratios[1] - ratios[0]) > 0.01 * ratios[0]


def test_images_without_objects(model):
    torch.manual_seed(1)
    images, targets = batch(torch.float64)
    for target in targets:
        for key in ("boxes", "labels", "masks", "keypoints"):
            target[key] = target[key][:0]
    losses = swap_crop_head(model)(images, targets)
    assert not any(losses[name].detach() for name in ADDED)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.roi_heads.refinement.parameters())


@pytest.mark.parametrize("swap", [False, True])
def test_under_autocast_the_losses_are_near(swap):
    model = refined(tiny_rcnn().train(), train_looks=2)
    if swap:
        swap_crop_head(model)
    # Of the same boxes to learn from: the RPN's depend on rounding, jittered ones do not.
    model.rpn.forward = lambda images, features, targets=None: ([torch.zeros(0, 4)] * 2, {})
    wanted = losses_of(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_of(model, torch.float32)
    for name in ADDED:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], wanted[name], rtol=0.03, atol=0)
        assert found[name] != wanted[name]


def test_channels_last():
    model = refined(tiny_rcnn().double().train())
    wanted = losses_of(model)
    found = losses_of(model.to(memory_format=torch.channels_last))
    for name in ADDED:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=0)
