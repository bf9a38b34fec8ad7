"""The boxes that a refinement is trained on, and that training on them makes boxes better."""

import pytest
import torch
from support.refined_models import refined
from support.tiny_models import CHANNELS, SIZE, pool, tiny_rcnn
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import box_iou

from detector import BoxGradient
from detector.refinement import RefinementConfig, add_refinement, losses
from detector.refinement.boxes import move, paired_iou
from detector.refinement.inference import iterate
from detector.refinement.losses import sample_training_boxes, unrolled_losses

SHAPE = (SIZE, SIZE)
NONE = torch.zeros(0, 4)
TRUE = torch.tensor([[10.0, 12.0, 30.0, 42.0], [35.0, 5.0, 60.0, 25.0]])


def sample(own, true, shape=SHAPE):
    (boxes,), (truth,) = sample_training_boxes([own], [true], [shape])
    assert len(boxes) == len(truth) <= losses.BOXES_PER_IMAGE
    return boxes, truth


def rows(boxes):
    return sorted(tuple(box) for box in boxes.tolist())


def test_paired_iou_is_the_diagonal_of_torchvisions():
    a, b = (torch.cat([corner, corner + 0.1 + torch.rand(200, 2)], dim=1) for corner in torch.rand(2, 200, 2))
    torch.testing.assert_close(paired_iou(a, b), box_iou(a, b).diagonal())


def test_the_iou_of_a_box_without_area_is_0():
    point, box = torch.tensor([[3.0, 3.0, 3.0, 3.0]]), torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    for a, b in ((point, box), (box, point), (point, point), (box[:, [2, 3, 0, 1]], box)):
        assert paired_iou(a, b).tolist() == [0.0]


def test_candidates_that_overlap_an_object_and_copies_of_each_object(monkeypatch):
    monkeypatch.setattr(losses, "BOXES_PER_OBJECT", 3)
    own = torch.tensor([[36.0, 5.0, 60.0, 25.0], [10.0, 12.0, 22.0, 40.0], [10.0, 12.0, 19.0, 42.0]])  # IoU .96 .56 .45
    monkeypatch.setattr(losses, "JITTER", 0.0)
    boxes, truth = sample(own, TRUE)
    assert rows(torch.cat([boxes, truth], 1)) == rows(
        torch.cat([torch.cat([TRUE.repeat(3, 1), own[:2]]), torch.cat([TRUE.repeat(3, 1), TRUE[[1, 0]]])], 1)
    )


def test_jittered_copies_overlap_their_object(monkeypatch):
    monkeypatch.setattr(losses, "BOXES_PER_OBJECT", 100)
    monkeypatch.setattr(losses, "BOXES_PER_IMAGE", 1000)
    boxes, truth = sample(NONE, TRUE)
    iou = box_iou(boxes, truth).diagonal()
    assert losses.MIN_TRAINING_IOU <= iou.min() < losses.MIN_TRAINING_IOU + 0.1
    assert iou.max() > 0.95
    assert rows(truth.unique(dim=0)) == rows(TRUE)
    assert len(boxes) < 200


def test_a_random_part_of_many_boxes(monkeypatch):
    monkeypatch.setattr(losses, "BOXES_PER_IMAGE", 6)
    own = TRUE + 0.5
    few = [sample(own, TRUE)[0] for _ in range(20)]
    assert {len(boxes) for boxes in few} == {6}
    assert 0 < sum(int((boxes[:, None] == own).all(2).sum()) for boxes in few) < 40


def test_images_without_objects_or_without_detections():
    for own, true in ((TRUE, NONE), (NONE, NONE)):
        boxes, truth = sample(own, true)
        assert boxes.shape == truth.shape == (0, 4)
    assert 8 <= len(sample(NONE, TRUE)[0]) <= 16


def test_boxes_stay_in_the_image():
    true = torch.tensor([[0.0, 0.0, 20.0, 30.0], [44.0, 30.0, 64.0, 50.0]])
    boxes, _ = sample(NONE, true.repeat(5, 1), (50, 64))
    assert boxes.min() == 0
    assert boxes[:, 0::2].max() == 64
    assert boxes[:, 1::2].max() == 50


# The last one has no area, as an object that was resized to nothing.
@pytest.mark.parametrize(
    "true", [[0.0, 0, 64, 64], [30, 30, 30.01, 30.02], [5, 20, 60, 20.3], [20.0, 20, 20, 30]], ids=str
)
def test_huge_tiny_and_thin_boxes_have_finite_losses_and_gradients(true, monkeypatch):
    monkeypatch.setattr(losses, "JITTER", 1.0)
    refinement = refined(tiny_rcnn(), box_gradient=BoxGradient.exact()).roi_heads.refinement
    own = torch.tensor([[0.0, 0.0, 64.0, 64.0], [64.0, 10.0, 64.0, 20.0]])
    boxes, truth = sample(own, torch.tensor([true]))
    features = {name: torch.randn(1, CHANNELS, SIZE // s, SIZE // s) for name, s in (("0", 4), ("1", 8), ("2", 16))}
    boxes = boxes.requires_grad_()
    found = unrolled_losses(refinement, features, [boxes], [truth], [SHAPE])
    parameters = list(refinement.parameters())
    for gradient in torch.autograd.grad(sum(found.values()), [boxes, *parameters], allow_unused=True):
        assert gradient.isfinite().all()
    assert all(loss.isfinite() for loss in found.values())


# --- Learning --------------------------------------------------------------------------------------------------------


def painted(boxes):
    """Maps of images with one rectangle each, in the first channel."""
    steps = torch.arange(SIZE) + 0.5
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    image = (((steps > x1) & (steps < x2)) & ((steps > y1.mT) & (steps < y2.mT)).mT).float()
    maps = {}
    for name, stride in (("0", 4), ("1", 8), ("2", 16)):
        coverage = nn.functional.avg_pool2d(image[:, None], stride)
        maps[name] = torch.cat([coverage, torch.zeros(len(boxes), CHANNELS - 1, *coverage.shape[2:])], dim=1)
    return maps


def rectangles(count):
    corner, size = 4 + torch.rand(count, 2) * 26, 14 + torch.rand(count, 2) * 16
    return torch.cat([corner, corner + size], dim=1)


def test_a_tiny_refinement_learns_to_find_painted_rectangles():
    head = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 49, 64), nn.ReLU())
    options = {"box_roi_pool": pool(["0", "1", "2"], 7), "box_head": head, "box_predictor": FastRCNNPredictor(64, 3)}
    model = tiny_rcnn(**options).requires_grad_(False)
    refinement = add_refinement(model, RefinementConfig(train_iterations=2)).roi_heads.refinement
    optimizer = torch.optim.Adam(refinement.parameters(), lr=0.008)
    torch.manual_seed(0)
    truth = rectangles(20)
    features, none, shapes = painted(truth), [NONE] * 20, [SHAPE] * 20
    history = []
    for _ in range(80):
        boxes, matched = sample_training_boxes(none, list(truth.split(1)), shapes)
        found = unrolled_losses(refinement, features, boxes, matched, shapes)
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        history.append([float(loss.detach()) for loss in found.values()])
    first, last = (torch.tensor(part).mean(0) for part in (history[:5], history[-5:]))
    assert last[0] < 0.6 * first[0]
    assert last[1] < first[1]
    # New rectangles.
    new = rectangles(60)
    near = move(new, 0.12 * torch.randn_like(new)).clamp(0, SIZE)
    with torch.no_grad():
        refined_boxes, _, _ = iterate(refinement, painted(new), list(near.split(1)), [SHAPE] * 60)
        _, logits = refinement(painted(new), list(near.split(1)), [SHAPE] * 60)
    before = paired_iou(near, new)
    assert paired_iou(torch.cat(refined_boxes), new).mean() > before.mean() + 0.05
    assert torch.corrcoef(torch.stack([logits.sigmoid(), before]))[0, 1] > 0.4
