import dataclasses
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from common.scheduling import Rates, Stage, scale_stages
from common.scheduling.budget import (
    BudgetSettings,
    Costs,
    Measured,
    expected_end_s,
    plan_budget,
    seconds_by_part,
)
from common.scheduling.recipe import Facts, adapt
from train_hybrid import STAGES, HybridConfig

SMALL = Facts(images=3000, classes=10, short_side=192, stride=32)


def settings_of(**changes) -> dict:
    cfg = HybridConfig(**changes)
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}


def costs_of(listed, facts=SMALL, step_s=0.1, evaluate_s=1.0, given=(), batches=(32,), **changes) -> Costs:
    """Every size of the list with a step time that grows with its pixels."""
    recipe = adapt(listed, settings_of(**changes), given, facts)
    return Costs(
        tuple(
            Measured(size, "square", (), b, step_s * b / 32 * size / 64, 0.0, evaluate_s, 0.5)
            for size in {stage.img_size for stage in recipe.stages}
            for b in batches
        ),
        start_s=5.0,
        calibration_s=3.0,
        save_s=0.1,
        drift=0.02,
    )


def buy(listed, costs, budget_s, facts=SMALL, given=(), **changes):
    return plan_budget(listed, settings_of(budget=f"{budget_s}s", **changes), given, facts, costs, budget_s)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45min", 2700), ("2h", 7200), ("1.5 h", 5400), ("12usd", 3600)]
)
def test_budgets_are_read(text, seconds):
    assert BudgetSettings(text, usd_per_hour=12.0).budget_s() == seconds


@pytest.mark.parametrize("text", ["", "45", "min", "0min", "-1h", "3 weeks", "12usd"])
def test_other_words_are_refused(text):
    with pytest.raises(UserError, match=r"--budget|--usd_per_hour"):
        BudgetSettings(text).budget_s()


stages = st.builds(
    Stage,
    epochs=st.integers(1, 60),
    img_size=st.sampled_from([64, 96, 128]),
    batch_size=st.sampled_from([32, 256, 1024]),
    data_fraction=st.sampled_from([0.5, 1.0]),
)


@settings(deadline=None, max_examples=30)
@given(
    listed=st.lists(stages, min_size=1, max_size=4),
    budget_s=st.floats(1, 3000),
    more=st.floats(1, 3),
    step_s=st.floats(0.003, 3),
    evaluate_s=st.floats(0, 30),
    own=st.booleans(),
)
def test_any_budget_is_kept_or_refused_with_one_that_would_do(
    listed, budget_s, more, step_s, evaluate_s, own
):
    of_user = {"stages"} if own else set()
    costs = costs_of(listed, step_s=step_s, evaluate_s=evaluate_s, given=of_user)
    try:
        outcome = buy(listed, costs, budget_s, given=of_user)
    except UserError as refusal:
        named = int(re.search(r"it takes (\d+)s", str(refusal))[1])
        assert named > budget_s
        bought = buy(listed, costs, named, given=of_user).whole
        assert bought.interval_s()[1] <= named
        return
    run = outcome.whole
    assert run.interval_s()[1] <= budget_s
    assert all(stage.epochs >= 1 for stage in run.plan.stages)
    # The whole cycle: it ends where that of an unlimited run ends.
    in_force = HybridConfig(**{**settings_of(), **run.recipe.values})
    rates = Rates(run.plan, in_force, 1.0)
    last = rates.lr(run.plan.total_steps - 1)
    end = rates.peak(len(run.plan.stages) - 1) / in_force.div_factor / 1e4
    assert last == pytest.approx(end, rel=1e-6) or run.plan.stage_steps(len(listed) - 1) < 20
    larger = buy(listed, costs, budget_s * more, given=of_user).whole

    def length(budgeted):
        return budgeted.plan.total_epochs, min(stage.data_fraction for stage in budgeted.plan.stages)

    assert larger.plan.total_epochs >= run.plan.total_epochs
    assert (larger.plan.total_epochs > len(listed)) or length(larger) >= length(run)
    assert outcome.double.plan.total_epochs >= run.plan.total_epochs


def test_a_generous_budget_is_used_and_a_tight_one_takes_a_share_of_the_data():
    costs = costs_of(STAGES)
    run = buy(STAGES, costs, 900).whole
    assert 0.9 * 900 < run.total_s < run.interval_s()[1] <= 900
    default = adapt(scale_stages(STAGES, run.plan.total_epochs), settings_of(), (), SMALL)
    assert list(run.plan.stages) == default.stages
    shortest = min(s for s in range(20, 200, 10) if _fits(costs, s))
    tight = buy(STAGES, costs, shortest).whole
    assert tight.plan.total_epochs == 4
    assert tight.plan.stages[-1].data_fraction < 1


def _fits(costs, budget_s) -> bool:
    try:
        return bool(buy(STAGES, costs, budget_s))
    except UserError:
        return False


def test_shards_are_read_whole():
    costs, tight = costs_of(STAGES), settings_of(budget="60s")
    assert _fits(costs, 60)
    with pytest.raises(UserError, match=r"takes \d+s or more"):
        plan_budget(STAGES, tight, (), SMALL, costs, 60, streaming=True)


def test_a_refusal_names_the_price():
    with pytest.raises(UserError, match=r"takes (\d+)s or 0\.\d\dusd or more"):
        buy(STAGES, costs_of(STAGES), 10, usd_per_hour=5.67)


def test_everything_is_counted():
    facts = dataclasses.replace(SMALL, images=3200)
    listed = [Stage(2, 96, 32, mixup=False), Stage(3, 64, 32, frozen=("conv1",), mixup=False)]
    measured = (
        Measured(96, "square", (), 32, 1.0, 0.5, 7.0, 2.0),
        Measured(64, "square", ("conv1",), 32, 0.5, 0.0, 3.0, 0.0),
    )
    run = buy(
        listed, Costs(measured, 5.0, 3.0, 0.25, drift=0.1), 760, facts, {"stages", "lr_finder_iterations"}
    ).whole
    assert [stage.epochs for stage in run.plan.stages] == [2, 3]
    assert run.parts == {
        "start": 5.0,
        "calibration": 3.0,
        "finder": 150.0,
        "compile": 2.0,
        "train 1": 200.0,
        "train 2": 150.0,
        "wait": 100.0,
        "evaluate": 23.0,
        "save": 1.5,
    }
    low, high = run.interval_s()
    assert low < run.total_s < high
    # What is over when the plan is made is certain.
    assert high - run.total_s == pytest.approx(1.645 * 0.1 * (run.total_s - 8))


def test_evaluations_that_would_cost_more_than_a_tenth_become_rarer():
    costly = costs_of(STAGES, evaluate_s=5.0)
    rare = buy(STAGES, costly, 900).whole
    every = buy(STAGES, costly, 900, given=("eval_every",)).whole
    assert rare.parts["evaluate"] <= 0.1 * rare.total_s
    assert every.parts["evaluate"] > 0.1 * every.total_s
    assert rare.recipe.values["eval_every"] == rare.plan.eval_every > 1 == every.plan.eval_every
    assert rare.plan.total_epochs > every.plan.total_epochs
    assert "--eval_every" in rare.recipe.notes[-1]
    # Those at the end are made in any case.
    costs = costs_of(STAGES, evaluate_s=2.0)
    at_the_end = plan_budget(
        STAGES, settings_of(budget="900s"), (), SMALL, costs, 900, evaluations=40.0
    ).whole
    assert at_the_end.parts["passes"] == 40 * 2.0
    assert at_the_end.parts["passes"] + at_the_end.parts["evaluate"] > 0.1 * at_the_end.total_s
    assert "eval_every" not in at_the_end.recipe.values
    # No rarer than that takes.
    more = seconds_by_part(replace(rare.plan, eval_every=rare.plan.eval_every - 1), costly, 0, 0.0)
    assert more["evaluate"] > 0.1 * rare.total_s
    assert "eval_every" not in buy(STAGES, costs_of(STAGES, evaluate_s=0.1), 900).whole.recipe.values


def test_a_machine_that_drifts_is_given_less_to_do():
    steady = costs_of(STAGES)
    plans = [buy(STAGES, costs, 900).whole for costs in (steady, steady._replace(drift=0.1))]
    assert plans[1].plan.total_epochs < plans[0].plan.total_epochs
    assert all(0.85 * 900 < plan.interval_s()[1] <= 900 for plan in plans)


def test_another_batch_takes_what_an_image_takes_beside_what_every_step_takes():
    one = Measured(64, "square", (), 32, 0.5, 0.1, 1.0, 0.0)
    stage = Stage(1, 64)
    assert Costs((one,), 0).step(stage, 16).step_s == 0.25
    costs = Costs((one,), 0, beside_s=0.1)
    assert costs.step(stage, 32) == one
    assert costs.step(stage, 64).step_s == pytest.approx(0.9)
    assert costs.step(stage, 16).wait_s == pytest.approx(0.05)
    assert costs._replace(beside_s=0.7).step(stage, 64).step_s == 0.5
    # Of two batches, the one that is more like it.
    two = Costs((one, one._replace(images=64, step_s=0.6)), 0)
    assert two.step(stage, 128).step_s == pytest.approx(1.2)
    assert two.step(stage, 32) == one


def test_sizes_between_measured_ones_lie_on_the_line_over_their_pixels():
    small = Measured(32, "square", (), 32, 0.2, 0.0, 1.0, 0.0)
    large = small._replace(img_size=96, step_s=1.0, wait_s=0.8, evaluate_s=2.0)
    costs = Costs((small, large), 0)
    between = costs.step(Stage(1, 64), 32)
    # 64 x 64 is three eighths of the way from 32 x 32 to 96 x 96.
    assert between[4:7] == pytest.approx((0.5, 0.3, 1.375))
    assert costs.step(Stage(1, 32), 32)[4:7] == small[4:7]
    assert costs.step(Stage(1, 96), 32) == large
    # Beyond them, and of a single one, an image costs as its pixels do.
    assert costs.step(Stage(1, 192), 32)[4:7] == pytest.approx((4.0, 3.2, 8.0))
    assert Costs((large,), 0).step(Stage(1, 48), 32).step_s == pytest.approx(0.25)
    frozen = large._replace(frozen=("conv1",), step_s=0.7)
    both = Costs((small, large, frozen), 0)
    assert both.step(Stage(1, 96, frozen=("conv1",)), 32).step_s == 0.7
    assert both.step(Stage(1, 48, frozen=("conv1",)), 32).step_s == pytest.approx(0.175)


def test_the_end_is_foreseen_from_the_pace_so_far():
    forecast = {"start": 10, "train 1": 100, "train 2": 200, "wait": 0, "evaluate": 30, "save": 0}
    on_time = expected_end_s(forecast, {"start": 10, "train 1": 100, "evaluate": 10}, [1.0, 0.0], 1 / 3)
    assert on_time == pytest.approx(340)
    late = expected_end_s(forecast, {"start": 10, "train 1": 150, "evaluate": 15}, [1.0, 0.0], 1 / 3)
    assert late == pytest.approx(10 + 330 * 1.5)
    # All evaluations are still to come.
    rare = expected_end_s(forecast, {"start": 10, "train 1": 150}, [1.0, 0.0], 0.0)
    assert rare == pytest.approx(10 + 330 * 1.5)
    assert expected_end_s(forecast, {"start": 20}, [0.0, 0.0], 0.0) == pytest.approx(350)
    # The second stage's compiling, and a grid behind the last epoch.
    more, spent = (
        {**forecast, "compile": 40, "passes": 50},
        {"start": 10, "train 1": 100, "evaluate": 10, "compile": 15},
    )
    assert expected_end_s(more, spent, [1.0, 0.0], 1 / 3) == pytest.approx(340 + 40 + 50)
    over = {**spent, "train 2": 200, "evaluate": 30, "compile": 40}
    assert expected_end_s(more, over, [1.0, 1.0], 1.0) == pytest.approx(340 + 40 + 50)
    assert expected_end_s(more, over | {"passes": 60}, [1.0, 1.0], 1.0) == pytest.approx(340 + 40 + 60)
