"""The boxes that a refinement learns from, and that it does learn from them."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.refined_models import refined
from support.tiny_models import CHANNELS, SIZE, pool, tiny_rcnn
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import box_iou

from detector.refinement import RefinementConfig, add_refinement
from detector.refinement.looking import look_again
from detector.refinement.losses import boxes_to_learn_from, jittered, paired_iou, unrolled_losses

SHAPE = (SIZE, SIZE)


@pytest.fixture(scope="module")
def refinement():
    torch.manual_seed(0)
    return refined(tiny_rcnn()).roi_heads.refinement


def learned_from(refinement, own, true, shape=SHAPE, **settings):
    refinement.configure(RefinementConfig(**settings))
    boxes, truth = boxes_to_learn_from([own], [true], [shape], refinement)
    return boxes[0], truth[0]


NONE = torch.zeros(0, 4)
TRUE = torch.tensor([[10.0, 12.0, 30.0, 40.0], [35.0, 5.0, 60.0, 25.0]])

# --- Jitter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [0.05, 0.25, 1.0])
def test_jitter_reaches_its_spread(jitter):
    """A normal deviate times a uniform one, that of the box, times the jitter: jitter / sqrt(3) off, on average."""
    box = torch.tensor([[100.0, 200.0, 140.0, 280.0]])
    boxes = jittered(box.repeat(40_000, 1), jitter)
    size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    sides = torch.tensor([40.0, 80.0])
    off = torch.cat([(centre - torch.tensor([120.0, 240.0])) / sides, (size / sides).log()], dim=1)
    torch.testing.assert_close(off.mean(0), torch.zeros(4), rtol=0, atol=0.02 * jitter)
    spread = torch.full((4,), jitter / math.sqrt(3))
    torch.testing.assert_close(off.square().mean(0).sqrt(), spread, rtol=0.02, atol=0)
    # From hardly to more than the jitter, each box by another measure: the four of a box are of a kind.
    furthest = off.abs().amax(dim=1)
    assert (furthest < 0.1 * jitter).float().mean() > 0.05
    assert (furthest > jitter).float().mean() > 0.1
    alike = torch.corrcoef(off.abs().T)
    assert (alike > 0.1).all()


def test_no_jitter_is_the_truth():
    torch.testing.assert_close(jittered(TRUE, 0.0), TRUE)


@given(jitter=st.floats(0, 1), side=st.sampled_from([1e-3, 1.0, 1e4]), seed=st.integers(0, 1000))
def test_jittered_boxes_are_finite_and_have_a_size(jitter, side, seed):
    torch.manual_seed(seed)
    boxes = jittered(torch.tensor([[0.0, 0.0, side, 2 * side]]).repeat(50, 1), jitter)
    assert boxes.isfinite().all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


# --- IoU -------------------------------------------------------------------------------------------------------------

coordinates = st.floats(-50, 50, width=32)
boxes_of_some_size = st.tuples(coordinates, coordinates, st.floats(0.125, 60, width=32), st.floats(0.125, 60, width=32))


@given(st.lists(st.tuples(boxes_of_some_size, boxes_of_some_size), min_size=1, max_size=5))
def test_the_iou_of_pairs_is_the_diagonal_of_torchvisions(pairs):
    a, b = (torch.tensor([pair[side] for pair in pairs], dtype=torch.float64) for side in (0, 1))
    a, b = (torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], dim=1) for box in (a, b))
    torch.testing.assert_close(paired_iou(a, b), box_iou(a, b).diagonal())
    torch.testing.assert_close(paired_iou(a, a), torch.ones(len(a)).double())


def test_the_iou_without_area_is_0():
    point, box = torch.tensor([[3.0, 3.0, 3.0, 3.0]]), torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    for a, b in ((point, box), (box, point), (point, point), (box[:, [2, 3, 0, 1]], box)):
        assert paired_iou(a, b).tolist() == [0.0]
    assert paired_iou(NONE, NONE).shape == (0,)


# --- What is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_iou", [0.0, 0.3, 0.5, 0.8])
def test_what_overlaps_too_little_is_dropped(refinement, min_iou):
    own = torch.tensor([[11.0, 12.0, 31.0, 42.0], [10.0, 12.0, 22.0, 40.0], [0.0, 50.0, 9.0, 60.0]])  # IoU .8, .6, 0
    boxes, truth = learned_from(
        refinement, own, TRUE, jitter=0.4, min_iou=min_iou, boxes_per_object=100, train_boxes=10_000
    )
    iou = box_iou(boxes, truth).diagonal()
    assert (iou >= min_iou).all()
    assert iou.min() < min_iou + 0.1
    assert iou.max() > 0.95
    kept = [bool((boxes == one).all(1).any()) for one in own]
    assert kept == [True, min_iou <= 0.5, False]  # what does not overlap at all never
    assert {tuple(t) for t in truth.tolist()} == {tuple(t) for t in TRUE.tolist()}
    assert len(boxes) == len(truth) <= 203


def test_each_object_has_its_copies_and_each_box_the_truth_it_overlaps_most(refinement):
    own = torch.tensor([[36.0, 5.0, 60.0, 25.0], [11.0, 12.0, 31.0, 42.0]])
    boxes, truth = learned_from(refinement, own, TRUE, jitter=0.0, boxes_per_object=3)
    pairs = [(tuple(box), tuple(true)) for box, true in zip(boxes.tolist(), truth.tolist())]
    first, second = (tuple(t) for t in TRUE.tolist())
    wanted = [(first, first)] * 3 + [(second, second)] * 3 + [(tuple(own[0].tolist()), second)]
    assert sorted(pairs) == sorted([*wanted, (tuple(own[1].tolist()), first)])


def test_no_more_than_so_many_boxes_drawn_by_chance(refinement):
    own = TRUE + 0.5
    few = [learned_from(refinement, own, TRUE, train_boxes=6, boxes_per_object=10)[0] for _ in range(20)]
    assert {len(boxes) for boxes in few} == {6}
    found = sum(int((boxes[:, None] == own).all(2).sum()) for boxes in few)
    assert 0 < found < 40  # neither never nor always


def test_images_without_objects_or_without_detections(refinement):
    for own, true in ((TRUE, NONE), (NONE, NONE)):
        boxes, truth = learned_from(refinement, own, true)
        assert boxes.shape == truth.shape == (0, 4)
    boxes, _ = learned_from(refinement, NONE, TRUE, jitter=0.1)
    assert len(boxes) == 16


def test_boxes_at_the_border_stay_in_the_image(refinement):
    true = torch.tensor([[0.0, 0.0, 20.0, 30.0], [44.0, 30.0, 64.0, 50.0]])
    boxes, _ = learned_from(refinement, NONE, true, (50, 64), jitter=0.3, min_iou=0.3, boxes_per_object=50)
    assert len(boxes) == 64
    assert boxes.min() == 0
    assert boxes[:, 0::2].max() == 64
    assert boxes[:, 1::2].max() == 50


@pytest.mark.parametrize("min_iou", [0.0, 0.5])
@pytest.mark.parametrize(
    "true",
    [
        [0.0, 0.0, 64.0, 64.0],  # all of it
        [30.0, 30.0, 30.01, 30.02],
        [63.0, 20.0, 64.0, 64.0],  # of one pixel at the border: half of what is drawn is off the image
        [5.0, 20.0, 60.0, 20.3],
        [20.0, 20.0, 20.0, 30.0],  # without area, as a truth that was resized to nothing
    ],
    ids=str,
)
def test_huge_tiny_and_thin_boxes_have_finite_losses_and_gradients(refinement, true, min_iou):
    true = torch.tensor([true])
    own = torch.tensor([[0.0, 0.0, 64.0, 64.0], [64.0, 10.0, 64.0, 20.0]])
    boxes, truth = learned_from(
        refinement, own, true, jitter=1.0, min_iou=min_iou, boxes_per_object=50, train_boxes=1000
    )
    features = {name: torch.randn(1, CHANNELS, SIZE // s, SIZE // s) for name, s in (("0", 4), ("1", 8), ("2", 16))}
    boxes = boxes.requires_grad_()
    losses = unrolled_losses(refinement, features, [boxes], [truth], [SHAPE])
    parameters = list(refinement.parameters())
    for gradient in torch.autograd.grad(sum(losses.values()), [boxes, *parameters], allow_unused=True):
        assert gradient.isfinite().all()
    assert all(loss.isfinite() for loss in losses.values())


def test_the_detectors_boxes_keep_their_gradient(refinement):
    own = (TRUE + 0.7).requires_grad_()
    boxes, truth = learned_from(refinement, own, TRUE, train_boxes=1000)
    assert boxes.requires_grad
    assert not truth.requires_grad
    (gradient,) = torch.autograd.grad(boxes.sum(), own)
    assert torch.equal(gradient, torch.ones(2, 4))


# --- Learning --------------------------------------------------------------------------------------------------------


def painted(boxes):
    """Maps of images of one rectangle each, in the first channel; the others are dark."""
    steps = torch.arange(SIZE) + 0.5
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    image = (((steps > x1) & (steps < x2)) & ((steps > y1.mT) & (steps < y2.mT)).mT).float()
    maps = {}
    for name, stride in (("0", 4), ("1", 8), ("2", 16)):
        shares = torch.nn.functional.avg_pool2d(image[:, None], stride)
        maps[name] = torch.cat([shares, torch.zeros(len(boxes), CHANNELS - 1, *shares.shape[2:])], dim=1)
    return maps


def rectangles(count):
    corner, size = 4 + torch.rand(count, 2) * 26, 14 + torch.rand(count, 2) * 16
    return torch.cat([corner, corner + size], dim=1)


def mean_iou(refinement, truth, boxes, looks):
    with torch.no_grad():
        found, _ = look_again(refinement, painted(truth), list(boxes.split(1)), [SHAPE] * len(truth), looks=looks)
    return float(paired_iou(torch.cat(found), truth).mean())


def test_a_tiny_refinement_learns_to_find_painted_rectangles():
    head = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 49, 64), nn.ReLU())
    model = tiny_rcnn(
        box_roi_pool=pool(["0", "1", "2"], 7), box_head=head, box_predictor=FastRCNNPredictor(64, 3)
    ).requires_grad_(False)
    refinement = add_refinement(model, RefinementConfig(train_looks=2)).roi_heads.refinement
    parameters = list(refinement.parameters())
    assert all(p.requires_grad for p in parameters)  # of a detector that is frozen
    optimizer = torch.optim.Adam(parameters, lr=0.005)
    truth = rectangles(24)
    features, none, shapes = painted(truth), [NONE] * 24, [SHAPE] * 24
    history = []
    for _ in range(120):
        boxes, matched = boxes_to_learn_from(none, list(truth.split(1)), shapes, refinement)
        losses = unrolled_losses(refinement, features, boxes, matched, shapes)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append([float(loss.detach()) for loss in losses.values()])
    first, last = (torch.tensor(part).mean(0) for part in (history[:5], history[-5:]))
    assert last[0] < 0.5 * first[0]
    assert last[1] < first[1]
    # Rectangles and boxes that it has not seen.
    new = rectangles(60)
    near = jittered(new, 0.2).clamp(0, SIZE)
    ious = [mean_iou(refinement, new, near, looks) for looks in range(3)]
    assert ious[0] == pytest.approx(float(paired_iou(near, new).mean()))
    assert ious[1] > ious[0] + 0.05
    assert ious[2] > ious[0] + 0.06
    # And the fit tells good boxes from bad ones.
    refinement.configure(dataclasses.replace(refinement.config, looks=0))
    with torch.no_grad():
        _, fit = look_again(refinement, painted(new), list(near.split(1)), [SHAPE] * 60, looks=0)
    assert torch.corrcoef(torch.stack([torch.cat(fit), paired_iou(near, new)]))[0, 1] > 0.4
