"""Sampling depends on its seeds only, not on the global state, the order of things, or the rest of the batch."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import batch, copies, tiny_rcnn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from detector import swap_crop_head
from detector.rcnn.sampling import SeededSampler, seed_sampling
from detector.seeds import seed_of, seeded

QUICK = settings(max_examples=50, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("numbers", "others"),
    [
        ([7], [7, 0]),
        ([1, 2], [2, 1]),
        ([1, 2], [1, 3]),
        ([3, 2**40], [3, -(2**40)]),
        ([2**32 + 5], [5, 1]),
        ([-1], [2**32 - 1] * 2),
    ],
)
def test_a_seed_depends_on_order_sign_and_count(numbers, others):
    assert 0 <= seed_of(*numbers) < 2**64
    assert seed_of(*numbers) == seed_of(*numbers) != seed_of(*others)


def test_a_seeded_block():
    state = torch.get_rng_state()
    values = []
    with suppress(TypeError), seeded(3):
        values.append(torch.rand(3))
        with seeded(4):
            torch.rand(9)
        values.append(torch.rand(2))
        raise TypeError
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(torch.cat(values), torch.cat([torch.rand(3), torch.rand(2)]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0)])
def test_a_seeded_block_on_an_accelerator(device):
    torch.cuda.manual_seed(9)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    values = []
    for _ in range(2):
        with seeded(1, device):
            values.append((torch.rand(7), torch.rand(7, device=device)))
    assert torch.equal(values[0][0], values[1][0])
    assert torch.equal(values[0][1], values[1][1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(), before[1])


# Outputs of torchvision's matcher: -1 is ignored, 0 is background, others are numbers of boxes.
matched_image = st.lists(st.integers(-1, 3), max_size=60).map(lambda image: torch.tensor(image, dtype=torch.int64))


@QUICK
@given(
    matched=st.lists(matched_image, min_size=1, max_size=4),
    size=st.integers(1, 20),
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
    seeds=st.lists(SEEDS, min_size=4, max_size=4),
)
def test_each_image_is_sampled_as_by_torchvision_with_its_own_seed(matched, size, fraction, seeds):
    sampler, stock = SeededSampler(size, fraction), BalancedPositiveNegativeSampler(size, fraction)
    sampler.seeds = seeds[: len(matched)]
    before = torch.get_rng_state()
    together = sampler(matched)
    assert torch.equal(torch.get_rng_state(), before)
    for image, seed, *ours in zip(matched, seeds, *together):
        torch.manual_seed(seed)
        for mask, (expected,) in zip(ours, stock([image]), strict=True):
            assert mask.dtype == expected.dtype
            assert torch.equal(mask, expected)


KINDS = ["stock", "swapped"]


def build(kind, **settings):
    """A model with more anchors and RoIs than are sampled; the settings of both samplers are equal."""
    small = {f"{part}_batch_size_per_image": 12 for part in ("rpn", "box")}
    model = tiny_rcnn(**small | {f"{part}_positive_fraction": 0.5 for part in ("rpn", "box")} | settings)
    return (swap_crop_head(model) if kind == "swapped" else model).train()


def losses_of(model, seeds, global_seed):
    images, targets = batch()
    if seeds != "untouched":
        seed_sampling(model, seeds)
    torch.manual_seed(global_seed)
    with torch.no_grad():
        return {name: loss.item() for name, loss in model(images, copies(targets)).items()}


def all_differ(*losses):
    """Whether both the sampled anchors and the sampled RoIs differ."""
    return all(len({each[name] for each in losses}) == len(losses) for name in ("loss_objectness", "loss_classifier"))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_depend_on_the_seeds_only(kind):
    model = build(kind)
    globally = [losses_of(model, "untouched", seed) for seed in range(3)]
    assert all_differ(*globally)
    first = losses_of(model, [1, 2], 0)
    assert losses_of(model, [1, 2], 1) == first
    assert all_differ(first, losses_of(model, [1, 3], 0), losses_of(model, [4, 2], 0), losses_of(model, [2, 1], 0))
    assert losses_of(model, None, 2) == globally[2]  # torchvision's sampling again


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_and_rois_have_streams_and_counts_of_their_own(kind):
    model = build(kind)
    seed_sampling(model, [7])
    matched = [torch.arange(200) % 2]
    for (mask,), (other,) in zip(model.rpn.fg_bg_sampler(matched), model.roi_heads.fg_bg_sampler(matched)):
        assert mask.sum() == other.sum() == 6
        assert not torch.equal(mask, other)
    model = build(kind, rpn_batch_size_per_image=10, box_batch_size_per_image=8, box_positive_fraction=0.25)
    for _ in range(2):
        seed_sampling(model, [7])
        for part, counts in ((model.rpn, [5, 5]), (model.roi_heads, [2, 6])):
            assert [int(mask.sum()) for (mask,) in part.fg_bg_sampler(matched)] == counts


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_as_many_seeds_as_images(seeds):
    with pytest.raises(ValueError, match="zip"):
        losses_of(build("stock"), seeds, 0)
