import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from common.config import parse_args
from common.scheduling import (
    Rates,
    ScheduleSettings,
    Stage,
    batch_power,
    known_peak,
    make_plan,
    resolve_lr,
)
from common.scheduling.rates import cosine_cycle
from train_hybrid import HybridConfig


class Planned:
    """A plan with its rates."""

    def __init__(self, stages, images=1000, processes=1, accumulation=1, peak=0.4, **settings):
        self.plan = make_plan(stages, images, processes, accumulation)
        self.rates = Rates(self.plan, ScheduleSettings(**settings), peak)

    def __getattr__(self, name):
        return getattr(self.rates if hasattr(Rates, name) else self.plan, name)


def plan_for(*args, **settings):
    return Planned(*args, **settings)


@settings(deadline=None, max_examples=40)
@given(
    epochs=st.integers(1, 6),
    batch=st.integers(5, 200),
    processes=st.sampled_from([1, 2, 4]),
    pct_start=st.floats(0.05, 0.95),
    peak=st.floats(1e-4, 10),
)
def test_lr_and_momentum_equal_torch_at_every_step(epochs, batch, processes, pct_start, peak):
    plan = plan_for([Stage(epochs, batch_size=batch)], processes=processes, peak=peak, pct_start=pct_start)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    if plan.total_steps * pct_start <= 1 or plan.total_steps < 2:
        return  # torch divides by zero here
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=plan.total_steps, pct_start=pct_start
    )
    for step in range(plan.total_steps):
        assert plan.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert plan.momentum(step) == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-9)
        optimizer.step()
        if step < plan.total_steps - 1:
            oracle.step()


def test_a_cycle_of_one_step_is_its_peak():
    assert cosine_cycle(0, 1, 0.3, 0.004, 0.1, 4e-7) == 0.1


def test_stage_wise_is_one_torch_cycle_per_stage():
    stages = [Stage(3, 56, 128), Stage(2, 112, 64)]
    plan = plan_for(stages, peak=0.8, stage_wise=True, max_lr=0.6)
    assert plan.peak(0) == 0.6
    assert plan.peak(1) == pytest.approx(0.4)  # the linear rule: half the batch, half the rate
    first = plan.stage_steps(0)
    alone = plan_for([stages[1]], peak=0.4)
    assert [plan.lr(first + s) for s in range(alone.total_steps)] == [
        alone.lr(s) for s in range(alone.total_steps)
    ]


def test_progressive_peaks_follow_the_batch_up_to_the_limit():
    stages = [Stage(1, 56, 4096), Stage(1, 112, 1024), Stage(1, 224, 256)]
    base = resolve_lr(0.1, 4096, "linear")
    plan = plan_for(stages, images=10_000, peak=base, stage_wise=True, max_lr=0.4)
    assert [plan.peak(i) for i in range(3)] == pytest.approx([0.4, 0.4, 0.1])
    scaled = [
        Stage(1, 56, 256, lr_scale=0.5),
        Stage(1, 112, 256, lr_scale=0.25),
        Stage(1, 112, 256, lr_scale=2.0),
    ]
    plan = plan_for(scaled, images=10_000, peak=0.2, max_lr=0.4)
    # Relative to the first stage's, whatever that is called.
    assert [plan.peak(i) for i in range(3)] == pytest.approx([0.2, 0.1, 0.4])


@pytest.mark.parametrize(
    ("settings", "peak"),
    [
        ({"lr": 0.1}, 0.4),
        ({"lr": 0.1, "lr_scaling": "none"}, 0.1),
        ({}, None),
        ({"optimizer": "nesterov"}, None),
        ({"optimizer": "csgdw"}, None),
        ({"optimizer": "nlars"}, None),
        ({"optimizer": "adamw"}, 2e-3),
        ({"optimizer": "adamw", "weights": "runs/a"}, 4e-4),
        ({"optimizer": "adamw", "lr": 1e-3, "weights": "runs/a"}, 4e-3),
    ],
)
def test_only_sgd_needs_a_sweep(settings, peak):
    known = known_peak({"lr": "auto", "lr_scaling": "linear", "optimizer": "sgd", **settings}, 1024)
    assert known == (None if peak is None else pytest.approx(peak))


def test_adams_later_stages_follow_the_square_root_of_their_batch_as_the_first_does():
    in_force = {"lr": "auto", "lr_scaling": "linear", "optimizer": "adamw"}
    plan = make_plan([Stage(1, batch_size=512), Stage(1, batch_size=128)], 2048, 1)
    peaks = [known_peak(in_force, batch) for batch in plan.global_batches]
    rates = Rates(plan, ScheduleSettings(), peaks[0], batch_power(in_force))
    assert [rates.peak(0), rates.peak(1)] == pytest.approx(peaks)
    # A rate that is given follows --lr_scaling, and the finder's is SGD's.
    assert batch_power({**in_force, "lr": 1e-3}) == batch_power({**in_force, "optimizer": "sgd"}) == 1


def test_scales_multiply_the_global_cycle_and_never_jump_upward():
    stages = [Stage(4, batch_size=20, lr_scale=1.0), Stage(4, batch_size=20, lr_scale=0.5)]
    plan = plan_for(stages)
    unscaled = plan_for([Stage(8, batch_size=20)])
    first = plan.stage_steps(0)
    assert plan.lr(first - 1) == unscaled.lr(first - 1)
    glide = round(0.1 * plan.stage_steps(1))
    ratios = [plan.lr(s) / unscaled.lr(s) for s in range(first, plan.total_steps)]
    assert ratios[0] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(ratios))
    assert ratios[glide:] == pytest.approx([0.5] * len(ratios[glide:]))


@pytest.mark.parametrize("stage_wise", [False, True])
def test_the_curve_ends_where_it_should(stage_wise):
    plan = plan_for([Stage(2, batch_size=50), Stage(3, batch_size=25, lr_scale=1.0)], stage_wise=stage_wise)
    assert plan.lr(plan.total_steps - 1) == pytest.approx(0.4 / 25 / 1e4)
    with pytest.raises(IndexError):
        plan.lr(plan.total_steps)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_same_global_batch_gives_the_same_plan_on_any_number_of_processes(processes):
    stages = [Stage(2, batch_size=64 // processes), Stage(2, batch_size=32 // processes)]
    plan, alone = (
        plan_for(stages, processes=processes),
        plan_for([Stage(2, batch_size=64), Stage(2, batch_size=32)]),
    )
    assert plan.total_steps == alone.total_steps
    assert [plan.lr(s) for s in range(plan.total_steps)] == [alone.lr(s) for s in range(plan.total_steps)]


def test_a_resumed_plan_holds_the_global_batch_by_accumulation():
    stages = [Stage(2, batch_size=16)]
    eight = plan_for(stages, processes=8)
    for processes, accumulation in ((4, 2), (1, 8), (8, 1), (16, 1)):
        moved = make_plan(stages, 1000, processes, 1, eight.global_batches)
        assert moved.accumulation(0) == accumulation
        assert moved.total_steps == eight.total_steps
    with pytest.raises(UserError, match="--num_processes"):
        make_plan(stages, 1000, 3, 1, eight.global_batches)


def test_epochs_are_whole_numbers_of_steps_and_can_be_entered_anywhere():
    plan = plan_for([Stage(2, batch_size=300, mixup=0.5), Stage(1, batch_size=100, data_fraction=0.5)])
    epochs = list(plan.epochs())
    assert [(e.index, e.stage_index, e.first_step, e.steps, e.mix) for e in epochs] == [
        (0, 0, 0, 3, True),
        (1, 0, 3, 3, False),
        (2, 1, 6, 5, True),
    ]
    assert list(plan.epochs(1)) == epochs[1:]
    assert plan.total_steps == 11


@pytest.mark.parametrize("done", range(9))
@pytest.mark.parametrize("eval_every", [1, 2, 3, 8, 20])
def test_every_so_many_epochs_and_the_last_are_evaluated(eval_every, done):
    stages = [Stage(3, 32, 10), Stage(1, 32, 10), Stage(4, 32, 10)]
    plan = make_plan(stages, 100, 1, eval_every=eval_every)
    evaluated = [epoch.index + 1 for epoch in plan.epochs() if epoch.evaluated]
    assert evaluated == sorted({*range(eval_every, 9, eval_every), 8})
    to_come = list(plan.epochs(done))
    for index, counts in enumerate(plan.epochs_left(done)):
        mine = [epoch for epoch in to_come if epoch.stage_index == index]
        assert counts == (len(mine), sum(epoch.evaluated for epoch in mine))


def test_a_batch_larger_than_the_data_is_cut_down():
    assert plan_for([Stage(1, batch_size=4096)], images=100, processes=2).global_batches == (100,)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("img_size", 0), ("batch_size", 0), ("data_fraction", 2), ("lr_scale", -1), ("mixup", 2)],
)
def test_impossible_stages_name_the_flag(field, value):
    stage = {"epochs": 1, field: value}
    with pytest.raises(UserError, match=f"--stages, stage 1: {field} takes"):
        parse_args(HybridConfig, "", ["--stages", str([stage]).replace("'", '"')])


def test_no_data_at_all_is_a_sentence():
    with pytest.raises(UserError, match="data_fraction"):
        make_plan([Stage(1, data_fraction=0.0)], 100, 1)


@pytest.mark.parametrize("per_process", [97, 96, 64, 7])
def test_a_batch_that_does_not_fit_is_cut_into_equal_parts_never_into_crumbs(per_process):
    plan = make_plan([Stage(1, 32, per_process)], 1000, 2).with_micro_batch(0, 50)
    assert plan.micro_batch(0) > min(25, per_process - 1)
    assert plan.micro_batch(0) <= 50
    assert per_process * 2 - plan.global_batches[0] < 2 * plan.accumulation(0)


def test_more_micro_batches_than_images_name_the_flag_that_can_be_lowered():
    assert make_plan([Stage(1, batch_size=64)], 60, 2, accumulation=30).global_batches == (60,)
    with pytest.raises(UserError, match="lower --accumulation to 30 or less"):
        make_plan([Stage(1, batch_size=64)], 60, 2, accumulation=31)


def test_fewer_images_than_processes_is_a_sentence():
    with pytest.raises(UserError, match="3 images, fewer than processes; set --num_processes"):
        make_plan([Stage(1, 32, 8)], 3, 4)


def test_a_batch_larger_than_the_data_is_cut_with_a_sentence():
    table = plan_for([Stage(1, 32, 1024), Stage(1, 32, 64)], 800, 2).table()
    assert table.splitlines()[-1] == "stage 1 has 800 images: --batch_size 1024 is cut to 400"


def test_a_cycle_whose_rise_is_one_step_begins_at_its_peak():
    assert cosine_cycle(0, 10, 0.1, start=0.0, peak=1.0, end=0.0) == 1.0
    assert cosine_cycle(0, 1, 1.0, start=0.0, peak=1.0, end=0.0) == 1.0


def test_the_table_has_a_line_for_each_stage():
    stages = [Stage(2, 32, 64), Stage(1, 48, 32, frozen=("conv1",), strength=0.5)]
    lines = plan_for(stages, 640, 2, 2).table().splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "1", "2"]
    assert lines[1].split()[1:7] == ["2", "32", "square", "100%", "64×2×2", "4"]
    assert lines[2].split()[-1] == "conv1"


def test_the_sentence_counts_stages_from_one():
    with pytest.raises(UserError, match="stage 2 has 10 images"):
        make_plan([Stage(1, 32, 8), Stage(1, 32, 8, data_fraction=0.1)], 100, 1, 1, [8, 16])
