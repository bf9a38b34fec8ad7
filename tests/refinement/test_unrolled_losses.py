"""The losses of all looks and their gradients, against a forward pass by hand.

The reference crops with torchvision's RoIAlign, of which finite differences are taken; with ``differentiable`` it crops
with MultiScaleAffineCrop, which has tests of its own, and its two paths are cut by ``detach``.
"""

import dataclasses

import pytest
import torch
from support.refinement_cases import SHAPES, RefinementCase
from torchvision.ops import MultiScaleRoIAlign, box_iou

from detector import BoxGradient, MultiScaleAffineCrop
from detector.refinement.losses import unrolled_losses

OFF = BoxGradient(crop=0, coder=0)
LOOKS = 3
BETA = 1 / 9


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return RefinementCase()


class Reference:
    """The losses by hand, as a function of boxes, features and weights; the fit's targets are those of one start."""

    def __init__(self, case, looks=LOOKS):
        self.case, self.looks = case, looks
        self.ious = None
        _, at_each_look = self.losses(case.boxes, case.features)
        self.at_each_look = [b.detach() for b in at_each_look]
        truth = torch.cat(case.truth)
        self.ious = [box_iou(b, truth).diagonal() for b in self.at_each_look]

    def losses(self, boxes, features, *, differentiable=False, crop=True, coder=True):
        pool_class = MultiScaleAffineCrop if differentiable else MultiScaleRoIAlign
        pool = pool_class(["0", "1", "2"], 3, 2, canonical_scale=32, canonical_level=3)
        truth, counts = torch.cat(self.case.truth), [len(b) for b in boxes]
        head = self.case.refinement.stages[0]
        linear = head.trunk[1]
        current, seen = torch.cat(list(boxes)), []
        box_loss = fit_loss = 0
        for look in range(self.looks):
            seen.append(current)
            at = current if crop else current.detach()
            crops = pool(features, list(at.split(counts)), SHAPES)
            hidden = torch.tanh(crops.flatten(1) @ linear.weight.T + linear.bias)
            deltas = hidden @ head.deltas.weight.T + head.deltas.bias
            fit = torch.sigmoid(hidden @ head.fit.weight[0] + head.fit.bias[0])
            if self.ious is not None:
                assert (self.ious[look] > 0.55).all()  # all count
                apart = (deltas - encoded(truth, current if coder else current.detach())).abs()
                smooth = torch.where(apart < BETA, apart**2 / (2 * BETA), apart - BETA / 2)
                box_loss = box_loss + smooth.mean()
                iou = self.ious[look]
                fit_loss = fit_loss - (iou * fit.log() + (1 - iou) * (1 - fit).log()).mean()
            current = moved(current, deltas)
        return torch.stack([box_loss, fit_loss]) if self.ious is not None else None, seen


def encoded(truth, boxes):
    """20 times the way of the centre in sides, 10 times the logarithm of the growth."""
    size, true_size = boxes[:, 2:] - boxes[:, :2], truth[:, 2:] - truth[:, :2]
    way = (truth[:, :2] + truth[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
    return torch.cat([20 * way / size, 10 * (true_size / size).log()], dim=1)


def moved(boxes, deltas):
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] / 20 * size
    half = size * (deltas[:, 2:] / 10).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


@pytest.fixture(scope="module")
def reference(case):
    return Reference(case)


def configured(case, gradient, looks=LOOKS, **settings):
    config = case.refinement.config
    case.refinement.configure(dataclasses.replace(config, box_gradient=gradient, train_looks=looks, **settings))
    return case.refinement


def losses_of(case, gradient, boxes=None, features=None, looks=LOOKS):
    refinement = configured(case, gradient, looks)
    found = unrolled_losses(refinement, features or case.features, boxes or case.boxes, case.truth, SHAPES)
    return torch.stack([found["loss_refinement_box"], found["loss_refinement_fit"]])


def gradients_of(losses, leaves):
    """Of each loss, everything in one vector; zeros where there is none."""
    found = []
    for loss in losses:
        parts = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(parts, leaves)]
        found.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(found)


def leaves_of(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def assert_equal(found, wanted, rtol):
    assert (wanted.abs().amax(dim=1) > 1e-6).all()
    assert ((found - wanted).abs().amax(dim=1) < rtol * wanted.abs().amax(dim=1)).all()


@pytest.mark.parametrize("gradient", [BoxGradient.exact(), OFF, BoxGradient(bound=0.1), BoxGradient(crop=0.3)], ids=str)
def test_the_values_are_those_by_hand_whatever_the_gradient(case, reference, gradient):
    wanted, _ = reference.losses(case.boxes, case.features)
    torch.testing.assert_close(losses_of(case, gradient), wanted, rtol=1e-9, atol=0)


def test_the_case_moves_its_boxes_and_is_far_from_the_border(reference):
    for before, after in zip(reference.at_each_look, reference.at_each_look[1:]):
        assert ((after - before).abs().amax(dim=1) > 0.3).sum() >= 6
        assert after.min() > 0.5
        assert after.max() < 55.5


def test_boxes_get_the_finite_differences_through_all_looks(case, reference):
    boxes = leaves_of(case.boxes)
    found = gradients_of(losses_of(case, BoxGradient.exact(), boxes), boxes)
    wanted = torch.zeros_like(found)
    step, start, counts = 1e-6, torch.cat(case.boxes), [len(b) for b in case.boxes]
    with torch.no_grad():
        for k in range(start.numel()):
            by = torch.zeros_like(start).index_fill_(0, torch.tensor([k // 4]), 0)
            by[k // 4, k % 4] = step
            up, down = (reference.losses((start + s * by).split(counts), case.features)[0] for s in (1, -1))
            wanted[:, k] = (up - down) / (2 * step)
    assert_equal(found, wanted, 1e-5)


@pytest.mark.parametrize("what", ["features", "weights"])
def test_features_and_weights_get_the_finite_differences_through_all_looks(case, reference, what):
    """Along some random directions."""
    features = {name: feature.clone().requires_grad_() for name, feature in case.features.items()}
    leaves = list(features.values()) if what == "features" else list(case.refinement.parameters())
    losses = losses_of(case, BoxGradient.exact(), features=features)
    found = gradients_of(losses, leaves)
    step = 1e-6
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        ways = [torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator) for leaf in leaves]
        values = []
        with torch.no_grad():
            for by in (step, -2 * step):  # there, and to the other side
                for leaf, way in zip(leaves, ways):
                    leaf += by * way
                values.append(reference.losses(case.boxes, features)[0])
            for leaf, way in zip(leaves, ways):
                leaf += step * way
        wanted = (values[0] - values[1]) / (2 * step)
        along = found @ torch.cat([way.flatten() for way in ways])
        torch.testing.assert_close(along, wanted, rtol=1e-4, atol=1e-5)
        assert (wanted.abs() > 1e-3).all()


@pytest.mark.parametrize(("crop", "coder"), [(1, 0), (0, 1), (1, 1)])
def test_the_two_paths_are_apart(case, reference, crop, coder):
    boxes = leaves_of(case.boxes)
    weights = list(case.refinement.parameters())
    found = gradients_of(losses_of(case, BoxGradient(crop=crop, coder=coder, bound=None), boxes), [*boxes, *weights])
    by_hand, _ = reference.losses(boxes, case.features, differentiable=True, crop=bool(crop), coder=bool(coder))
    assert_equal(found[:1], gradients_of(by_hand[:1], [*boxes, *weights]), 1e-9)
    assert_equal(found[1:], gradients_of(by_hand[1:], [*boxes, *weights]), 1e-9)


def test_the_paths_differ_and_scale(case):
    """Of one look: twice half of a path is the path, and both are the exact derivative."""
    boxes = leaves_of(case.boxes)
    found = {}
    for crop, coder in ((1, 0), (0, 1), (1, 1), (0.5, 0), (0, 0.25)):
        losses = losses_of(case, BoxGradient(crop=crop, coder=coder, bound=None), boxes, looks=1)
        found[crop, coder] = gradients_of(losses[:1], boxes)
    assert_equal(found[1, 0] + found[0, 1], found[1, 1], 1e-9)
    assert_equal(2 * found[0.5, 0], found[1, 0], 1e-9)
    assert_equal(4 * found[0, 0.25], found[0, 1], 1e-9)
    assert (found[1, 0] - found[0, 1]).norm() > 0.1 * found[1, 1].norm()


def test_without_a_loss_that_may_move_a_box_looks_are_constants_to_each_other(case):
    """Of two looks, the first look's deltas get the gradient of its own loss alone."""
    found = []
    for gradient in (OFF, BoxGradient(losses=())):
        seen = []
        handle = case.refinement.stages[0].register_forward_hook(lambda _, given, result, s=seen: s.append(result[0]))
        losses = losses_of(case, gradient, looks=2)
        handle.remove()
        found.append(torch.autograd.grad(losses.sum(), seen)[0])
    assert found[0].any()
    assert torch.equal(*found)


def test_off_is_as_many_single_looks_at_constant_boxes(case, reference):
    boxes, features = leaves_of(case.boxes), {name: f.clone().requires_grad_() for name, f in case.features.items()}
    leaves = [*features.values(), *case.refinement.parameters()]
    losses = losses_of(case, OFF, boxes, features)
    assert not gradients_of(losses, boxes).any()
    found = gradients_of(losses, leaves)
    counts = [len(b) for b in case.boxes]
    single = [
        losses_of(case, BoxGradient.exact(), list(at.split(counts)), features, looks=1) for at in reference.at_each_look
    ]
    assert_equal(found, gradients_of(sum(single), leaves), 1e-9)
    exact = gradients_of(losses_of(case, BoxGradient.exact(), boxes, features), leaves)
    assert ((exact - found).norm(dim=1) > 0.05 * found.norm(dim=1)).all()


@pytest.mark.parametrize("bound", [0.1, 0.02, 1e9])
def test_the_bound_holds_what_comes_back_at_the_deltas_row_by_row(case, reference, bound):
    """Of two looks: at the deltas of the first there is the gradient of its own loss, and what the second sends."""
    settings = {"off": OFF, "exact": BoxGradient.exact(), "bound": BoxGradient(bound=bound)}
    found = {}
    for name, gradient in settings.items():
        seen = []
        handle = case.refinement.stages[0].register_forward_hook(
            lambda _, given, result, seen=seen: seen.append(result[0])
        )
        losses = losses_of(case, gradient, looks=2)
        handle.remove()
        found[name] = torch.autograd.grad(losses.sum(), seen)
    own, others = found["off"][0], found["exact"][0] - found["off"][0]
    torch.testing.assert_close(found["bound"][1], found["off"][1], rtol=1e-12, atol=0)  # nothing comes after the last
    wanted, held = own.clone(), 0
    for k in range(len(own)):
        share = float(bound * own[k].norm() / others[k].norm())
        held += share < 1
        wanted[k] += min(1, share) * others[k]
    torch.testing.assert_close(found["bound"][0], wanted, rtol=1e-9, atol=1e-12)
    assert held == (0 if bound > 1 else len(own))


def test_a_box_that_does_not_count_has_a_fit_alone(case):
    """Below min_iou with its truth: no box loss, in value or gradient."""
    far = [b + 25 for b in case.boxes[1:]]
    boxes = [case.boxes[0], *leaves_of(far)]
    refinement = configured(case, BoxGradient.exact(), 1, min_iou=0.5)
    losses = unrolled_losses(refinement, case.features, boxes, case.truth, SHAPES)
    alone = unrolled_losses(refinement, case.features, case.boxes, [case.truth[0], case.boxes[1] + 40], SHAPES)
    torch.testing.assert_close(losses["loss_refinement_box"], alone["loss_refinement_box"], rtol=1e-9, atol=0)
    assert not gradients_of([losses["loss_refinement_box"]], boxes[1:]).any()
    assert gradients_of([losses["loss_refinement_fit"]], boxes[1:]).any()


def test_each_stage_learns_from_better_boxes():
    """The second set of weights, of boxes with an IoU of 0.1 more."""
    case = RefinementCase(stages=2, looks=1, train_looks=2, min_iou=0.5)
    truth = torch.tensor([[10.3, 10.7, 40.3, 40.7]]).double()
    for off, reached in ((1.1, True), (9.9, False)):  # IoUs of about 0.93 and 0.5
        case.refinement.stages[0].deltas.weight.data.zero_()  # boxes stay there
        boxes = [truth + torch.tensor([off, 0, off, 0]).double(), truth.new_zeros(0, 4)]
        losses = unrolled_losses(case.refinement, case.features, boxes, [truth, truth[:0]], SHAPES)
        second = torch.autograd.grad(losses["loss_refinement_box"], case.refinement.stages[1].deltas.bias)[0]
        assert bool(second.any()) == reached
        first = case.refinement.stages[0].deltas.bias
        losses = unrolled_losses(case.refinement, case.features, boxes, [truth, truth[:0]], SHAPES)
        assert torch.autograd.grad(losses["loss_refinement_box"], first)[0].any()


@pytest.mark.parametrize("gradient", [BoxGradient.exact(), OFF, BoxGradient(bound=0.1)], ids=str)
def test_no_boxes_are_zeros_that_stay_in_the_graph(case, gradient):
    """Of several processes each must have a gradient for each weight."""
    nothing = [b[:0] for b in case.boxes]
    refinement = configured(case, gradient)
    losses = unrolled_losses(refinement, case.features, nothing, nothing, SHAPES)
    assert set(losses) == {"loss_refinement_box", "loss_refinement_fit"}
    assert not any(loss.detach() for loss in losses.values())
    for gradient in torch.autograd.grad(sum(losses.values()), list(refinement.parameters())):
        assert not gradient.any()


def test_a_look_that_leaves_no_box_is_not_taken(case):
    """Deltas that shrink a box below a pixel, or off the image: the next look is at the box as it was."""
    refinement = configured(case, BoxGradient.exact(), 2)
    head = refinement.stages[0]
    with torch.no_grad():
        kept = {name: value.clone() for name, value in head.state_dict().items()}
        head.deltas.weight.zero_()
        head.deltas.bias.copy_(torch.tensor([0.0, 0.0, -80.0, -80.0]))
    boxes = leaves_of(case.boxes)
    losses = unrolled_losses(refinement, case.features, boxes, case.truth, SHAPES)
    gradients = gradients_of(losses.values(), boxes)
    twice = unrolled_losses(configured(case, OFF, 1), case.features, case.boxes, case.truth, SHAPES)
    head.load_state_dict(kept)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, 2 * twice[name], rtol=1e-9, atol=0)
    assert gradients.isfinite().all()


def test_in_deterministic_mode_it_is_the_same_to_the_last_bit(case):
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            losses = losses_of(case, BoxGradient.exact())
            found.append(gradients_of(losses, list(case.refinement.parameters())))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*found)
