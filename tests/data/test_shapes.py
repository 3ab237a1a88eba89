"""The shapes of rectangular batches: which are chosen, and what they cost."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.shapes import ASPECT_JITTER, assign, bucket_table, choose_shapes, format_buckets, jittered

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
    shapes = choose_shapes(sizes, target, mode, max_buckets)
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


@given(image_sizes(), modes, st.integers(1, 5))
def test_shapes_are_the_best_choice(sizes, mode, max_buckets):
    chosen = choose_shapes(sizes, 64, mode, max_buckets, multiple=16 if mode == "short" else 8)
    if mode == "short":
        sides = [(64, side) for side in (64, 80, 96, 112, 128)]
    else:
        sides = [(64, 64), (56, 72), (48, 80), (48, 88)]
    candidates = np.array(sorted({*sides, *[side[::-1] for side in sides]}))
    lost = lost_by_cropping(sizes, candidates)
    columns = range(len(candidates))
    best = [
        min(lost[:, some].min(axis=1).mean() for some in itertools.combinations(columns, k))
        for k in range(1, max_buckets + 1)
    ]
    chosen_lost = lost_by_cropping(sizes, chosen).min(axis=1).mean()
    rounding = 0.005  # aspects are rounded by 0.2 % for the choice
    assert chosen_lost <= min(best) + 0.001 + rounding
    # One shape fewer would have been worse.
    assert len(chosen) == 1 or best[len(chosen) - 2] > min(best) + 0.001 - rounding


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


def test_longer_shapes_on_request():
    sizes = np.full((10, 2), (100, 300), np.int32)
    assert choose_shapes(sizes, 64, "short").tolist() == [[64, 128]]
    assert choose_shapes(sizes, 64, "short", max_aspect=3.0).tolist() == [[64, 192]]


@given(image_sizes(), targets, modes)
def test_images_go_where_they_lose_least(sizes, target, mode):
    shapes = choose_shapes(sizes, target, mode)
    bucket = assign(sizes, shapes)
    lost = lost_by_cropping(sizes, shapes)
    own = lost[np.arange(len(sizes)), bucket]
    np.testing.assert_allclose(own, lost.min(axis=1), atol=1e-9)

    table = bucket_table(sizes, shapes)
    assert [[row.height, row.width] for row in table] == shapes.tolist()
    for k, row in enumerate(table):
        assert row.share == pytest.approx(np.mean(bucket == k))
        assert row.lost == pytest.approx(own[bucket == k].mean() if row.share else 0)


def test_table_for_the_console():
    sizes = np.array([[100, 100], [100, 100], [100, 200], [100, 400]])
    text = format_buckets(bucket_table(sizes, np.array([[64, 64], [64, 128]])))
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
