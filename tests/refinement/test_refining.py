"""Looking again and ranking at test time, against plain Python."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from support.refined_models import PLAIN, refined
from support.refinement_cases import SHAPES, RefinementCase
from support.tiny_models import SIZE, batch, tiny_rcnn
from torchvision.ops import box_iou

from detector import swap_crop_head
from detector.refinement import RefinementConfig
from detector.refinement.looking import look_again
from detector.refinement.refining import refine

KEYS = ("boxes", "scores", "labels")


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return RefinementCase(torch.float32)


@pytest.fixture(scope="module")
def free():
    """Its fit is the same everywhere: no box is held back."""
    torch.manual_seed(0)
    case = RefinementCase(torch.float32)
    torch.nn.init.zeros_(case.refinement.stages[0].fit.weight)
    return case


def configured(case, **settings):
    case.refinement.configure(RefinementConfig(**PLAIN | settings))
    return case.refinement


def detections(case, seed=0):
    """Scores from the best to the worst, and labels of two classes."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(len(b), generator=generator).sort(descending=True).values for b in case.boxes]
    labels = [torch.randint(1, 3, (len(b),), generator=generator) for b in case.boxes]
    return scores, labels


@torch.no_grad()
def found_by(case, threshold=0.5, boxes=None, features=None, shapes=SHAPES, **settings):
    scores, labels = detections(case)
    boxes = case.boxes if boxes is None else boxes
    return refine(
        configured(case, **settings),
        case.features if features is None else features,
        boxes,
        scores,
        labels,
        shapes,
        nms_threshold=threshold,
    )


@torch.no_grad()
def by_hand(case, looks, box, image, scale=1.0, overlap=0.0):
    """One box [4], look by look; and its fit."""
    start = box
    only = {name: feature[image : image + 1] for name, feature in case.features.items()}

    def head_at(at):
        deltas, logit = case.refinement.stages[0](case.refinement.pool(only, [at[None]], [(SIZE, SIZE)]))
        return deltas[0].double(), float(logit.sigmoid())

    deltas, fit = head_at(box)
    for _ in range(looks):
        deltas = scale * deltas
        x1, y1, x2, y2 = box.double().tolist()
        width, height = x2 - x1, y2 - y1
        x, y = (x1 + x2) / 2 + width * float(deltas[0]) / 20, (y1 + y2) / 2 + height * float(deltas[1]) / 20
        half_width, half_height = (s * math.exp(float(d) / 10) / 2 for s, d in zip((width, height), deltas[2:]))
        bottom, right = SHAPES[image]
        tried = torch.tensor(
            [
                min(max(x - half_width, 0), right),
                min(max(y - half_height, 0), bottom),
                min(max(x + half_width, 0), right),
                min(max(y + half_height, 0), bottom),
            ]
        )
        new_deltas, new_fit = head_at(tried)
        if new_fit < fit or box_iou(tried[None], start[None].to(tried)) < overlap:
            break  # the same box is tried again, with the same end
        box, deltas, fit = tried, new_deltas, new_fit
    return box, fit


@pytest.mark.parametrize(("scale", "overlap"), [(1.0, 0.0), (0.6, 0.0), (1.0, 0.7), (0.8, 0.6)])
@pytest.mark.parametrize("looks", [0, 1, 2, 4])
def test_boxes_move_as_by_hand_only_where_the_fit_does_not_fall_and_not_too_far(case, looks, scale, overlap):
    settings = configured(case, look_scale=scale, least_overlap=overlap)
    with torch.no_grad():
        boxes, fits = look_again(settings, case.features, case.boxes, SHAPES, looks=looks)
    for image in range(2):
        for box, fit, start in zip(boxes[image], fits[image], case.boxes[image]):
            wanted, wanted_fit = by_hand(case, looks, start, image, scale, overlap)
            torch.testing.assert_close(box, wanted, rtol=0, atol=1e-3)
            assert float(fit) == pytest.approx(wanted_fit, abs=1e-4)
    moved = [(b != s).any(1) for b, s in zip(boxes, case.boxes)]
    if looks == 0:
        assert not torch.cat(moved).any()
    else:
        assert 0 < torch.cat(moved).sum() < len(torch.cat(moved))


def test_the_fit_never_falls_look_by_look(case):
    with torch.no_grad():
        fits = [
            torch.cat(look_again(configured(case), case.features, case.boxes, SHAPES, looks=n)[1]) for n in range(5)
        ]
    for before, after in pairwise(fits):
        assert (after >= before).all()


def test_each_look_has_its_stage_and_further_looks_share_the_last():
    case = RefinementCase(torch.float32, stages=2, looks=4)
    calls = []
    for number, stage in enumerate(case.refinement.stages):
        stage.register_forward_hook(lambda *_, number=number: calls.append(number))
    with torch.no_grad():
        look_again(case.refinement, case.features, case.boxes, SHAPES, looks=4)
    assert calls == [0, 1, 1, 1, 1]


def test_a_head_that_says_nan_leaves_the_box():
    case = RefinementCase(torch.float32)
    hook = case.refinement.stages[0].register_forward_hook(
        lambda _, given, result: (result[0].index_fill(0, torch.tensor([1]), math.nan), result[1])
    )
    with torch.no_grad():
        boxes, fit = look_again(case.refinement, case.features, case.boxes, SHAPES, looks=3)
        hook.remove()
        wanted, _ = look_again(case.refinement, case.features, case.boxes, SHAPES, looks=3)
    assert torch.equal(boxes[0][1], case.boxes[0][1])
    boxes[0][1] = wanted[0][1]
    torch.testing.assert_close(boxes, wanted)
    assert torch.cat(fit).isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"score_threshold": 0.5}, {"boxes_per_image": 2}, {"climbs": 3, "boxes_per_image": 3}]
)
def test_the_others_are_left_as_they_are_in_order_and_number(case, free, settings):
    case = case if "climbs" in settings else free
    all_of_them = found_by(case, climbs=settings.get("climbs", 0))[0]
    scores, labels = detections(case)
    boxes, found_scores, found_labels = found_by(case, **settings)
    few = [
        min(int((s >= settings.get("score_threshold", 0)).sum()), settings.get("boxes_per_image", 100)) for s in scores
    ]
    assert 0 < sum(few) < sum(map(len, scores))
    for image in range(2):
        torch.testing.assert_close(boxes[image][: few[image]], all_of_them[image][: few[image]], rtol=0, atol=1e-4)
        assert torch.equal(boxes[image][few[image] :], case.boxes[image][few[image] :])
        assert torch.equal(found_scores[image], scores[image])
        assert torch.equal(found_labels[image], labels[image])
    assert not torch.equal(torch.cat(boxes), torch.cat(case.boxes))


def test_a_threshold_that_none_reaches(case):
    for settings in ({}, {"climbs": 2}, {"fit_power": 1.0}, {"fit_nms": True}):
        boxes, scores, labels = found_by(case, threshold=0.9999, score_threshold=1.0, **settings)
        wanted = [case.boxes, *detections(case)]
        for found, expected in zip((boxes, scores, labels), wanted):
            assert torch.equal(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize("power", [0.5, 2.0])
@torch.no_grad()
def test_the_fit_ranks(case, power):
    boxes, fits = look_again(configured(case), case.features, case.boxes, SHAPES, looks=2)
    scores, labels = detections(case)
    found = found_by(case, fit_power=power, boxes_per_image=4)
    for image in range(2):
        wanted = []
        for k in range(len(scores[image])):
            refined = k < 4
            score = float(scores[image][k]) * (float(fits[image][k]) ** power if refined else 1)
            box = boxes[image][k] if refined else case.boxes[image][k]
            wanted.append((score, box.tolist(), int(labels[image][k])))
        wanted.sort(key=lambda one: -one[0])
        assert wanted != sorted(wanted, key=lambda one: one[1])
        assert found[1][image].tolist() == pytest.approx([w[0] for w in wanted], rel=1e-4)
        torch.testing.assert_close(found[0][image], torch.tensor([w[1] for w in wanted]), rtol=0, atol=1e-3)
        assert found[2][image].tolist() == [w[2] for w in wanted]


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.3, 0.6])
@torch.no_grad()
def test_of_boxes_that_overlap_the_best_fitting_stays_with_the_best_score(case, threshold, power):
    boxes, fits = look_again(configured(case), case.features, case.boxes, SHAPES, looks=2)
    scores, labels = detections(case)
    found = found_by(case, threshold, fit_nms=True, fit_power=power)
    dropped = 0
    for image in range(2):
        one = [
            (float(f), float(s) * float(f) ** power, b, int(la))
            for b, f, s, la in zip(boxes[image], fits[image], scores[image], labels[image])
        ]
        one.sort(key=lambda d: -d[0])
        kept = []
        for detection in one:
            if not any(overlap(detection, k) > threshold for k in kept):
                kept.append(detection)
        best = [max(d[1] for d in one if d is k or overlap(d, k) > threshold) for k in kept]
        order = sorted(range(len(kept)), key=lambda k: -best[k])
        assert found[1][image].tolist() == pytest.approx([best[k] for k in order], rel=1e-4)
        torch.testing.assert_close(found[0][image], torch.stack([kept[k][2] for k in order]), rtol=0, atol=1e-3)
        assert found[2][image].tolist() == [kept[k][3] for k in order]
        dropped += len(one) - len(kept)
    assert dropped >= 2


def overlap(one, other):
    """Of two detections; 0 where their classes differ."""
    return float(box_iou(one[2][None], other[2][None])) * (one[3] == other[3])


@pytest.mark.parametrize("settings", [{}, {"climbs": 4}])
def test_boxes_stay_in_their_images(settings):
    case = RefinementCase(torch.float32, std=20.0)
    with torch.no_grad():  # outwards, and not to be refused
        for parameter in case.refinement.stages[0].fit.parameters():
            parameter.zero_()
    boxes, *_ = found_by(case, looks=3, **settings)
    for image, (height, width) in enumerate(SHAPES):
        assert boxes[image].min() >= 0
        assert boxes[image][:, 0::2].max() <= width
        assert boxes[image][:, 1::2].max() <= height
    ends = torch.cat([boxes[0] == 0, boxes[0] == SIZE, boxes[1] == 0, boxes[1] == SIZE])
    assert ends.any()


def test_a_climb_ends_in_the_image_and_at_the_fit_it_tells(case):
    """Of boxes that are a pixel inside, of which some would climb on out of the image."""
    generator = torch.Generator().manual_seed(1)
    edges = []
    for height, width in SHAPES:
        inner = torch.tensor([[1.0, 1.0, width / 2, height / 2], [width / 2, height / 2, width - 1.0, height - 1.0]])
        edges.append(inner.repeat(5, 1) + torch.rand(10, 4, generator=generator) - 0.5)
    refinement = configured(case, looks=0, climbs=10, step_size=0.3, fit_power=1.0)
    rank = [torch.arange(10)] * 2
    boxes, fits, labels = refine(
        refinement, case.features, edges, [torch.ones(10)] * 2, rank, SHAPES, nms_threshold=0.5
    )
    for (height, width), found in zip(SHAPES, boxes):
        assert found.min() >= 0
        assert (found <= torch.tensor([width, height, width, height])).all()
    ends = [((b == 0) | (b == torch.tensor([w, h, w, h]))).any(1) for b, (h, w) in zip(boxes, SHAPES)]
    assert torch.cat(ends).sum() >= 3
    before = [edge[label] for edge, label in zip(edges, labels)]
    assert (torch.cat(boxes) != torch.cat(before)).any(1).sum() >= 15
    with torch.no_grad():
        logits = refinement.stages[0](refinement.pool(case.features, boxes, SHAPES))[1]
    torch.testing.assert_close(torch.cat(fits), logits.sigmoid(), rtol=1e-4, atol=1e-5)


RANKED = {"climbs": 3, "fit_power": 1.0, "fit_nms": True}


@pytest.mark.parametrize("settings", [{}, RANKED])
def test_a_batch_is_its_images_one_by_one(case, settings):
    together = found_by(case, **settings)
    scores, labels = detections(case)
    for image in range(2):
        rows = slice(image, image + 1)
        alone = refine(
            configured(case, **settings),
            {name: feature[rows] for name, feature in case.features.items()},
            case.boxes[rows],
            scores[rows],
            labels[rows],
            # As the strides are told from images padded to 64 pixels, which both are.
            SHAPES[rows],
            nms_threshold=0.5,
        )
        for ours, theirs in zip(alone, together):
            torch.testing.assert_close(ours[0].detach(), theirs[image], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"looks": 0}, RANKED])
@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)])
def test_images_without_detections(case, settings, empty):
    boxes = [b[:0] if image in empty else b for image, b in enumerate(case.boxes)]
    scores, labels = detections(case)
    scores, labels = ([one[: len(b)] for one, b in zip(part, boxes)] for part in (scores, labels))
    with torch.no_grad():
        found = refine(configured(case, **settings), case.features, boxes, scores, labels, SHAPES, nms_threshold=0.5)
    whole = found_by(case, **settings)
    for image in range(2):
        for part, wanted in zip(found, whole):
            if image in empty:
                assert len(part[image]) == 0
            else:
                torch.testing.assert_close(part[image], wanted[image], rtol=1e-4, atol=1e-3)
    for image in empty:
        assert found[0][image].shape == (0, 4)


def test_autocast_keeps_boxes_in_float32_and_near(free):
    case = free
    wanted = found_by(case, looks=1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        features = {name: feature.bfloat16() for name, feature in case.features.items()}
        boxes, scores, _ = found_by(case, looks=1, features=features)
    apart = torch.cat(boxes) - torch.cat(wanted)
    assert all(part.dtype == torch.float32 for part in (*boxes, *scores))
    assert 0 < apart.abs().median() < 0.1
    assert apart.abs().max() < 0.5


def test_channels_last_and_deterministic_mode(case):
    wanted = found_by(case, **RANKED)
    features = {name: feature.contiguous(memory_format=torch.channels_last) for name, feature in case.features.items()}
    torch.use_deterministic_algorithms(True)
    try:
        found = found_by(case, features=features, **RANKED)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


# --- In a detector ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_detector_refines_a_batch_as_its_images_one_by_one():
    model = refined(tiny_rcnn().eval(), climbs=2)
    images, _ = batch()
    together = model(images)
    for image, wanted in zip(images, together):
        (alone,) = model([image])
        assert len(alone["boxes"]) > 5
        for key in KEYS:
            torch.testing.assert_close(alone[key], wanted[key], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("swap", [False, True])
def test_several_threads_call_one_detector(swap):
    """All of them have begun before the first comes to its refinement."""
    model = refined(tiny_rcnn().eval(), **RANKED)
    if swap:
        swap_crop_head(model)
    images = [torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    @torch.no_grad()
    def detect(image):
        return model([image])[0]

    wanted = [detect(image) for image in images]
    together = threading.Barrier(len(images), timeout=60)

    def wait(*_):
        together.wait()

    model.roi_heads.box_roi_pool.register_forward_hook(wait)
    with ThreadPoolExecutor(len(images)) as pool:
        found = list(pool.map(detect, images))
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(theirs["boxes"]) > 5
        assert all(torch.equal(ours[key], theirs[key]) for key in KEYS)


@torch.no_grad()
def test_a_detector_that_finds_nothing():
    model = refined(tiny_rcnn(box_score_thresh=1.0).eval(), **RANKED)
    for found in model(batch()[0]):
        assert found["boxes"].shape == (0, 4)


@torch.no_grad()
def test_masks_are_looked_for_in_the_refined_boxes():
    model = refined(tiny_rcnn("mask").eval())
    seen = []
    model.roi_heads.mask_roi_pool.register_forward_hook(lambda _, given, result: seen.extend(given[1]))
    images = batch()[0]
    for found, boxes in zip(model(images), seen, strict=True):
        torch.testing.assert_close(boxes, found["boxes"])  # images of 64 pixels are not resized
    model.roi_heads.refinement.enabled = False
    before = [found["boxes"] for found in model(images)]
    assert not torch.equal(torch.cat(seen[2:]), torch.cat(seen[:2]))
    assert torch.equal(torch.cat(seen[2:]), torch.cat(before))


@pytest.mark.parametrize("swap", [False, True])
@torch.no_grad()
def test_boxes_of_a_detector_under_autocast_are_float32(swap):
    model = refined(tiny_rcnn().eval(), **RANKED)
    if swap:
        swap_crop_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch()[0])
    assert all(one["boxes"].dtype == torch.float32 for one in found)
