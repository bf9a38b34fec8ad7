"""The bound: by hand, by its inequality, and in whole detectors."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import assert_bounded, at_the_deltas, losses_of, tiny_rcnn

from detector import BoxGradient, swap_crop_head
from detector.rcnn.box_gradient import bounded_copies

EVERY_LOSS = ("box", "classification", "mask", "keypoint")


def through(own, other, bound):
    """Return the gradient of a leaf whose copies get these gradients; None stands for an unused copy."""
    leaf = torch.zeros_like(own if own is not None else other).requires_grad_()
    pairs = zip(bounded_copies(leaf, bound), (own, other))
    torch.autograd.backward(*zip(*((part, gradient) for part, gradient in pairs if gradient is not None)))
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
def test_the_inequality(seed, bound, sizes, dtype):
    generator = torch.Generator().manual_seed(seed)
    own, other = (10.0**size * torch.randn(6, 4, generator=generator, dtype=dtype) for size in sizes)
    passed = (through(own, other, bound) - own).double()  # 0 if it is below the rounding of own
    own, other = own.double(), other.double()
    slack = 1e-6 * own.norm(dim=1)
    assert (passed.norm(dim=1) <= (bound + 1e-6) * own.norm(dim=1)).all()
    assert (passed.norm(dim=1) <= other.norm(dim=1) * (1 + 1e-6) + slack).all()
    along, square = ((own + passed) * own).sum(1), own.square().sum(1)
    assert (along >= (1 - bound - 1e-5) * square).all()


@pytest.mark.parametrize(
    ("own", "other", "bound", "factor"), [(1, 0, 0.1, 1), (1, 0, None, 1), (0, 1, None, 1), (0, 1, 0.1, 0)]
)
def test_an_unused_copy(own, other, bound, factor):
    gradient = torch.tensor([[1.0, 2.0]])
    assert torch.equal(through(gradient if own else None, gradient if other else None, bound), factor * gradient)


def test_a_gradient_scaler_sees_infinity_and_nan():
    own, other = torch.ones(2, 2), torch.tensor([[math.inf, 1.0], [math.nan, 1.0]])
    assert not through(own, other, 0.1).isfinite().all(dim=1).any()


# --- In a detector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_gradient_at_the_deltas_of_a_detector(kind, bound):
    model = tiny_rcnn(kind).double().train()
    heads = ("loss_classifier", "loss_box_reg", "loss_mask")[: 3 if kind == "mask" else 2]
    swap_crop_head(model, BoxGradient(losses=EVERY_LOSS, bound=None))
    own, others = at_the_deltas(model, ("loss_rpn_box_reg",), heads)
    swap_crop_head(model, BoxGradient(losses=EVERY_LOSS, bound=bound))
    (found,) = at_the_deltas(model, ("loss_rpn_box_reg", *heads))
    assert_bounded(found, own, others, bound)
    assert (others[~own.any(1)].any(1)).any()  # anchors that the RPN's own loss does not train
    assert not found[~own.any(1)].any()


def test_an_rpn_in_eval_mode_has_no_loss_so_nothing_passes_the_bound():
    model = swap_crop_head(tiny_rcnn(rpn_pre_nms_top_n_test=600, rpn_post_nms_top_n_test=600).train())
    found = {}
    for settings in (BoxGradient(), BoxGradient.exact()):
        swap_crop_head(model, settings).rpn.eval()
        loss, weight = losses_of(model)["loss_box_reg"], model.rpn.head.bbox_pred.weight
        found[settings.bound] = torch.autograd.grad(loss, weight, allow_unused=True)[0]
    assert found[None].any()
    assert found[0.1] is None or not found[0.1].any()


def gradient_of(model):
    gradients = torch.autograd.grad(sum(losses_of(model).values()), list(model.rpn.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_the_bound_holds_under_autocast():
    model, found = tiny_rcnn().train(), []
    for settings in (BoxGradient(crop=0, coder=0), BoxGradient(), BoxGradient.exact()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradient_of(swap_crop_head(copy.deepcopy(model), settings)))
    assert 0 < (found[1] - found[0]).norm() < 0.25 * (found[2] - found[0]).norm()


@pytest.mark.slow
def test_the_bound_in_a_compiled_rpn():
    model = swap_crop_head(tiny_rcnn().train())
    wanted = gradient_of(model)
    model.rpn.compile(backend="eager")
    torch.testing.assert_close(gradient_of(model), wanted, rtol=1e-4, atol=1e-6)
