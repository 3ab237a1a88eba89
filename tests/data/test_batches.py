"""From a plan to the items of one process, with stand-ins for the plan and the sources."""

from types import SimpleNamespace

import numpy as np
import pytest

from common import UserError
from common.data.batches import Batches, ViewSettings, stage_shapes
from common.scheduling import Stage


def source(count: int, **more) -> SimpleNamespace:
    sizes = np.random.default_rng(count).integers(30, 60, (count, 2), dtype=np.int32)
    parts = {"labels": np.arange(count) % 3, "group_rows": None, "sizes": lambda: sizes}
    return type("Images", (SimpleNamespace,), {"__len__": lambda self: count})(**parts | more)


def plan(*stages: Stage, accumulation: int = 2, world: int = 1) -> SimpleNamespace:
    """One epoch of two steps per stage."""
    epochs = [
        SimpleNamespace(
            index=index,
            stage_index=index,
            stage=stage,
            first_step=2 * index,
            evaluated=True,
            global_batch=stage.batch_size,
        )
        for index, stage in enumerate(stages)
    ]
    return SimpleNamespace(
        stages=stages,
        epochs=lambda start: epochs[start:],
        accumulation=lambda index: accumulation,
        micro_batch=lambda index: stages[index].batch_size // world // accumulation,
    )


STAGES = Stage(1, 32, 12), Stage(1, 48, 8, data_fraction=0.5, shape="rect")


def batches(*stages: Stage, rank: int = 0, world: int = 1, train=None, **settings) -> Batches:
    settings = ViewSettings(**settings)
    return Batches(plan(*stages, world=world), train or source(29), source(10), settings, 3, rank, world)


@pytest.mark.parametrize("shape", ["square", "rect"])
def test_strength_says_how_small_random_crops_may_be(shape):
    stages = [Stage(1, 32, shape=shape, strength=strength) for strength in (0.0, 0.5, 1.0, 2.0)]
    made = batches(*stages, crop_scale=(0.09, 1.0))
    scales = [made.train_view(stage).scale for stage in stages]
    assert scales == [pytest.approx((low, 1.0)) for low in (1.0, 0.3, 0.09, 0.0081)]


def test_a_run_is_training_and_evaluation_of_each_epoch_in_turn():
    items = list(batches(*STAGES).run_items(0, 0))
    assert [item.split for item in items] == [0] * 4 + [1] * 2 + [0] * 2 + [1] * 3
    assert [len(item.indices) for item in items] == [6] * 4 + [6, 4] + [4] * 2 + [4, 4, 2]
    assert {(item.height, item.width) for item in items[:6]} == {(32, 32)}
    seen = [np.concatenate([item.indices for item in items[first:last]]) for first, last in ((4, 6), (8, 11))]
    assert [sorted(indices) for indices in seen] == [list(range(10))] * 2


def test_a_run_goes_on_where_it_stopped():
    whole = list(batches(*STAGES).run_items(0, 0))
    for epoch, step, rest in ((0, 1, whole[2:]), (1, 2, whole[6:])):
        tail = list(batches(*STAGES).run_items(epoch, step))
        assert [item.indices.tolist() for item in tail] == [item.indices.tolist() for item in rest]


def test_two_processes_share_the_items():
    whole = list(batches(*STAGES).run_items(0, 0))
    parts = [list(batches(*STAGES, rank=rank, world=2).run_items(0, 0)) for rank in (0, 1)]
    for split in (0, 1):
        one, two = (
            sorted(np.concatenate([item.indices for item in items if item.split == split]).tolist())
            for items in (whole, parts[0] + parts[1])
        )
        assert one == two


def test_shapes_of_a_stage_are_those_of_its_batches():
    train, settings = source(29), ViewSettings()
    assert stage_shapes(STAGES[0], train, settings) == [(32, 32)]
    shapes = stage_shapes(STAGES[1], train, settings)
    assert 1 < len(shapes) <= 9
    items = batches(*STAGES, train=train).run_items(1, 0)
    assert {(item.height, item.width) for item in items if item.split == 0} <= set(shapes)
    assert all(type(side) is int for shape in shapes for side in shape)


def test_whole_images_are_evaluated_at_shapes_of_the_training_set():
    made = batches(*STAGES, rect_val=True)
    allowed = set(stage_shapes(STAGES[1], made.train, made.settings))
    items = made.eval_items(48, 4)
    assert {(item.height, item.width) for item in items} <= allowed
    assert {item.view.crop_pct for item in items} == {1.0}
    assert {item.view.crop_pct for item in made.eval_items(48, 4, crop=0.9)} == {0.9}
    assert "all" in made.bucket_tables()


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_pct": 0.0}, "crop_pct"),
    ],
)
def test_settings_that_cannot_be_meant(settings, flag):
    with pytest.raises(UserError, match=f"--{flag} "):
        batches(*STAGES, **settings)


def test_streams_are_read_in_order():
    stream = source(29, group_rows=np.array([10, 10, 9]))
    items = list(batches(STAGES[0], train=stream).run_items(0, 0))
    assert len(np.unique(np.concatenate([item.indices for item in items[:4]]))) == 24
    for settings in ({"rect_val": True}, {"sampler": "sqrt"}, {}):
        with pytest.raises(UserError, match="--streaming"):
            batches(STAGES[0 if settings else 1], train=stream, **settings)


def test_a_balanced_sampler_resumes_and_is_shared_out_like_the_plain_order():
    labels = np.repeat([0, 1, 2], [20, 6, 3])
    settings = {"train": source(29, labels=labels), "sampler": "balanced"}
    items = list(batches(*STAGES, **settings).run_items(0, 0))
    first = np.concatenate([item.indices for item in items[:4]])
    assert np.bincount(labels[first % 29]).min() >= 6  # 24 of 29 are taken, 9 or 10 of each class drawn
    half = np.concatenate([item.indices for item in items[6:8]])  # data_fraction: 14 of them are in the pool
    assert len(np.unique(half % 29)) < len(half) == 8
    tail = list(batches(*STAGES, **settings).run_items(1, 2))
    assert [item.indices.tolist() for item in tail] == [item.indices.tolist() for item in items[6:]]
    parts = [
        list(
            batches(*STAGES, rank=rank, world=2, **settings).train_items(plan(*STAGES, world=2).epochs(0)[0])
        )
        for rank in (0, 1)
    ]
    assert set(first) == set(np.concatenate([item.indices for part in parts for item in part]))
