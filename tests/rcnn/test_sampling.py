"""Draws are functions of what they are for: not of the global state, the order of things, or the rest of the batch."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import batch, copies, tiny_rcnn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from detector import restore_roi_align, swap_crop_head
from detector.rcnn.sampling import SeededSampler, seed_sampling
from detector.seeds import seed_of, seeded

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**64 - 1)


@QUICK
@given(numbers=st.lists(st.integers(-3, 3) | st.integers(0, 2**32 - 1), min_size=1, max_size=5), data=st.data())
def test_a_seed_depends_on_every_number(numbers, data):
    place = data.draw(st.integers(0, len(numbers) - 1))
    other = data.draw(st.integers(-(2**31), 2**32 - 1).filter(lambda number: number != numbers[place]))
    seed = seed_of(*numbers)
    assert 0 <= seed < 2**64
    assert seed == seed_of(*numbers)
    assert seed != seed_of(*numbers[:place], other, *numbers[place + 1 :])


@QUICK
@given(numbers=st.permutations([0, 1, 2, 3]), others=st.permutations([0, 1, 2, 3]))
def test_a_seed_depends_on_the_order(numbers, others):
    assert (seed_of(*numbers) == seed_of(*others)) == (numbers == others)


def test_seeds_of_a_run_are_all_different():
    seeds = [seed_of(0, epoch, image) for epoch in range(40) for image in range(500)]
    assert len(set(seeds)) == len(seeds)
    bits = np.unpackbits(np.array(seeds, np.uint64).view(np.uint8)).reshape(len(seeds), 64)
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / len(seeds) ** 0.5  # every bit is set in half of them


@pytest.mark.parametrize("number", [-1, -(2**63), 2**63, 2**64 - 1, -(10**30), 10**30])
def test_negative_and_huge_numbers(number):
    seed = seed_of(number)
    assert type(seed) is int
    torch.manual_seed(seed)  # torch takes it
    assert len({seed, seed_of(number + 1), seed_of(number - 1)}) == 3


@pytest.mark.parametrize("number", [1, 7, 2**40])
def test_the_sign_counts(number):
    assert seed_of(3, -number) != seed_of(3, number)


@pytest.mark.parametrize(
    ("numbers", "others"),
    [
        ([7], [7, 0]),  # a run's seed and epoch, and the same with image 0
        ([7, 3], [7, 3, 0]),
        ([0], [0, 0, 0]),
        ([2**32 + 5], [5, 1]),
        ([2**32 + 5, 0], [5, 1]),
        ([2**32, 0], [0, 1]),
        ([-1], [2**32 - 1, 2**32 - 1]),
    ],
)
def test_a_seed_depends_on_where_numbers_end_and_on_how_many_there_are(numbers, others):
    assert seed_of(*numbers) != seed_of(*others)


@QUICK
@given(seed=SEEDS, before=st.integers(0, 100))
def test_draws_start_from_the_seed(seed, before):
    torch.manual_seed(before)
    torch.rand(before)
    with seeded(seed):
        drawn = torch.rand(3), torch.randperm(20), torch.randn(2)
    torch.manual_seed(seed)
    for ours, expected in zip(drawn, (torch.rand(3), torch.randperm(20), torch.randn(2))):
        assert torch.equal(ours, expected)


def test_draws_afterwards_are_as_if_there_had_been_none():
    torch.rand(5)
    before = torch.get_rng_state()
    with seeded(1, torch.device("cpu")):
        torch.rand(7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0)])
def test_the_same_on_an_accelerator(device):
    torch.cuda.manual_seed(9)
    torch.rand(5, device=device)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(1, device):
            drawn.append((torch.rand(7), torch.rand(7, device=device)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(), before[1])


def test_draws_within_draws():
    with seeded(1):
        expected = torch.rand(2), torch.rand(2)
    with seeded(1):
        first = torch.rand(2)
        with seeded(2):
            torch.rand(9)
        second = torch.rand(2)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


def test_an_exception_leaves_the_global_stream_alone():
    before = torch.get_rng_state()

    def fail():
        with seeded(3):
            torch.rand(7)
            raise KeyError("within")

    with pytest.raises(KeyError, match="within"):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


@st.composite
def matched_images(draw):
    """What torchvision's matcher gives: -1 is ignored, 0 background, above is the number of a box, from 1 on."""
    images = draw(st.lists(st.lists(st.integers(-1, 3), max_size=60), min_size=1, max_size=4))
    return [torch.tensor(image, dtype=torch.int64) for image in images]


def assert_same(ours, expected):
    assert len(ours) == len(expected) == 2  # positives, negatives
    for masks, expected_masks in zip(ours, expected):
        assert len(masks) == len(expected_masks)
        for mask, expected_mask in zip(masks, expected_masks):
            assert mask.dtype == expected_mask.dtype
            assert torch.equal(mask, expected_mask)


@QUICK
@given(
    matched=matched_images(),
    size=st.integers(1, 20),
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
    seeds=st.lists(SEEDS, min_size=4, max_size=4),
)
def test_each_image_gets_torchvisions_draw_from_its_own_seed(matched, size, fraction, seeds):
    sampler, stock = SeededSampler(size, fraction), BalancedPositiveNegativeSampler(size, fraction)
    sampler.seeds = seeds[: len(matched)]
    before = torch.get_rng_state()
    together = sampler(matched)
    assert torch.equal(torch.get_rng_state(), before)
    for number, (image, seed) in enumerate(zip(matched, seeds)):
        torch.manual_seed(seed)
        expected = stock([image])
        assert_same([masks[number : number + 1] for masks in together], expected)
        sampler.seeds = [seed]
        assert_same(sampler([image]), expected)  # alone in its batch


@QUICK
@given(matched=matched_images(), size=st.integers(1, 20), seed=st.integers(0, 1000))
def test_without_seeds_torchvisions_own_draws(matched, size, seed):
    torch.manual_seed(seed)
    expected = BalancedPositiveNegativeSampler(size, 0.5)(matched)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    assert_same(SeededSampler(size, 0.5)(matched), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_a_number_of_seeds_that_does_not_fit_is_refused(seeds):
    sampler = SeededSampler(4, 0.5)
    sampler.seeds = seeds
    with pytest.raises(ValueError, match="zip"):
        sampler([torch.zeros(9, dtype=torch.int64)] * 2)


KINDS = ["stock", "swapped"]


def build(kind, **settings):
    """Few anchors and RoIs are drawn of the many that there are; the two samplers are alike."""
    small = {
        "rpn_batch_size_per_image": 12,
        "box_batch_size_per_image": 12,
        "rpn_positive_fraction": 0.5,
        "box_positive_fraction": 0.5,
    }
    model = tiny_rcnn(**small | settings)
    if kind == "swapped":
        swap_crop_head(model)
    return model.train()


def losses_of(model, seeds, global_seed):
    images, targets = batch()
    if seeds != "untouched":
        seed_sampling(model, seeds)
    torch.manual_seed(global_seed)
    with torch.no_grad():
        return {name: loss.item() for name, loss in model(images, copies(targets)).items()}


def all_differ(*losses):
    """Of the anchors that were drawn, and of the RoIs."""
    return all(len({each[name] for each in losses}) == len(losses) for name in ("loss_objectness", "loss_classifier"))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_depend_on_the_seeds_and_on_nothing_else_that_is_drawn(kind):
    model = build(kind)
    # They would otherwise: what follows is not true because all is drawn that there is.
    assert all_differ(*(losses_of(model, "untouched", seed) for seed in range(3)))
    first = losses_of(model, [1, 2], 0)
    assert losses_of(model, [1, 2], 1) == first
    assert all_differ(first, losses_of(model, [1, 3], 0), losses_of(model, [4, 2], 0), losses_of(model, [2, 1], 0))


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_and_rois_take_nothing_from_the_global_stream(kind):
    model = build(kind)
    images, targets = batch()
    torch.manual_seed(0)
    model.transform(images, copies(targets))  # draws the size, even where there is one
    expected = torch.get_rng_state()
    seed_sampling(model, [1, 2])
    torch.manual_seed(0)
    model(images, copies(targets))
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_none_gives_torchvisions_draws_again(kind):
    expected = losses_of(build(kind), "untouched", 5)
    model = build(kind)
    assert losses_of(model, None, 5) == expected
    assert losses_of(model, [1, 2], 5) != expected
    assert losses_of(model, None, 5) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_and_rois_are_drawn_from_different_streams(kind):
    model = build(kind)
    seed_sampling(model, [1, 2])
    matched = [torch.arange(200) % 2, torch.arange(300) % 3]
    anchors, rois = model.rpn.fg_bg_sampler(matched), model.roi_heads.fg_bg_sampler(matched)
    for masks, others in zip(anchors, rois):
        for mask, other in zip(masks, others):
            assert mask.sum() == other.sum() == 6
            assert not torch.equal(mask, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_drawn_numbers_are_the_models_own(kind):
    model = build(kind, rpn_batch_size_per_image=10, box_batch_size_per_image=8, box_positive_fraction=0.25)
    for _ in range(2):
        seed_sampling(model, [7])
        for part, positives, negatives in ((model.rpn, 5, 5), (model.roi_heads, 2, 6)):
            drawn = part.fg_bg_sampler([torch.arange(100) % 2])
            assert [int(mask.sum()) for (mask,) in drawn] == [positives, negatives]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_a_number_of_seeds_that_does_not_fit_the_batch_is_refused(kind, seeds):
    with pytest.raises(ValueError, match="zip"):
        losses_of(build(kind), seeds, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_model_draws_the_same_and_apart(kind):
    model = build(kind)
    expected = losses_of(model, [1, 2], 0)
    other = copy.deepcopy(model)
    assert losses_of(other, "untouched", 1) == expected  # the seeds were copied with it
    assert all_differ(losses_of(other, [3, 4], 0), expected)
    assert losses_of(model, "untouched", 1) == expected


def test_swapping_and_restoring_keep_the_draws():
    """Both leave the heads' samplers in place."""
    model = build("stock")
    expected = losses_of(model, [1, 2], 0)
    swap_crop_head(model)
    assert losses_of(model, "untouched", 1) == pytest.approx(expected, rel=1e-5)
    restore_roi_align(model)
    assert losses_of(model, "untouched", 1) == expected
