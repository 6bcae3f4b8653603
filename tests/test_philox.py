"""The noise generator: published vectors, an independent scalar implementation, and the statistics that matter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qad.philox import philox4x32, uniform16

# Random123's published known answers: rounds, counter, key, result. The third pair is the leading digits of pi.
ZEROS, ONES = (0,) * 6, (0xFFFFFFFF,) * 6
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN_ANSWERS = [
    (7, ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
# Elements that one pass of the generator handles: shorter and longer draws must agree across its border.
CHUNK = 8 << 15


def scalar_philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """One call in exact integers."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(rounds):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ low, second % 2**32, (first >> 32) ^ d ^ high, first % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(("rounds", "words", "answer"), KNOWN_ANSWERS)
def test_published_known_answers(rounds: int, words: tuple[int, ...], answer: tuple[int, ...]) -> None:
    counter = (torch.tensor([words[0]]), *words[1:4])
    assert tuple(word.item() for word in philox4x32(counter, words[4:], rounds)) == answer  # type: ignore[arg-type]


word = st.integers(0, 2**32 - 1)


@given(index=st.integers(0, 2**32 - 1), rest=st.tuples(word, word, word), key=st.tuples(word, word))
def test_every_counter_and_key_agrees_with_exact_integers(
    index: int, rest: tuple[int, int, int], key: tuple[int, int]
) -> None:
    got = [int(w) for w in philox4x32((torch.tensor([index]), *rest), key)]
    assert got == scalar_philox([index, *rest], list(key), 7)


@given(seed=st.integers(0, 2**64 - 1), tensor=word, step=word, stream=word, count=st.integers(1, 40))
def test_element_takes_its_documented_bits(seed: int, tensor: int, step: int, stream: int, count: int) -> None:
    values = uniform16(count, seed=seed, tensor=tensor, step=step, stream=stream).tolist()
    key = [seed % 2**32, seed >> 32]
    for element, value in enumerate(values):
        words = scalar_philox([element // 8, tensor, step, stream], key, 7)
        bits = (words[element % 8 // 2] >> (16 * (element % 2))) & 0xFFFF
        assert value == (bits + 0.5) / 65536


@pytest.mark.parametrize("count", [1, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 12_345])
def test_a_shorter_draw_is_a_prefix_of_a_longer_one(count: int) -> None:
    longer = uniform16(2 * CHUNK + 5, seed=3, tensor=1, step=4)
    assert torch.equal(uniform16(count, seed=3, tensor=1, step=4), longer[:count])


def test_nothing_to_draw() -> None:
    assert uniform16(0, seed=0, tensor=0, step=0).shape == (0,)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"seed": 1 << 32}, {"tensor": 1}, {"step": 1}, {"stream": 1}],
    ids=lambda change: str(change),
)
def test_each_part_of_the_key_gives_unrelated_values(change: dict[str, int]) -> None:
    count = 1 << 16
    base = {"seed": 0, "tensor": 0, "step": 0, "stream": 0}
    one, other = uniform16(count, **base), uniform16(count, **base | change)  # type: ignore[arg-type]
    assert (one == other).float().mean() < 1e-3
    correlation = float(torch.corrcoef(torch.stack([one, other]).double())[0, 1])
    assert abs(correlation) < 5 / math.sqrt(count)


def test_range_mean_and_variance() -> None:
    count = 1 << 20
    values = uniform16(count, seed=11, tensor=2, step=9).double()
    assert 0 < values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * count)
    # The variance of a squared deviation from the mean of a uniform variable is 1/180.
    assert abs(values.var() - 1 / 12) < 5 / math.sqrt(180 * count)


def test_sixteen_bit_numbers_are_uniform() -> None:
    """Chi-square over all 65536 values, five standard deviations wide."""
    buckets, per_bucket = 1 << 16, 32
    values = uniform16(buckets * per_bucket, seed=5, tensor=7, step=0)
    counts = torch.bincount((values * buckets).long(), minlength=buckets).double()
    chi_square = float(((counts - per_bucket) ** 2 / per_bucket).sum())
    assert abs(chi_square - (buckets - 1)) < 5 * math.sqrt(2 * (buckets - 1))


def test_neighbours_are_uncorrelated() -> None:
    values = uniform16(1 << 20, seed=5, tensor=7, step=0).double() - 0.5
    for lag in (1, 2, 7, 8, 32):
        correlation = float((values[lag:] * values[:-lag]).mean()) * 12
        assert abs(correlation) < 5 / math.sqrt(values.numel()), lag
