"""Which gradients reach the proposals, path by path and loss by loss, against references written without our heads.

The references: finite differences of stock torchvision (whose losses as a function of the proposals know nothing of
detached tensors), and :func:`reference_losses`, a forward pass by hand whose two paths are switched by ``detach``.
"""

import copy
import dataclasses
import gc
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import CHANNELS, SIZE, batch, copies, tiny_rcnn
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2, roi_heads
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, keypointrcnn_loss, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image

from detector import BoxGradient, MultiScaleAffineCrop, swap_crop_head

SHAPES = [(SIZE, SIZE), (SIZE - 8, SIZE)]
EVERY_LOSS = ("box", "classification", "mask", "keypoint")
OFF = BoxGradient(crop=0, coder=0)

# --- The settings ----------------------------------------------------------------------------------------------------


def test_defaults():
    assert BoxGradient() == BoxGradient(
        crop=1.0, coder=1.0, losses=("box",), positives_only=True, bound=0.1, warmup_steps=0
    )


def test_settings_are_frozen_and_hashable():
    settings = BoxGradient(crop=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.crop = 1.0
    assert {settings: 1}[BoxGradient(crop=0.5)] == 1
    assert settings != BoxGradient(crop=0.25)


def test_a_list_from_a_config_file_becomes_a_tuple():
    settings = BoxGradient(losses=["box", "classification"])
    assert settings.losses == ("box", "classification")
    assert hash(settings) == hash(BoxGradient(losses=("box", "classification")))


@pytest.mark.parametrize("name", ["crop", "coder"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf])
def test_a_scale_outside_its_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a scale from 0 to 1, got {value}"):
        BoxGradient(**{name: value})


@pytest.mark.parametrize("losses", [("boxes",), ("box", "rpn"), ("loss_box_reg",), (3,)])
def test_an_unknown_loss(losses):
    with pytest.raises(ValueError, match=f"losses must be of box, classification, mask, keypoint, got {losses[-1]!r}"):
        BoxGradient(losses=losses)


@pytest.mark.parametrize("losses", ["box", None, 3])
def test_losses_that_are_no_tuple(losses):
    with pytest.raises(ValueError, match=f"losses must be a tuple of names.* got {losses!r}"):
        BoxGradient(losses=losses)


# --- The RoI heads alone, on proposals that are leaves ---------------------------------------------------------------


class Case:
    """RoI heads, maps, and proposals of which some match the truth without being it, all in float64."""

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
        torch.manual_seed(1)  # positives and negatives are drawn by torch.randperm
        return heads(self.features, proposals, SHAPES, copies(self.targets))[1]

    def swapped(self, settings):
        model = tiny_rcnn()
        model.roi_heads = copy.deepcopy(self.heads)
        return swap_crop_head(model, settings).roi_heads

    def gradient(self, settings, *names):
        """The gradient of a sum of losses of the swapped heads at the proposals, [K, 4]; None where there is none."""
        proposals = self.leaves()
        losses = self.losses(self.swapped(settings), proposals)
        return gradient_at(proposals, sum(losses[name] for name in names))

    def reference_losses(self, proposals, crop=True, coder=True):
        """The heads' forward pass by hand; ``crop`` and ``coder`` say which path has the proposals attached."""
        torch.manual_seed(1)
        heads = self.heads
        drawn, matched, labels, regression = RoIHeads.select_training_samples(heads, proposals, copies(self.targets))
        at = drawn if crop else [p.detach() for p in drawn]
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
            truth = [t["keypoints"] for t in self.targets]
            losses["loss_keypoint"] = keypointrcnn_loss(points, constant, truth, matched)
        return losses

    def pooled(self, stock, boxes):
        """What a pool returns; MultiScaleAffineCrop has tests of its own."""
        canonical = {"canonical_scale": stock.canonical_scale, "canonical_level": stock.canonical_level}
        pool = MultiScaleAffineCrop(stock.featmap_names, stock.output_size, stock.sampling_ratio, **canonical)
        return pool(self.features, boxes, SHAPES)

    def reference(self, *names, **paths):
        proposals = self.leaves()
        losses = self.reference_losses(proposals, **paths)
        return gradient_at(proposals, sum(losses[name] for name in names))

    def finite_differences(self, step=1e-6):
        """The derivative of each of stock torchvision's losses, RoIAlign and all, by name."""
        gradients = []
        for image, boxes in enumerate(self.proposals):
            for k in range(boxes.numel()):
                values = []
                for sign in (1, -1):
                    moved = [p.clone() for p in self.proposals]
                    moved[image].view(-1)[k] += sign * step
                    with torch.no_grad():
                        values.append(self.losses(self.heads, moved))
                gradients.append({name: (values[0][name] - values[1][name]) / (2 * step) for name in values[0]})
        return {name: torch.stack([g[name] for g in gradients]).view(-1, 4) for name in gradients[0]}

    def positive(self):
        """Which proposals are positives, [K]."""
        boxes, labels = ([t[key] for t in self.targets] for key in ("boxes", "labels"))
        _, labels = RoIHeads.assign_targets_to_proposals(self.heads, self.proposals, boxes, labels)
        return torch.cat(labels) > 0


def gradient_at(proposals, loss):
    if not loss.requires_grad:
        return None
    gradients = torch.autograd.grad(loss, proposals, allow_unused=True)
    return None if all(g is None for g in gradients) else torch.cat(gradients)


def assert_equal(gradient, expected, rtol=1e-9):
    """Equal relative to the largest gradient: some are sums that cancel."""
    assert gradient is not None
    size = expected.abs().max()
    assert size > 1e-6
    assert (gradient - expected).abs().max() < rtol * size


def assert_distinct(*gradients):
    for i, a in enumerate(gradients):
        for b in gradients[:i]:
            assert (a - b).norm() > 0.1 * max(a.norm(), b.norm())


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return Case()


@pytest.fixture(scope="module")
def derivative(case):
    return case.finite_differences()


def test_the_case_has_positives_that_are_not_the_truth_and_background(case):
    assert case.positive().sum() >= 8
    assert (~case.positive()).sum() >= 8
    both = case.reference("loss_box_reg")
    crop = case.reference("loss_box_reg", coder=False)
    coder = case.reference("loss_box_reg", crop=False)
    # The two paths differ from one another and from their sum by far more than the tolerance below.
    assert_distinct(both, crop, coder)
    assert_equal(crop + coder, both, 1e-12)


def test_by_default_the_box_loss_has_its_exact_derivative(case, derivative):
    # All of it: a background RoI has no box loss, so to leave its box detached takes nothing away.
    assert_equal(case.gradient(BoxGradient(), "loss_box_reg"), derivative["loss_box_reg"], 1e-5)


@pytest.mark.parametrize(
    "names", [("loss_box_reg",), ("loss_classifier",), ("loss_box_reg", "loss_classifier")], ids="+".join
)
def test_with_all_losses_and_rois_the_gradient_is_the_derivative(case, derivative, names):
    settings = BoxGradient(losses=EVERY_LOSS, positives_only=False)
    gradient = case.gradient(settings, *names)
    assert_equal(gradient, sum(derivative[name] for name in names), 1e-5)
    assert_equal(gradient, case.reference(*names))


def test_crop_path_alone(case):
    gradient = case.gradient(BoxGradient(coder=0), "loss_box_reg")
    assert_equal(gradient, case.reference("loss_box_reg", coder=False))


def test_coder_path_alone(case):
    gradient = case.gradient(BoxGradient(crop=0), "loss_box_reg")
    assert_equal(gradient, case.reference("loss_box_reg", crop=False), 1e-12)
    # It is all that stock torchvision has once its proposals are attached: roi_align gives boxes no gradient.
    proposals = case.leaves()
    losses = case.losses(case.heads, proposals)
    assert_equal(gradient, gradient_at(proposals, losses["loss_box_reg"]), 1e-12)


@pytest.mark.parametrize("settings", [OFF, BoxGradient(losses=()), BoxGradient(crop=0, losses=("classification",))])
def test_neither_path(case, settings):
    assert case.gradient(settings, "loss_box_reg", "loss_classifier") is None


@pytest.mark.parametrize("crop", [0, 0.25, 1])
@pytest.mark.parametrize("coder", [0.5, 1])
def test_each_scale_is_that_of_its_path(case, crop, coder):
    gradient = case.gradient(BoxGradient(crop=crop, coder=coder), "loss_box_reg")
    expected = crop * case.reference("loss_box_reg", coder=False) + coder * case.reference("loss_box_reg", crop=False)
    assert_equal(gradient, expected)


def test_half_the_scale_is_half_the_gradient_of_the_crop_path(case):
    settings = BoxGradient(crop=0.5, coder=0, losses=("classification",), positives_only=False)
    assert_equal(case.gradient(settings, "loss_classifier"), case.reference("loss_classifier") / 2)


@pytest.mark.parametrize("losses", [("box",), ("mask", "keypoint"), ("box", "mask", "keypoint")])
def test_the_classification_loss_moves_no_proposal_unless_named(case, losses):
    assert case.gradient(BoxGradient(losses=losses, positives_only=False), "loss_classifier") is None


@pytest.mark.parametrize("losses", [("classification",), ("mask",), ("keypoint", "classification")])
def test_the_box_loss_moves_no_proposal_unless_named_by_either_path(case, losses):
    assert case.gradient(BoxGradient(losses=losses, positives_only=False), "loss_box_reg") is None


def test_the_classification_loss_named_alone(case):
    settings = BoxGradient(losses=("classification",), positives_only=False)
    assert_equal(case.gradient(settings, "loss_classifier", "loss_box_reg"), case.reference("loss_classifier"))


def test_positives_only(case):
    positive = case.positive()
    settings = BoxGradient(losses=("box", "classification"), positives_only=True)
    gradient = case.gradient(settings, "loss_classifier", "loss_box_reg")
    expected = case.reference("loss_classifier", "loss_box_reg")
    assert (expected[~positive].abs().sum(1) > 1e-6).any()  # without the setting background moves
    assert torch.equal(gradient[~positive], torch.zeros_like(gradient[~positive]))
    assert_equal(gradient[positive], expected[positive])


@pytest.mark.parametrize("weight", [2.0, 0.3])
def test_a_weighted_loss_weighs_its_gradient_to_the_proposals(case, weight):
    settings = BoxGradient(losses=("box", "classification"), positives_only=False)
    proposals = case.leaves()
    losses = case.losses(case.swapped(settings), proposals)
    gradient = gradient_at(proposals, weight * losses["loss_box_reg"] + losses["loss_classifier"])
    expected = weight * case.reference("loss_box_reg") + case.reference("loss_classifier")
    assert_equal(gradient, expected)


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_mask_and_keypoint_losses_when_named(kind):
    case = Case(kind)
    loss = f"loss_{kind}"
    expected = case.reference(loss)
    assert_equal(case.gradient(BoxGradient(losses=(kind,)), loss), expected)
    assert_equal(case.gradient(BoxGradient(losses=(kind,)), loss, "loss_box_reg", "loss_classifier"), expected)
    assert_equal(case.gradient(BoxGradient(crop=0.5, losses=(kind,)), loss), expected / 2)
    assert case.gradient(BoxGradient(), loss) is None
    assert case.gradient(BoxGradient(crop=0, losses=EVERY_LOSS), loss) is None
    # All together, each with its own crops.
    names = ("loss_classifier", "loss_box_reg", loss)
    settings = BoxGradient(losses=EVERY_LOSS, positives_only=False)
    assert_equal(case.gradient(settings, *names), case.reference(*names))


@pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
@pytest.mark.parametrize(
    "settings", [BoxGradient(), BoxGradient(crop=0.5, coder=0, losses=EVERY_LOSS, positives_only=False)]
)
def test_heads_and_features_are_trained_as_ever(kind, settings):
    """Every loss's gradient at the maps and at the heads' parameters is that of stock torchvision."""
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
        for gradient, wanted in zip(gradients, expected):
            assert (gradient is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("empty", [[0], [1], [0, 1]])
def test_images_without_objects(empty):
    case = Case()
    for image in empty:
        case.targets[image] = {"boxes": torch.zeros(0, 4, dtype=torch.float64), "labels": torch.zeros(0).long()}
    settings = BoxGradient(losses=EVERY_LOSS)
    gradient = case.gradient(settings, "loss_box_reg", "loss_classifier")
    for image, part in enumerate(gradient.split([len(p) for p in case.proposals])):
        if image in empty:
            assert torch.equal(part, torch.zeros_like(part))
        else:
            assert part.isfinite().all()
            assert part.any()


def test_no_proposals_but_the_truth():
    # As at random initialisation: nothing to move, and nothing wrong.
    case = Case()
    case.proposals = [p[:0] for p in case.proposals]
    gradient = case.gradient(BoxGradient(losses=EVERY_LOSS), "loss_box_reg", "loss_classifier")
    assert gradient is None or gradient.shape == (0, 4)


class Token:
    """Hooked to a tensor, it lives as long as the tensor's place in the graph does."""

    def __call__(self, gradient):
        return None


@pytest.mark.parametrize("fails", [False, True])
def test_the_graph_does_not_outlive_the_step(case, fails, monkeypatch):
    heads = case.swapped(BoxGradient(losses=EVERY_LOSS))
    if fails:
        monkeypatch.setattr(heads.box_head, "forward", lambda crops: crops + "no tensor")

    def step():
        proposals = [p * 1 for p in case.leaves()]
        token = Token()
        proposals[0].register_hook(token)
        if fails:
            with pytest.raises(TypeError):
                case.losses(heads, proposals)
        else:
            case.losses(heads, proposals)["loss_box_reg"].backward()
        return weakref.ref(token)

    alive = step()
    gc.collect()
    assert alive() is None


# --- Whole detectors -------------------------------------------------------------------------------------------------


def model_losses(model, images, targets, seed=1):
    torch.manual_seed(seed)
    return model(images, copies(targets))


class ConstantBackbone(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return self.features


def gradients_of(model, loss):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return dict(zip(names, gradients))


@pytest.mark.parametrize("fpn", [True, False])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (BoxGradient.exact(), ["loss_box_reg"]),
        (BoxGradient(losses=EVERY_LOSS, positives_only=False, bound=None), ["loss_classifier", "loss_box_reg"]),
    ],
    ids=["exact", "all"],
)
def test_from_the_loss_to_the_deltas_of_the_rpn(fpn, settings, names):
    """End to end: d loss / d bbox_pred of the swapped model = finite differences of the stock one, which is cut."""
    model = tiny_rcnn(fpn=fpn).double().train()
    images, targets = batch(torch.float64)
    assert_derivative_at_the_deltas(model, settings, names, images, targets)


def assert_derivative_at_the_deltas(model, settings, names, images, targets):
    """The gradient of a sum of losses at the RPN's last layer, swapped, is the stock model's finite differences."""
    swapped = swap_crop_head(copy.deepcopy(model), settings)
    losses = model_losses(swapped, images, targets)
    gradients = gradients_of(swapped, sum(losses[name] for name in names))
    for name in ("weight", "bias"):
        parameter = getattr(model.rpn.head.bbox_pred, name)
        gradient = gradients[f"rpn.head.bbox_pred.{name}"].flatten()
        some = [*gradient.abs().topk(3).indices.tolist(), 0]
        expected = torch.zeros(len(some), dtype=torch.float64)
        for k, index in enumerate(some):
            value = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[index] += step
                    losses = model_losses(model, images, targets)
                    parameter.view(-1)[index] -= step
                value.append(sum(losses[name] for name in names))
            expected[k] = (value[0] - value[1]) / 2e-6
        assert_equal(gradient[some], expected, 1e-4)


@pytest.mark.parametrize("fpn", [True, False])
@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_from_the_loss_of_masks_or_key_points_to_the_deltas_of_the_rpn(kind, fpn, monkeypatch):
    model = tiny_rcnn(kind, fpn=fpn).double().train()
    images, targets = batch(torch.float64)
    # What is to be learned is cut out of the true masks at the proposals: a constant to the gradient, so here as well.
    cut, of_image = [], itertools.cycle(range(len(images)))
    project = roi_heads.project_masks_on_boxes

    def constant(*arguments):
        image = next(of_image)
        if image == len(cut):
            cut.append(project(*arguments))
        return cut[image]

    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", constant)
    settings = BoxGradient(losses=(kind,), bound=None)
    assert_derivative_at_the_deltas(model, settings, [f"loss_{kind}"], images, targets)
    # The other losses, which are not named, add nothing.
    swapped = swap_crop_head(copy.deepcopy(model), settings)
    losses = model_losses(swapped, images, targets)
    others = gradients_of(swapped, losses["loss_box_reg"] + losses["loss_classifier"])
    assert others["rpn.head.bbox_pred.weight"] is None
    assert len(cut) == (len(images) if kind == "mask" else 0)


def test_each_path_reaches_the_deltas_of_the_rpn_apart():
    model = tiny_rcnn().double().train()
    images, targets = batch(torch.float64)
    reached = {}
    for crop, coder in [(1, 1), (1, 0), (0, 1), (0, 0)]:
        swapped = swap_crop_head(copy.deepcopy(model), BoxGradient(crop=crop, coder=coder, bound=None))
        loss = model_losses(swapped, images, targets)["loss_box_reg"]
        reached[crop, coder] = gradients_of(swapped, loss)["rpn.head.bbox_pred.weight"]
    assert reached.pop((0, 0)) is None
    assert_distinct(*reached.values())
    assert_equal(reached[1, 0] + reached[0, 1], reached[1, 1])


@pytest.mark.parametrize("settings", [BoxGradient(), BoxGradient(losses=EVERY_LOSS, positives_only=False)])
def test_the_rest_of_the_model_is_trained_as_ever(settings):
    # What the box gradient adds enters through the proposals: the RPN's deltas, and what lies below them. The
    # features' part of that is cut here, so that all that is left to differ is the RPN.
    model = tiny_rcnn("mask").double().train()
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    images, targets = batch(torch.float64)
    gradients = []
    for box_gradient in (settings, OFF):
        swapped = swap_crop_head(copy.deepcopy(model), box_gradient)
        gradients.append(gradients_of(swapped, sum(model_losses(swapped, images, targets).values())))
    for name, wanted in gradients[1].items():
        if name.startswith(("rpn.head.conv", "rpn.head.bbox_pred")):
            assert (gradients[0][name] - wanted).norm() > 1e-6 * wanted.norm()
        else:
            torch.testing.assert_close(gradients[0][name], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [OFF, BoxGradient(losses=())], ids=["both paths 0", "no loss"])
@pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
def test_off_equals_detached_proposals_to_the_last_bit(kind, settings):
    stock = tiny_rcnn(kind).train()
    detached = copy.deepcopy(stock)  # stock RPN and heads, our crop
    for name in ("box", "mask", "keypoint"):
        pool = getattr(detached.roi_heads, f"{name}_roi_pool")
        if pool is not None:
            canonical = {"canonical_scale": pool.canonical_scale, "canonical_level": pool.canonical_level}
            ours = MultiScaleAffineCrop(pool.featmap_names, pool.output_size, pool.sampling_ratio, **canonical)
            setattr(detached.roi_heads, f"{name}_roi_pool", ours)
    off = swap_crop_head(copy.deepcopy(stock), settings)
    images, targets = batch()
    losses, gradients = {}, {}
    for key, model in {"off": off, "detached": detached, "stock": stock}.items():
        losses[key] = model_losses(model, images, targets)
        gradients[key] = gradients_of(model, sum(losses[key].values()))
    for name, wanted in losses["detached"].items():
        assert torch.equal(losses["off"][name], wanted)
        torch.testing.assert_close(losses["stock"][name], wanted, rtol=1e-5, atol=1e-6)
    for name, wanted in gradients["detached"].items():
        assert torch.equal(gradients["off"][name], wanted)
        torch.testing.assert_close(gradients["stock"][name], wanted, rtol=1e-4, atol=1e-5)


def test_live_batch_norm_in_the_box_head_sees_one_batch():
    model = fasterrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=3,
        min_size=SIZE,
        max_size=SIZE,
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=50,
        box_batch_size_per_image=8,
    ).train()
    # What the ResNet computes does not matter here, and takes seconds.
    features = {
        name: torch.randn(2, 256, SIZE // stride, SIZE // stride)
        for name, stride in {"0": 4, "1": 8, "2": 16, "3": 32, "pool": 64}.items()
    }
    model.backbone = ConstantBackbone(features)
    images, targets = batch()
    statistics = {}
    for key, settings in {"on": BoxGradient(losses=EVERY_LOSS), "off": OFF}.items():
        swapped = swap_crop_head(copy.deepcopy(model), settings)
        sum(model_losses(swapped, images, targets).values()).backward()
        statistics[key] = {
            name: buffer for name, buffer in swapped.named_buffers() if name.startswith("roi_heads.box_head")
        }
    tracked = [buffer for name, buffer in statistics["on"].items() if name.endswith("num_batches_tracked")]
    assert len(tracked) == 4
    assert all(buffer == 1 for buffer in tracked)
    for name, buffer in statistics["on"].items():
        assert torch.equal(buffer, statistics["off"][name])


def test_frozen_features_and_heads():
    # Nothing that the box loss passes through has a parameter to train, but for the RPN's.
    model = swap_crop_head(tiny_rcnn().train(), BoxGradient.exact())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("rpn.head"))
    images, targets = batch()
    model_losses(model, images, targets)["loss_box_reg"].backward()
    frozen = model.rpn.head.bbox_pred.weight.grad.clone()
    assert frozen.any()
    # The same gradient as with everything in training.
    model.zero_grad()
    model.requires_grad_(True)
    model_losses(model, images, targets)["loss_box_reg"].backward()
    torch.testing.assert_close(frozen, model.rpn.head.bbox_pred.weight.grad, rtol=1e-4, atol=1e-7)


def test_everything_frozen():
    model = swap_crop_head(tiny_rcnn().train(), BoxGradient(losses=EVERY_LOSS)).requires_grad_(False)
    losses = model_losses(model, *batch())
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
def test_training_mode_without_gradients(kind):
    """A validation loss: the model in training mode, under no_grad."""
    model = swap_crop_head(tiny_rcnn(kind).train(), BoxGradient(losses=EVERY_LOSS))
    images, targets = batch()
    with torch.no_grad():
        without = model_losses(model, images, targets)
    for name, loss in model_losses(model, images, targets).items():
        assert not without[name].requires_grad
        torch.testing.assert_close(without[name], loss.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("settings", "reached"), [(BoxGradient(), True), (OFF, False)])
def test_in_eval_mode_detections_are_attached_to_the_proposals(settings, reached):
    model = swap_crop_head(tiny_rcnn().eval(), settings)
    detections = model(batch()[0])
    gradient = gradients_of(model, sum(d["boxes"].sum() for d in detections))["rpn.head.bbox_pred.weight"]
    assert (gradient is not None and bool(gradient.any())) == reached


def test_losses_of_a_batch_that_includes_an_image_without_objects():
    model = swap_crop_head(tiny_rcnn().train(), BoxGradient(losses=EVERY_LOSS))
    images, targets = batch()
    targets[0] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    sum(model_losses(model, images, targets).values()).backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()


# --- Autocast --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hot():
    """Images whose coordinates bfloat16 cannot hold: above 256 its steps are 2 pixels."""
    model = tiny_rcnn(min_size=320, max_size=320)
    images = [torch.rand(3, 320, 320)]
    targets = [{"boxes": torch.tensor([[250.3, 260.1, 279.2, 291.4]]), "labels": torch.tensor([1])}]
    return model, images, targets


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_anchors_and_proposals_are_float32(hot, training):
    model, images, targets = hot
    swap_crop_head(model, OFF).train(training)
    seen = {}
    model.rpn.register_forward_hook(lambda _, given, result: seen.update(images=given[0], proposals=result[0]))
    model.rpn.head.register_forward_hook(lambda _, given, result: seen.update(objectness=result[0], deltas=result[1]))
    model.rpn.anchor_generator.register_forward_hook(lambda _, given, result: seen.update(anchors=result))
    with torch.no_grad(), bfloat16():
        model(images, targets)
    assert seen["deltas"][0].dtype == torch.bfloat16  # autocast was at work
    assert {a.dtype for a in seen["anchors"]} == {torch.float32}
    assert {p.dtype for p in seen["proposals"]} == {torch.float32}

    # The proposals: decoded in float32 from those bfloat16 deltas, level by level.
    boxes = []
    anchors = seen["anchors"][0].split([d.shape[1] // 4 * d.shape[2] * d.shape[3] for d in seen["deltas"]])
    for level_deltas, level_anchors in zip(seen["deltas"], anchors):
        level = level_deltas[0].float().view(-1, 4, *level_deltas.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4)
        boxes.append(model.rpn.box_coder.decode_single(level, level_anchors))
    boxes = clip_boxes_to_image(torch.cat(boxes), (320, 320))
    (proposals,) = seen["proposals"]
    assert len(proposals) > 20
    assert torch.cdist(proposals, boxes, p=float("inf")).amin(1).max() < 1e-3
    # Had they been rounded to bfloat16 they would be off by up to a pixel.
    assert (proposals - proposals.bfloat16()).abs().max() > 0.2


def test_under_autocast_final_boxes_are_decoded_in_float32(hot):
    model, images, _ = hot
    swap_crop_head(model, BoxGradient()).eval()
    seen = {}
    model.rpn.register_forward_hook(lambda _, given, result: seen.update(proposals=result[0][0]))
    model.roi_heads.box_predictor.register_forward_hook(lambda _, given, result: seen.update(deltas=result[1]))
    with torch.no_grad(), bfloat16():
        (detections,) = model(images)
    assert seen["deltas"].dtype == torch.bfloat16
    assert detections["boxes"].dtype == torch.float32
    assert detections["scores"].dtype == torch.float32
    boxes = model.roi_heads.box_coder.decode(seen["deltas"].float(), [seen["proposals"]])
    boxes = clip_boxes_to_image(boxes.reshape(-1, 4), (320, 320))
    assert len(detections["boxes"]) > 5
    assert torch.cdist(detections["boxes"], boxes, p=float("inf")).amin(1).max() < 1e-3
    assert (detections["boxes"] - detections["boxes"].bfloat16()).abs().max() > 0.2


def test_under_autocast_the_grid_is_float32(hot, monkeypatch):
    model, images, targets = hot
    swap_crop_head(model, BoxGradient(losses=EVERY_LOSS, positives_only=False)).train()
    dtypes = []
    original = F.grid_sample

    def grid_sample(input, grid, **kwargs):
        dtypes.append(grid.dtype)
        return original(input, grid, **kwargs)

    monkeypatch.setattr(F, "grid_sample", grid_sample)
    with bfloat16():
        model_losses(model, images, targets)
    assert len(dtypes) >= 4  # the heads' crops and the attached ones, on some levels
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("paths", [{"coder": 0}, {"crop": 0}], ids=["crop path", "coder path"])
def test_under_autocast_the_gradient_is_that_of_float32(paths):
    """Through bfloat16 layers a gradient is rounded, no more."""
    case = Case()
    case.heads.float()
    case.features = {name: feature.detach().float() for name, feature in case.features.items()}
    case.proposals = [p.float() for p in case.proposals]
    case.targets = [{**t, "boxes": t["boxes"].float()} for t in case.targets]
    settings = BoxGradient(losses=EVERY_LOSS, positives_only=False, **paths)
    expected = case.gradient(settings, "loss_box_reg", "loss_classifier")
    with bfloat16():
        gradient = case.gradient(settings, "loss_box_reg", "loss_classifier")
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.05 * expected.norm()


def test_a_training_step_under_autocast():
    model = swap_crop_head(tiny_rcnn("mask").train(), BoxGradient(losses=EVERY_LOSS))
    with bfloat16():
        losses = model_losses(model, *batch())
    sum(losses.values()).backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    assert model.rpn.head.bbox_pred.weight.grad.any()


def test_float16_crops_do_not_lose_small_gradients():
    """The crop path's gradient is taken before a gradient scaler can lift it over float16's smallest number."""
    from detector.rcnn.roi_heads import AttachedRoIHeads

    class Pool(torch.nn.Module):
        def forward(self, features, boxes, image_shapes):
            return (features["0"][0] * torch.cat(boxes).sum(1, keepdim=True)).half()

    heads = AttachedRoIHeads.__new__(AttachedRoIHeads)
    torch.nn.Module.__init__(heads)
    heads.box_roi_pool, heads.box_gradient = Pool(), BoxGradient()
    boxes = torch.ones(1, 4, requires_grad=True)
    heads._drawn = ([boxes], [torch.ones(1)])
    features = {"0": torch.ones(1, 1)}
    crop = heads.box_roi_pool(features, [boxes.detach()], None).requires_grad_()
    losses = {"loss_box_reg": (crop * 1e-5).float().sum() * 1e-3}  # 1e-8: below what float16 holds
    heads._add_crop_path(losses, {"box": crop}, features, None)
    (losses["loss_box_reg"] * 2**16).backward()  # as a gradient scaler does
    torch.testing.assert_close(boxes.grad / 2**16, torch.full((1, 4), 1e-8), rtol=0.1, atol=0)
