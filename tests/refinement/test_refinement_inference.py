"""Refinement iterations, rescoring and gradient ascent at test time, against plain Python."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.refined_models import refined
from support.refinement_cases import SHAPES, RefinementCase
from support.tiny_models import SIZE, batch, tiny_rcnn
from torchvision.ops import box_iou

from detector import swap_crop_head
from detector.refinement import inference
from detector.refinement.inference import ascend, iterate, refine_detections

KEYS = ("boxes", "scores", "labels")
RANKED = {"ascent_steps": 3, "iou_power": 1.0}


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return RefinementCase(torch.float32, std=0.5)


@pytest.fixture(scope="module")
def free():
    """A case whose predicted IoU is the same everywhere, so that no box is held back by it."""
    torch.manual_seed(0)
    case = RefinementCase(torch.float32)
    torch.nn.init.zeros_(case.refinement.head.iou.weight)
    return case


def detections(case):
    """Scores from high to low, and labels of two classes."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "boxes": boxes,
            "scores": torch.rand(len(boxes), generator=generator).sort(descending=True).values,
            "labels": torch.randint(1, 3, (len(boxes),), generator=generator),
        }
        for boxes in case.boxes
    ]


def configured(case, score_threshold=0.0, **settings):
    refinement = case.refinement
    refinement.config = replace(refinement.config, **{"iterations": 2, "ascent_steps": 0, "iou_power": 0.0} | settings)
    refinement.score_threshold = score_threshold
    return refinement


@torch.no_grad()
def refined_by(case, found=None, features=None, shapes=SHAPES, **settings):
    found = detections(case) if found is None else found
    return refine_detections(configured(case, **settings), features or case.features, found, shapes)


def iterated(case, iterations, boxes=None):
    with torch.no_grad():
        return iterate(configured(case, iterations=iterations), case.features, boxes or case.boxes, SHAPES)


@torch.no_grad()
def by_hand(case, iterations, box, image, step_size, min_iou):
    """One box [4], iteration by iteration, and its predicted IoU."""
    start = box
    only = {name: feature[image : image + 1] for name, feature in case.features.items()}

    def head_at(at):
        deltas, logit = case.refinement.head(case.refinement.pool(only, [at[None]], [(SIZE, SIZE)]))
        return deltas[0].double(), float(logit.sigmoid())

    deltas, iou = head_at(box)
    for _ in range(iterations):
        deltas = step_size * deltas
        x1, y1, x2, y2 = box.double().tolist()
        width, height = x2 - x1, y2 - y1
        x, y = (x1 + x2) / 2 + width * float(deltas[0]) / 20, (y1 + y2) / 2 + height * float(deltas[1]) / 20
        half_width, half_height = (s * math.exp(float(d) / 10) / 2 for s, d in zip((width, height), deltas[2:]))
        bottom, right = SHAPES[image]
        sides = (x - half_width, right), (y - half_height, bottom), (x + half_width, right), (y + half_height, bottom)
        candidate = torch.tensor([min(max(side, 0), most) for side, most in sides])
        new_deltas, new_iou = head_at(candidate)
        if new_iou < iou or box_iou(candidate[None], start[None].to(candidate)) < min_iou:
            break
        box, deltas, iou = candidate, new_deltas, new_iou
    return box, iou


@pytest.mark.parametrize(("step_size", "min_iou"), [(0.8, 0.7), (1.0, 0.0), (0.6, 0.8)])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_iterations_are_those_by_hand(case, iterations, step_size, min_iou, monkeypatch):
    monkeypatch.setattr(inference, "STEP_SIZE", step_size)
    monkeypatch.setattr(inference, "MIN_IOU", min_iou)
    boxes, ious = iterated(case, iterations)
    moved = 0
    for image in range(2):
        for box, iou, start in zip(boxes[image], ious[image], case.boxes[image]):
            wanted, wanted_iou = by_hand(case, iterations, start, image, step_size, min_iou)
            torch.testing.assert_close(box, wanted, rtol=0, atol=1e-3)
            assert float(iou) == pytest.approx(wanted_iou, abs=1e-4)
            moved += bool((box != start).any())
    assert 0 < moved < 9 if iterations else moved == 0


def test_the_predicted_iou_never_falls(case):
    for before, after in pairwise(torch.cat(iterated(case, n)[1]) for n in range(5)):
        assert (after >= before).all()


def test_predicted_deltas_that_are_nan_leave_the_box():
    case = RefinementCase(torch.float32)
    hook = case.refinement.head.register_forward_hook(
        lambda _, given, result: (result[0].index_fill(0, torch.tensor([1]), math.nan), result[1])
    )
    boxes, ious = iterated(case, 3)
    hook.remove()
    wanted, _ = iterated(case, 3)
    torch.testing.assert_close(boxes[0][1], case.boxes[0][1])
    boxes[0][1] = wanted[0][1]
    torch.testing.assert_close(boxes, wanted)
    assert torch.cat(ious).isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"score_threshold": 0.5}, {"boxes_per_image": 2}, {"ascent_steps": 3, "boxes_per_image": 3}]
)
def test_other_boxes_stay_in_place_and_order(free, settings):
    case = RefinementCase(torch.float32) if "ascent_steps" in settings else free
    whole = refined_by(case, ascent_steps=settings.get("ascent_steps", 0))
    count = 0
    for found, refined_all, before in zip(refined_by(case, **settings), whole, detections(case)):
        some = int((before["scores"] >= settings.get("score_threshold", 0)).sum())
        some = min(some, settings.get("boxes_per_image", 100))
        torch.testing.assert_close(found["boxes"][:some], refined_all["boxes"][:some], rtol=0, atol=1e-4)
        assert not some or not torch.equal(found["boxes"][:some], before["boxes"][:some])
        assert torch.equal(found["boxes"][some:], before["boxes"][some:])
        assert torch.equal(found["scores"], before["scores"])
        assert torch.equal(found["labels"], before["labels"])
        count += some
    assert 0 < count < 9


@pytest.mark.parametrize("settings", [{}, {"ascent_steps": 2}, {"iou_power": 1.0}])
def test_a_threshold_that_no_score_reaches(case, settings):
    for found, before in zip(refined_by(case, score_threshold=1.0, **settings), detections(case)):
        assert all(torch.equal(found[key], before[key]) for key in KEYS)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_scores_are_weighted_and_detections_ranked(case, power):
    boxes, ious = iterated(case, 2)
    found = refined_by(case, iou_power=power, boxes_per_image=4)
    for image, before in enumerate(detections(case)):
        wanted = []
        for k in range(len(before["scores"])):
            box, weight = (boxes[image][k], float(ious[image][k]) ** power) if k < 4 else (before["boxes"][k], 1)
            wanted.append((float(before["scores"][k]) * weight, box.tolist(), int(before["labels"][k])))
        wanted.sort(key=lambda one: -one[0])
        assert found[image]["scores"].tolist() == pytest.approx([w[0] for w in wanted], rel=1e-4)
        torch.testing.assert_close(found[image]["boxes"], torch.tensor([w[1] for w in wanted]), rtol=0, atol=1e-3)
        assert found[image]["labels"].tolist() == [w[2] for w in wanted]


def test_ties_keep_their_order():
    case = RefinementCase(torch.float32)
    torch.nn.init.zeros_(case.refinement.head.iou.weight)
    boxes = torch.cat([case.boxes[0]] * 16)
    given = [{"boxes": boxes, "scores": torch.full((len(boxes),), 0.5), "labels": torch.arange(len(boxes))}] * 2
    for found in refined_by(case, given, iou_power=1.0):
        assert torch.equal(found["labels"], torch.arange(len(boxes)))


@pytest.mark.parametrize("settings", [{"iterations": 3}, {"iterations": 0, "ascent_steps": 10}])
def test_boxes_stay_in_their_images(settings, monkeypatch):
    monkeypatch.setattr(inference, "MIN_IOU", 0.0)
    monkeypatch.setattr(inference, "ASCENT_STEP_SIZE", 10.0)
    case = RefinementCase(torch.float32, std=20.0)
    if settings["iterations"]:
        torch.nn.init.zeros_(case.refinement.head.iou.weight)
    corners = [[torch.tensor([[1.0, 1, 9, 9], [w / 2, h / 2, w - 1, h - 1]])] for h, w in SHAPES]
    case.boxes = [torch.cat([*corner, boxes]) for corner, boxes in zip(corners, case.boxes)]
    found = refined_by(case, iou_power=1.0, **settings)
    ends = 0
    for (height, width), one in zip(SHAPES, found):
        most = torch.tensor([width, height, width, height])
        assert ((one["boxes"] >= 0) & (one["boxes"] <= most)).all()
        ends += ((one["boxes"] == 0) | (one["boxes"] == most)).sum()
    assert ends


@pytest.mark.parametrize("settings", [{}, RANKED])
def test_a_batch_is_its_images_one_by_one(case, settings):
    together = refined_by(case, **settings)
    for image in range(2):
        rows = slice(image, image + 1)
        features = {name: feature[rows] for name, feature in case.features.items()}
        (alone,) = refined_by(case, detections(case)[rows], features, SHAPES[rows], **settings)
        for key in KEYS:
            torch.testing.assert_close(alone[key], together[image][key], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"iterations": 0}, RANKED])
@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_detections(case, settings, empty):
    given = [
        {key: value[:0] if image in empty else value for key, value in one.items()}
        for image, one in enumerate(detections(case))
    ]
    for image, (found, whole) in enumerate(zip(refined_by(case, given, **settings), refined_by(case, **settings))):
        for key in KEYS:
            expected = whole[key][:0] if image in empty else whole[key]
            torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-3)


def test_autocast_keeps_boxes_in_float32(free):
    wanted = refined_by(free, iterations=1)
    with torch.autocast("cpu", torch.bfloat16):
        features = {name: feature.bfloat16() for name, feature in free.features.items()}
        found = refined_by(free, features=features, iterations=1)
    for one, other in zip(found, wanted):
        assert one["boxes"].dtype == one["scores"].dtype == torch.float32
        assert 0 < (one["boxes"] - other["boxes"]).abs().max() < 0.5


# --- Gradient ascent -------------------------------------------------------------------------------------------------

GOAL = torch.tensor([[20.0, 30.0, 60.0, 50.0], [5.0, 5.0, 25.0, 45.0], [40.0, 10.0, 50.0, 20.0]]).double()
START = torch.tensor([[23.1, 27.3, 70.4, 52.2], [1.3, 9.9, 22.7, 47.1], [41.7, 7.7, 49.3, 20.9]]).double()
SIDES = (GOAL[:, 2:] - GOAL[:, :2]).repeat(1, 2)


def closeness(boxes, goal=GOAL, sides=SIDES):
    """A quadratic score with its maximum, 0, at the goals."""
    return -((boxes - goal) / sides).square().sum(1)


def test_boxes_end_at_the_maximum():
    boxes, score = ascend(closeness, START, 100)
    torch.testing.assert_close(boxes, GOAL, rtol=0, atol=0.05)
    torch.testing.assert_close(score, closeness(boxes))


@pytest.mark.parametrize("scale", [0.1, 1, 100])
def test_no_score_falls_with_more_steps(scale):
    scores = [ascend(lambda boxes: scale * closeness(boxes), START, steps)[1] for steps in range(12)]
    assert torch.equal(scores[0], scale * closeness(START))
    assert all((after >= before).all() for before, after in pairwise(scores))
    assert (scores[-1] > scores[0]).all()


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

    def steep(boxes):
        seen.append(boxes.detach().clone())
        return 1e6 * closeness(boxes)

    ascend(steep, START, 3)
    assert len(seen) == 4
    for before, after in pairwise(seen):
        sides = before[:, 2:] - before[:, :2]
        moved = ((after[:, :2] + after[:, 2:]) - (before[:, :2] + before[:, 2:])).abs() / 2 / sides
        grown = ((after[:, 2:] - after[:, :2]) / sides).log().abs()
        furthest = torch.cat([moved, grown], dim=1).amax(dim=1)
        torch.testing.assert_close(furthest, torch.full((3,), 0.05).double())


def test_boxes_do_not_depend_on_each_other():
    def score_of(boxes, rows=slice(None)):
        scale = torch.tensor([1.0, 30.0, math.nan]).double()[rows]
        return scale * closeness(boxes, GOAL[rows], SIDES[rows])

    together, scores = ascend(score_of, START, 20)
    for row in range(3):
        rows = slice(row, row + 1)
        alone, score = ascend(lambda b, rows=rows: score_of(b, rows), START[rows], 20)
        assert torch.equal(alone, together[rows])
        assert torch.equal(score.nan_to_num(7), scores[rows].nan_to_num(7))
    assert not torch.equal(together[:2], START[:2])


@pytest.mark.parametrize("where", ["score", "gradient", "beyond"])
def test_nan_leaves_the_box(where):
    def score_of(boxes):
        first, one, last = closeness(boxes).split(1)
        if where == "score":
            one = one * math.nan
        elif where == "gradient":  # of a square root, at 0
            one = (one - one.detach()).sqrt()
        elif not torch.equal(boxes[1], START[1]):  # once it has moved
            one = one * math.nan
        return torch.cat([first, one, last])

    seen = []
    boxes, _ = ascend(lambda b: (seen.append(b.detach()), score_of(b))[1], START, 20)
    assert torch.cat(seen).isfinite().all()  # the crop refuses others
    assert torch.equal(boxes[1], START[1])
    assert (closeness(boxes)[[0, 2]] > closeness(START)[[0, 2]]).all()


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
    settings = {"iterations": 0, "iou_power": 1.0}
    given = [one | {"scores": torch.ones_like(one["scores"])} for one in detections(case)]
    with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = {name: feature * 1 for name, feature in case.features.items()}  # made in this mode
        low, high = (
            refine_detections(configured(case, ascent_steps=steps, **settings), features, given, SHAPES)
            for steps in (0, 8)
        )
    for before, after in zip(low, high):
        assert (after["scores"] >= before["scores"] - 1e-6).all()
        assert (after["scores"] > before["scores"] + 1e-3).sum() >= 2
    if not autocast:
        with torch.no_grad():
            logits = case.refinement(case.features, [one["boxes"] for one in high], SHAPES)[1]
        torch.testing.assert_close(torch.cat([one["scores"] for one in high]), logits.sigmoid(), rtol=1e-4, atol=1e-5)
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
        assert all(torch.equal(ours[key], theirs[key]) for key in KEYS)


@torch.no_grad()
def test_a_detector_that_finds_nothing():
    model = refined(tiny_rcnn("mask", box_score_thresh=1.0).eval(), **RANKED)
    for found in model(batch()[0]):
        assert found["boxes"].shape == (0, 4)
        assert len(found["masks"]) == 0


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
    assert not torch.allclose(found["boxes"], before["boxes"], atol=0.5)
    field = {"mask": "masks", "keypoint": "keypoints"}[kind]
    assert len(found[field]) == len(found["boxes"])
    assert not torch.allclose(found[field], before[field])


@pytest.mark.parametrize("swap", [False, True])
@torch.no_grad()
def test_boxes_of_a_detector_under_autocast_are_float32(swap):
    model = refined(tiny_rcnn().eval(), **RANKED)
    if swap:
        swap_crop_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch()[0])
    assert all(one["boxes"].dtype == torch.float32 for one in found)
