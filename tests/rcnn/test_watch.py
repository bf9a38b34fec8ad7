"""What is read off a step, against gradients taken one by one."""

import copy

import pytest
import torch
from support.tiny_models import batch, copies, tiny_rcnn
from torchvision.ops import box_iou

from detector import BoxGradient, restore_roi_align, swap_crop_head
from detector.rcnn.watch import watch_box_gradient

LOSSES = ("loss_classifier", "loss_box_reg")
SETTINGS = BoxGradient(losses=("box", "classification"), bound=None)
EVERY_ROI = {"box_batch_size_per_image": 2000, "box_positive_fraction": 1.0}  # that is drawn: nothing is left to chance


@pytest.fixture
def model():
    return swap_crop_head(tiny_rcnn(**EVERY_ROI).double().train(), SETTINGS)


def step(model, images, targets):
    torch.manual_seed(0)  # the RPN draws anchors
    with watch_box_gradient(model) as watch:
        sum(model(images, copies(targets)).values()).backward()
    return watch.reading()


def proposals_and_deltas(model, images, targets):
    """Losses, and what they can be differentiated with respect to."""
    seen = {}
    handles = [
        model.rpn.register_forward_hook(lambda _, given, result: seen.update(proposals=result[0])),
        model.rpn.head.register_forward_hook(lambda _, given, result: seen.update(deltas=result[1])),
    ]
    losses = model(images, copies(targets))
    for handle in handles:
        handle.remove()
    return losses, seen["proposals"], seen["deltas"]


def test_ratio_is_that_of_the_norms_at_the_deltas(model):
    images, targets = batch(torch.float64)
    losses, _, deltas = proposals_and_deltas(model, images, targets)
    norms = []
    for loss in (sum(losses[name] for name in LOSSES), losses["loss_rpn_box_reg"]):
        gradients = torch.autograd.grad(loss, deltas, retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    assert step(model, images, targets)["ratio"] == pytest.approx(float(norms[0] / norms[1]), rel=1e-9)


@pytest.mark.parametrize("bound", [0.5, 1e-4])
def test_what_the_bound_holds_back_is_seen_beside_what_passes(model, bound):
    images, targets = batch(torch.float64)
    free = step(model, images, targets)
    assert free["passed"] == pytest.approx(free["ratio"], rel=1e-9)
    swap_crop_head(model, BoxGradient(losses=SETTINGS.losses, bound=bound))
    held = step(model, images, targets)
    assert 0 < held.pop("passed") <= bound * (1 + 1e-9)
    free.pop("passed")
    assert held == pytest.approx(free, rel=1e-9)


def test_directions_are_those_of_the_positive_proposals(model):
    images, targets = batch(torch.float64)
    losses, proposals, _ = proposals_and_deltas(model, images, targets)
    gradients = torch.autograd.grad(sum(losses[name] for name in LOSSES), proposals)
    cosines, ious = [], []
    for boxes, gradient, target in zip(proposals, gradients, targets):
        overlap, truth = box_iou(boxes.detach(), target["boxes"]).max(1)
        for box, slope, goal, iou in zip(boxes.detach(), gradient, target["boxes"][truth], overlap):
            if iou >= 0.5:
                sides = (box[2:] - box[:2]).repeat(2)
                descent, way = -slope * sides, (goal - box) / sides
                cosines.append(float(descent @ way / (descent.norm() * way.norm())))
                ious.append(float(iou))
    assert len(ious) >= 5
    assert 0 < sum(c < 0 for c in cosines) < len(cosines)
    seen = step(model, images, targets)
    assert seen["away"] == pytest.approx(sum(c < 0 for c in cosines) / len(cosines))
    assert seen["cosine"] == pytest.approx(sum(cosines) / len(cosines))
    assert seen["iou"] == pytest.approx(sum(ious) / len(ious))


@pytest.mark.parametrize(
    "settings", [SETTINGS, BoxGradient(), BoxGradient(coder=0), BoxGradient(crop=0, coder=0)], ids=str
)
def test_watching_changes_no_gradient(model, settings):
    images, targets = batch(torch.float64)
    swap_crop_head(model, settings)
    twin = copy.deepcopy(model)
    step(model, images, targets)
    torch.manual_seed(0)
    sum(twin(images, copies(targets)).values()).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(a.grad, b.grad), name


def test_with_the_gradient_off_there_is_the_iou_alone(model):
    swap_crop_head(model, BoxGradient(crop=0, coder=0))
    assert set(step(model, *batch(torch.float64))) == {"iou"}


def test_an_image_without_objects(model):
    images, targets = batch(torch.float64)
    empty = [{"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0).long()} for _ in targets]
    assert step(model, images, empty) == {}
    swap_crop_head(model, BoxGradient(losses=SETTINGS.losses, positives_only=False))  # the classification of background
    assert step(model, images, empty) == {}
    assert set(step(model, images, [empty[0], targets[1]])) == {"ratio", "passed", "away", "cosine", "iou"}


def test_after_the_watch_nothing_is_seen_and_nothing_is_kept(model):
    images, targets = batch(torch.float64)
    with pytest.raises(RuntimeError, match="a mistake in the loop"), watch_box_gradient(model) as watch:
        raise RuntimeError("a mistake in the loop")
    sum(model(images, copies(targets)).values()).backward()
    assert watch.reading() == {}
    assert not {"box_gradient_watch"} & {*vars(model.rpn), *vars(model.roi_heads)}


def test_a_model_that_is_not_swapped(model):
    for other in (restore_roi_align(copy.deepcopy(model)), torch.nn.DataParallel(model), torch.nn.Identity()):
        with pytest.raises(TypeError, match="is not swapped: call swap_crop_head first"), watch_box_gradient(other):
            pass


def test_frozen_rpn(model):
    model.requires_grad_(False)
    for parameter in model.roi_heads.parameters():
        parameter.requires_grad_(True)
    assert set(step(model, *batch(torch.float64))) == {"iou"}
