"""A refinement trained with its detector by the usual call: what it adds, and what its losses reach."""

import copy

import pytest
import torch
from support.refined_models import refined
from support.tiny_models import SIZE, batch, copies, losses_of, tiny_rcnn
from torchvision.ops import MultiScaleRoIAlign, box_convert, box_iou

from detector import BoxGradient, swap_crop_head
from detector.evaluation.losses import detect_with_losses
from detector.refinement import losses, remove_refinement, roi_heads

OF_THE_REFINEMENT = ("loss_refinement_box", "loss_refinement_iou")
AGAIN = "loss_classifier_again"
ADDED = (*OF_THE_REFINEMENT, AGAIN)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(losses, "BOXES_PER_IMAGE", 1000)
    monkeypatch.setattr(losses, "MIN_TRAINING_IOU", 0.3)
    return refined(tiny_rcnn().double().train(), std=0.5)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_usual_call_adds_three_losses_and_changes_no_other(kind, swap):
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
def test_which_parts_its_losses_train(model, swap):
    if swap:
        swap_crop_head(model, BoxGradient.exact())
    heads = model.roi_heads
    found = losses_of(model, torch.float64)
    box_head = [heads.box_head, heads.box_predictor.cls_score]
    for names, trained in ((OF_THE_REFINEMENT, [heads.refinement]), ((AGAIN,), box_head)):
        model.zero_grad()
        sum(found[name] for name in names).backward(retain_graph=True)
        assert model.backbone.body["a"][0].weight.grad.any()
        for part in (model.rpn, heads.refinement, heads.box_predictor.bbox_pred, *box_head):
            reached = any(p.grad is not None and p.grad.any() for p in part.parameters())
            assert reached == (part in trained)


@pytest.mark.parametrize("swap", [False, True])
def test_it_learns_from_the_boxes_that_the_box_head_decodes(model, swap, monkeypatch):
    """An RoI takes the deltas of its object's class, or of the class with the highest score; without a gradient."""
    if swap:
        swap_crop_head(model)
    heads, given, seen = model.roi_heads, [], {}
    sample = roi_heads.sample_training_boxes
    monkeypatch.setattr(roi_heads, "sample_training_boxes", lambda *all: (given.append(all[0]), sample(*all))[1])
    heads.box_roi_pool.register_forward_pre_hook(lambda module, one: (seen.setdefault("rois", one[1]), None)[1])
    heads.box_predictor.register_forward_hook(lambda module, one, out: (seen.setdefault("out", out), None)[1])
    again = losses_of(model, torch.float64)[AGAIN]
    (found,) = given
    rois, targets = seen["rois"], batch(torch.float64)[1]
    counts = [len(b) for b in rois]
    scores, deltas = (part.detach().split(counts) for part in seen["out"])
    sizes = [(SIZE, SIZE), (SIZE - 8, SIZE)]
    classes = []
    for image, (boxes, own, (height, width)) in enumerate(zip(found, rois, sizes, strict=True)):
        assert not boxes.requires_grad
        iou, match = box_iou(own.detach(), targets[image]["boxes"]).max(1)
        best = scores[image][:, 1:].argmax(1) + 1
        labels = torch.where(iou >= 0.5, targets[image]["labels"][match], best)
        assert len(set(labels.tolist())) > 1
        assert (iou >= 0.5).sum() >= 3
        x, y, w, h = deltas[image].unflatten(1, (-1, 4))[torch.arange(len(own)), labels].unbind(1)
        start = box_convert(own.detach(), "xyxy", "cxcywh")
        moved = start[:, :2] + torch.stack([x, y], 1) / 10 * start[:, 2:]
        wanted = box_convert(torch.cat([moved, start[:, 2:] * (torch.stack([w, h], 1) / 5).exp()], 1), "cxcywh", "xyxy")
        wanted = wanted.clamp(min=0).minimum(wanted.new_tensor([width, height] * 2))
        thin = ((wanted[:, 2:] - wanted[:, :2]) < 1).any(1, keepdim=True)
        torch.testing.assert_close(boxes, torch.where(thin, own.detach(), wanted))
        iou, match = box_iou(boxes, targets[image]["boxes"]).max(1)
        classes.append(torch.where(iou >= 0.5, targets[image]["labels"][match], 0))
    assert (torch.cat(classes) > 0).any()
    # The box head classifies these boxes, not its RoIs.
    maps = model.backbone(model.transform(batch(torch.float64)[0])[0].tensors)
    crops = MultiScaleRoIAlign(["0", "1", "2"], 3, 2, canonical_scale=32, canonical_level=3)(maps, found, sizes)
    wanted = torch.nn.functional.cross_entropy(heads.box_predictor(heads.box_head(crops))[0], torch.cat(classes))
    torch.testing.assert_close(again, wanted)


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
    assert not any(found[name].detach() for name in OF_THE_REFINEMENT)
    assert found[AGAIN] > 0
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.roi_heads.refinement.parameters())


def test_a_step_in_which_every_decoded_box_is_ignored(model, monkeypatch):
    """Their IoU is between the matcher's thresholds, so none has a label."""
    heads = model.roi_heads
    heads.proposal_matcher.low_threshold = 0.0
    corner = torch.tensor([[0.0, 0.0, 1.5, 1.5]], dtype=torch.float64)
    monkeypatch.setattr(heads, "_decoded", lambda rois, *_: [corner.repeat(len(boxes), 1) for boxes in rois])
    found = losses_of(model, torch.float64)
    assert found[AGAIN] == 0
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in heads.box_predictor.parameters())


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
