"""The losses of all training iterations and their gradients, against a forward pass by hand.

The reference crops with torchvision's RoIAlign for finite differences. With ``differentiable`` it crops with
MultiScaleAffineCrop, and its two paths are cut by ``detach``.
"""

from dataclasses import replace

import pytest
import torch
from support.refinement_cases import SHAPES, RefinementCase
from torchvision.ops import MultiScaleRoIAlign, box_iou

from detector import BoxGradient, MultiScaleAffineCrop
from detector.refinement.losses import unrolled_losses

OFF = BoxGradient(crop=0, coder=0)
ITERATIONS = 3
BETA = 1 / 9


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return RefinementCase(std=0.5)


class Reference:
    """The losses by hand, as a function of boxes, features and weights. The targets of the IoU are constants."""

    def __init__(self, case):
        self.case, self.ious = case, None
        self.boxes_by_iteration = [b.detach() for b in self.losses(case.boxes, case.features)[1]]
        self.ious = [box_iou(b, torch.cat(case.truth)).diagonal() for b in self.boxes_by_iteration]

    def losses(self, boxes, features, *, differentiable=False, crop=True, coder=True):
        pool_class = MultiScaleAffineCrop if differentiable else MultiScaleRoIAlign
        pool = pool_class(["0", "1", "2"], 3, 2, canonical_scale=32, canonical_level=3)
        truth, counts = torch.cat(self.case.truth), [len(b) for b in boxes]
        head = self.case.refinement.head
        linear = head.trunk[1]
        current, seen = torch.cat(list(boxes)), []
        box_loss = iou_loss = 0
        for iteration in range(ITERATIONS):
            seen.append(current)
            at = current if crop else current.detach()
            crops = pool(features, list(at.split(counts)), SHAPES)
            hidden = torch.tanh(crops.flatten(1) @ linear.weight.T + linear.bias)
            deltas = hidden @ head.deltas.weight.T + head.deltas.bias
            predicted = torch.sigmoid(hidden @ head.iou.weight[0] + head.iou.bias[0])
            if self.ious is not None:
                iou = self.ious[iteration]
                assert (iou > 0.55).all()  # all boxes have a box loss
                error = (deltas - encoded(truth, current if coder else current.detach())).abs()
                box_loss = box_loss + torch.where(error < BETA, error**2 / (2 * BETA), error - BETA / 2).mean()
                iou_loss = iou_loss - (iou * predicted.log() + (1 - iou) * (1 - predicted).log()).mean()
            current = moved(current, deltas)
        return torch.stack([box_loss, iou_loss]) if self.ious is not None else None, seen


def encoded(truth, boxes):
    """20 times the offset of the centre in sides, 10 times the logarithm of the growth."""
    size, true_size = boxes[:, 2:] - boxes[:, :2], truth[:, 2:] - truth[:, :2]
    offset = (truth[:, :2] + truth[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
    return torch.cat([20 * offset / size, 10 * (true_size / size).log()], dim=1)


def moved(boxes, deltas):
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] / 20 * size
    half = size * (deltas[:, 2:] / 10).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


@pytest.fixture(scope="module")
def reference(case):
    return Reference(case)


def configured(case, gradient, iterations=ITERATIONS):
    case.refinement.config = replace(case.refinement.config, box_gradient=gradient, train_iterations=iterations)
    return case.refinement


def losses_of(case, gradient, boxes=None, features=None, iterations=ITERATIONS):
    refinement = configured(case, gradient, iterations)
    found = unrolled_losses(refinement, features or case.features, boxes or case.boxes, case.truth, SHAPES)
    return torch.stack([found["loss_refinement_box"], found["loss_refinement_iou"]])


def gradients_of(losses, leaves):
    """Return the gradient of each loss as one vector, zeros where there is none."""
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
def test_values_do_not_depend_on_the_gradient(case, reference, gradient):
    wanted, _ = reference.losses(case.boxes, case.features)
    torch.testing.assert_close(losses_of(case, gradient), wanted, rtol=1e-9, atol=0)


def test_boxes_get_the_finite_differences_through_all_iterations(case, reference):
    for before, after in zip(reference.boxes_by_iteration, reference.boxes_by_iteration[1:]):
        assert ((after - before).abs().amax(dim=1) > 0.3).sum() >= 6
    boxes = leaves_of(case.boxes)
    found = gradients_of(losses_of(case, BoxGradient.exact(), boxes), boxes)
    wanted = torch.zeros_like(found)
    size, start, counts = 1e-6, torch.cat(case.boxes), [len(b) for b in case.boxes]
    with torch.no_grad():
        for k in range(start.numel()):
            step = torch.zeros_like(start)
            step.view(-1)[k] = size
            up, down = (reference.losses((start + s * step).split(counts), case.features)[0] for s in (1, -1))
            wanted[:, k] = (up - down) / (2 * size)
    assert_equal(found, wanted, 1e-5)


@pytest.mark.parametrize(("crop", "coder"), [(1, 0), (0, 1), (1, 1)])
def test_each_path(case, reference, crop, coder):
    boxes, maps = leaves_of(case.boxes), {name: f.clone().requires_grad_() for name, f in case.features.items()}
    leaves = [*boxes, *maps.values(), *case.refinement.parameters()]
    found = gradients_of(losses_of(case, BoxGradient(crop=crop, coder=coder, bound=None), boxes, maps), leaves)
    by_hand, _ = reference.losses(boxes, maps, differentiable=True, crop=bool(crop), coder=bool(coder))
    assert_equal(found, gradients_of(by_hand, leaves), 1e-9)


def test_the_scales_of_the_paths(case):
    boxes, found = leaves_of(case.boxes), {}
    for crop, coder in ((1, 0), (0, 1), (0.5, 0.25)):
        losses = losses_of(case, BoxGradient(crop=crop, coder=coder, bound=None), boxes, iterations=1)
        found[crop, coder] = gradients_of(losses[:1], boxes)
    assert_equal(found[0.5, 0.25], 0.5 * found[1, 0] + 0.25 * found[0, 1], 1e-9)
    assert (found[1, 0] - found[0, 1]).norm() > 0.1 * found[1, 0].norm()


def test_off_is_as_many_single_iterations_at_constant_boxes(case, reference):
    boxes, features = leaves_of(case.boxes), {name: f.clone().requires_grad_() for name, f in case.features.items()}
    leaves = [*features.values(), *case.refinement.parameters()]
    losses = losses_of(case, OFF, boxes, features)
    assert not gradients_of(losses, boxes).any()
    found = gradients_of(losses, leaves)
    assert torch.equal(found, gradients_of(losses_of(case, BoxGradient(losses=()), boxes, features), leaves))
    counts = [len(b) for b in case.boxes]
    single = [
        losses_of(case, BoxGradient.exact(), list(at.split(counts)), features, iterations=1)
        for at in reference.boxes_by_iteration
    ]
    assert_equal(found, gradients_of(sum(single), leaves), 1e-9)
    exact = gradients_of(losses_of(case, BoxGradient.exact(), boxes, features), leaves)
    assert ((exact - found).norm(dim=1) > 0.05 * found.norm(dim=1)).all()


@pytest.mark.parametrize("bound", [0.1, 0.02, 1e9])
def test_the_bound_at_the_deltas_of_the_first_of_two_iterations(case, bound):
    settings = {"off": OFF, "exact": BoxGradient.exact(), "bound": BoxGradient(bound=bound)}
    found = {}
    for name, gradient in settings.items():
        seen = []
        handle = case.refinement.head.register_forward_hook(lambda _, given, result, seen=seen: seen.append(result[0]))
        losses = losses_of(case, gradient, iterations=2)
        handle.remove()
        found[name] = torch.autograd.grad(losses.sum(), seen)
    own, others = found["off"][0], found["exact"][0] - found["off"][0]
    torch.testing.assert_close(found["bound"][1], found["off"][1], rtol=1e-12, atol=0)  # the last iteration
    scale = bound * own.norm(dim=1, keepdim=True) / others.norm(dim=1, keepdim=True)
    assert (scale > 1).all() if bound > 1 else (scale < 1).all()
    torch.testing.assert_close(found["bound"][0], own + scale.clamp(max=1) * others, rtol=1e-9, atol=1e-12)


def test_a_box_far_from_its_object_has_no_box_loss(case):
    boxes = [case.boxes[0], *leaves_of([b + 25 for b in case.boxes[1:]])]
    refinement = configured(case, BoxGradient.exact(), 1)
    losses = unrolled_losses(refinement, case.features, boxes, case.truth, SHAPES)
    alone = unrolled_losses(refinement, case.features, case.boxes, [case.truth[0], case.boxes[1] + 40], SHAPES)
    torch.testing.assert_close(losses["loss_refinement_box"], alone["loss_refinement_box"], rtol=1e-9, atol=0)
    assert not gradients_of([losses["loss_refinement_box"]], boxes[1:]).any()
    assert gradients_of([losses["loss_refinement_iou"]], boxes[1:]).any()


@pytest.mark.parametrize("gradient", [BoxGradient.exact(), OFF, BoxGradient(bound=0.1)], ids=str)
def test_no_boxes_are_zeros_in_the_graph(case, gradient):
    """Each of several processes needs a gradient for each weight."""
    nothing = [b[:0] for b in case.boxes]
    refinement = configured(case, gradient)
    losses = unrolled_losses(refinement, case.features, nothing, nothing, SHAPES)
    assert not any(loss.detach() for loss in losses.values())
    for gradient in torch.autograd.grad(sum(losses.values()), list(refinement.parameters())):
        assert not gradient.any()


def test_an_iteration_that_leaves_no_box_has_no_effect():
    """For deltas that shrink a box below a pixel, the next iteration is at the same box."""
    case = RefinementCase()
    with torch.no_grad():
        case.refinement.head.deltas.weight.zero_()
        case.refinement.head.deltas.bias.copy_(torch.tensor([0.0, 0.0, -80.0, -80.0]))
    boxes = leaves_of(case.boxes)
    losses = losses_of(case, BoxGradient.exact(), boxes, iterations=2)
    assert gradients_of(losses, boxes).isfinite().all()
    torch.testing.assert_close(losses, 2 * losses_of(case, OFF, iterations=1), rtol=1e-9, atol=0)
