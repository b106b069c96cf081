import pytest
import torch
from scipy import stats

from imagen_lightning.diffusion import random as random_module
from imagen_lightning.diffusion.random import (
    Stream,
    normal,
    philox,
    random_bits,
    seeded_generator,
    spread_uniform,
    uniform,
)

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    k0, k1 = words(key)
    result = philox(tuple(torch.tensor([word]) for word in words(counter)), (k0, k1))
    assert [int(word) for word in result] == words(answer)


def test_bits_are_philox_of_block_stream_and_position_under_the_seed():
    # the one known answer that this layout of counter and key reaches; then another block by its words
    assert random_bits(0, 0, torch.tensor([0]), 4)[0].tolist() == words(KNOWN_ANSWERS[0][2])
    counter = (torch.tensor([1]), torch.tensor([3]), torch.tensor([7]), torch.tensor([5]))
    expected = [int(word) for word in philox(counter, (11, 13))]
    assert random_bits((13 << 32) + 11, 3, torch.tensor([(5 << 32) + 7]), 8)[0, 4:].tolist() == expected


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 5, 7), (3, 16, 16)])
def test_numbers_do_not_depend_on_the_batch(shape):
    positions = torch.tensor([5, 0, 2**40 + 3, 17, 1, 8, 9, 123456])
    draw = uniform if shape == () else normal
    whole = draw(3, Stream.NOISE, positions, shape)
    assert whole.shape == (8, *shape)
    for size in (1, 2, 3, 5):
        parts = [draw(3, Stream.NOISE, part, shape) for part in positions.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(3, Stream.NOISE, positions.flip(0), shape).flip(0), whole)
    times = spread_uniform(3, Stream.TIME, positions)
    assert torch.equal(torch.cat([spread_uniform(3, Stream.TIME, part) for part in positions.split(3)]), times)


def test_seeds_streams_and_positions_give_other_numbers():
    positions = torch.tensor([0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1])
    draws = [
        normal(seed, stream, positions, (500,))
        for seed in (0, 1, -1, 2**32, -(2**32), 2**63)
        for stream in (*Stream, 1000)
    ]
    rows = torch.cat(draws)
    assert len(torch.unique(rows, dim=0)) == len(rows)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.25  # of 500 numbers: 5.6 standard deviations, over 32 thousand pairs


def test_a_negative_seed_is_its_64_bit_pattern():
    positions = torch.arange(4)
    assert torch.equal(random_bits(-1, 0, positions, 4), random_bits(2**64 - 1, 0, positions, 4))
    assert uniform(-7, 0, positions, (10,)).min() > 0


def test_normality():
    numbers = normal(0, Stream.NOISE, torch.arange(25), (4000,)).flatten().double().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    assert abs(numbers.mean()) < 3 / 1e5**0.5
    assert abs(numbers.var() - 1) < 3 * (2 / 1e5) ** 0.5
    assert abs(stats.kurtosis(numbers)) < 3 * (24 / 1e5) ** 0.5
    assert abs((numbers[::2] * numbers[1::2]).mean()) < 3 / 5e4**0.5  # Box and Muller's pairs are independent


def test_uniformity():
    numbers = uniform(0, Stream.TIME, torch.arange(100_000))
    assert stats.kstest(numbers.double().numpy(), "uniform").pvalue > 0.01
    within = uniform(1, Stream.CROP, torch.arange(10), (10_000,)).flatten()
    assert stats.kstest(within.double().numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF])
def test_uniform_never_reaches_its_ends(monkeypatch, bits):
    monkeypatch.setattr(random_module, "random_bits", lambda *args: torch.full((1, 2), bits))
    numbers = uniform(0, 0, torch.zeros(1, dtype=torch.int64), (2,))
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert normal(0, 0, torch.zeros(1, dtype=torch.int64), (2,)).isfinite().all()
    times = spread_uniform(0, 0, torch.tensor([0, 1, 2**62]))
    assert 0 < times.min() <= times.max() < 1


def star_discrepancy(numbers):
    numbers = numbers.double().sort().values
    n = len(numbers)
    ranks = torch.arange(n, dtype=torch.float64)
    return float(torch.maximum((ranks + 1) / n - numbers, numbers - ranks / n).max())


@pytest.mark.parametrize("n", [8, 64, 1000])
def test_times_of_consecutive_positions_are_spread(n):
    # random times would be some 1 / sqrt(n) apart from even ones; the golden ratio keeps within a few 1 / n
    for first in (0, 12_345, 2**33 + 1, 2**62):
        for seed in range(3):
            times = spread_uniform(seed, Stream.TIME, torch.arange(first, first + n))
            assert star_discrepancy(times) < 3 / n
            assert times.min() > 0
            assert times.max() < 1


def test_times_step_by_the_golden_ratio():
    times = spread_uniform(5, Stream.TIME, torch.arange(2**40, 2**40 + 100)).double()
    golden = (5**0.5 - 1) / 2
    assert torch.allclose(times.diff() % 1, torch.full((99,), golden, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 1000])
def test_the_time_of_one_position_is_uniform_over_seeds(position):
    times = torch.cat([spread_uniform(seed, Stream.TIME, torch.tensor([position])) for seed in range(300)])
    assert stats.kstest(times.double().numpy(), "uniform").pvalue > 0.01


def test_generators_of_images_and_stages():
    first = torch.randn(5, generator=seeded_generator(0, 3, 1))
    assert torch.equal(first, torch.randn(5, generator=seeded_generator(0, 3, 1)))
    others = [
        torch.randn(5, generator=seeded_generator(*which)) for which in ((1, 3, 1), (0, 4, 1), (0, 3, 0), (-1, 3, 1))
    ]
    assert len(torch.unique(torch.stack([first, *others]), dim=0)) == 5
