"""Random numbers against a slow reference, and as a source of random numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.rng import CROP, CUTOUT, ERASE, FLIP, ORDER, ROWS, SUBSET, uniforms

settings.register_profile("machine under load", deadline=None)
settings.load_profile("machine under load")

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def reference(seed: int, epoch: int, index: int, stream: int, draw: int) -> float:
    key = 0
    for part in (seed, epoch, stream):
        key = mix((key + part + GOLDEN) & MASK)
    image = mix((key + (index + 1) * GOLDEN) & MASK)
    return (mix((image + (draw + 1) * GOLDEN) & MASK) >> 11) / 2**53


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 10**6), st.integers(0, 2**40), st.integers(0, 6))
def test_equals_integer_arithmetic(seed, epoch, index, stream):
    # Bit for bit: a resumed run draws the same numbers on any machine and under any version of numpy.
    expected = [reference(seed, epoch, index, stream, draw) for draw in range(3)]
    assert uniforms(seed, epoch, np.array([index]), stream, 3)[0].tolist() == expected


def test_mixer_is_the_published_one():
    # The first outputs of splitmix64 for the seed 1234567, as in its authors' program.
    outputs = [mix((1234567 + (i + 1) * GOLDEN) & MASK) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=50), st.data())
def test_a_draw_does_not_depend_on_its_batch(indices, data):
    indices = np.array(indices)
    whole = uniforms(3, 4, indices, FLIP, 5)
    assert whole.shape == (len(indices), 5)
    assert whole.dtype == np.float64
    chosen = data.draw(st.lists(st.integers(0, len(indices) - 1), min_size=1))
    np.testing.assert_array_equal(uniforms(3, 4, indices[chosen], FLIP, 5), whole[chosen])
    np.testing.assert_array_equal(uniforms(3, 4, indices.astype(np.int32), FLIP, 2), whole[:, :2])


def test_uniform():
    draws = uniforms(0, 0, np.arange(200_000), CROP, 5)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=1000, range=(0, 1))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 800 < chi_square < 1200  # expected 999, standard deviation 45
    low_bits = (draws * 2**53).astype(np.int64) % 1024  # as good as the high ones
    assert 850 < ((np.bincount(low_bits.ravel(), minlength=1024) - 976.6) ** 2 / 976.6).sum() < 1200


def test_streams_epochs_seeds_images_and_draws_are_independent():
    images = np.arange(100_000)
    columns = [
        *(uniforms(0, 0, images, stream, 1)[:, 0] for stream in (CROP, ERASE, CUTOUT, ORDER, ROWS, SUBSET)),
        *uniforms(0, 0, images, FLIP, 3).T,
        uniforms(0, 0, images + 1, FLIP, 1)[:, 0],
        uniforms(0, 1, images, FLIP, 1)[:, 0],
        uniforms(1, 0, images, FLIP, 1)[:, 0],
        uniforms(2**40, 0, images, FLIP, 1)[:, 0],
    ]
    for one, other in itertools.combinations(columns, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.016  # five standard deviations
        assert abs(np.corrcoef((one - 0.5) ** 2, (other - 0.5) ** 2)[0, 1]) < 0.016


@pytest.mark.parametrize(("one", "other"), [((1, 2), (2, 1)), ((0, 8), (0, 1)), ((0, 2**20), (1, 0))])
def test_seed_and_epoch_do_not_stand_in_for_each_other(one, other):
    images = np.arange(100)
    for stream, other_stream in itertools.product(range(7), repeat=2):
        first = uniforms(*one, images, stream, 1)
        assert not np.isin(first, uniforms(*other, images, other_stream, 1)).any()
