"""Kernels and synchronisations of a training step and an inference beyond the stock model's, without the crops."""

from collections import Counter
from functools import partial

import pytest
import torch
from support.operator_counts import OperatorCounts, uncounted
from support.refined_models import refined
from support.tiny_models import batch, copies, tiny_rcnn
from torchvision.ops import MultiScaleRoIAlign

from detector import BoxGradient, MultiScaleAffineCrop, swap_crop_head

EVERY_LOSS = ("box", "classification", "mask", "keypoint")


class FreeCrop(torch.autograd.Function):
    """A crop that costs nothing, forward and backward."""

    @staticmethod
    def forward(ctx, shape, *maps_and_boxes):
        ctx.save_for_backward(*maps_and_boxes)
        with uncounted():
            return maps_and_boxes[0].new_zeros(shape)

    @staticmethod
    def backward(ctx, gradient):
        with uncounted():
            needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:])
            return None, *(torch.zeros_like(given) if need else None for given, need in needed)


def free_crop(pool, features, boxes, image_shapes):
    maps = [features[name] for name in pool.featmap_names]
    return FreeCrop.apply((sum(map(len, boxes)), maps[0].shape[1], *pool.output_size), *maps, *boxes)


def free_box_gradient(pool, features, boxes, image_shapes, upstream):
    with uncounted():
        return [torch.zeros_like(b) for b in boxes]


@pytest.fixture(autouse=True)
def as_with_the_triton_kernel(monkeypatch):
    monkeypatch.setattr(MultiScaleAffineCrop, "needs_no_forward", lambda pool, features: True)


def counted(model, images, targets=None):
    """Return the counts of an inference, or those of the forward and the backward pass of a training step."""
    for pool in model.modules():
        if isinstance(pool, MultiScaleRoIAlign):
            pool.forward, pool.box_gradient = partial(free_crop, pool), partial(free_box_gradient, pool)
    torch.manual_seed(0)
    model.train(targets is not None)
    with torch.set_grad_enabled(model.training), OperatorCounts() as forward:
        result = model(images, *[] if targets is None else [copies(targets)])
        loss = sum(result.values()) if model.training else None
    if loss is None:
        return [forward]
    with OperatorCounts() as backward:
        loss.backward()
    return [forward, backward]


def beyond(models, number, *, training):
    """Return the kernels, per pass, and the synchronisations of the second model beyond those of the first."""
    images, targets = (part[:number] for part in batch())
    stock, ours = (counted(model, images, targets if training else None) for model in models)
    kernels = [b.kernels.total() - a.kernels.total() for a, b in zip(stock, ours, strict=True)]
    return kernels, sum((b.syncs - a.syncs for a, b in zip(stock, ours)), Counter())


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
def test_an_inference_costs_nothing_more(kind, number):
    models = tiny_rcnn(kind), swap_crop_head(tiny_rcnn(kind))
    assert beyond(models, number, training=False) == ([0], Counter())


# Kernels of a step beyond the stock model's: of the batch, and of each image.
NOTHING = (0, 0)
POSITIVES = (1, 1)  # forward: the anchors of all images in one tensor, and which RoIs are positives
TARGETS = (3, 1)  # forward: the above, and the encoded targets of all images in one tensor
BOX_HEAD = (11, 1)  # forward: the above, and the head's backward pass from the box loss to the crops
# Backward: the decoding of deltas, the choice of the top k, and for each image clipping, NMS and sampling.
PROPOSALS = (16, 23)
BOUND = (23, 23)  # and the bound
CODER = (42, 23)  # and the encoding of the targets
CROP_AND_CODER = (42, 24)  # and the sum of the two paths
APART = (42, 25)  # and, of a loss alone, the gradient at the boxes times that at the loss
EVERY_POOL = (42, 27)  # and the choice of the positives for masks or keypoints
BOX_AND_CLASSES = ("box", "classification")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("kind", "settings", "forward", "backward"),
    [
        ("box", BoxGradient(crop=0, coder=0), NOTHING, NOTHING),
        ("box", BoxGradient(coder=0, bound=None, losses=BOX_AND_CLASSES), POSITIVES, PROPOSALS),
        ("box", BoxGradient(coder=0, losses=BOX_AND_CLASSES), POSITIVES, BOUND),
        ("box", BoxGradient(crop=0), TARGETS, CODER),
        ("box", BoxGradient(losses=BOX_AND_CLASSES), TARGETS, CROP_AND_CODER),
        ("box", BoxGradient(), BOX_HEAD, APART),
        ("mask", BoxGradient(), BOX_HEAD, APART),
        ("mask", BoxGradient(losses=EVERY_LOSS), TARGETS, EVERY_POOL),
        ("keypoint", BoxGradient(losses=EVERY_LOSS), TARGETS, EVERY_POOL),
    ],
    ids=str,
)
def test_a_training_step_waits_no_more_often(kind, settings, forward, backward, number):
    models = tiny_rcnn(kind), swap_crop_head(tiny_rcnn(kind), settings)
    kernels, syncs = beyond(models, number, training=True)
    assert syncs == Counter()
    for found, (of_batch, of_image) in zip(kernels, (forward, backward), strict=True):
        assert found <= of_batch + number * of_image


def test_a_selection_by_a_mask_would_be_seen(monkeypatch):
    monkeypatch.setattr(MultiScaleAffineCrop, "needs_no_forward", lambda pool, features: False)
    _, syncs = beyond((tiny_rcnn(), swap_crop_head(tiny_rcnn())), 2, training=True)
    assert syncs.keys() == {"index", "index_put"}


@pytest.mark.parametrize("number", [1, 2])
def test_a_refinement(number):
    """It waits for NMS in testing, and once per image for the number of its boxes in training."""
    models = swap_crop_head(tiny_rcnn()), swap_crop_head(refined(tiny_rcnn()))
    assert beyond(models, number, training=False)[1] == Counter(nms=number, lift_fresh=number)
    # A fill by a mask counts as index_put_, but does not wait: PyTorch fills a GPU's tensor by masked_fill_.
    fills = Counter(index_put_=4 * number, lift_fresh=4 * number)
    assert beyond(models, number, training=True)[1] == Counter(nonzero=number) + fills


# --- The counts ------------------------------------------------------------------------------------------------------

ROWS, MASK = torch.arange(6.0).view(3, 2), torch.tensor([True, False, True])
INDEX, ONES = torch.tensor([2, 0]), torch.tensor([1, 1, 1])


@pytest.mark.parametrize(
    "run",
    [
        lambda: ROWS[MASK],
        lambda: ROWS.index_put((MASK,), torch.zeros(2, 2)),
        lambda: torch.where(MASK),
        lambda: ROWS.masked_select(MASK[:, None]),
        lambda: bool(MASK.any()),
        lambda: int(INDEX.sum()),
        lambda: ROWS[: INDEX[0]],
        lambda: INDEX.tolist(),
        lambda: INDEX.cpu(),
        lambda: INDEX.unique(),
        lambda: ROWS.repeat_interleave(ONES, dim=0),
        lambda: torch.equal(ROWS, ROWS),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.as_tensor((1.0, 2.0)),
    ],
)
def test_what_synchronises(run):
    with OperatorCounts() as counts:
        run()
    assert counts.syncs.total() == 1


@pytest.mark.parametrize(
    ("kernels", "run"),
    [
        (0, lambda: ROWS[1:].reshape(-1).unsqueeze(0).detach().expand(5, 4).unbind(0)),
        (0, lambda: torch.empty_like(ROWS)),
        (1, lambda: ROWS[INDEX]),
        (1, lambda: torch.zeros_like(ROWS)),
        (1, lambda: ROWS.double()),
        (2, lambda: ROWS.clone().add_(1)),
        (1, lambda: torch.where(MASK[:, None], ROWS, ROWS)),
        (2, lambda: ROWS.repeat_interleave(ONES, dim=0, output_size=3)),
    ],
)
def test_what_does_not(kernels, run):
    with OperatorCounts() as counts:
        run()
    assert (counts.kernels.total(), counts.syncs.total()) == (kernels, 0)
