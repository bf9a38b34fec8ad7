"""Gradients at the proposals, path by path and loss by loss, against references that do not use our heads.

The references are finite differences of stock torchvision, and :meth:`Case.reference_losses`, a forward pass by hand
that crops with torchvision's pure-Python ``_roi_align`` and switches its two paths by ``detach``.
"""

import copy
import gc
import itertools
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from support.tiny_models import CHANNELS, SIZE, batch, copies, tiny_rcnn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, keypointrcnn_loss, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, poolers
from torchvision.ops.roi_align import _roi_align

from detector import BoxGradient, swap_crop_head
from detector.rcnn.box_gradient import add_gradient

SHAPES = [(SIZE, SIZE), (SIZE - 8, SIZE)]
EVERY_LOSS = ("box", "classification", "mask", "keypoint")
OFF = BoxGradient(crop=0, coder=0)

# --- The settings ----------------------------------------------------------------------------------------------------


def test_settings():
    assert BoxGradient() == BoxGradient(crop=1.0, coder=1.0, losses=("box",), bound=0.1)
    assert BoxGradient.exact() == BoxGradient(bound=None)
    from_file = BoxGradient(losses=["box", "classification"])
    assert hash(from_file) == hash(BoxGradient(losses=("box", "classification")))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["crop", "coder"], [-0.1, 1.5, math.nan]),
        *itertools.product(["bound"], [0, -0.1, math.nan, math.inf]),
        *itertools.product(["losses"], [("boxes",), ("box", "rpn"), (3,), "box"]),
    ],
)
def test_invalid_settings(name, value):
    with pytest.raises(ValueError, match=name):
        BoxGradient(**{name: value})


# --- The RoI heads alone, on proposals that are leaves ---------------------------------------------------------------


def differentiable_roi_align(input, boxes, output_size, spatial_scale, sampling_ratio):
    # __wrapped__, because the function compiles itself at its first call.
    return _roi_align.__wrapped__(input, boxes, spatial_scale, *output_size, sampling_ratio, False)


class Case:
    """RoI heads, maps, and proposals near the truth and far from it, in float64."""

    def __init__(self, kind="box"):
        self.heads = tiny_rcnn(kind).double().roi_heads.train()  # stock
        self.features = {
            name: torch.randn(2, CHANNELS, SIZE // stride, SIZE // stride, dtype=torch.float64).requires_grad_()
            for name, stride in (("0", 4), ("1", 8), ("2", 16))
        }
        _, self.targets = batch(torch.float64)
        self.proposals = []
        for (height, width), target in zip(SHAPES, self.targets):
            truth = target["boxes"].repeat(3, 1)
            side = (truth[:, 2:] - truth[:, :2]).repeat(1, 2)
            near = truth + side * 0.08 * torch.randn(truth.shape, dtype=torch.float64)
            corner = torch.rand(4, 2, dtype=torch.float64) * 40
            far = torch.cat([corner, corner + 6 + 12 * torch.rand(4, 2, dtype=torch.float64)], 1)
            # Boxes that end on the image's edge itself have samples on kinks, where there is no derivative.
            boxes = clip_boxes_to_image(torch.cat([near, far]) - 0.31, (height - 0.83, width - 0.77)) + 0.31
            self.proposals.append(boxes)

    def leaves(self):
        return [p.clone().requires_grad_() for p in self.proposals]

    def losses(self, heads, proposals):
        torch.manual_seed(1)  # RoIs are sampled by torch.randperm
        return heads(self.features, proposals, SHAPES, copies(self.targets))[1]

    def swapped(self, settings):
        model = tiny_rcnn()
        model.roi_heads = copy.deepcopy(self.heads)
        return swap_crop_head(model, settings).roi_heads

    def gradient(self, settings, *names):
        """Return the gradient [K, 4] of the swapped heads' losses at the proposals, or None."""
        proposals = self.leaves()
        losses = self.losses(self.swapped(settings), proposals)
        return gradient_at(proposals, sum(losses[name] for name in names))

    def reference_losses(self, proposals, crop=True, coder=True):
        """The heads' forward pass by hand. ``crop`` and ``coder`` attach the proposals to a path."""
        torch.manual_seed(1)
        heads = self.heads
        sampled, matched, labels, regression = RoIHeads.select_training_samples(heads, proposals, copies(self.targets))
        at = sampled if crop else [p.detach() for p in sampled]
        positive = [torch.where(image_labels > 0)[0] for image_labels in labels]
        at_positive = [p[index] for p, index in zip(at, positive)]
        constant = [p.detach() for p in at_positive]
        matched = [m[index] for m, index in zip(matched, positive)]

        logits, deltas = heads.box_predictor(heads.box_head(self.pooled(heads.box_roi_pool, at)))
        if not coder:
            regression = [r.detach() for r in regression]
        losses = dict(zip(("loss_classifier", "loss_box_reg"), fastrcnn_loss(logits, deltas, labels, regression)))
        if heads.mask_roi_pool is not None:
            masks = heads.mask_predictor(heads.mask_head(self.pooled(heads.mask_roi_pool, at_positive)))
            truth, classes = ([t[key] for t in self.targets] for key in ("masks", "labels"))
            losses["loss_mask"] = maskrcnn_loss(masks, constant, truth, classes, matched)
        if heads.keypoint_roi_pool is not None:
            points = heads.keypoint_predictor(heads.keypoint_head(self.pooled(heads.keypoint_roi_pool, at_positive)))
            losses["loss_keypoint"] = keypointrcnn_loss(
                points, constant, [t["keypoints"] for t in self.targets], matched
            )
        return losses

    def pooled(self, pool, boxes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(poolers, "roi_align", differentiable_roi_align)
            return pool(self.features, boxes, SHAPES)

    def reference(self, *names, moving=None, **paths):
        """Return the reference gradient [K, 4]; 0 where ``moving`` is false."""
        proposals = self.leaves()
        losses = self.reference_losses(proposals, **paths)
        gradient = gradient_at(proposals, sum(losses[name] for name in names))
        return gradient if moving is None else gradient * moving[:, None]

    def finite_differences(self, step=1e-6):
        """Return the derivative of stock torchvision's box loss at the proposals."""
        derivative = []
        for image, boxes in enumerate(self.proposals):
            for k in range(boxes.numel()):
                values = []
                for sign in (1, -1):
                    moved = [p.clone() for p in self.proposals]
                    moved[image].view(-1)[k] += sign * step
                    with torch.no_grad():
                        values.append(self.losses(self.heads, moved)["loss_box_reg"])
                derivative.append((values[0] - values[1]) / (2 * step))
        return torch.stack(derivative).view(-1, 4)

    def positive(self):
        """Return which proposals are positives, [K]."""
        boxes, labels = ([t[key] for t in self.targets] for key in ("boxes", "labels"))
        _, labels = RoIHeads.assign_targets_to_proposals(self.heads, self.proposals, boxes, labels)
        return torch.cat(labels) > 0


def gradient_at(proposals, loss):
    if not loss.requires_grad:
        return None
    gradients = torch.autograd.grad(loss, proposals, allow_unused=True)
    return None if all(g is None for g in gradients) else torch.cat(gradients)


def assert_equal(gradient, expected, rtol=1e-9):
    """Compare relative to the largest gradient, as some are sums that cancel."""
    assert gradient is not None
    size = expected.abs().max()
    assert size > 1e-6
    assert (gradient - expected).abs().max() < rtol * size


def assert_distinct(*gradients):
    for a, b in itertools.combinations(gradients, 2):
        assert (a - b).norm() > 0.1 * max(a.norm(), b.norm())


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return Case()


def test_the_default_is_the_exact_derivative_of_the_box_loss(case):
    assert case.positive().sum() >= 8
    assert (~case.positive()).sum() >= 8
    derivative = case.reference("loss_box_reg")
    crop, coder = case.reference("loss_box_reg", coder=False), case.reference("loss_box_reg", crop=False)
    assert_distinct(derivative, crop, coder)
    assert_equal(crop + coder, derivative, 1e-12)
    assert_equal(case.gradient(BoxGradient(), "loss_box_reg"), derivative)
    assert_equal(derivative, case.finite_differences(), 1e-5)


@pytest.mark.parametrize("crop", [0, 0.25, 1])
@pytest.mark.parametrize("coder", [0, 0.5, 1])
def test_each_scale_is_that_of_its_path(case, crop, coder):
    gradient = case.gradient(BoxGradient(crop=crop, coder=coder), "loss_box_reg")
    if crop == coder == 0:
        assert gradient is None
        return
    expected = crop * case.reference("loss_box_reg", coder=False) + coder * case.reference("loss_box_reg", crop=False)
    assert_equal(gradient, expected)


def test_losses_move_positives_only(case):
    settings = BoxGradient(crop=0.5, losses=("box", "classification"))
    positive = case.positive()
    whole = case.reference("loss_classifier")
    assert whole[~positive].abs().max() > 1e-6
    assert_equal(case.gradient(settings, "loss_classifier"), 0.5 * whole * positive[:, None])
    box = 0.5 * case.reference("loss_box_reg", coder=False) + case.reference("loss_box_reg", crop=False)
    assert_equal(case.gradient(settings, "loss_classifier", "loss_box_reg"), 0.5 * whole * positive[:, None] + box)


def test_a_weighted_loss_weights_its_gradient_to_the_proposals(case):
    proposals = case.leaves()
    losses = case.losses(case.swapped(BoxGradient(losses=("box", "classification"))), proposals)
    gradient = gradient_at(proposals, 0.3 * losses["loss_box_reg"] + losses["loss_classifier"])
    expected = 0.3 * case.reference("loss_box_reg") + case.reference("loss_classifier", moving=case.positive())
    assert_equal(gradient, expected)


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_mask_and_keypoint_losses_when_named(kind):
    case = Case(kind)
    loss = f"loss_{kind}"
    expected = case.reference(loss)
    assert_equal(case.gradient(BoxGradient(losses=(kind,)), loss, "loss_box_reg", "loss_classifier"), expected)
    assert_equal(case.gradient(BoxGradient(crop=0.5, losses=(kind,)), loss), expected / 2)
    assert case.gradient(BoxGradient(), loss) is None
    assert case.gradient(BoxGradient(crop=0, losses=EVERY_LOSS), loss) is None
    names = ("loss_classifier", "loss_box_reg", loss)
    assert_equal(case.gradient(BoxGradient(losses=EVERY_LOSS), *names), case.reference(*names, moving=case.positive()))


@pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
@pytest.mark.parametrize("settings", [BoxGradient(), BoxGradient(crop=0.5, coder=0, losses=EVERY_LOSS)])
def test_heads_and_features_are_trained_as_in_torchvision(kind, settings):
    case = Case(kind)
    maps = list(case.features.values())
    swapped = case.swapped(settings)
    ours = case.losses(swapped, case.leaves())
    stock = case.losses(case.heads, case.proposals)
    assert ours.keys() == stock.keys()
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=0, atol=1e-12)
        parameters = list(swapped.parameters()), list(case.heads.parameters())
        gradients = torch.autograd.grad(ours[name], [*maps, *parameters[0]], retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(stock[name], [*maps, *parameters[1]], retain_graph=True, allow_unused=True)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert (gradient is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("empty", [[0], [0, 1]])
def test_images_without_objects(empty):
    case = Case()
    for image in empty:
        case.targets[image] = {"boxes": torch.zeros(0, 4, dtype=torch.float64), "labels": torch.zeros(0).long()}
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way, which the hook at the boxes would hide
        gradient = case.gradient(BoxGradient(losses=EVERY_LOSS), "loss_box_reg", "loss_classifier")
    assert gradient.isfinite().all()
    for image, part in enumerate(gradient.split([len(p) for p in case.proposals])):
        assert part.any() == (image not in empty)


@pytest.mark.parametrize("fails", [False, True])
def test_the_graph_does_not_outlive_the_step(case, fails):
    heads = case.swapped(BoxGradient(losses=EVERY_LOSS))
    if fails:
        heads.box_head.forward = lambda crops: crops + "no tensor"

    def step():
        proposals = [p * 1 for p in case.leaves()]
        hook = lambda gradient: None  # noqa: E731 - lives as long as the graph
        proposals[0].register_hook(hook)
        with pytest.raises(TypeError) if fails else nullcontext():
            case.losses(heads, proposals)["loss_box_reg"].backward()
        return weakref.ref(hook)

    alive = step()
    gc.collect()
    assert alive() is None


def test_a_gradient_that_overflows_leaves_the_loss_finite():
    """A gradient scaler skips the step, while a loss that is not finite ends the training."""
    boxes = torch.ones(2, 4, requires_grad=True)
    loss = add_gradient(boxes.sum(), [boxes], [torch.tensor([[math.inf] * 4, [2.0] * 4])])
    assert loss.item() == 8
    assert torch.autograd.grad(3 * loss, boxes)[0].tolist() == [[math.inf] * 4, [9.0] * 4]


def test_float16_crops_do_not_lose_small_gradients():
    """The crop path's gradient is taken before a gradient scaler can lift it above float16's smallest number."""
    case = Case()
    heads = case.swapped(BoxGradient(coder=0))
    expected = case.gradient(BoxGradient(coder=0), "loss_box_reg")
    tiny = 3e-6  # gradients at the crops are below what float16 holds
    heads.box_roi_pool.register_forward_hook(lambda module, given, crops: crops.half())
    heads.box_head.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    proposals = case.leaves()
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roi_heads, "fastrcnn_loss", lambda *given: [tiny * loss for loss in fastrcnn_loss(*given)])
        loss = case.losses(heads, proposals)["loss_box_reg"]
    gradient = gradient_at(proposals, loss * 2**16) / 2**16 / tiny  # as a gradient scaler does
    assert (gradient - expected).norm() < 0.2 * expected.norm()


# --- Whole detectors -------------------------------------------------------------------------------------------------


def model_losses(model, images, targets):
    torch.manual_seed(1)
    return model(images, copies(targets))


def gradients_of(model, loss):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return dict(zip(names, gradients))


@pytest.mark.parametrize(
    ("kind", "loss", "fpn"),
    [("box", "loss_box_reg", True), ("box", "loss_box_reg", False), ("keypoint", "loss_keypoint", True)],
)
def test_from_the_loss_to_the_deltas_of_the_rpn(kind, loss, fpn):
    """The gradient at the RPN's last layer equals finite differences of the stock model, where autograd is cut."""
    model = tiny_rcnn(kind, fpn=fpn).double().train()
    images, targets = batch(torch.float64)
    swapped = swap_crop_head(copy.deepcopy(model), BoxGradient(losses=(kind,), bound=None))
    losses = model_losses(swapped, images, targets)
    weight = model.rpn.head.bbox_pred.weight.data.view(-1)
    gradient = gradients_of(swapped, losses[loss])["rpn.head.bbox_pred.weight"].flatten()
    for index in [*gradient.abs().topk(2).indices.tolist(), 0]:
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[index] += step
                values.append(model_losses(model, images, targets)[loss])
                weight[index] -= step
        assert abs(gradient[index] - (values[0] - values[1]) / 2e-6) < 1e-4 * gradient.abs().max()
    unnamed = losses["loss_classifier"] + (0 if kind == "box" else losses["loss_box_reg"])
    assert gradients_of(swapped, unnamed)["rpn.head.bbox_pred.weight"] is None


@pytest.mark.parametrize("settings", [OFF, BoxGradient(losses=())], ids=["both paths 0", "no loss"])
@pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
def test_off_equals_detached_proposals_to_the_last_bit(kind, settings):
    detached = tiny_rcnn(kind).train()
    swapped = swap_crop_head(copy.deepcopy(detached), settings)
    for name in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):  # stock RPN and heads, our crop
        setattr(detached.roi_heads, name, copy.deepcopy(getattr(swapped.roi_heads, name)))
    images, targets = batch()
    losses = [model_losses(model, images, targets) for model in (swapped, detached)]
    assert losses[0] == losses[1]
    gradients = [gradients_of(model, sum(one.values())) for model, one in zip((swapped, detached), losses)]
    for name, wanted in gradients[1].items():
        assert torch.equal(gradients[0][name], wanted)


def test_batch_norm_in_the_box_head_sees_one_batch():
    model = tiny_rcnn().train()
    model.roi_heads.box_head.append(torch.nn.BatchNorm1d(16))
    statistics = []
    for settings in (BoxGradient(losses=EVERY_LOSS), OFF):
        swapped = swap_crop_head(copy.deepcopy(model), settings)
        sum(model_losses(swapped, *batch()).values()).backward()
        statistics.append(dict(swapped.roi_heads.box_head.named_buffers()))
    assert statistics[0]["3.num_batches_tracked"] == 1
    assert all(torch.equal(buffer, statistics[1][name]) for name, buffer in statistics[0].items())


def test_frozen_features_and_heads():
    model = swap_crop_head(tiny_rcnn().train(), BoxGradient.exact())
    gradients = []
    for frozen in (True, False):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("rpn.head") or not frozen)
        loss = model_losses(model, *batch())["loss_box_reg"]
        gradients.append(torch.autograd.grad(loss, model.rpn.head.bbox_pred.weight)[0])
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    losses = model_losses(model.requires_grad_(False), *batch())
    assert all(loss.isfinite() for loss in losses.values())


def test_training_mode_under_no_grad():
    model = swap_crop_head(tiny_rcnn("mask").train(), BoxGradient(losses=EVERY_LOSS))
    with torch.no_grad():
        without = model_losses(model, *batch())
    for name, loss in model_losses(model, *batch()).items():
        assert not without[name].requires_grad
        torch.testing.assert_close(without[name], loss.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("settings", "reached"), [(BoxGradient(), True), (OFF, False)])
def test_in_eval_mode_detections_are_attached_to_the_proposals(settings, reached):
    model = swap_crop_head(tiny_rcnn().eval(), settings)
    detections = model(batch()[0])
    gradient = gradients_of(model, sum(d["boxes"].sum() for d in detections))["rpn.head.bbox_pred.weight"]
    assert (gradient is not None and bool(gradient.any())) == reached


# --- Autocast --------------------------------------------------------------------------------------------------------


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_under_autocast_boxes_are_decoded_in_float32():
    """Coordinates above 256, where bfloat16 has steps of 2 pixels."""
    model = swap_crop_head(tiny_rcnn(min_size=320, max_size=320).eval(), OFF)
    seen = {}
    for module in (model.rpn, model.rpn.head, model.rpn.anchor_generator, model.roi_heads.box_predictor):
        module.register_forward_hook(lambda module, given, result: seen.update({module: result}))
    with torch.no_grad(), bfloat16():
        (detections,) = model([torch.rand(3, 320, 320)])
    anchors, deltas = seen[model.rpn.anchor_generator][0], seen[model.rpn.head][1]
    rows = [d[0].float().view(-1, 4, *d.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4) for d in deltas]
    first = model.rpn.box_coder.decode_single(torch.cat(rows), anchors)
    (proposals,), deltas = seen[model.rpn][0], seen[model.roi_heads.box_predictor][1]
    second = model.roi_heads.box_coder.decode(deltas.float(), [proposals])
    assert deltas.dtype == torch.bfloat16  # autocast was at work
    assert detections["scores"].dtype == anchors.dtype == torch.float32
    for boxes, expected in ((proposals, first), (detections["boxes"], second)):
        assert boxes.dtype == torch.float32
        assert len(boxes) > 5
        expected = clip_boxes_to_image(expected.reshape(-1, 4), (320, 320))
        assert torch.cdist(boxes, expected, p=float("inf")).amin(1).max() < 1e-3
        assert (boxes - boxes.bfloat16()).abs().max() > 0.2


@pytest.mark.parametrize("paths", [{"coder": 0}, {"crop": 0}], ids=["crop path", "coder path"])
def test_under_autocast_the_gradient_is_that_of_float32_but_for_rounding(paths):
    case = Case()
    case.heads.float()
    case.features = {name: feature.detach().float() for name, feature in case.features.items()}
    case.proposals = [p.float() for p in case.proposals]
    case.targets = [{**t, "boxes": t["boxes"].float()} for t in case.targets]
    settings = BoxGradient(losses=EVERY_LOSS, **paths)
    expected = case.gradient(settings, "loss_box_reg", "loss_classifier")
    with bfloat16():
        gradient = case.gradient(settings, "loss_box_reg", "loss_classifier")
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.05 * expected.norm()
