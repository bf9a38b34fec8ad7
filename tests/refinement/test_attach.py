"""Adding and removing a refinement, which leaves the rest of the detector as it is, and training it alone."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refined_models import refined
from support.tiny_models import CHANNELS, SIZE, batch, copies, tiny_rcnn
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from detector import BoxGradient, MultiScaleAffineCrop, restore_roi_align, swap_crop_head
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.refinement import RefinementConfig, add_refinement, refinement_losses, remove_refinement
from detector.refinement.attach import refinement_of
from detector.refinement.feature_cache import FeatureCache, extract_features
from detector.refinement.losses import sample_training_boxes, unrolled_losses
from detector.refinement.roi_heads import AttachedRefinedRoIHeads, RefinedRoIHeads

MODELS = ["box", "mask", "keypoint", "single scale"]
KEEPS_SCORES = RefinementConfig(iou_power=0.0)


def build(name):
    return tiny_rcnn("box" if name == "single scale" else name, fpn=name != "single scale").eval()


def added(model):
    """Add a refinement that has not been trained."""
    return add_refinement(model, KEEPS_SCORES)


def detect(model):
    with torch.no_grad():
        return model.eval()(batch()[0])


def assert_same(found, expected, exact=True):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert len(theirs["boxes"])
        for key, wanted in theirs.items():
            if exact:
                assert torch.equal(ours[key], wanted), key
            else:
                torch.testing.assert_close(ours[key], wanted, rtol=1e-4, atol=1e-3)


def boxes_of(found):
    return torch.cat([one["boxes"] for one in found])


def state_of(model):
    """Return the class of each module, and the names of its attributes."""
    return {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}


def randomize(model):
    """Give an existing refinement random weights, so that it moves boxes."""
    for layer in (model.roi_heads.refinement.head.deltas, model.roi_heads.refinement.head.iou):
        nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("swap", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("name", MODELS)
def test_the_detector_itself_does_not_change(name, swap):
    model = build(name)
    if swap:
        swap_crop_head(model)
    expected, before = detect(model), state_of(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    keys, values = list(model.state_dict()), copy.deepcopy(model.state_dict())

    assert added(model) is model
    assert all((dict(model.named_parameters()) | dict(model.named_buffers()))[n] is t for n, t in tensors.items())
    new = [key for key in model.state_dict() if key not in values]
    assert [key for key in model.state_dict() if key in values] == keys
    assert new
    assert all(key.startswith("roi_heads.refinement.head.") for key in new)
    assert {n for n, kind in state_of(model).items() if n in before and kind != before[n]} == {"roi_heads"}
    assert_same(detect(model), expected, exact=False)  # untrained, it moves no box

    randomize(model)
    assert torch.cdist(boxes_of(detect(model)), boxes_of(expected)).amin(1).max() > 0.5
    model.roi_heads.refinement.enabled = False
    assert_same(detect(model), expected)
    model.roi_heads.refinement.enabled = True
    assert remove_refinement(model) is model
    assert state_of(model) == before
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model.state_dict()[key], value) for key, value in values.items())
    assert_same(detect(model), expected)


def test_scores_of_an_untrained_refinement_are_those_of_the_box_head_at_the_detections():
    """The predicted IoU is a half, and the second score is that of torchvision's heads with detections as proposals."""
    model = build("box")
    images = batch()[0][:1]  # of 64 pixels, which are not resized
    with torch.no_grad():
        (before,) = model(images)
        add_refinement(model, RefinementConfig(iou_power=2.0))
        (found,) = model(images)
        heads, shapes = model.roi_heads, [(SIZE, SIZE)]
        features = model.backbone(model.transform(images)[0].tensors)
        crops = heads.box_roi_pool(features, [before["boxes"]], shapes)
        again = heads.box_predictor(heads.box_head(crops))[0].softmax(1)[torch.arange(len(crops)), before["labels"]]
    scores, order = (before["scores"] * again).sqrt().div(4).sort(descending=True)
    torch.testing.assert_close(found["scores"], scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["boxes"], before["boxes"][order], rtol=1e-4, atol=1e-3)
    assert (order != torch.arange(len(order))).any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_its_weights_are_a_trainable_copy_of_the_box_head(dtype, training):
    model = add_refinement(build("box").requires_grad_(False).to(dtype).train(training))
    refinement = model.roi_heads.refinement
    assert all(module.training == training for module in refinement.modules())
    assert {(p.dtype, p.requires_grad) for p in refinement.parameters()} == {(dtype, True)}
    theirs = list(model.roi_heads.box_head.parameters())
    for ours, other in zip(refinement.head.trunk.parameters(), theirs, strict=True):
        assert torch.equal(ours, other)
        assert ours is not other
        assert not other.requires_grad


def test_it_crops_as_the_detector_does():
    model = build("mask")
    model.roi_heads.box_roi_pool = MultiScaleAffineCrop(
        ["0", "1"], 3, 1, canonical_scale=40, canonical_level=3, aligned=True, sampler="gather"
    )
    ours = add_refinement(model).roi_heads.refinement.pool
    theirs = swap_crop_head(model).roi_heads.box_roi_pool
    for name in ("featmap_names", "output_size", "sampling_ratio", "canonical_scale", "canonical_level"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("aligned", "sampler", "size_divisible"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_sampler_of_a_later_swap_is_the_refinements_too():
    model = add_refinement(build("mask"))
    ours = model.roi_heads.refinement.pool
    pools = (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool, ours)
    for _ in range(2):
        swap_crop_head(model, sampler="gather")
        assert [pool.sampler for pool in pools] == ["gather"] * 3
        swap_crop_head(model)
    restore_roi_align(model)
    assert [type(pool) for pool in pools] == [MultiScaleRoIAlign, MultiScaleRoIAlign, MultiScaleAffineCrop]
    assert ours.sampler == "gather"


def test_a_second_call_changes_the_settings_and_keeps_the_weights():
    model = refined(build("box"), std=0.5, iterations=1)
    refinement, before, one = model.roi_heads.refinement, copy.deepcopy(model.state_dict()), detect(model)
    config = RefinementConfig(iterations=3, ascent_steps=2, iou_power=0.0)
    add_refinement(model, config)
    assert model.roi_heads.refinement is refinement
    assert refinement.config == config
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not torch.equal(boxes_of(detect(model)), boxes_of(one))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("order", [(refined, swap_crop_head), (swap_crop_head, refined)], ids=["added", "swapped"])
def test_a_swapped_and_refined_model_pickles(order):
    model = build("mask")
    stock = detect(model)
    for change in order:
        change(model)
    twin = pickled(model)
    assert type(twin.roi_heads) is type(model.roi_heads) is AttachedRefinedRoIHeads
    assert_same(detect(twin), detect(model))
    assert type(remove_refinement(twin).roi_heads) is AttachedRoIHeads
    assert type(restore_roi_align(twin).roi_heads) is RoIHeads
    assert_same(detect(twin), stock)
    images, targets = batch()
    sum(model.train()(images, copies(targets)).values()).backward()
    twin = restore_roi_align(pickled(model))
    assert type(twin.roi_heads) is RefinedRoIHeads
    assert_same(detect(pickled(twin)), detect(model), exact=False)


# --- With the swap, in every order -----------------------------------------------------------------------------------


class OwnHeads(RoIHeads):
    """A user's subclass without a forward."""

    def postprocess_detections(self, *args):
        boxes, scores, labels = super().postprocess_detections(*args)
        return boxes, [s / 2 for s in scores], labels


HALF = BoxGradient(crop=0.5)
CHANGES = {
    "add": added,
    "remove": remove_refinement,
    "swap": lambda model: swap_crop_head(model, HALF),
    "restore": restore_roi_align,
}


@pytest.fixture(scope="module")
def bases():
    models = {kind: build("mask") for kind in (RoIHeads, OwnHeads)}
    models[OwnHeads].roi_heads.__class__ = OwnHeads
    return models


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from([RoIHeads, OwnHeads]), names=st.lists(st.sampled_from(sorted(CHANGES)), max_size=7))
def test_changes_in_any_order(bases, kind, names):
    model = copy.deepcopy(bases[kind])
    before = state_of(model)
    swapped = has_refinement = False
    for name in names:
        known = refinement_of(model)
        CHANGES[name](model)
        swapped = {"swap": True, "restore": False}.get(name, swapped)
        has_refinement = {"add": True, "remove": False}.get(name, has_refinement)
        heads = model.roi_heads
        assert isinstance(heads, kind)
        assert isinstance(heads, AttachedRoIHeads) == swapped
        assert isinstance(heads, RefinedRoIHeads) == has_refinement == (refinement_of(model) is not None)
        assert not (known and has_refinement) or refinement_of(model) is known
        assert type(heads.box_roi_pool) is (MultiScaleAffineCrop if swapped else MultiScaleRoIAlign)
        order = [c for c in type(heads).__mro__ if c in (AttachedRoIHeads, RefinedRoIHeads, kind)]
        assert order == sorted(order, key=[AttachedRoIHeads, RefinedRoIHeads, kind].index)
        if swapped:
            assert heads.box_gradient == model.rpn.box_gradient == HALF
    remove_refinement(restore_roi_align(model))
    assert state_of(model) == before


class OwnForward(RoIHeads):
    def forward(self, *args):
        return super().forward(*args)


def test_models_that_cannot_be_refined_are_refused_and_left_as_they_are():
    with torch.device("meta"):
        others = [detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None), nn.Identity()]
    own = build("box")
    own.roi_heads.__class__ = OwnForward
    predictor = build("box")
    predictor.roi_heads.box_predictor = nn.Identity()
    for model in (*others, own, predictor):
        before = state_of(model)
        with pytest.raises(TypeError):
            add_refinement(model)
        assert state_of(model) == before
    with pytest.raises(TypeError, match="config"):
        add_refinement(build("box"), {"iterations": 1})
    with pytest.raises(TypeError, match="add_refinement"):
        refinement_losses(build("box"), *batch())


# --- Training the refinement alone -----------------------------------------------------------------------------------


def with_batch_norm():
    """A refined model with batch norm in its backbone and its heads."""
    model = tiny_rcnn()
    model.backbone.body["b"] = nn.Sequential(model.backbone.body["b"], nn.BatchNorm2d(CHANNELS))
    model.roi_heads.box_head = nn.Sequential(*model.roi_heads.box_head, nn.BatchNorm1d(16))
    return refined(model)


def only_boxes(targets):
    return [{"boxes": target["boxes"]} for target in targets]


@pytest.mark.parametrize("swap", [False, True])
def test_the_detector_gets_no_gradient(swap):
    model = with_batch_norm().train()
    if swap:
        swap_crop_head(model, BoxGradient.exact())
    model.backbone.body["b"].eval()  # a user's choice
    modes = {name: module.training for name, module in model.named_modules()}
    own = {n: v.clone() for n, v in model.state_dict().items() if "refinement" not in n}
    images, targets = batch()
    losses = refinement_losses(model, images, only_boxes(targets))
    assert set(losses) == {"loss_refinement_box", "loss_refinement_iou"}
    sum(losses.values()).backward()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[n], v) for n, v in own.items())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("refinement" in name), name
    with pytest.raises(TypeError):
        refinement_losses(model, [(255 * image).byte() for image in images], only_boxes(targets))
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize(
    ("boxes", "error", "row"),
    [
        ([[30.0, 20.0, 10.0, 15.0]], ValueError, 0),  # x, y, width and height
        ([[3.0, 2.0, 10.0, 15.0], [3.0, 2.0, 3.0, 15.0]], ValueError, 1),
        ([[3.0, 2.0, float("nan"), 15.0]], ValueError, 0),
        ([[3.0, 2.0, float("inf"), 15.0]], ValueError, 0),
        ([[64.0, 2.0, 70.0, 15.0]], ValueError, 0),
        ([[3.0, -9.0, 7.0, 0.0]], ValueError, 0),
        (torch.zeros(0), ValueError, None),
        (torch.ones(2, 5), ValueError, None),
        (torch.zeros(0, 4, dtype=torch.bool), TypeError, None),
        (torch.zeros(0, 4, dtype=torch.bfloat16), TypeError, None),
        (None, TypeError, None),
    ],
)
def test_invalid_ground_truth_is_named(boxes, error, row):
    images, targets = batch()
    targets[1]["boxes"] = torch.tensor(boxes) if isinstance(boxes, list) else boxes
    with pytest.raises(error) as caught:
        refinement_losses(refined(tiny_rcnn()), images, targets)
    assert str(caught.value).startswith("targets[1]['boxes']" + ("" if row is None else f"[{row}]"))


def test_images_and_targets_that_do_not_match():
    model = refined(tiny_rcnn())
    images, targets = batch()
    for some, of_them in ((images, targets[:1]), (images[:1], targets), ([], [])):
        with pytest.raises(ValueError, match="images and targets"):
            refinement_losses(model, some, of_them)
    with pytest.raises(ValueError, match=r"images\[1\]"):
        refinement_losses(model, [images[0], images[1][0]], targets)


def test_boxes_may_reach_outside_and_be_integers():
    images, targets = batch()
    targets[1]["boxes"] = torch.tensor([[-5, -3, 30, 20], [40, 30, 90, 80], [63, 55, 64, 56]])
    found = []
    for of_type in (only_boxes(targets), [{"boxes": t["boxes"].float()} for t in targets]):
        torch.manual_seed(0)
        found.append(refinement_losses(refined(tiny_rcnn()), images, of_type))
    assert found[0] == found[1]
    assert found[0]["loss_refinement_box"] > 0


def test_the_losses_are_those_at_the_detectors_boxes():
    model = refined(tiny_rcnn(min_size=96, max_size=96).train())
    images, targets = batch()
    before = copy.deepcopy(targets)
    torch.manual_seed(4)
    found = refinement_losses(model, images, targets)
    assert all(torch.equal(t["boxes"], b["boxes"]) and t.keys() == b.keys() for t, b in zip(targets, before))
    # By hand, from the detector without a refinement.
    stock, seen = remove_refinement(copy.deepcopy(model)).eval(), []
    stock.backbone.register_forward_hook(lambda _, given, result: seen.append(result))
    with torch.no_grad():
        boxes = [stock([image])[0]["boxes"] * 1.5 for image in images]
    maps = {name: torch.cat([one[name] for one in seen]) for name in seen[0]}
    sizes = [(96, 96), (84, 96)]
    torch.manual_seed(4)
    sampled, matched = sample_training_boxes(boxes, [target["boxes"] * 1.5 for target in targets], sizes)
    wanted = unrolled_losses(model.roi_heads.refinement, maps, sampled, matched, sizes)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects(empty):
    model = with_batch_norm().train()
    images, targets = batch()
    targets = [{"boxes": t["boxes"][:0] if i in empty else t["boxes"]} for i, t in enumerate(targets)]
    losses = refinement_losses(model, images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert (losses["loss_refinement_box"] > 0) == (len(empty) < 2)
    assert all(parameter.grad.isfinite().all() for parameter in model.roi_heads.refinement.parameters())


def test_the_cache_keeps_features_by_the_pixels_of_the_image():
    model = refined(tiny_rcnn())
    images, targets = batch()
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    cache = FeatureCache(10**7)
    flipped = [images[0].flip(2), images[1]]
    found = []
    for shown, kept in ((images, None), (images, cache), (images, cache), (flipped, None), (flipped, cache)):
        torch.manual_seed(2)
        found.append(refinement_losses(model, shown, targets, cache=kept))
    assert len(calls) == 2 + 2 + 0 + 2 + 1
    assert found[0] == found[1] == found[2]
    assert found[3] == found[4] != found[0]
    model.eval()
    for blank in (torch.zeros(3, 48, 64), torch.zeros(3, 64, 48)):
        assert cache(model, blank).size == extract_features(model, blank).size
    # Memory for the first image only.
    one = FeatureCache(10**7)
    refinement_losses(model, images[:1], targets[:1], cache=one)
    calls.clear()
    cache = FeatureCache(one.nbytes)
    for _ in range(3):
        refinement_losses(model, images, targets, cache=cache)
    assert len(calls) == 2 + 1 + 1
    assert cache.nbytes == one.nbytes
