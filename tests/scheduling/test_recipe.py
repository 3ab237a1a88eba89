import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.scheduling import BACKBONE, Stage
from common.scheduling.recipe import FEWEST_IMAGES, Facts, adapt
from common.scheduling.stages import apportion
from train_finetune import FinetuneConfig
from train_hybrid import HybridConfig
from train_progressive import ProgressiveConfig
from train_rect import RectConfig
from train_standard import StandardConfig

CONFIGS = {
    "standard": StandardConfig(),
    "finetune": FinetuneConfig(weights="timm"),
    "progressive": ProgressiveConfig(),
    "hybrid": HybridConfig(),
    "expert": HybridConfig(progressive_freezing=True),
    "rect": RectConfig(),
}
SMALL = Facts(images=3000, classes=10, short_side=192, stride=32)


def imagenet(processes: int) -> Facts:
    return Facts(images=1_281_167, classes=1000, processes=processes, short_side=375, stride=32)


def settings_of(cfg) -> dict:
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}


def adapted(name: str, facts: Facts = SMALL, recipe: str = "auto", **changes):
    """The recipe for a script with these flags."""
    cfg = dataclasses.replace(CONFIGS[name], recipe=recipe, **changes)
    return adapt(cfg.curriculum(), settings_of(cfg), set(changes), facts)


def every(recipe, name: str) -> set:
    return {getattr(stage, name) for stage in recipe.stages}


@pytest.mark.parametrize("processes", [4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_changes_at_the_lists_own_scale(name, processes):
    recipe = adapted(name, imagenet(processes))
    assert recipe.stages == CONFIGS[name].curriculum()
    assert recipe.values == {}
    assert recipe.notes == []


@pytest.mark.parametrize("name", ["progressive", "rect"])
def test_a_lists_own_rate_is_not_adams(name):
    recipe = adapted(name, imagenet(8), optimizer="adamw")
    assert recipe.stages == CONFIGS[name].curriculum()
    assert recipe.values["lr"] == "auto"
    assert "adamw's own peak (--lr auto), not 0.1 per 256 images" in recipe.notes
    assert "lr" not in adapted(name, imagenet(8), optimizer="adamw", lr=0.1).values


def test_who_leaves_one_kind_of_mixing_out_has_not_asked_for_the_other():
    for zero in ("mixup_alpha", "cutmix_alpha", "batch_aug_prob", "mixup_share"):
        assert every(adapted("standard", epochs=5, **{zero: 0.0}), "mixup") == {0.0}
    assert every(adapted("standard", epochs=5, cutmix_alpha=0.5), "mixup") == {0.9}


@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_the_swing_leaves_the_momentum_in_its_range(momentum):
    cfg = dataclasses.replace(CONFIGS["rect"], epochs=12, momentum=momentum)
    values = adapted("rect", epochs=12, momentum=momentum).values
    dataclasses.replace(cfg, **values).check_momentum()
    assert values["pct_start"] == 0.3


@pytest.mark.parametrize(
    ("name", "epochs"), [("hybrid", 1), ("hybrid", 3), ("progressive", 2), ("expert", 2)]
)
def test_fewer_epochs_than_stages_are_the_last_stages(name, epochs):
    listed = CONFIGS[name].curriculum()
    short = dataclasses.replace(CONFIGS[name], epochs=epochs).curriculum()
    assert short == [dataclasses.replace(stage, epochs=1) for stage in listed[-epochs:]]
    assert sum(stage.epochs for stage in adapted(name, epochs=epochs).stages) == epochs


@pytest.mark.parametrize("name", CONFIGS)
def test_listed_changes_nothing_anywhere(name):
    recipe = adapted(name, recipe="listed")
    assert (recipe.stages, recipe.values, recipe.notes) == (CONFIGS[name].curriculum(), {}, [])


@pytest.mark.parametrize(
    ("listed", "total", "shares"),
    [
        ([15, 15, 30, 20], 8, [1, 2, 3, 2]),
        ([15, 15, 30, 20], 12, [2, 2, 5, 3]),
        ([15, 15, 30, 20], 80, [15, 15, 30, 20]),
        ([25, 25, 25], 8, [2, 3, 3]),
        ([1, 1, 98], 4, [1, 1, 2]),
        ([1, 98, 1], 2, [1, 1, 1]),
    ],
)
def test_epochs_are_shared_out_exactly(listed, total, shares):
    assert apportion(listed, total) == shares


@settings(deadline=None)
@given(listed=st.lists(st.integers(1, 100), min_size=1, max_size=6), total=st.integers(1, 300))
def test_shares_sum_to_the_total_and_lie_within_one_of_proportion(listed, total):
    shares = apportion(listed, total)
    assert min(shares) >= 1
    assert sum(shares) == max(total, len(listed))
    if all(count * total >= sum(listed) for count in listed):
        assert all(abs(s - c * total / sum(listed)) < 1 for s, c in zip(shares, listed, strict=True))


def test_a_short_run_is_mild_and_says_so_in_one_line():
    recipe = adapted("standard", epochs=12)
    assert recipe.values["crop_scale"] == (0.35, 1.0)
    assert every(recipe, "mixup") == {0.0}
    (note,) = [note for note in recipe.notes if "12 epochs" in note]
    assert all(part in note for part in ("mild", "35% to 100%", "--crop_scale", "--mixup_alpha", "--recipe"))


@pytest.mark.parametrize(("epochs", "crop", "mixup"), [(24, 0.35, 0.0), (25, 0.17, 0.45), (50, 0.08, 0.9)])
def test_regularisation_follows_the_length_of_the_run(epochs, crop, mixup):
    recipe = adapted("standard", imagenet(8), epochs=epochs)
    assert recipe.values.get("crop_scale", (0.08, 1.0))[0] == crop
    assert every(recipe, "mixup") == {mixup}


def test_few_images_of_a_class_are_regularised_one_level_less():
    assert every(adapted("standard", dataclasses.replace(SMALL, classes=30), epochs=60), "mixup") == {0.45}
    assert every(adapted("standard", dataclasses.replace(SMALL, classes=10), epochs=60), "mixup") == {0.9}


def test_rect_loses_its_erasing_and_keeps_its_crops():
    recipe = adapted("rect", epochs=12)
    assert recipe.values["erasing_prob"] == 0
    assert "crop_scale" not in recipe.values


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("images", [600, 3000, 50_000])
def test_every_epoch_has_enough_steps(name, processes, images):
    recipe = adapted(name, Facts(images, 10, processes))
    for stage in recipe.stages:
        steps = int(images * stage.data_fraction) // (stage.batch_size * processes)
        assert steps >= 20 or (stage.batch_size == FEWEST_IMAGES and stage.data_fraction == 1)
        assert stage.batch_size >= FEWEST_IMAGES


@pytest.mark.parametrize("images", [600, 3000, 5800, 20_000])
def test_a_long_run_leaves_its_epochs_as_many_steps_as_the_lists_do(images):
    (batch,) = every(adapted("standard", dataclasses.replace(SMALL, images=images), epochs=40), "batch_size")
    assert images // batch >= 39


@pytest.mark.parametrize(
    ("epochs", "images", "free", "in_budget"),
    [(3, 3000, 16, 32), (1, 3000, 8, 32), (1, 600, 8, 16), (12, 3000, 64, 64)],
)
def test_a_budget_buys_images_rather_than_steps_of_small_batches(epochs, images, free, in_budget):
    facts = dataclasses.replace(SMALL, images=images)
    assert every(adapted("standard", facts, epochs=epochs), "batch_size") == {free}
    cfg = dataclasses.replace(CONFIGS["standard"], epochs=epochs)
    recipe = adapt(cfg.curriculum(), settings_of(cfg) | {"budget": "3min"}, {"budget"}, facts)
    assert every(recipe, "batch_size") == {in_budget}


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(CONFIGS)),
    images=st.integers(100, 2_000_000),
    classes=st.integers(2, 5000),
    processes=st.sampled_from([1, 2, 4, 8]),
    short_side=st.integers(0, 80) | st.integers(80, 500),
    stride=st.sampled_from([0, 8, 16, 32]),
)
def test_rules_only_make_a_list_smaller_and_gentler(name, images, classes, processes, short_side, stride):
    listed = CONFIGS[name].curriculum()
    recipe = adapted(name, Facts(images, classes, processes, short_side, stride))
    assert [stage.epochs for stage in recipe.stages] == [stage.epochs for stage in listed]
    for now, then in zip(recipe.stages, listed, strict=True):
        assert max(stride, 32) <= now.img_size <= then.img_size
        assert now.batch_size <= then.batch_size
        assert now.mixup <= then.mixup
        assert now.strength <= then.strength
        assert then.data_fraction <= now.data_fraction <= 1
        assert (now.frozen, now.shape) == (then.frozen, then.shape)
    assert sorted(stage.img_size for stage in recipe.stages) == [stage.img_size for stage in recipe.stages]


def test_the_sample_pictures_have_twenty_steps_on_eight_processes():
    recipe = adapted("hybrid", Facts(2000, 10, 8, short_side=85))
    assert [stage.batch_size for stage in recipe.stages] == [8, 8, 8, 8]
    assert [stage.data_fraction for stage in recipe.stages] == [0.64, 0.75, 1, 1]


def test_a_short_run_has_five_hundred_steps_and_accumulation_counts():
    (stage,) = adapted("standard", epochs=12).stages
    assert stage.batch_size == 64
    (stage,) = adapted("standard", epochs=12, accumulation=2).stages
    assert stage.batch_size == 32
    assert adapted("standard", imagenet(8), epochs=16).stages[0].batch_size == 512


def test_no_stage_goes_below_the_batch_that_was_asked_for():
    assert every(adapted("standard", epochs=12, batch_size=512), "batch_size") == {512}
    assert every(adapted("progressive", epochs=12, batch_size=64), "batch_size") == {64}


@pytest.mark.parametrize(
    ("name", "img_size", "sizes"),
    [
        ("progressive", 60, [48, 60]),
        ("progressive", 64, [48, 64]),
        ("progressive", 96, [48, 64, 80, 96]),
        ("progressive", 128, [48, 80, 96, 128]),
        ("progressive", 224, [80, 128, 176, 224]),
        ("hybrid", 96, [48, 64, 80, 96]),
        ("hybrid", 48, [48]),
        ("progressive", 24, [24]),
    ],
)
def test_sizes_of_a_short_curriculum_rise_in_equal_steps(name, img_size, sizes):
    recipe = adapted(name, epochs=12, img_size=img_size)
    assert [stage.img_size for stage in recipe.stages] == sizes
    assert len({stage.epochs for stage in recipe.stages}) == 1


@pytest.mark.parametrize(("stride", "smallest"), [(8, 32), (14, 32), (16, 32), (32, 48)])
@pytest.mark.parametrize("epochs", [12, 75])
def test_the_last_map_has_more_than_one_cell(stride, smallest, epochs):
    recipe = adapted("progressive", Facts(3000, 10, stride=stride), epochs=epochs, img_size=64)
    assert recipe.stages[0].img_size == smallest
    assert math.ceil(smallest / stride) >= 2


@pytest.mark.parametrize(
    ("name", "short_side", "sizes"),
    [
        ("standard", 192, [192]),
        ("standard", 200, [192]),
        ("standard", 0, [224]),
        ("standard", 32, [64]),
        ("progressive", 128, [48, 96, 128]),
        ("rect", 128, [128]),
        ("finetune", 32, [224, 224]),
    ],
)
def test_no_stage_is_larger_than_the_images(name, short_side, sizes):
    recipe = adapted(name, dataclasses.replace(SMALL, short_side=short_side))
    assert [stage.img_size for stage in recipe.stages] == sizes


def test_the_size_that_was_asked_for_stays():
    assert every(adapted("standard", img_size=224), "img_size") == {224}
    assert every(adapted("rect", target_size=224), "img_size") == {224}


def test_a_short_curriculum_has_one_cycle_and_the_finders_rate():
    recipe = adapted("progressive", epochs=12)
    assert {"lr": "auto", "max_lr": None, "stage_wise": False}.items() <= recipe.values.items()
    assert every(adapted("hybrid", epochs=12), "lr_scale") == {None}
    assert every(adapted("hybrid", epochs=12), "data_fraction") == {1.0}
    assert adapted("hybrid").stages[0].data_fraction == 0.5


@pytest.mark.parametrize(
    ("name", "epochs", "lengths"),
    [
        ("hybrid", 12, [3, 3, 3, 3]),
        ("hybrid", 8, [2, 2, 2, 2]),
        ("hybrid", 48, [12, 12, 12, 12]),
        ("hybrid", 50, [9, 9, 19, 13]),
        ("progressive", 3, [1, 1, 1]),
        ("progressive", 11, [2, 3, 3, 3]),
        ("standard", 12, [12]),
    ],
)
def test_each_size_gets_as_many_epochs_in_a_short_run(name, epochs, lengths):
    recipe = adapted(name, imagenet(8), epochs=epochs)
    assert [stage.epochs for stage in recipe.stages] == lengths
    assert any("as many epochs for each size" in note for note in recipe.notes) == (
        name != "standard" and epochs < 50
    )


def test_what_is_frozen_stays_with_its_epochs():
    listed = dataclasses.replace(CONFIGS["expert"], epochs=20).curriculum()
    recipe = adapted("expert", imagenet(8), epochs=20)
    assert [s.frozen for s in listed for _ in range(s.epochs)] == [
        s.frozen for s in recipe.stages for _ in range(s.epochs)
    ]
    sizes = [s.img_size for s in recipe.stages for _ in range(s.epochs)]
    assert sizes == [80] * 5 + [128] * 5 + [176] * 5 + [224] * 5


def test_a_size_between_two_has_the_batch_of_the_larger():
    sizes = {stage.img_size: stage.batch_size for stage in adapted("hybrid", imagenet(8), epochs=12).stages}
    assert sizes == {80: 1024, 128: 1024, 176: 512, 224: 512}


def test_the_finders_peak_has_a_warm_up():
    assert {"pct_start": 0.3, "momentum_swing": 0.05}.items() <= adapted("rect", epochs=12).values.items()
    assert not {"pct_start", "momentum_swing"} & adapted("rect", epochs=12, lr=0.1).values.keys()
    assert {"pct_start": 0.3, "momentum_swing": 0.05}.items() <= adapted(
        "rect", epochs=12, lr="auto"
    ).values.items()
    by_hand = adapted("progressive", epochs=12, lr="auto").values
    assert by_hand["max_lr"] is None
    assert "lr" not in by_hand
    assert adapted("rect", epochs=12, pct_start=0.1).values["momentum_swing"] == 0.05
    assert not {"pct_start", "momentum_swing"} & adapted("standard", epochs=12).values.keys()


def test_gentle_crops_are_evaluated_whole():
    assert adapted("standard", epochs=12).values["crop_pct"] == 1
    assert "crop_pct" not in adapted("standard", epochs=12, crop_pct=0.95).values
    assert "crop_pct" not in adapted("standard", imagenet(8), epochs=30).values
    assert "crop_pct" not in adapted("standard", epochs=12, crop_scale=(0.2, 1.0)).values


def test_rectangles_settle_after_squares_in_a_short_run():
    recipe = adapted("rect", epochs=12)
    assert [(s.shape, s.epochs, s.strength) for s in recipe.stages] == [("square", 9, 1.0), ("rect", 3, 0.2)]
    assert recipe.values["rect_area"] == "constant"
    assert "rect_area" not in adapted("rect", epochs=12, rect_area="short").values
    assert every(adapted("rect", epochs=2), "shape") == {"rect"}
    assert every(adapted("rect", imagenet(8), epochs=50), "shape") == {"rect"}


def test_strength_follows_the_size():
    recipe = adapted("progressive", epochs=12, img_size=96)
    assert [stage.strength for stage in recipe.stages] == pytest.approx([1 / 2, 2 / 3, 5 / 6, 1])


def test_fine_tuning_keeps_its_two_cycles_and_a_tenth_for_the_head():
    recipe = adapted("finetune", epochs=12)
    assert [stage.epochs for stage in recipe.stages] == [1, 11]
    assert BACKBONE in recipe.stages[0].frozen
    assert recipe.stages[1].lr_scale == 0.3
    assert "stage_wise" not in recipe.values


def test_a_head_that_can_be_fitted_takes_no_epochs_in_a_short_run():
    small, large = (dataclasses.replace(facts, linear_head=True) for facts in (SMALL, imagenet(8)))
    (stage,) = adapted("finetune", small, epochs=12).stages
    assert (stage.epochs, stage.frozen, stage.lr_scale) == (12, (), None)
    assert [stage.epochs for stage in adapted("finetune", small, epochs=12, head_epochs=3).stages] == [3, 9]
    assert [stage.epochs for stage in adapted("finetune", large, epochs=50).stages] == [5, 45]
    assert [stage.frozen for stage in adapted("finetune", SMALL, epochs=1).stages] == [()]
    assert len(adapted("standard", small, epochs=12).stages) == 1


def test_ema_and_finder_follow_the_number_of_steps():
    recipe = adapted("standard", epochs=10, batch_size=60, ema=True)
    assert recipe.values["ema_decay"] == pytest.approx(1 - 1 / 20)
    assert recipe.values["lr_finder_iterations"] == 50
    assert "ema_decay" not in adapted("standard", epochs=10).values
    assert adapted("standard", epochs=1, batch_size=100).values["lr_finder_iterations"] == 25
    assert "lr_finder_iterations" not in adapted("standard", epochs=12, lr=0.1).values


GIVEN = {
    "crop_scale": (0.08, 1.0), "mixup_alpha": 0.2, "erasing_prob": 0.25, "lr": 0.1, "max_lr": 0.4, "stage_wise": True,
    "ema_decay": 0.9999, "lr_finder_iterations": 100,
}  # fmt: skip


@pytest.mark.parametrize("name", ["progressive", "hybrid"])
def test_what_the_user_gave_never_changes(name):
    stages = [Stage(2, 16, 512, lr_scale=0.5, mixup=1.0), Stage(2, 320, 512, lr_scale=0.25)]
    recipe = adapted(name, stages=stages, ema=True, **GIVEN)
    assert recipe.stages == stages
    assert recipe.values == {}
    assert recipe.notes == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_change_is_noted_with_its_flag(name):
    recipe = adapted(name, Facts(3000, 10, short_side=128), epochs=12)
    notes = " ".join(recipe.notes)
    # the limit of the rate goes with the rate
    assert all(f"--{setting}" in notes for setting in recipe.values if setting != "max_lr")
    assert "--batch_size" in notes
    assert ("--target_size" if name == "rect" else "--img_size") in notes or name == "finetune"
    assert ("--stage_wise" in notes) == (name == "progressive")
