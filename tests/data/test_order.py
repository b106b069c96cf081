import time
import tracemalloc
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest

from imagen_lightning.data.order import BucketedOrder, PositionBatchSampler, SampleOrder
from imagen_lightning.types import InputError

SIZES = [5, 1, 7, 3, 4, 6, 2]


def all_pairs(sizes):
    return {(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)}


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_every_sample_once_an_epoch_in_windows_of_shards(window):
    order = SampleOrder(SIZES, seed=3, global_batch_size=4, window=window)
    for epoch in range(3):
        pairs = order.positions(epoch, 0, len(order))
        assert len(pairs) == len(order) == sum(SIZES)
        assert set(pairs) == all_pairs(SIZES)
        # each run of `window` new shards is exhausted before the next begins
        while pairs:
            shards = []
            for shard, _ in pairs:
                if shard not in shards:
                    shards.append(shard)
            here = shards[:window]
            size = sum(SIZES[shard] for shard in here)
            assert {shard for shard, _ in pairs[:size]} == set(here)
            pairs = pairs[size:]


def test_any_slice_is_the_slice_of_the_whole_epoch():
    whole = SampleOrder(SIZES, 0, 4, 2).positions(5, 0, 28)
    for start in range(0, 28, 3):
        for stop in range(start, 29, 5):
            assert SampleOrder(SIZES, 0, 4, 2).positions(5, start, stop) == whole[start:stop]


def test_epochs_and_seeds_differ_and_repeat():
    sizes = [50] * 6
    first = SampleOrder(sizes, 0, 4, 2).positions(0, 0, 300)
    assert first == SampleOrder(sizes, 0, 8, 2).positions(0, 0, 300)
    assert first != SampleOrder(sizes, 0, 4, 2).positions(1, 0, 300)
    assert first != SampleOrder(sizes, 1, 4, 2).positions(0, 0, 300)
    assert sum(a == b for a, b in zip(first, sorted(first), strict=True)) < 30


def test_batches_run_across_the_epochs_end():
    order = SampleOrder(SIZES, 0, 5, 2)  # 28 samples: batch 5 takes 3 of epoch 0 and 2 of epoch 1
    batches = [order.batch(p) for p in range(0, 5 * 28, 5)]
    consumed = [pair for batch in batches for pair in batch]
    for epoch in range(5):
        assert consumed[28 * epoch : 28 * (epoch + 1)] == order.positions(epoch, 0, 28)
    assert batches[5] == order.positions(0, 25, 28) + order.positions(1, 0, 2)


def test_replacement_is_a_pure_function_within_the_window():
    order = SampleOrder([20] * 6, 0, 4, 2)
    shards = {shard for shard, _ in order.positions(0, 0, 40)}
    drawn = [order.replacement(7, attempt) for attempt in range(30)]
    assert {shard for shard, _ in drawn} == shards
    assert len(set(drawn)) > 10
    assert drawn == [SampleOrder([20] * 6, 0, 4, 2).replacement(7, attempt) for attempt in range(30)]


@pytest.mark.parametrize("trial", range(20))
def test_each_epoch_is_a_permutation_however_it_is_asked(trial):
    generator = np.random.default_rng(trial)
    sizes = generator.integers(0, 9, generator.integers(1, 12)).tolist()
    sizes[0] += 1
    window, batch = int(generator.integers(1, 6)), int(generator.integers(1, 20))
    order, length = SampleOrder(sizes, trial, batch, window), sum(sizes)
    consumed = [pair for position in range(0, 3 * length * batch, batch) for pair in order.batch(position)]
    for epoch in range(3):
        here = consumed[epoch * length : (epoch + 1) * length]
        assert sorted(here) == sorted(all_pairs(sizes))
        assert here == SampleOrder(sizes, trial, 1, window).positions(epoch, 0, length)
    # in any order of asking, and from a state that other questions have left
    for position in generator.integers(0, 3 * length, 50).tolist():
        assert order.at(position) == consumed[position]
        assert SampleOrder(sizes, trial, batch, window).at(position) == consumed[position]
        assert order.replacement(position, 1) == SampleOrder(sizes, trial, batch, window).replacement(position, 1)
    start, stop = sorted(generator.integers(0, 3 * length, 2).tolist())
    assert [tuple(pair) for pair in order.pairs(start, stop).tolist()] == consumed[start:stop]


def test_the_shards_of_windows():
    order = SampleOrder(SIZES, 3, 4, 3)  # windows of 3, 3 and 1 shards
    for epoch in range(2):
        windows = [order.window_shards(epoch, number) for number in range(3)]
        assert [len(shards) for shards in windows] == [3, 3, 1]
        assert sorted(chain(*windows)) == list(range(7))
    assert order.window_shards(0, 3) == order.window_shards(1, 0)
    assert order.window_shards(0, 7) == order.window_shards(2, 1)
    for position in range(2 * len(order)):
        epoch, number = order.window_number(position)
        assert order.at(position)[0] in order.window_shards(epoch, number)
        here = order.shards_at(position)
        assert here[: len(order.window_shards(epoch, number))] == order.window_shards(epoch, number)
        assert set(here) == {*order.window_shards(epoch, number), *order.window_shards(epoch, number + 1)}


def test_shards_without_samples_leave_no_gap():
    order = SampleOrder([0, 0, 3, 0, 0, 0, 2], 1, 4, 1)
    assert sorted(order.positions(0, 0, 5)) == [(2, 0), (2, 1), (2, 2), (6, 0), (6, 1)]
    assert {order.window_shards(*order.window_number(p))[0] for p in range(5)} == {2, 6}


def test_start_deep_in_a_large_set_is_quick_and_light():
    sizes = [10_000] * 10_000
    tracemalloc.start()
    begin = time.perf_counter()
    order = SampleOrder(sizes, 0, 64, 8)
    assert len({order.at(position) for position in range(1_000_000, 1_000_064)}) == 64
    assert order.at(123_456_789_012) == SampleOrder(sizes, 0, 64, 8).at(123_456_789_012)
    assert time.perf_counter() - begin < 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize(
    "arguments", [([], 0, 4, 2), ([0, 0], 0, 4, 2), ([3], -1, 4, 2), ([3], 0, 0, 2), ([3], 0, 4, 0)]
)
def test_order_refuses(arguments):
    with pytest.raises(InputError):
        SampleOrder(*arguments)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_each_global_batch(world_size):
    samplers = [iter(PositionBatchSampler(6, 8, rank, world_size)) for rank in range(world_size)]
    for number in range(5):
        batch = [position for sampler in samplers for position in next(sampler)]
        assert batch == list(range(6 + 8 * number, 14 + 8 * number))


@pytest.mark.parametrize(("stop", "world_size"), [(19, 1), (19, 2), (17, 2), (16, 2), (3, 4)])
def test_validation_ends_with_a_short_batch(stop, world_size):
    samplers = [PositionBatchSampler(0, 8, rank, world_size, stop) for rank in range(world_size)]
    seen = [position for sampler in samplers for batch in sampler for position in batch]
    assert sorted(seen) == list(range(stop))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def test_sampler_refuses_an_uneven_batch_and_is_endless_without_stop():
    with pytest.raises(InputError, match=r"batch_size 10 .* all 4 processes"):
        PositionBatchSampler(0, 10, 0, 4)
    with pytest.raises(TypeError):
        len(PositionBatchSampler(0, 8))


def make_buckets(seed, num_shards=9, shares=(0.6, 0.05, 0.3, 0.05), largest=40):
    generator = np.random.default_rng(seed)
    return [
        generator.choice(len(shares), generator.integers(0, largest), p=shares).astype(np.uint8)
        for _ in range(num_shards)
    ]


@pytest.mark.parametrize(("window", "batch"), [(2, 4), (1, 7), (100, 16), (3, 50)])
def test_every_sample_once_an_epoch_of_its_bucket(window, batch):
    buckets = make_buckets(5)
    order = BucketedOrder(buckets, 3, batch, window)
    length = sum(map(len, buckets))
    assert len(order) == length
    seen, epochs, nexts = {}, [], []
    for position in range(0, 12 * length, batch):
        number, pairs = order.bucket(position), order.batch(position)
        assert {buckets[shard][sample] for shard, sample in pairs} == {number}
        assert {order.bucket(position + i) for i in range(batch)} == {number}
        seen.setdefault(number, []).extend(pairs)
    for number, pairs in seen.items():
        whole = sorted((s, i) for s, items in enumerate(buckets) for i in np.flatnonzero(items == number).tolist())
        for start in range(0, len(pairs) - len(whole) + 1, len(whole)):
            assert sorted(pairs[start : start + len(whole)]) == whole
        epochs.append(Fraction(len(pairs), len(whole)))
        nexts.append(epochs[-1] + Fraction(batch, len(whole)))
    assert max(epochs) <= min(nexts)  # all buckets are at the same epoch, to a batch
    assert abs(max(epochs) - 12) < Fraction(5 * batch, length)
    assert len(seen) == 4


def test_batches_come_as_they_are_due():
    buckets = make_buckets(8)
    sizes = np.bincount(np.concatenate(buckets)).tolist()
    order = BucketedOrder(buckets, 0, 6, 2)
    due = sorted((Fraction((j + 1) * 6, n), b) for b, n in enumerate(sizes) for j in range(3 * n))
    expected = [b for _, b in due][: 2 * sum(sizes)]
    assert [order.bucket(6 * batch) for batch in range(2 * sum(sizes))] == expected
    for batch in np.random.default_rng(0).permutation(2 * sum(sizes)).tolist():
        assert BucketedOrder(buckets, 0, 6, 2).bucket(6 * batch + 5) == expected[batch]
    far = 10**12
    assert order.bucket(6 * far) == order.bucket(6 * (far + sum(sizes)))  # it repeats after as many batches as samples


def test_bucketed_order_is_pure():
    buckets = make_buckets(2)
    order = BucketedOrder(buckets, 7, 8, 2)
    length = len(order)
    consumed = [pair for position in range(0, 4 * length, 8) for pair in order.batch(position)]
    generator = np.random.default_rng(0)
    for position in generator.integers(0, 4 * length, 100).tolist():
        fresh = BucketedOrder(buckets, 7, 8, 2)
        assert order.at(position) == fresh.at(position) == consumed[position]
        replacement = order.replacement(position, 2)
        assert replacement == fresh.replacement(position, 2)
        assert buckets[replacement[0]][replacement[1]] == order.bucket(position)
    assert order.positions(2, 5, length) == consumed[2 * length + 5 : 3 * length]
    assert order.positions(0, 3, 4) == consumed[3:4]
    other = BucketedOrder(buckets, 8, 8, 2)
    assert [pair for p in range(0, length, 8) for pair in other.batch(p)] != consumed[: 8 * -(-length // 8)]
    with pytest.raises(IndexError):
        order.positions(0, 0, length + 1)


def test_buckets_read_the_same_windows():
    """What all buckets read in a stretch of the run is a few windows' shards."""
    buckets = make_buckets(1, num_shards=40, largest=200)
    order = BucketedOrder(buckets, 0, 16, 4)
    share = len(order) // 10  # as much as a window
    for start in range(0, 2 * len(order), share):
        shards = {shard for shard, _ in order.pairs(start, start + share).tolist()}
        assert len(shards) <= 3 * 4
    for position in range(0, len(order), 37):
        assert order.at(position)[0] in order.shards_at(position)
    assert sorted(chain(*[order.window_shards(0, n) for n in range(10)])) == list(range(40))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_buckets_batches(world_size):
    order = BucketedOrder(make_buckets(4), 0, 8, 2)
    samplers = [iter(PositionBatchSampler(16, 8, rank, world_size)) for rank in range(world_size)]
    for number in range(2, 40):
        shares = [next(sampler) for sampler in samplers]
        assert len({order.bucket(position) for share in shares for position in share}) == 1
        assert [order.at(position) for share in shares for position in share] == order.batch(8 * number)


def test_one_bucket_is_the_plain_order():
    buckets = [np.full(size, 3, np.uint8) for size in SIZES]
    order, plain = BucketedOrder(buckets, 5, 4, 2), SampleOrder(SIZES, 5, 4, 2)
    assert order.positions(1, 0, 28) == plain.positions(1, 0, 28)
    assert order.bucket(17) == 3
    with pytest.raises(InputError):
        BucketedOrder([np.zeros(0, np.uint8)] * 3, 0, 4, 2)


def test_bucketed_start_deep_in_a_large_set_is_quick():
    shard = np.random.default_rng(0).choice(9, 10_000, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01])
    buckets = [shard.astype(np.uint8)] * 2000
    begin = time.perf_counter()
    order = BucketedOrder(buckets, 0, 64, 8)
    assert len(set(order.batch(64 * 1_000_000))) == 64
    assert time.perf_counter() - begin < 2
