import time

import pytest

from imagen_lightning.data.order import PositionBatchSampler, SampleOrder
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


def test_start_deep_in_a_large_set_is_quick():
    order = SampleOrder([10_000] * 400, 0, 64, 8)
    begin = time.perf_counter()
    assert len({order.at(position) for position in range(1_000_000, 1_000_064)}) == 64
    assert time.perf_counter() - begin < 1


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
