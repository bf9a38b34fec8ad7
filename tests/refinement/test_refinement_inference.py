"""Refinement iterations, rescoring and gradient ascent at test time, against plain Python."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from support.refined_models import refined
from support.refinement_cases import SHAPES, RefinementCase
from support.tiny_models import SIZE, batch, tiny_rcnn
from torchvision.ops import nms

from detector import RefinementConfig, swap_crop_head
from detector.refinement import inference, roi_heads
from detector.refinement.inference import ascend, iterate, refine_detections

RANKED = {"ascent_steps": 3, "iou_power": 1.0}


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return RefinementCase(torch.float32, std=0.5)


@pytest.fixture(scope="module")
def free():
    """A case whose predicted IoU is the same everywhere, so that it holds no box back."""
    torch.manual_seed(0)
    case = RefinementCase(torch.float32)
    torch.nn.init.zeros_(case.refinement.head.iou.weight)
    return case


def detections(case):
    """Boxes, scores from high to low, and labels of two classes."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(len(b), generator=generator).sort(descending=True).values for b in case.boxes]
    return case.boxes, scores, [torch.randint(1, 3, (len(b),), generator=generator) for b in case.boxes]


def configured(case, **settings):
    case.refinement.config = RefinementConfig(**{"iou_power": 0.0} | settings)
    return case.refinement


@torch.no_grad()
def refined_by(case, found=None, features=None, shapes=SHAPES, **settings):
    return refine_detections(configured(case, **settings), features or case.features, found or detections(case), shapes)


def iterated(case, iterations):
    with torch.no_grad():
        return iterate(configured(case, iterations=iterations), case.features, case.boxes, SHAPES)[:2]


def assert_close(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def by_hand(case, iterations, box, image):
    """One box [4], iteration by iteration, and the IoU that the last crop predicts."""
    only = {name: feature[image : image + 1] for name, feature in case.features.items()}
    for _ in range(max(iterations, 1)):
        deltas, logit = case.refinement.head(case.refinement.pool(only, [box[None]], [(SIZE, SIZE)]))
        if iterations:
            deltas = deltas[0].double()
            x1, y1, x2, y2 = box.double().tolist()
            width, height = x2 - x1, y2 - y1
            x, y = (x1 + x2) / 2 + width * float(deltas[0]) / 20, (y1 + y2) / 2 + height * float(deltas[1]) / 20
            half_width, half_height = (s * math.exp(float(d) / 10) / 2 for s, d in zip((width, height), deltas[2:]))
            bottom, right = SHAPES[image]
            sides = (x - half_width, right), (y - half_height, bottom), (x + half_width, right)
            sides = [min(max(side, 0), most) for side, most in (*sides, (y + half_height, bottom))]
            if sides[2] - sides[0] >= 1 and sides[3] - sides[1] >= 1:
                box = torch.tensor(sides)
    return box, float(logit.sigmoid())


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_iterations_are_those_by_hand(case, iterations):
    boxes, ious = iterated(case, iterations)
    for image in range(2):
        for box, iou, start in zip(boxes[image], ious[image], case.boxes[image]):
            wanted, wanted_iou = by_hand(case, iterations, start, image)
            torch.testing.assert_close(box, wanted, rtol=0, atol=1e-3)
            assert float(iou) == pytest.approx(wanted_iou, abs=1e-4)
            assert torch.equal(box, start) == (iterations == 0)


@pytest.mark.parametrize("delta", [math.nan, -200.0], ids=["NaN", "an empty box"])
def test_deltas_that_cannot_be_followed_leave_the_box(delta):
    case = RefinementCase(torch.float32)
    hook = case.refinement.head.register_forward_hook(
        lambda _, given, result: (result[0].index_fill(0, torch.tensor([1]), delta), result[1])
    )
    boxes, ious = iterated(case, 3)
    hook.remove()
    wanted, _ = iterated(case, 3)
    torch.testing.assert_close(boxes[0][1], case.boxes[0][1])
    boxes[0][1] = wanted[0][1]
    torch.testing.assert_close(boxes, wanted)
    assert torch.cat(ious).isfinite().all()


def test_every_one_of_many_detections_is_refined(case):
    """A detection that kept its score would outrank those whose scores are weighted."""
    boxes = [b.repeat(50, 1) for b in case.boxes]
    found = refined_by(case, (boxes, *([b.new_ones(len(b)) for b in boxes] for _ in range(2))), iou_power=1.0)
    for image, moved in enumerate(iterated(case, 2)[0]):
        assert len(found[0][image]) == 50 * len(moved)
        assert (found[0][image][:, None] - moved).abs().amax(2).amin(1).max() < 1e-3
        assert found[1][image].max() < 1


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_scores_are_weighted_and_detections_ranked(case, power):
    moved, ious = iterated(case, 2)
    found = refined_by(case, iou_power=power)
    for image, (_, before, classes) in enumerate(zip(*detections(case))):
        wanted = []
        for k, (score, label) in enumerate(zip(before, classes)):
            wanted.append((float(score) * float(ious[image][k]) ** power, moved[image][k].tolist(), int(label)))
        scores, boxes, labels = zip(*sorted(wanted, key=lambda one: -one[0]))
        assert found[1][image].tolist() == pytest.approx(scores, rel=1e-4)
        torch.testing.assert_close(found[0][image], torch.tensor(boxes), rtol=0, atol=1e-3)
        assert found[2][image].tolist() == list(labels)


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"iterations": 2}, {"iterations": 1, "ascent_steps": 2}])
def test_a_classifier_scores_the_last_crops_of_the_iterations(settings):
    case, seen, iterations = RefinementCase(std=0.5), [], settings["iterations"]
    boxes, scores, labels = detections(case)
    before = boxes, [of_image.double() for of_image in scores], labels
    counts = [len(of_image) for of_image in scores]
    logits = torch.randn(sum(counts), 3, dtype=torch.float64)

    def classify(crops):
        seen.append(crops)
        return logits

    with torch.no_grad():
        cropped_at = iterated(case, max(iterations - 1, 0))[0]
        found = refine_detections(
            configured(case, iou_power=1.0, **settings), case.features, before, SHAPES, classify=classify
        )
        torch.testing.assert_close(seen[0], case.refinement.pool(case.features, cropped_at, SHAPES))
    equal = before[0], [torch.ones_like(scores) for scores in before[1]], before[2]
    alone = refined_by(case, equal, **settings)
    by_iou = refined_by(case, equal, iou_power=1.0, **settings)
    ious = {tuple(box): iou for box, iou in zip(torch.cat(by_iou[0]).tolist(), torch.cat(by_iou[1]).tolist())}
    for image, (scores, labels) in enumerate(zip(*before[1:])):
        wanted = []
        for k, (score, label) in enumerate(zip(scores.tolist(), labels.tolist())):
            box = alone[0][image][k].tolist()
            again = float(logits[sum(counts[:image]) + k].softmax(0)[label])
            wanted.append((math.sqrt(score * again) * ious[tuple(box)], label, *box))
        rows = torch.cat([found[1][image][:, None], found[2][image][:, None], found[0][image]], 1)
        assert found[1][image].dtype == torch.float64
        torch.testing.assert_close(rows, torch.tensor(sorted(wanted, reverse=True), dtype=torch.float64))


def test_ties_keep_their_order(free):
    boxes, order = torch.cat([free.boxes[0]] * 16), torch.arange(16 * len(free.boxes[0]))
    _, _, labels = refined_by(free, ([boxes] * 2, [torch.full((len(boxes),), 0.5)] * 2, [order] * 2), iou_power=1.0)
    assert all(torch.equal(of_image, order) for of_image in labels)


@pytest.mark.parametrize("settings", [{"iterations": 3}, {"iterations": 0, "ascent_steps": 10}])
def test_boxes_stay_in_their_images(settings, monkeypatch):
    monkeypatch.setattr(inference, "ASCENT_STEP_SIZE", 10.0)
    case = RefinementCase(torch.float32, std=20.0)
    if settings["iterations"]:
        torch.nn.init.zeros_(case.refinement.head.iou.weight)
    corners = [torch.tensor([[1.0, 1, 9, 9], [w / 2, h / 2, w - 1, h - 1]]) for h, w in SHAPES]
    case.boxes = [torch.cat(both) for both in zip(corners, case.boxes)]
    ends = 0
    for (height, width), boxes in zip(SHAPES, refined_by(case, iou_power=1.0, **settings)[0]):
        most = torch.tensor([width, height, width, height])
        assert ((boxes >= 0) & (boxes <= most)).all()
        ends += ((boxes == 0) | (boxes == most)).sum()
    assert ends


@pytest.mark.parametrize("settings", [{}, RANKED])
def test_a_batch_is_its_images_one_by_one(case, settings):
    together = refined_by(case, **settings)
    for image in range(2):
        rows = slice(image, image + 1)
        features = {name: feature[rows] for name, feature in case.features.items()}
        alone = refined_by(case, tuple(part[rows] for part in detections(case)), features, SHAPES[rows], **settings)
        assert_close(alone, [part[rows] for part in together])


@pytest.mark.parametrize("settings", [{"iterations": 0}, RANKED])
@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_detections(case, settings, empty):
    def emptied(found):
        return tuple([v[:0] if image in empty else v for image, v in enumerate(part)] for part in found)

    assert_close(refined_by(case, emptied(detections(case)), **settings), emptied(refined_by(case, **settings)))


def test_autocast_keeps_boxes_in_float32(free):
    wanted = refined_by(free, iterations=1)
    with torch.autocast("cpu", torch.bfloat16):
        features = {name: feature.bfloat16() for name, feature in free.features.items()}
        found = refined_by(free, features=features, iterations=1)
    for boxes, scores, other in zip(*found[:2], wanted[0]):
        assert boxes.dtype == scores.dtype == torch.float32
        assert 0 < (boxes - other).abs().max() < 0.5


# --- Gradient ascent -------------------------------------------------------------------------------------------------

GOAL = torch.tensor([[20.0, 30.0, 60.0, 50.0], [5.0, 5.0, 25.0, 45.0], [40.0, 10.0, 50.0, 20.0]]).double()
START = torch.tensor([[23.1, 27.3, 70.4, 52.2], [1.3, 9.9, 22.7, 47.1], [41.7, 7.7, 49.3, 20.9]]).double()
SIDES = (GOAL[:, 2:] - GOAL[:, :2]).repeat(1, 2)


def closeness(boxes, goal=GOAL, sides=SIDES):
    """A quadratic score with its maximum, 0, at the goals."""
    return -((boxes - goal) / sides).square().sum(1)


@pytest.mark.parametrize("scale", [0.1, 1, 100])
def test_scores_rise_to_the_maximum_and_never_fall(scale):
    found = [ascend(lambda boxes: scale * closeness(boxes), START, steps) for steps in (*range(12), 100)]
    assert torch.equal(found[0][1], scale * closeness(START))
    assert all((after[1] >= before[1]).all() for before, after in pairwise(found))
    torch.testing.assert_close(found[-1][1], scale * closeness(found[-1][0]))
    if scale == 1:
        torch.testing.assert_close(found[-1][0], GOAL, rtol=0, atol=0.05)


def test_a_step_that_is_too_long_is_halved_until_one_rises():
    """A ridge 1 % of a side away. The gradient asks for steps of 5, 2.5 and 1.25 %, of which the last rises."""

    def ridge(boxes):
        return -((boxes[:, 0] + boxes[:, 2]) / 2 - 50.1).abs() / 20

    start = torch.tensor([[45.0, 45.0, 55.0, 55.0]]).double()
    boxes, score = ascend(ridge, start, 10)
    torch.testing.assert_close(boxes, start + torch.tensor([0.125, 0, 0.125, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(score, ridge(boxes))


def test_no_step_is_longer_than_five_percent_of_a_side():
    seen = []
    ascend(lambda boxes: (seen.append(boxes.detach()), 1e6 * closeness(boxes))[1], START, 1)
    before, after = seen
    sides = before[:, 2:] - before[:, :2]
    moved = ((after[:, :2] + after[:, 2:]) - (before[:, :2] + before[:, 2:])).abs() / 2 / sides
    grown = ((after[:, 2:] - after[:, :2]) / sides).log().abs()
    torch.testing.assert_close(torch.cat([moved, grown], dim=1).amax(dim=1), torch.full((3,), 0.05).double())


@pytest.mark.parametrize("where", ["score", "gradient", "beyond"])
def test_nan_leaves_the_box_and_no_other(where):
    def score_of(boxes):
        assert boxes.isfinite().all()  # the crop refuses others
        first, one, last = closeness(boxes).split(1)
        if where == "gradient":  # of a square root, at 0
            one = (one - one.detach()).sqrt()
        elif where == "score" or not torch.equal(boxes[1], START[1]):  # once it has moved
            one = one * math.nan
        return torch.cat([first, one, last])

    boxes, _ = ascend(score_of, START, 20)
    assert torch.equal(boxes[1], START[1])
    assert torch.equal(boxes[[0, 2]], ascend(closeness, START, 20)[0][[0, 2]])


@pytest.mark.parametrize(("start", "steps", "calls"), [(START, 7, 8), (GOAL, 100, 5), (START, 0, 1), (START[:0], 5, 1)])
def test_evaluations(start, steps, calls):
    """One per step, and none once all boxes have converged: at the goal after four shorter and shorter steps."""
    seen = []
    rows = slice(len(start))
    boxes, _ = ascend(lambda b: (seen.append(1), closeness(b, GOAL[rows], SIDES[rows]))[1], start, steps)
    assert len(seen) == calls
    assert boxes.shape == start.shape


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_predicted_iou_rises_in_every_gradient_mode(context, autocast):
    case = RefinementCase(torch.float32, std=0.5)
    given = case.boxes, [torch.ones(len(b)) for b in case.boxes], detections(case)[2]
    with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = {name: feature * 1 for name, feature in case.features.items()}  # made in this mode
        low, high = (
            refine_detections(configured(case, iterations=0, iou_power=1.0, ascent_steps=n), features, given, SHAPES)
            for n in (0, 8)
        )
    for before, after in zip(low[1], high[1]):
        assert (after >= before - 1e-6).all()
        assert (after > before + 1e-3).sum() >= 2
    if not autocast:
        with torch.no_grad():
            logits = case.refinement(case.features, high[0], SHAPES)[1]
        torch.testing.assert_close(torch.cat(high[1]), logits.sigmoid(), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in case.refinement.parameters())
    assert all(not f.requires_grad for f in case.features.values())


# --- In a detector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_several_threads_call_one_detector(swap):
    model = refined(tiny_rcnn().eval(), **RANKED)
    if swap:
        swap_crop_head(model)
    images = [torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    @torch.no_grad()
    def detect(image):
        return model([image])[0]

    wanted = [detect(image) for image in images]
    together = threading.Barrier(len(images), timeout=60)
    model.roi_heads.box_roi_pool.register_forward_hook(lambda *_: (together.wait(), None)[1])
    with ThreadPoolExecutor(len(images)) as pool:
        found = list(pool.map(detect, images))
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(theirs["boxes"]) > 5
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
@torch.no_grad()
def test_masks_and_keypoints_are_predicted_in_the_refined_boxes(kind):
    model = refined(swap_crop_head(tiny_rcnn(kind)).eval(), std=0.5, ascent_steps=2)
    pooled = []
    pool = getattr(model.roi_heads, f"{kind}_roi_pool")
    pool.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[1]))
    images = [batch()[0][0]]  # 64 pixels are not resized
    (found,) = model(images)
    model.roi_heads.refinement.enabled = False
    (before,) = model(images)
    torch.testing.assert_close(pooled[0][0], found["boxes"])
    torch.testing.assert_close(pooled[1][0], before["boxes"])
    assert torch.cdist(found["boxes"], before["boxes"]).amin(1).max() > 0.5
    field = {"mask": "masks", "keypoint": "keypoints"}[kind]
    assert len(found[field]) == len(found["boxes"])
    assert torch.cdist(found[field].flatten(1), before[field].flatten(1)).amin(1).max() > 0.01


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("of_the_model", "least", "iou_power"), [(0.3, 0.0, 0.0), (0.3, 0.0, 1.0), (0.3, 1.0, 1.0), (1.0, 0.7, 1.0)]
)
@torch.no_grad()
def test_nms_follows_at_the_larger_threshold(of_the_model, least, iou_power, swap, monkeypatch):
    """Against torchvision's NMS of each class, by the new scores."""
    monkeypatch.setattr(roi_heads, "NMS_THRESHOLD", least)
    model = refined(tiny_rcnn(box_nms_thresh=of_the_model).eval(), std=0.5, iou_power=iou_power)
    if swap:
        swap_crop_head(model)
    heads, moved = model.roi_heads, []

    def record_without_nms(*given, nms_thresh, **options):
        moved.append(refine_detections(*given, **options))
        return refine_detections(*given, nms_thresh=nms_thresh, **options)

    heads.refined = record_without_nms
    removed, threshold = 0, 0.3 if least == 0 else 1.0
    for found, boxes, scores, labels in zip(model(batch()[0]), *moved[0], strict=True):
        of_class = (torch.where(labels == label)[0] for label in (1, 2))
        kept = torch.cat([rows[nms(boxes[rows], scores[rows], threshold)] for rows in of_class])
        kept = kept[scores[kept].sort(descending=True).indices]
        torch.testing.assert_close(found["scores"], scores[kept])
        assert torch.equal(found["labels"], labels[kept])
        assert len(kept) > 3
        removed += len(boxes) - len(kept)
    assert (removed > 0) == (threshold < 1)


@torch.no_grad()
def test_nms_of_bfloat16_boxes(case):
    """Boxes of a stock detector are bfloat16 under autocast. Their offset by class would not leave them apart."""
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0], [16.0, 0.0, 24.0, 8.0]]).bfloat16()
    found = [boxes] * 2, [torch.tensor([0.9, 0.8, 0.7])] * 2, [torch.full((3,), 80)] * 2
    kept = refine_detections(configured(case, iterations=0), case.features, found, SHAPES, nms_thresh=0.5)
    assert all(torch.equal(found_boxes, boxes) for found_boxes in kept[0])
