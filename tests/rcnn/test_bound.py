"""The bound: by hand, by its inequality, and in whole detectors against gradients taken one by one."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import batch, copies, tiny_rcnn

from detector import BoxGradient, swap_crop_head
from detector.rcnn.box_gradient import bounded_copies

OFF = BoxGradient(crop=0, coder=0)
EVERY_LOSS = ("box", "classification", "mask", "keypoint")

# --- The copies alone ------------------------------------------------------------------------------------------------


def through(own, other, bound):
    """The gradient of a leaf whose two copies get these gradients; None: the copy is not used."""
    leaf = torch.zeros_like(own if own is not None else other).requires_grad_()
    used = [
        (part, gradient) for part, gradient in zip(bounded_copies(leaf, bound), (own, other)) if gradient is not None
    ]
    torch.autograd.backward(*zip(*used))
    return leaf.grad


def test_the_gradient_is_scaled_row_by_row():
    own = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])  # norms 5, 5, 0, 5
    other = torch.tensor([[0.0, 10.0], [0.0, 0.25], [0.0, 7.0], [0.0, 0.0]])
    wanted = torch.tensor([[3.0, 4.5], [3.0, 4.25], [0.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(through(own, other, 0.1), wanted)


@given(
    seed=st.integers(0, 2**32 - 1),
    bound=st.floats(1e-3, 2),
    sizes=st.tuples(st.integers(-18, 18), st.integers(-18, 18)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_what_passes_is_within_the_bound_and_never_leads_uphill(seed, bound, sizes, dtype):
    generator = torch.Generator().manual_seed(seed)
    own, other = (10.0**size * torch.randn(6, 4, generator=generator, dtype=dtype) for size in sizes)
    passed = (through(own, other, bound) - own).double()  # 0 where it is below the rounding of own
    own, other = own.double(), other.double()
    slack = 1e-6 * own.norm(dim=1)
    assert (passed.norm(dim=1) <= (bound + 1e-6) * own.norm(dim=1)).all()
    assert (passed.norm(dim=1) <= other.norm(dim=1) * (1 + 1e-6) + slack).all()
    along, square = ((own + passed) * own).sum(1), own.square().sum(1)
    assert (along >= (1 - bound - 1e-5) * square).all()


@pytest.mark.parametrize("scale", [2.0**-20, 0.25, 2.0**16])
def test_a_loss_scaler_changes_nothing(scale):
    torch.manual_seed(0)
    own, other = torch.randn(2, 6), 30 * torch.randn(2, 6)
    torch.testing.assert_close(through(scale * own, scale * other, 0.1) / scale, through(own, other, 0.1))


def test_where_one_copy_is_not_used():
    gradient = torch.tensor([[1.0, 2.0]])
    assert torch.equal(through(gradient, None, 0.1), gradient)
    assert torch.equal(through(gradient, None, None), gradient)
    assert torch.equal(through(None, gradient, None), gradient)
    assert torch.equal(through(None, gradient, 0.1), torch.zeros(1, 2))  # nothing to compare it with


def test_without_a_bound_it_is_the_plain_sum_twice_differentiable():
    def function(x, bound=None):
        first, second = bounded_copies(x, bound)
        return first**3 * 2 - second**2 * first

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_not_finite_stays_so():
    """A gradient scaler must see it."""
    own, other = torch.ones(2, 2), torch.tensor([[math.inf, 1.0], [math.nan, 1.0]])
    assert not through(own, other, 0.1).isfinite().all(dim=1).any()


# --- In a detector ---------------------------------------------------------------------------------------------------


def losses_of(model, images, targets, seed=1):
    torch.manual_seed(seed)
    return model(images, copies(targets))


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.rpn.parameters()])


def at_the_deltas(model, images, targets, *groups):
    """The gradients of sums of losses at the deltas that the RPN's head returns, [anchors, 4]."""
    seen = []
    handle = model.rpn.head.register_forward_hook(lambda _, given, result: seen.extend(result[1]))
    losses = losses_of(model, images, targets)
    handle.remove()
    found = []
    for names in groups:
        gradients = torch.autograd.grad(sum(losses[name] for name in names), seen, retain_graph=True)
        found.append(torch.cat([g.unflatten(1, (-1, 4)).movedim(2, -1).flatten(0, -2) for g in gradients]))
    return found


@pytest.mark.parametrize("bound", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_gradient_at_the_deltas_of_a_detector_is_made_of_its_parts(kind, bound):
    """Box by box: that of the RPN's own box loss, and the exact one of the heads' losses, scaled to the bound."""
    model = tiny_rcnn(kind).double().train()
    images, targets = batch(torch.float64)
    heads = ("loss_classifier", "loss_box_reg", "loss_mask") if kind == "mask" else ("loss_classifier", "loss_box_reg")
    swap_crop_head(model, BoxGradient(losses=EVERY_LOSS, bound=None))
    own, others = at_the_deltas(model, images, targets, ("loss_rpn_box_reg",), heads)
    swap_crop_head(model, BoxGradient(losses=EVERY_LOSS, bound=bound))
    (found,) = at_the_deltas(model, images, targets, ("loss_rpn_box_reg", *heads))
    wanted = own.clone()
    for k, (a, b) in enumerate(zip(own, others)):
        if b.any():
            wanted[k] += min(1, float(bound * a.norm() / b.norm())) * b
    assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()
    moved = (wanted - own).norm(dim=1) > 1e-4 * own.norm(dim=1).clamp(min=1e-12)
    assert moved.sum() >= 3
    assert (others[~own.any(1)].any(1)).any()  # a box that the RPN's own loss does not train
    assert not found[~own.any(1)].any()


def test_weights_of_the_losses_do_not_loosen_it():
    """Doubling the box head's loss changes nothing at the RPN once the bound holds."""
    model = swap_crop_head(tiny_rcnn().double().train(), BoxGradient(bound=0.01))
    images, targets = batch(torch.float64)
    found = []
    for weight in (1, 2, 50):
        losses = losses_of(model, images, targets)
        found.append(
            gradient_of(model, losses["loss_objectness"] + losses["loss_rpn_box_reg"] + weight * losses["loss_box_reg"])
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-14)


def test_an_image_sends_back_the_same_alone_and_in_a_batch():
    """So batches, accumulated or spread over devices, give one gradient."""
    model = swap_crop_head(tiny_rcnn(box_batch_size_per_image=8, rpn_batch_size_per_image=8).double().train())
    images, targets = batch(torch.float64)
    images = [image[:, :56] for image in images]  # of one size: no padding
    targets[0]["boxes"] = targets[0]["boxes"].clamp(max=55.3)
    model.rpn.fg_bg_sampler = model.roi_heads.fg_bg_sampler = First(8)
    whole = gradient_of(model, sum(losses_of(model, images, targets).values()))
    parts = [gradient_of(model, sum(losses_of(model, images[i:][:1], targets[i:][:1]).values())) for i in range(2)]
    torch.testing.assert_close(whole, sum(parts) / 2, rtol=1e-9, atol=1e-12)


class First:
    """Draws the first candidates, always as many."""

    def __init__(self, count):
        self.count = count

    def __call__(self, matched):
        masks = []
        for labels in matched:
            positive, negative = torch.where(labels >= 1)[0][: self.count // 4], torch.where(labels == 0)[0]
            chosen = positive, negative[: self.count - len(positive)]
            masks.append([torch.zeros_like(labels, dtype=torch.uint8).index_fill(0, c, 1) for c in chosen])
        return tuple(map(list, zip(*masks)))


def test_an_rpn_in_eval_mode_beside_heads_in_training():
    """It has no loss of its own there, but the heads have: nothing may pass that is not bounded."""
    model = swap_crop_head(tiny_rcnn(rpn_pre_nms_top_n_test=600, rpn_post_nms_top_n_test=600).train())
    images, targets = batch()
    found = {}
    for settings in (BoxGradient(), BoxGradient.exact()):
        swap_crop_head(model, settings).rpn.eval()
        losses = losses_of(model, images, targets)
        weight = model.rpn.head.bbox_pred.weight
        found[settings.bound] = torch.autograd.grad(losses["loss_box_reg"], weight, allow_unused=True)[0]
    assert found[None].any()
    assert found[0.1] is None or not found[0.1].any()


def test_the_bound_holds_under_autocast():
    """In bfloat16 the deltas are rounded; the gradients are compared in float32, where they are decoded."""
    model = tiny_rcnn().train()
    images, targets = batch()
    found = []
    for settings in (OFF, BoxGradient(bound=0.1), BoxGradient.exact()):
        swapped = swap_crop_head(copy.deepcopy(model), settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(swapped, images, targets)
        found.append(gradient_of(swapped, sum(losses.values())))
    assert (found[1] - found[0]).norm() < 0.25 * (found[2] - found[0]).norm()
    assert (found[1] - found[0]).norm() > 0


@pytest.mark.slow
def test_the_bound_in_a_compiled_model():
    model = swap_crop_head(tiny_rcnn().train())
    images, targets = batch()
    wanted = gradient_of(model, sum(losses_of(model, images, targets).values()))
    compiled = torch.compile(model, backend="eager")
    found = gradient_of(model, sum(losses_of(compiled, images, targets).values()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
