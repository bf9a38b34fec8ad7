"""Which images make up which batch: for any number of images, shapes, ranks, seeds and epochs."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader

from detector.data.batches import ScoringBatches, TrainingBatches

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
EPOCHS = st.integers(0, 1000)
SIZES = st.integers(1, 6)
RANKS = st.integers(1, 4)
WIDE = st.lists(st.booleans(), min_size=1, max_size=60)


def flat(batches):
    return [index for batch in batches for index in batch]


def global_batches(wide, batch_size, ranks, epoch, **settings):
    """The batches of all ranks, side by side: the images of one step."""
    parts = [TrainingBatches(wide, batch_size, ranks=ranks, rank=r, **settings).batches(epoch) for r in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # no rank waits for another
    return [list(step) for step in zip(*parts)]


@QUICK
@given(wide=WIDE, batch_size=SIZES, ranks=RANKS, seed=SEEDS, epoch=EPOCHS)
def test_no_image_comes_twice_in_an_epoch_and_only_an_incomplete_batch_is_missing(wide, batch_size, ranks, seed, epoch):
    size = batch_size * ranks
    assume(len(wide) >= size)
    steps = global_batches(wide, batch_size, ranks, epoch, seed=seed)
    assert {len(batch) for step in steps for batch in step} == {batch_size}
    used = flat(flat(steps))
    assert len(set(used)) == len(used)
    assert set(used) <= set(range(len(wide)))
    assert len(wide) - len(used) < size


@QUICK
@given(wide=WIDE, batch_size=SIZES, ranks=RANKS, seed=SEEDS, epoch=EPOCHS)
def test_the_length_is_the_number_of_batches(wide, batch_size, ranks, seed, epoch):
    for rank in range(ranks):
        batches = TrainingBatches(wide, batch_size, seed=seed, ranks=ranks, rank=rank, epoch=epoch)
        assert len(batches) == len(list(batches)) == max(len(wide) // (batch_size * ranks), 1)


@QUICK
@given(wide=WIDE, batch_size=SIZES, ranks=RANKS, seed=SEEDS, epoch=EPOCHS)
def test_all_steps_but_one_are_of_one_shape(wide, batch_size, ranks, seed, epoch):
    # What fills no batch is less than one of the wide and less than one of the tall: less than two, so one is full.
    steps = global_batches(wide, batch_size, ranks, epoch, seed=seed)
    mixed = [step for step in steps if len({wide[index] for index in flat(step)}) == 2]
    assert len(mixed) <= 1


def test_shapes_alternate_at_random():
    """Not all wide batches first: the last steps of an epoch would see one shape alone."""
    wide = [True] * 40 + [False] * 40
    orders = set()
    for epoch in range(5):
        shapes = tuple(wide[batch[0]] for batch in TrainingBatches(wide, 4).batches(epoch))
        assert Counter(shapes) == {True: 10, False: 10}
        orders.add(shapes)
    assert len(orders) == 5


@QUICK
@given(wide=WIDE, batch_size=SIZES, ranks=RANKS, seed=SEEDS, epoch=EPOCHS)
def test_several_ranks_see_together_what_one_with_as_many_images_sees(wide, batch_size, ranks, seed, epoch):
    size = batch_size * ranks
    assume(len(wide) >= size)
    together = [flat(step) for step in global_batches(wide, batch_size, ranks, epoch, seed=seed)]
    assert together == TrainingBatches(wide, size, seed=seed).batches(epoch)


@QUICK
@given(wide=WIDE, batch_size=SIZES, ranks=RANKS, seed=SEEDS, epoch=EPOCHS)
def test_fewer_images_than_a_batch_give_every_rank_one_that_is_not_empty(wide, batch_size, ranks, seed, epoch):
    size = batch_size * ranks
    wide = wide[: size - 1]
    assume(wide)
    (step,) = global_batches(wide, batch_size, ranks, epoch, seed=seed)
    assert set(flat(step)) == set(range(len(wide)))
    for batch in step:
        assert 0 < len(batch) <= batch_size
        assert len(set(batch)) == len(batch)


@QUICK
@given(wide=WIDE, batch_size=SIZES, ranks=RANKS, seed=SEEDS, first=EPOCHS, data=st.data())
def test_start_leaves_out_batches_of_the_first_epoch_alone(wide, batch_size, ranks, seed, first, data):
    rank = data.draw(st.integers(0, ranks - 1))
    whole = TrainingBatches(wide, batch_size, seed=seed, ranks=ranks, rank=rank)
    start = data.draw(st.integers(0, len(whole)))
    resumed = TrainingBatches(wide, batch_size, seed=seed, ranks=ranks, rank=rank, epoch=first, start=start)
    for epoch, left_out in ((first, start), (first + 1, 0), (first + 2, 0), (first, start)):
        for batches in (whole, resumed):
            batches.set_epoch(epoch)
        assert list(resumed) == list(whole)[left_out:]


@QUICK
@given(wide=WIDE, batch_size=SIZES, seed=SEEDS, epoch=EPOCHS)
def test_items_tell_the_epoch_and_the_image(wide, batch_size, seed, epoch):
    batches = TrainingBatches(wide, batch_size, seed=seed, epoch=epoch)
    assert list(batches) == [[(epoch, index) for index in batch] for batch in batches.batches(epoch)]
    for item in flat(batches):
        assert [type(number) for number in item] == [int, int]  # tensors would fail as keys, and cost time


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
    again = [TrainingBatches(wide, batch_size, seed=seed).batches(epoch) for seed, epoch in runs]
    assert orders == again


def test_every_image_comes_equally_often_at_every_place():
    """Over 600 epochs of 12 images: 50 times each, +- 5 standard deviations of a binomial distribution."""
    batches = TrainingBatches([True] * 12, 3, seed=1)
    counts = Counter((place, index) for epoch in range(600) for place, index in enumerate(flat(batches.batches(epoch))))
    assert len(counts) == 12 * 12
    spread = (600 * 1 / 12 * 11 / 12) ** 0.5
    assert all(abs(count - 50) < 5 * spread for count in counts.values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_images_are_left_out_in_other_epochs(ranks):
    wide = [True] * 12 + [False] * 11
    left_out = Counter()
    for epoch in range(60):
        used = set(flat(flat(global_batches(wide, 8 // ranks, ranks, epoch))))
        left_out[frozenset(set(range(len(wide))) - used)] += 1
    assert len(left_out) > 30
    assert {len(indices) for indices in left_out} == {7}


@pytest.mark.parametrize(("wide", "tall", "batch_size"), [(8, 1, 4), (1, 8, 4), (17, 2, 4), (7, 16, 8)])
def test_every_image_is_trained_on_in_some_epoch(wide, tall, batch_size):
    wide = [True] * wide + [False] * tall
    batches = TrainingBatches(wide, batch_size)
    used = {index for epoch in range(60) for index in flat(batches.batches(epoch))}
    assert used == set(range(len(wide)))


def test_lightning_sets_the_epoch():
    class Items:
        def __getitem__(self, item):
            return item

    expected = TrainingBatches([True] * 5 + [False] * 9, 2, seed=4, epoch=3)
    sampler = TrainingBatches(expected.wide.tolist(), 2, seed=4)
    loader = DataLoader(Items(), batch_sampler=sampler, collate_fn=list)
    assert {epoch for epoch, _ in flat(loader)} == {0}
    _set_sampler_epoch(loader, 3)
    assert list(loader) == list(expected)
    assert {epoch for epoch, _ in flat(loader)} == {3}
    sampler.sampler.set_epoch(0)
    assert {epoch for epoch, _ in flat(loader)} == {0}
    assert len(loader) == 7


@QUICK
@given(images=st.integers(0, 60), batch_size=SIZES, ranks=st.integers(1, 8))
def test_scoring_covers_every_image_once_in_the_batches_of_a_single_rank(images, batch_size, ranks):
    alone = list(ScoringBatches(images, batch_size))
    assert flat(alone) == list(range(images))
    assert all(len(batch) == batch_size for batch in alone[:-1])
    parts = [ScoringBatches(images, batch_size, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    together = [batch for part in parts for batch in part]
    assert sorted(together) == alone
    assert max(map(len, parts)) - min(map(len, parts)) <= 1  # shared evenly
    assert [list(part) for part in parts] == [list(part) for part in parts]  # a second epoch of scoring


def test_more_ranks_than_batches_to_score():
    parts = [list(ScoringBatches(5, 4, ranks=4, rank=rank)) for rank in range(4)]
    assert parts == [[[0, 1, 2, 3]], [[4]], [], []]
