"""A refinement comes into a detector and out of it, and leaves all else as it is."""

import copy
import dataclasses
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refined_models import PLAIN, refined
from support.tiny_models import CHANNELS, batch, copies, pool, tiny_rcnn
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from detector import BoxGradient, MultiScaleAffineCrop, restore_roi_align, swap_crop_head
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.refinement import RefinementConfig, add_refinement, refinement_losses, remove_refinement
from detector.refinement.attach import freeze_detector, refinement_of
from detector.refinement.losses import boxes_to_learn_from, unrolled_losses
from detector.refinement.roi_heads import AttachedRefinedRoIHeads, RefinedRoIHeads
from detector.refinement.seen import FeatureCache

MODELS = ["fasterrcnn_mobilenet_v3_large_320_fpn", "box", "mask", "keypoint", "single scale"]
ALL = RefinementConfig(**PLAIN)


def build(name):
    torch.manual_seed(0)
    if name not in MODELS[:1]:
        return tiny_rcnn("box" if name == "single scale" else name, fpn=name != "single scale").eval()
    few = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_test": 20, "rpn_score_thresh": 0.0}
    few |= {"box_score_thresh": 0.0, "box_detections_per_img": 5}
    return getattr(detection, name)(weights=None, weights_backbone=None, **few).eval()


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
    """The class of each module, and what stands in it beside parameters, buffers and modules."""
    return {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}


def shaken(model):
    """A refinement that is there gets random weights: it moves boxes, wherever the fit does not fall."""
    for parameter in model.roi_heads.refinement.parameters():
        if parameter.shape[0] in (1, 4):
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("swap", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("name", MODELS)
def test_the_detector_stays_what_it_is(name, swap):
    model = build(name)
    if swap:
        swap_crop_head(model)
    expected, before = detect(model), state_of(model)
    own = {"parameters": dict(model.named_parameters()), "buffers": dict(model.named_buffers())}
    keys, values = list(model.state_dict()), copy.deepcopy(model.state_dict())

    assert add_refinement(model, ALL) is model
    found = {"parameters": dict(model.named_parameters()), "buffers": dict(model.named_buffers())}
    for kind, tensors in own.items():
        assert all(found[kind][n] is tensor for n, tensor in tensors.items())
    added = [key for key in model.state_dict() if key not in values]
    assert [key for key in model.state_dict() if key in values] == keys
    assert added
    assert all(key.startswith("roi_heads.refinement.") for key in added)
    assert {n for n, kind in state_of(model).items() if n in before and kind != before[n]} == {"roi_heads"}
    # Its outputs are zero: the boxes are those before, to rounding.
    assert_same(detect(model), expected, exact=False)

    shaken(model)
    assert (boxes_of(detect(model)) - boxes_of(expected)).abs().max() > 0.5
    model.roi_heads.refinement.enabled = False
    assert_same(detect(model), expected)
    model.roi_heads.refinement.enabled = True
    assert remove_refinement(model) is model
    assert state_of(model) == before
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model.state_dict()[key], value) for key, value in values.items())
    assert_same(detect(model), expected)


@torch.no_grad()
def test_before_it_is_trained_the_fit_is_a_half_everywhere():
    """So detections that are ranked by it keep their boxes and their order, at lower scores."""
    model = build("box")
    before = model(batch()[0])
    add_refinement(model, dataclasses.replace(ALL, fit_power=2.0))
    for found, wanted in zip(model(batch()[0]), before, strict=True):
        assert_same([found], [wanted | {"scores": wanted["scores"] / 4}], exact=False)


def test_its_weights_are_copies_of_the_box_head_trained_though_that_is_frozen():
    model = build("box").requires_grad_(False)
    add_refinement(model, RefinementConfig(stages=2))
    trunks = [stage.trunk for stage in model.roi_heads.refinement.stages]
    for trunk in trunks:
        for ours, theirs in zip(trunk.parameters(), model.roi_heads.box_head.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours is not theirs
            assert ours.requires_grad
            assert not theirs.requires_grad
    assert not {id(p) for p in trunks[0].parameters()} & {id(p) for p in trunks[1].parameters()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_are_the_detectors(dtype, training):
    model = add_refinement(build("box").to(dtype).train(training), ALL)
    assert {p.dtype for p in model.roi_heads.refinement.parameters()} == {dtype}
    assert all(module.training == training for module in model.roi_heads.refinement.modules())
    if dtype == torch.float64:
        with torch.no_grad():
            assert model.eval()([image.to(dtype) for image in batch()[0]])[0]["boxes"].dtype == dtype


def test_the_head_crops_as_the_detector_does():
    model = build("box")
    model.roi_heads.box_roi_pool = MultiScaleAffineCrop(
        ["0", "1"], 3, 1, canonical_scale=40, canonical_level=3, aligned=True, sampler="gather"
    )
    ours = add_refinement(model).roi_heads.refinement.pool
    theirs = swap_crop_head(model).roi_heads.box_roi_pool
    assert vars(ours).keys() == vars(theirs).keys()
    names = ("featmap_names", "output_size", "sampling_ratio", "canonical_scale", "canonical_level", "aligned")
    for name in (*names, "sampler", "size_divisible"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_sampler_of_a_later_swap_is_the_refinements_too():
    model = add_refinement(build("mask"))
    ours = model.roi_heads.refinement.pool
    pools = (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool, ours)
    swap_crop_head(model, sampler="gather")
    assert [pool.sampler for pool in pools] == ["gather"] * 3
    swap_crop_head(model)
    assert [pool.sampler for pool in pools] == ["gather"] * 3
    restore_roi_align(model)
    assert model.roi_heads.refinement.pool is ours
    assert [type(pool) for pool in pools] == [MultiScaleRoIAlign, MultiScaleRoIAlign, MultiScaleAffineCrop]
    assert "sampler" not in vars(pools[0])
    assert ours.sampler == "gather"


def test_the_settings_say_how_the_head_samples():
    model = add_refinement(build("box"), dataclasses.replace(ALL, sampling="exact"))
    assert model.roi_heads.refinement.pool.sampling == "exact"
    add_refinement(model, ALL)
    assert model.roi_heads.refinement.pool.sampling == "points"


def test_a_second_call_changes_the_settings_and_keeps_the_weights():
    model = refined(build("box"), looks=1)
    refinement, before = model.roi_heads.refinement, copy.deepcopy(model.state_dict())
    one = detect(model)
    config = dataclasses.replace(ALL, looks=3, climbs=2)
    add_refinement(model, config)
    assert model.roi_heads.refinement is refinement
    assert refinement.config == config
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not torch.equal(boxes_of(detect(model)), boxes_of(one))
    add_refinement(model, dataclasses.replace(ALL, looks=1))
    assert_same(detect(model), one)
    add_refinement(model, dataclasses.replace(ALL, stages=2))  # there are no weights for that
    assert len(model.roi_heads.refinement.stages) == 2


@pytest.mark.parametrize("swap", [False, True])
def test_state_dict_and_deepcopy(swap):
    model = refined(build("mask"), stages=2)
    if swap:
        swap_crop_head(model)
    expected = detect(model)
    twin = copy.deepcopy(model)
    assert_same(detect(twin), expected)
    remove_refinement(twin)
    assert refinement_of(model) is not None  # the twin is a model of its own
    assert_same(detect(model), expected)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = add_refinement(tiny_rcnn("mask", seed=5).eval(), dataclasses.replace(ALL, stages=2))
    if swap:
        swap_crop_head(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(detect(other), expected)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_refined_model_pickles():
    model = refined(build("box"))
    twin = pickled(model)
    assert type(twin.roi_heads) is RefinedRoIHeads
    assert_same(detect(twin), detect(model))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("order", [(refined, swap_crop_head), (swap_crop_head, refined)], ids=["added", "swapped"])
def test_a_model_that_is_swapped_and_refined_pickles(order, used):
    model = build("mask")
    stock = detect(model)
    for change in order:
        change(model)
    if used:
        images, targets = batch()
        sum(model.train()(images, copies(targets)).values()).backward()
    twin = pickled(model)
    assert type(twin.roi_heads) is type(model.roi_heads) is AttachedRefinedRoIHeads
    assert_same(detect(twin), detect(model))
    remove_refinement(twin)
    assert type(twin.roi_heads) is AttachedRoIHeads
    restore_roi_align(twin)
    assert type(twin.roi_heads) is RoIHeads
    if not used:
        assert_same(detect(twin), stock)
    twin = restore_roi_align(pickled(model))
    assert type(twin.roi_heads) is RefinedRoIHeads
    assert_same(detect(twin), detect(model), exact=False)
    assert refinement_of(model) is not None


def test_a_users_class_of_both_is_not_taken_for_ours():
    class Both(RefinedRoIHeads, OwnHeads):
        def postprocess_detections(self, *args):
            raise AssertionError

    model = build("box")
    model.roi_heads.__class__ = OwnHeads
    detect(add_refinement(model))
    assert type(model.roi_heads).__bases__ == Both.__bases__
    assert type(model.roi_heads) is not Both


# --- With the swap, in every order -----------------------------------------------------------------------------------


class OwnHeads(RoIHeads):
    """A user's subclass that changes one step and has no forward of its own."""

    def postprocess_detections(self, *args):
        boxes, scores, labels = super().postprocess_detections(*args)
        return boxes, [s / 2 for s in scores], labels


HALF = BoxGradient(crop=0.5)
CHANGES = {
    "add": lambda model: add_refinement(model, ALL),
    "remove": remove_refinement,
    "swap": lambda model: swap_crop_head(model, HALF),
    "restore": restore_roi_align,
}


@pytest.fixture(scope="module")
def bases():
    models = {kind: build("mask") for kind in (RoIHeads, OwnHeads)}
    models[OwnHeads].roi_heads.__class__ = OwnHeads
    return models


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from([RoIHeads, OwnHeads]), names=st.lists(st.sampled_from(sorted(CHANGES)), max_size=7))
def test_adding_swapping_restoring_and_removing_in_any_order(bases, kind, names):
    model = copy.deepcopy(bases[kind])
    before = state_of(model)
    swapped = added = False
    for name in names:
        known = refinement_of(model)
        CHANGES[name](model)
        swapped = {"swap": True, "restore": False}.get(name, swapped)
        added = {"add": True, "remove": False}.get(name, added)
        heads = model.roi_heads
        assert isinstance(heads, kind)
        assert isinstance(heads, AttachedRoIHeads) == swapped
        assert isinstance(heads, RefinedRoIHeads) == added == (refinement_of(model) is not None)
        if known is not None and added:
            assert refinement_of(model) is known
        if swapped:
            assert heads.box_gradient == model.rpn.box_gradient == HALF
            # What the swap does comes first, for it detaches proposals.
            assert type(heads).__mro__.index(AttachedRoIHeads) < type(heads).__mro__.index(kind)
            if added:
                order = type(heads).__mro__
                assert order.index(AttachedRoIHeads) < order.index(RefinedRoIHeads) < order.index(kind)
        assert type(heads.box_roi_pool) is (MultiScaleAffineCrop if swapped else MultiScaleRoIAlign)
        if added:
            assert type(heads.refinement.pool) is MultiScaleAffineCrop
    remove_refinement(restore_roi_align(model))
    assert state_of(model) == before


@pytest.mark.parametrize("kind", [RoIHeads, OwnHeads])
@pytest.mark.parametrize("order", [("add", "swap"), ("swap", "add")])
@pytest.mark.parametrize("first_out", ["remove", "restore"])
def test_detections_on_the_way_in_and_out(bases, kind, order, first_out):
    model = copy.deepcopy(bases[kind])
    stock = detect(model)
    assert kind is RoIHeads or max(float(found["scores"].max()) for found in stock) < 0.5
    for name in order:
        CHANGES[name](model)
        assert_same(detect(model), stock, exact=False)
    refinement = shaken(model).roi_heads.refinement
    both = detect(model)
    assert (boxes_of(both) - boxes_of(stock)).abs().max() > 0.5
    CHANGES[first_out](model)
    if first_out == "remove":
        assert_same(detect(model), stock, exact=False)
        restore_roi_align(model)
    else:
        assert_same(detect(model), both, exact=False)
        assert model.roi_heads.refinement is refinement
        remove_refinement(model)
    assert_same(detect(model), stock)


# --- What is refused -------------------------------------------------------------------------------------------------


class OwnForward(RoIHeads):
    def forward(self, *args):
        return super().forward(*args)


def test_models_that_cannot_be_refined_are_refused_and_left_as_they_are():
    with torch.device("meta"):
        retina = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    model = build("box")
    own, other = copy.deepcopy(model), copy.deepcopy(model)
    own.roi_heads.__class__ = OwnForward
    other.roi_heads.box_predictor = nn.Sequential(nn.Flatten())
    cases = {
        "RetinaNet has no RoI pooler": (retina, ALL),
        "OwnForward has a forward of its own": (own, ALL),
        "Sequential has no linear cls_score": (other, ALL),
        "config must be a RefinementConfig, got {'looks': 2}": (model, {"looks": 2}),
    }
    for message, (wrong, config) in cases.items():
        before = state_of(wrong)
        with pytest.raises(TypeError, match=message):
            add_refinement(wrong, config)
        assert state_of(wrong) == before


def test_removing_from_a_model_without_one():
    model = build("box")
    before = state_of(model)
    assert remove_refinement(model) is model
    assert state_of(model) == before


# --- Trained alone ---------------------------------------------------------------------------------------------------


def with_batch_norm():
    """A detector with batch norm in its backbone and its box head."""
    model = tiny_rcnn(
        box_roi_pool=pool(["0", "1", "2"]),
        box_head=FastRCNNConvFCHead((CHANNELS, 3, 3), [4], [16], norm_layer=nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(16, 3),
    )
    model.backbone.body["a"].append(nn.BatchNorm2d(CHANNELS))
    return refined(model)


def only_boxes(targets):
    return [{"boxes": target["boxes"]} for target in targets]


@pytest.mark.parametrize("swap", [False, True])
def test_the_detector_learns_nothing_from_the_losses_of_the_refinement(swap):
    model = with_batch_norm().train()
    if swap:
        swap_crop_head(model, BoxGradient.exact())
    model.backbone.body["b"].eval()  # a user's own
    model.roi_heads.refinement.stages[0].fit.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    own = {n: v.clone() for n, v in model.state_dict().items() if "refinement" not in n}
    images, targets = batch()
    losses = refinement_losses(model, images, only_boxes(targets))
    assert set(losses) == {"loss_refinement_box", "loss_refinement_fit"}
    sum(losses.values()).backward()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[n], v) for n, v in own.items())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("refinement" in name), name
    assert model.roi_heads.refinement.enabled
    # After a mistake, too.
    with pytest.raises(TypeError, match="floating type"):
        refinement_losses(model, [(255 * image).byte() for image in images], only_boxes(targets))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.roi_heads.refinement.enabled


@pytest.mark.parametrize(
    ("boxes", "error", "field"),
    [
        ([[30.0, 20.0, 10.0, 15.0]], ValueError, r"\['boxes'\]\[0\]"),  # x, y, width and height
        ([[3.0, 2.0, 10.0, 15.0], [3.0, 2.0, 3.0, 15.0]], ValueError, r"\['boxes'\]\[1\]"),
        ([[3.0, 2.0, float("nan"), 15.0]], ValueError, r"\['boxes'\]\[0\]"),
        ([[3.0, 2.0, float("inf"), 15.0]], ValueError, r"\['boxes'\]\[0\]"),
        ([[64.0, 2.0, 70.0, 15.0]], ValueError, r"\['boxes'\]\[0\]"),
        ([[3.0, -9.0, 7.0, 0.0]], ValueError, r"\['boxes'\]\[0\]"),
        (torch.zeros(0), ValueError, r"\['boxes'\]"),
        (torch.ones(2, 5), ValueError, r"\['boxes'\]"),
        (torch.zeros(0, 4, dtype=torch.bool), TypeError, r"\['boxes'\]"),
        (torch.zeros(0, 4, dtype=torch.bfloat16), TypeError, r"\['boxes'\]"),
        (((1, 2, 3, 4),), TypeError, r"\['boxes'\]"),
        (None, TypeError, r"\['boxes'\]"),
    ],
)
def test_true_boxes_of_which_nothing_can_be_learned_are_refused(boxes, error, field):
    model = refined(tiny_rcnn())
    images, targets = batch()
    targets[1]["boxes"] = torch.tensor(boxes) if isinstance(boxes, list) else boxes
    with pytest.raises(error, match=rf"^targets\[1\]{field}"):
        refinement_losses(model, images, targets)


def test_targets_that_are_not_there_are_refused():
    model = refined(tiny_rcnn())
    images, targets = batch()
    with pytest.raises(ValueError, match=r"targets\[1\]\['boxes'\]"):
        refinement_losses(model, images, [targets[0], {}])
    for some, of_them in ((images, targets[:1]), (images[:1], targets), ([], [])):
        with pytest.raises(ValueError, match=rf"images has {len(some)} .* targets {len(of_them)}"):
            refinement_losses(model, some, of_them)
    with pytest.raises(ValueError, match=r"images\[1\]"):
        refinement_losses(model, [images[0], images[1][0]], targets)


def test_true_boxes_that_reach_outside_and_whole_numbers_are_taken():
    """As in torchvision's own training, to which such boxes are no mistake."""
    images, targets = batch()
    targets[1]["boxes"] = torch.tensor([[-5, -3, 30, 20], [40, 30, 90, 80], [63, 55, 64, 56]])
    targets[1]["labels"] = torch.ones(3, dtype=torch.int64)
    model = refined(tiny_rcnn().train())
    assert all(loss.isfinite() for loss in model(images, copies(targets)).values())
    found = []
    for whole in (True, False):
        torch.manual_seed(0)
        of_type = [{"boxes": t["boxes"] if whole else t["boxes"].float()} for t in targets]
        found.append(refinement_losses(model, images, of_type))
    assert found[0] == found[1]
    assert found[0]["loss_refinement_box"] > 0


def test_beside_the_detector_torchvision_refuses_boxes_without_a_size():
    model = refined(tiny_rcnn().train())
    images, targets = batch()
    targets[1]["boxes"] = targets[1]["boxes"][:, [2, 3, 0, 1]]
    with pytest.raises(AssertionError, match="positive height and width"):
        model(images, targets)


def test_the_losses_are_those_at_the_detectors_boxes_without_the_refinement():
    model = refined(tiny_rcnn(min_size=96, max_size=96).train(), min_iou=0.1, train_boxes=1000)
    images, targets = batch()
    torch.manual_seed(4)
    found = refinement_losses(model, images, only_boxes(targets))
    # By hand, of the detector in eval mode before there was a refinement.
    stock, seen = remove_refinement(copy.deepcopy(model)).eval(), []
    stock.backbone.register_forward_hook(lambda _, given, result: seen.append(result))
    detections, sizes = [], [(96, 96), (84, 96)]
    with torch.no_grad():
        for image in images:
            detections += stock([image])
    maps = {name: torch.cat([one[name] for one in seen]) for name in seen[0]}
    boxes = [one["boxes"] * 1.5 for one in detections]
    truth = [target["boxes"] * 1.5 for target in targets]
    refinement = model.roi_heads.refinement
    torch.manual_seed(4)
    drawn, matched = boxes_to_learn_from(boxes, truth, sizes, refinement)
    for own, some in zip(boxes, drawn):  # the detector's own are among them
        assert (some[:, None] == own).all(2).any()
    torch.testing.assert_close(found, unrolled_losses(refinement, maps, drawn, matched, sizes), rtol=1e-4, atol=1e-5)


def test_labels_are_not_looked_at_and_targets_are_left_as_they_are():
    model = refined(tiny_rcnn())
    images, targets = batch()
    found = []
    for shown in (only_boxes(targets), copies(targets), [t | {"labels": "none"} for t in only_boxes(targets)]):
        before = copy.deepcopy(shown)
        torch.manual_seed(1)
        found.append(refinement_losses(model, images, shown))
        for ours, theirs in zip(shown, before):
            assert ours.keys() == theirs.keys()
            assert torch.equal(ours["boxes"], theirs["boxes"])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects(empty, training):
    """Of nothing batch norm would make statistics that are no numbers."""
    model = with_batch_norm().train(training)
    images, targets = batch()
    targets = [{"boxes": t["boxes"][:0] if i in empty else t["boxes"]} for i, t in enumerate(targets)]
    losses = refinement_losses(model, images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert (losses["loss_refinement_box"] > 0) == (len(empty) < 2)
    for parameter in model.roi_heads.refinement.parameters():
        assert parameter.grad.isfinite().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_model_without_a_refinement_has_no_losses_of_it():
    with pytest.raises(TypeError, match="FasterRCNN has no refinement: call add_refinement first"):
        refinement_losses(build("box"), *batch())


def test_freezing_the_detector():
    model = refined(tiny_rcnn(), stages=2)
    parameters = freeze_detector(model)
    assert [id(p) for p in parameters] == [id(p) for p in model.roi_heads.refinement.parameters()]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "roi_heads.refinement." in name}


# --- What was seen is kept -------------------------------------------------------------------------------------------


def test_an_image_is_looked_at_once_and_gives_the_same_losses():
    model = refined(tiny_rcnn())
    images, targets = batch()
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    cache = FeatureCache(10**7)
    mirrored = [images[0].flip(2), images[1]]
    found = []
    for shown, kept in ((images, None), (images, cache), (images, cache), (mirrored, None), (mirrored, cache)):
        torch.manual_seed(2)
        found.append(refinement_losses(model, shown, targets, cache=kept))
    assert len(calls) == 2 + 2 + 0 + 2 + 1  # the mirrored one is another
    assert found[0] == found[1] == found[2]
    assert found[3] == found[4] != found[0]
    assert 0 < cache.bytes <= cache.most_bytes


def test_what_does_not_fit_is_looked_at_anew():
    model = refined(tiny_rcnn())
    images, targets = batch()
    one = FeatureCache(10**7)
    refinement_losses(model, images[:1], targets[:1], cache=one)
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    cache = FeatureCache(one.bytes)  # for the first
    for _ in range(3):
        refinement_losses(model, images, targets, cache=cache)
    assert len(calls) == 2 + 1 + 1
    assert cache.bytes == one.bytes
