"""Batches for any number of images, shapes, ranks, seeds and epochs."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader

from detector.data.batches import TrainingBatches, scoring_batches

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
EPOCHS = st.integers(0, 1000)
SIZES = st.integers(1, 6)
RANKS = st.integers(1, 4)
WIDE = st.lists(st.booleans(), min_size=1, max_size=60)


def flat(batches):
    return [index for batch in batches for index in batch]


def global_batches(wide, batch_size, ranks, epoch, **settings):
    """The batches of all ranks, side by side: the images of each step."""
    parts = [TrainingBatches(wide, batch_size, ranks=ranks, rank=r, **settings).batches(epoch) for r in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # no rank waits for another
    return [list(step) for step in zip(*parts)]


@QUICK
@given(wide=WIDE, batch_size=SIZES, ranks=RANKS, seed=SEEDS, epoch=EPOCHS)
def test_an_epoch(wide, batch_size, ranks, seed, epoch):
    size = batch_size * ranks
    steps = global_batches(wide, batch_size, ranks, epoch, seed=seed)
    assert len(steps) == max(len(wide) // size, 1)
    used = flat(flat(steps))
    if len(wide) < size:  # one step, in which every rank has some image
        assert set(used) == set(range(len(wide)))
        assert all(0 < len(batch) <= batch_size and len(set(batch)) == len(batch) for batch in steps[0])
        return
    # No image comes twice, and only the remainder is missing.
    assert {len(batch) for step in steps for batch in step} == {batch_size}
    assert len(set(used)) == len(used) == len(steps) * size
    # The images that fill no batch of their shape are fewer than two batches, so there is at most one mixed batch.
    assert sum(len({wide[index] for index in flat(step)}) == 2 for step in steps) <= 1
    # Ranks share the batches of a single process.
    assert [flat(step) for step in steps] == TrainingBatches(wide, size, seed=seed).batches(epoch)


@QUICK
@given(wide=WIDE, batch_size=SIZES, ranks=RANKS, seed=SEEDS, first=EPOCHS, data=st.data())
def test_a_resumed_epoch_skips_its_first_batches(wide, batch_size, ranks, seed, first, data):
    options = {"seed": seed, "ranks": ranks, "rank": data.draw(st.integers(0, ranks - 1))}
    whole = TrainingBatches(wide, batch_size, **options)
    start = data.draw(st.integers(0, len(whole)))
    resumed = TrainingBatches(wide, batch_size, epoch=first, start=start, **options)
    for epoch, skipped in ((first, start), (first + 1, 0), (first + 2, 0), (first, start)):
        for batches in (whole, resumed):
            batches.set_epoch(epoch)
        items = list(whole)
        assert list(resumed) == items[skipped:]
        assert items == [[(epoch, index) for index in batch] for batch in whole.batches(epoch)]
        assert len(items) == len(whole)
        assert all(type(number) is int for item in flat(items) for number in item)  # tensors would fail as keys


@QUICK
@given(
    shapes=st.sampled_from([1, 2, 3]),
    batch_size=SIZES,
    runs=st.lists(st.tuples(SEEDS, EPOCHS), min_size=2, max_size=4, unique=True),
)
def test_other_epochs_and_seeds_give_other_orders(shapes, batch_size, runs):
    wide = [index % shapes == 0 for index in range(60)]
    orders = [TrainingBatches(wide, batch_size, seed=seed).batches(epoch) for seed, epoch in runs]
    assert len({tuple(flat(order)) for order in orders}) == len(runs)


def test_shapes_alternate_at_random():
    """Otherwise the last steps of an epoch would see only one shape."""
    wide = [True] * 40 + [False] * 40
    orders = set()
    for epoch in range(5):
        shapes = tuple(wide[batch[0]] for batch in TrainingBatches(wide, 4).batches(epoch))
        assert Counter(shapes) == {True: 10, False: 10}
        orders.add(shapes)
    assert len(orders) == 5


def test_every_image_comes_equally_often_at_every_place():
    """In 300 epochs of 12 images: 25 times each, within 5 standard deviations of a binomial distribution."""
    batches = TrainingBatches([True] * 12, 3, seed=1)
    counts = Counter((place, index) for epoch in range(300) for place, index in enumerate(flat(batches.batches(epoch))))
    assert len(counts) == 12 * 12
    assert all(abs(count - 25) < 5 * (300 * 1 / 12 * 11 / 12) ** 0.5 for count in counts.values())


@pytest.mark.parametrize(("wide", "tall", "batch_size"), [(8, 1, 4), (1, 8, 4), (17, 2, 4), (7, 16, 8)])
def test_every_image_is_trained_on_in_some_epoch(wide, tall, batch_size):
    batches = TrainingBatches([True] * wide + [False] * tall, batch_size)
    used = {index for epoch in range(60) for index in flat(batches.batches(epoch))}
    assert used == set(range(wide + tall))


def test_lightning_sets_the_epoch():
    class Items:
        def __getitem__(self, item):
            return item

    expected = TrainingBatches([True] * 5 + [False] * 9, 2, seed=4, epoch=3)
    sampler = TrainingBatches(expected.wide, 2, seed=4)
    loader = DataLoader(Items(), batch_sampler=sampler, collate_fn=list)
    assert {epoch for epoch, _ in flat(loader)} == {0}
    _set_sampler_epoch(loader, 3)
    assert list(loader) == list(expected)
    assert len(loader) == 7


@QUICK
@given(images=st.integers(0, 60), batch_size=SIZES, ranks=st.integers(1, 8))
def test_scoring_covers_every_image_once_in_the_batches_of_a_single_rank(images, batch_size, ranks):
    alone = scoring_batches(images, batch_size)
    assert flat(alone) == list(range(images))
    assert all(len(batch) == batch_size for batch in alone[:-1])
    parts = [scoring_batches(images, batch_size, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert sorted(batch for part in parts for batch in part) == alone
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
