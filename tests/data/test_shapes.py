"""The shapes of rectangular batches: which are chosen, and what they cost."""

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import shapes as shapes_module
from common.data.shapes import ASPECT_JITTER, assign, bucket_table, choose_shapes, jittered

settings.register_profile("machine under load", deadline=None)
settings.load_profile("machine under load")

modes = st.sampled_from(["short", "constant"])
targets = st.sampled_from([32, 56, 64, 100, 112, 128, 160, 176, 224, 288])
one_size = st.one_of(
    st.tuples(st.integers(1, 600), st.integers(1, 600)),
    st.sampled_from([(1, 1), (1, 30), (900, 30), (30, 900), (375, 500), (500, 375), (64, 64)]),
)


@st.composite
def image_sizes(draw):
    """Any aspects: photographs, slivers of 1:30 and 30:1, single pixels; a few kinds, or one alone."""
    kinds = np.array(draw(st.lists(one_size, min_size=1, max_size=12)), np.int32)
    weights = np.array(draw(st.lists(st.integers(1, 50), min_size=len(kinds), max_size=len(kinds))))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return kinds[rng.choice(len(kinds), draw(st.integers(1, 150)), p=weights / weights.sum())]


def lost_by_cropping(sizes, shapes):
    """Area lost for each image and shape, float [N, K], from the boxes themselves."""
    h, w = sizes[:, None, 0].astype(float), sizes[:, None, 1].astype(float)
    aspect = shapes[:, 1] / shapes[:, 0]
    return 1 - np.minimum(w, h * aspect) * np.minimum(h, w / aspect) / (w * h)


@given(image_sizes(), targets, modes, st.integers(1, 9))
def test_shapes_are_as_promised(sizes, target, mode, max_buckets):
    with mock.patch.object(shapes_module, "MAX_SHAPES", max_buckets):
        shapes = choose_shapes(sizes, target, mode)
    assert shapes.dtype == np.int32
    assert 1 <= len(shapes) <= max_buckets
    aspects = shapes[:, 1] / shapes[:, 0]
    assert (np.diff(aspects) > 0).all()
    assert aspects.min() >= 0.5
    assert aspects.max() <= 2
    step = {32: 4, 56: 8, 64: 8, 100: 8, 112: 16, 128: 16, 160: 16, 176: 16, 224: 32, 288: 32}[target]
    assert ((shapes % step == 0) | (shapes == target)).all()
    if mode == "short":
        assert (shapes.min(axis=1) == target).all()
    else:
        area = shapes.prod(axis=1) / target**2
        assert area.min() >= 15 / 16
        assert area.max() <= 33 / 32


@given(image_sizes(), modes)
def test_as_few_shapes_as_lose_a_thousandth_more(sizes, mode):
    aspects = np.exp(
        np.rint(256 * np.log(sizes[:, 1] / sizes[:, 0])) / 256
    )  # rounded as they are for the choice
    sizes = np.stack([np.ones(len(sizes)), aspects], 1)
    with mock.patch.object(shapes_module, "MAX_SHAPES", 99):
        chosen = choose_shapes(sizes, 64, mode)
    lost = lost_by_cropping(sizes, chosen)
    least = lost_by_cropping(sizes, shapes_module._candidate_shapes(64, mode)).min(axis=1).mean()
    assert lost.min(axis=1).mean() <= least + 0.001 + 1e-9
    if len(chosen) > 1:
        without = [np.delete(lost, k, axis=1).min(axis=1).mean() for k in range(len(chosen))]
        assert min(without) > least + 0.001 - 1e-9


def random_aspects(seed):
    """Some thousand images: a few aspects as cameras have them, or any, about a centre."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(100, 3000))
    aspects = np.exp(rng.normal(rng.normal(0, 0.2), rng.uniform(0.05, 0.6), count))
    if seed % 2:
        cameras = [4 / 3, 3 / 4, 3 / 2, 2 / 3, 1, 16 / 9, 9 / 16, 0.8, 1.25]
        aspects = rng.choice(cameras, count, p=rng.dirichlet(np.ones(9)))
    return np.rint(1000 * np.stack([aspects**-0.5, aspects**0.5], 1)).astype(np.int32)


@pytest.mark.parametrize(
    ("max_buckets", "mean", "most"), [(3, 0.003, 0.02), (5, 0.0005, 0.004), (7, 0.0002, 0.0015)]
)
def test_shapes_lose_little_more_than_the_best_choice(max_buckets, mean, most, monkeypatch):
    """Of all choices of so many shapes, tried one by one."""
    sides = [(128, 64), (112, 64), (96, 64), (80, 64), (64, 64), (64, 80), (64, 96), (64, 112), (64, 128)]
    candidates = np.array(sides, np.int32)
    monkeypatch.setattr(shapes_module, "MAX_SHAPES", max_buckets)
    monkeypatch.setattr(shapes_module, "_candidate_shapes", lambda target, mode: candidates)
    more = []
    for seed in range(60):
        sizes = random_aspects(seed)
        lost = lost_by_cropping(sizes, candidates)
        choices = itertools.combinations(range(len(candidates)), max_buckets)
        best = min(lost[:, some].min(axis=1).mean() for some in choices)
        chosen = choose_shapes(sizes, 64, "short")
        more.append(lost_by_cropping(sizes, chosen).min(axis=1).mean() - best)
    assert np.mean(more) < mean
    assert max(more) < most


def test_no_shape_without_need():
    landscape = np.full((100, 2), (375, 500), np.int32)
    assert choose_shapes(landscape, 224, "constant").tolist() == [[192, 256]]
    assert choose_shapes(landscape, 96, "short").tolist() == [[96, 128]]
    assert choose_shapes(np.full((10, 2), (448, 480), np.int32), 448, "short").tolist() == [[448, 480]]
    # One portrait among 500 gains 0.09 % of all area by a shape of its own, three gain enough.
    mixed = [np.concatenate([landscape] * 5 + [landscape[:portraits, ::-1]]) for portraits in (1, 3)]
    assert choose_shapes(mixed[0], 96, "short").tolist() == [[96, 128]]
    assert choose_shapes(mixed[1], 96, "short").tolist() == [[128, 96], [96, 128]]


def test_area_goes_before_aspect():
    # 160 × 288 has the images' aspect, but 8 % fewer pixels than the square.
    assert choose_shapes(np.full((10, 2), (100, 180)), 224, "constant").tolist() == [[160, 320]]


def test_very_long_images_are_cropped():
    assert choose_shapes(np.full((10, 2), (100, 300), np.int32), 64, "short").tolist() == [[64, 128]]


@given(image_sizes(), targets, modes)
def test_images_go_where_they_lose_least(sizes, target, mode):
    shapes = choose_shapes(sizes, target, mode)
    bucket = assign(sizes, shapes)
    lost = lost_by_cropping(sizes, shapes)
    own = lost[np.arange(len(sizes)), bucket]
    np.testing.assert_allclose(own, lost.min(axis=1), atol=1e-9)

    lines = [line.replace("%", "").split() for line in bucket_table(sizes, shapes).splitlines()[1:-1]]
    assert [[int(high), int(wide)] for high, _, wide, *_ in lines] == shapes.tolist()
    for k, (*_, share, mean_lost) in enumerate(lines):
        assert float(share) == pytest.approx(100 * np.mean(bucket == k), abs=0.051)
        assert float(mean_lost) == pytest.approx(
            100 * own[bucket == k].mean() if (bucket == k).any() else 0, abs=0.051
        )


def test_table_for_the_console():
    sizes = np.array([[100, 100], [100, 100], [100, 200], [100, 400]])
    text = bucket_table(sizes, np.array([[64, 64], [64, 128]]))
    lines = [line.split() for line in text.splitlines()]
    assert lines == [
        ["high", "×", "wide", "images", "lost"],
        ["64", "×", "64", "50.0%", "0.0%"],
        ["64", "×", "128", "50.0%", "25.0%"],
        ["all", "100.0%", "12.5%", "6,144", "pixels", "per", "image"],
    ]


def test_aspects_are_jittered_anew_each_epoch():
    sizes = np.full((4000, 2), (100, 150))
    first, second = (jittered(sizes, 3, epoch) for epoch in (0, 1))
    change = np.log(first[:, 1] / first[:, 0] / 1.5) / np.log(ASPECT_JITTER)
    assert -1 <= change.min() < -0.99 < 0.99 < change.max() <= 1
    assert abs(change.mean()) < 0.05
    np.testing.assert_allclose(first.prod(1), 15_000)
    assert (first != second).all(1).mean() > 0.99
    np.testing.assert_array_equal(first, jittered(sizes, 3, 0))
