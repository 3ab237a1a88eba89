"""What each process sees, for any data, batch, world size, epoch and start."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.data.order import View, eval_items, even_out, local_items, rect_epoch, square_epoch, subset
from common.data.shapes import assign, choose_shapes
from tests.data.test_shapes import image_sizes, modes, targets

settings.register_profile("machine under load", deadline=None)
settings.load_profile("machine under load")

TRAIN = View(scale=(0.35, 1.0))
EVAL = View(scale=None, crop_pct=1.0)

seeds = st.integers(0, 2**32)
epochs = st.integers(0, 1000)


@st.composite
def epoch_plans(draw):
    """An epoch of either kind, with all it was made of."""
    sizes = draw(image_sizes())
    shapes = choose_shapes(sizes, draw(targets), draw(modes))
    bucket = assign(sizes, shapes)
    pool = np.setdiff1d(np.arange(len(sizes)), draw(st.lists(st.integers(0, 149), max_size=20)))
    world, accumulation = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    global_batch = world * accumulation * draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["square", "rect"]))

    def make(seed, epoch):
        if kind == "square":
            return square_epoch(pool, 64, global_batch, seed, epoch)
        return rect_epoch(pool, bucket, shapes, global_batch, seed, epoch)

    allowed = {(64, 64)} if kind == "square" else {tuple(shape) for shape in shapes.tolist()}
    return make, pool, global_batch, world, accumulation, allowed


def take(matrix, rank=0, world=1, accumulation=1, start_step=0, epoch=0):
    return list(
        local_items(
            matrix,
            epoch=epoch,
            view=TRAIN,
            rank=rank,
            world=world,
            accumulation=accumulation,
            start_step=start_step,
        )
    )


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a.indices, b.indices) and a[2:] == b[2:] for a, b in zip(one, other, strict=True)
    )


@given(epoch_plans(), seeds, epochs, st.data())
def test_an_epoch_for_all_processes(plan, seed, epoch, data):
    make, pool, global_batch, world, accumulation, allowed = plan
    assume(len(pool) >= global_batch)  # else the plan refuses
    matrix = make(seed, epoch)
    steps = len(pool) // global_batch

    # Coverage: every image of the pool but fewer than one global batch, none twice.
    assert matrix.indices.shape == (steps, global_batch)
    assert matrix.indices.dtype == matrix.shapes.dtype == np.int32
    assert len(np.unique(matrix.indices)) == steps * global_batch
    assert np.isin(matrix.indices, pool).all()

    # A pure function of its arguments.
    again = make(seed, epoch)
    np.testing.assert_array_equal(matrix.indices, again.indices)
    np.testing.assert_array_equal(matrix.shapes, again.shapes)

    # Equal steps, one known shape a step on all processes, and together they see the row.
    ranks = [take(matrix, rank, world, accumulation, epoch=epoch) for rank in range(world)]
    assert {len(items) for items in ranks} == {steps * accumulation}
    for step in range(steps):
        micro = [item for items in ranks for item in items[step * accumulation : (step + 1) * accumulation]]
        assert {(item.height, item.width) for item in micro} == {tuple(matrix.shapes[step].tolist())}
        assert {(item.height, item.width) for item in micro} <= allowed
        assert {len(item.indices) for item in micro} == {global_batch // (world * accumulation)}
        seen = np.concatenate([item.indices for item in micro])
        np.testing.assert_array_equal(np.sort(seen), np.sort(matrix.indices[step]))
    item = ranks[0][0]
    assert item.indices.dtype == np.int64
    assert (item.split, item.epoch, item.view) == (0, epoch, TRAIN)
    assert type(item.height) is type(item.width) is int

    # Resuming from any step yields exactly the tail.
    start = data.draw(st.integers(0, steps))
    for rank, items in enumerate(ranks):
        tail = take(matrix, rank, world, accumulation, start, epoch)
        assert same(tail, items[start * accumulation :])


def image_mix(count):
    """Sizes as photographs have them: landscape, portrait, square and odd ones."""
    rng = np.random.default_rng(count)
    sides = np.array([[375, 500], [500, 375], [333, 500], [400, 400], [0, 0]])
    sizes = sides[rng.choice(5, count, p=[0.4, 0.2, 0.2, 0.1, 0.1])]
    return np.where(sizes > 0, sizes, rng.integers(100, 600, (count, 2))).astype(np.int32)


def make_epoch(kind, pool, global_batch, seed, epoch):
    if kind == "square":
        return square_epoch(pool, 64, global_batch, seed, epoch)
    sizes = image_mix(pool.max() + 1)
    shapes = choose_shapes(sizes, 224, "short")
    return rect_epoch(pool, assign(sizes, shapes), shapes, global_batch, seed, epoch)


@pytest.mark.parametrize("kind", ["square", "rect"])
def test_another_epoch_and_another_seed_have_another_order(kind):
    pool = np.arange(0, 1000, 2)
    epochs_of_images = [make_epoch(kind, pool, 24, *key).indices for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for one, other in itertools.combinations(epochs_of_images, 2):
        assert (one == other).mean() < 0.05
        assert set(one.ravel()) != set(other.ravel())  # also which images stay out


@pytest.mark.parametrize("kind", ["square", "rect"])
def test_another_world_size_sees_the_same_images_at_each_step(kind):
    matrix = make_epoch(kind, np.arange(1000), 16, 5, 6)
    for world, accumulation in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 4)):
        ranks = [take(matrix, rank, world, accumulation) for rank in range(world)]
        for step, row in enumerate(matrix.indices):
            micro = [items[step * accumulation : (step + 1) * accumulation] for items in ranks]
            # Micro-batch a of rank r takes block a * world + r: the row comes back in order.
            in_order = [micro[rank][a].indices for a in range(accumulation) for rank in range(world)]
            np.testing.assert_array_equal(np.concatenate(in_order), row)


@pytest.mark.parametrize("kind", ["square", "rect"])
def test_resuming_at_any_step_yields_the_tail(kind):
    matrix = make_epoch(kind, np.arange(1000), 16, 5, 6)
    assert kind == "square" or len(np.unique(matrix.shapes, axis=0)) > 5
    whole = take(matrix, rank=1, world=2, accumulation=2)
    for start in range(len(matrix.indices) + 1):
        assert same(take(matrix, rank=1, world=2, accumulation=2, start_step=start), whole[2 * start :])


def test_a_batch_that_does_not_divide_is_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        take(square_epoch(np.arange(100), 64, 10, 0, 0), world=2, accumulation=2)


@pytest.mark.parametrize("kind", ["square", "rect"])
def test_every_image_stays_out_equally_often(kind):
    pool = np.arange(50)
    seen = np.bincount(
        np.concatenate([make_epoch(kind, pool, 16, 0, epoch).indices.ravel() for epoch in range(600)])
    )
    # 2 of 50 stay out: 24 times in 600 epochs, standard deviation 4.8.
    assert 600 * 50 - seen.sum() == 600 * 2
    assert (600 - seen).min() > 5
    assert (600 - seen).max() < 46


@pytest.mark.parametrize("kind", ["square", "rect"])
def test_shuffled(kind):
    pool = np.arange(20_000)
    matrix = make_epoch(kind, pool, 16, 3, 0)
    following = make_epoch(kind, pool, 16, 3, 1)
    place = np.empty(len(pool))
    place[matrix.indices.ravel()] = np.arange(len(pool))
    place_after = np.empty(len(pool))
    place_after[following.indices.ravel()] = np.arange(len(pool))
    # Neighbours in the dataset are not neighbours in the epoch, nor does one epoch foretell the next.
    limit = 5 / np.sqrt(len(pool))
    assert abs(np.corrcoef(place, pool)[0, 1]) < limit
    assert abs(np.corrcoef(place[1:], place[:-1])[0, 1]) < limit
    assert abs(np.corrcoef(place, place_after)[0, 1]) < limit
    # Batches are drawn from the whole dataset or bucket, not from a stretch of it.
    assert matrix.indices.std(axis=1).min() > 0.08 * len(pool)
    # Two images that share a batch in one epoch rarely share it in the next.
    batch_after = place_after.astype(int) // 16
    together = np.mean(batch_after[matrix.indices[:, 1:]] == batch_after[matrix.indices[:, :-1]])
    assert together < 0.02


def test_batches_of_a_bucket_are_scattered():
    bucket = np.arange(16_000) % 2
    shapes = np.array([[64, 64], [64, 96]], np.int32)
    wide = (rect_epoch(np.arange(16_000), bucket, shapes, 16, 0, 0).shapes[:, 1] == 96).astype(int)
    assert wide.sum() == 500
    changes = np.count_nonzero(np.diff(wide))
    assert 420 < changes < 580  # expected 500, standard deviation 16
    assert abs(np.corrcoef(wide, np.arange(1000))[0, 1]) < 0.16
    other = (rect_epoch(np.arange(16_000), bucket, shapes, 16, 0, 1).shapes[:, 1] == 96).astype(int)
    assert abs(np.corrcoef(wide, other)[0, 1]) < 0.16


@given(st.lists(st.integers(0, 4), min_size=8, max_size=200), st.integers(1, 8), seeds)
def test_leftovers_go_to_the_nearest_shape(buckets, global_batch, seed):
    buckets = np.array(buckets)
    shapes = np.array([[128, 64], [80, 64], [64, 64], [64, 88], [64, 128]], np.int32)
    matrix = rect_epoch(np.arange(len(buckets)), buckets, shapes, global_batch, seed, 0)
    mixed = 0
    for row, shape in zip(matrix.indices, matrix.shapes.tolist(), strict=True):
        own = buckets[row]
        mixed += len(np.unique(own)) > 1

        def lost(h, w, own=own):
            return sum(1 - min(w / h, ow / oh) / max(w / h, ow / oh) for oh, ow in shapes[own].tolist())

        assert lost(*shape) <= min(lost(*other) for other in shapes.tolist()) + 1e-9
    assert mixed < len(np.unique(buckets))  # at most one batch for each border of two buckets


def test_a_bucket_with_a_single_image_joins_its_neighbour():
    shapes = np.array([[128, 64], [64, 64], [64, 128]], np.int32)
    bucket = np.array([0] * 8 + [1] * 7 + [2])
    matrix = rect_epoch(np.arange(16), bucket, shapes, 8, 0, 0)
    by_shape = {tuple(s): set(row) for s, row in zip(matrix.shapes.tolist(), matrix.indices, strict=True)}
    assert by_shape == {(128, 64): set(range(8)), (64, 64): set(range(8, 16))}


@given(
    image_sizes(),
    targets,
    modes,
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 200),
)
def test_evaluation_sees_every_image_once(sizes, target, mode, square, world, batch_size):
    if square:
        shape_of_image = np.full((len(sizes), 2), target)
        size = target
    else:
        shapes = choose_shapes(sizes, target, mode)
        size = shape_of_image = shapes[assign(sizes, shapes)]
    ranks = [eval_items(len(sizes), size, batch_size, rank, world, EVAL) for rank in range(world)]
    everything = [item for items in ranks for item in items]
    seen = np.concatenate([item.indices for item in everything])
    np.testing.assert_array_equal(np.sort(seen), np.arange(len(sizes)))
    for item in everything:
        assert item.indices.dtype == np.int64
        assert 1 <= len(item.indices) <= batch_size
        assert (shape_of_image[item.indices] == (item.height, item.width)).all()
        assert (item.split, item.epoch, item.view) == (1, 0, EVAL)
        assert type(item.height) is type(item.width) is int
    images = [sum(len(item.indices) for item in items) for items in ranks]
    assert max(images) - min(images) <= 1
    for items in ranks:  # sorted by shape, and no more batches than the shapes need
        order = [(item.height, item.width) for item in items]
        assert len(list(itertools.groupby(order))) == len(set(order))
        assert all(len(a.indices) == batch_size or a[2:4] != b[2:4] for a, b in itertools.pairwise(items))


def test_evaluation_of_fewer_images_than_processes():
    batches = [eval_items(3, 64, 16, rank, 8, EVAL) for rank in range(8)]
    assert [len(items) for items in batches] == [1, 1, 1, 0, 0, 0, 0, 0]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=300), st.floats(0.001, 1), st.floats(0.001, 1), seeds)
def test_subsets_are_nested_and_balanced(labels, one, other, seed):
    labels = np.array(labels)
    small, large = (subset(labels, fraction, seed) for fraction in sorted((one, other)))
    assert np.isin(small, large).all()
    for chosen, fraction in ((small, min(one, other)), (large, max(one, other))):
        assert chosen.dtype == np.int64
        assert (np.diff(chosen) > 0).all()
        assert len(chosen) == max(1, round(fraction * len(labels)))
        counts, totals = np.bincount(labels[chosen], minlength=7), np.bincount(labels, minlength=7)
        present = np.count_nonzero(totals)
        assert np.count_nonzero(counts) == min(present, len(chosen))
        assert (np.abs(counts - fraction * totals) <= 1 + present / len(labels) * totals).all()
    np.testing.assert_array_equal(subset(labels, 1.0, seed), np.arange(len(labels)))


def test_subsets_are_seeded_and_random():
    labels = np.arange(10_000) // 100
    chosen = subset(labels, 0.5, 0)
    np.testing.assert_array_equal(chosen, subset(labels, 0.5, 0))
    shared = np.isin(chosen, subset(labels, 0.5, 1)).mean()
    assert 0.45 < shared < 0.55
    counts = np.bincount(chosen % 100, minlength=100)  # no place in a class is favoured
    assert 25 < counts.min() <= counts.max() < 75
    # The subset says nothing about the order of an epoch.
    order = np.argsort(square_epoch(np.arange(10_000), 64, 100, 0, 0).indices.ravel())
    assert 4700 < order[chosen].mean() < 5300


def test_epoch_of_an_odd_lot():
    sizes = np.array([[1, 1], [1, 30], [30, 1], [1, 1], [480, 640]], np.int32)
    shapes = choose_shapes(sizes, 224, "short")
    assert shapes.tolist() == [[448, 224], [224, 224], [224, 288], [224, 448]]
    matrix = rect_epoch(np.arange(5), assign(sizes, shapes), shapes, 1, 0, 0)
    shape_of = dict(zip(matrix.indices[:, 0].tolist(), matrix.shapes.tolist(), strict=True))
    assert shape_of == {0: [224, 224], 1: [224, 448], 2: [448, 224], 3: [224, 224], 4: [224, 288]}


def test_imagenet_takes_no_time_and_little_memory():
    count = 1_281_167
    sizes = np.random.default_rng(0).integers(200, 700, (count, 2), dtype=np.int32)
    pool = np.arange(count)
    labels = pool * 1000 // count

    def rect():
        shapes = choose_shapes(sizes, 224, "short")
        return rect_epoch(pool, assign(sizes, shapes), shapes, 2048, 0, 0)

    limits = {
        "square": (1.0, lambda: square_epoch(pool, 224, 2048, 0, 0)),
        "rect": (2.0, rect),
        "subset": (2.0, lambda: subset(labels, 0.5, 0)),
    }
    for name, (limit_s, make) in limits.items():
        start = time.process_time()  # not the clock: the machine may be busy with other things
        make()
        assert time.process_time() - start < limit_s, name
        tracemalloc.start()
        make()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 * 2**20, name


@given(
    st.lists(st.integers(0, 5), min_size=12, max_size=200), st.sampled_from([0.0, 0.5, 1.0]), seeds, epochs
)
def test_classes_are_drawn_in_proportion_and_images_of_a_class_equally_often(labels, evenness, seed, epoch):
    labels = np.array(labels)
    pool = np.flatnonzero(np.arange(len(labels)) % 7)
    drawn = even_out(pool, labels, evenness, seed, epoch)
    assert len(drawn) == len(pool)
    assert len(np.unique(drawn)) == len(drawn)  # copies have numbers of their own
    images = drawn % len(labels)
    assert np.isin(images, pool).all()
    sizes = np.bincount(labels[pool], minlength=6)
    wanted = np.where(sizes, sizes ** (1 - evenness), 0)
    classes = np.bincount(labels[images], minlength=6)
    assert np.abs(classes - wanted * len(pool) / wanted.sum()).max() <= 1
    times = np.bincount(images, minlength=len(labels))[pool]
    for label in np.unique(labels[pool]):
        assert np.ptp(times[labels[pool] == label]) <= 1
    np.testing.assert_array_equal(drawn, even_out(pool, labels, evenness, seed, epoch))


def test_images_of_a_large_class_take_turns():
    labels = np.repeat([0, 1], [90, 10])
    epochs_of_images = [even_out(np.arange(100), labels, 1.0, 3, epoch) for epoch in range(8)]
    seen = [set(images[images < 90].tolist()) for images in epochs_of_images]
    assert {len(images) for images in seen} == {50}
    assert set.union(*seen) == set(range(90))


def test_an_image_drawn_very_often_still_has_a_number_of_32_bits():
    labels = np.repeat([0, 1], [99_999, 1])
    drawn = even_out(np.arange(100_000), labels, 1.0, 0, 0)
    assert (drawn % 100_000 == 99_999).sum() == 50_000
    assert drawn.max() < 2**31


@pytest.mark.parametrize("kind", ["square", "rect"])
def test_copies_are_put_into_batches_like_any_image(kind):
    pool = even_out(np.arange(200), np.repeat([0, 1], [180, 20]), 1.0, 0, 0)
    sizes = image_mix(200)
    shapes = choose_shapes(sizes, 224, "short")
    matrix = (
        square_epoch(pool, 64, 20, 0, 0)
        if kind == "square"
        else rect_epoch(pool, assign(sizes, shapes), shapes, 20, 0, 0)
    )
    assert set(matrix.indices.ravel()) == set(pool)
