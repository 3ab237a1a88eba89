"""The stages of a run: as its recipe has them, or under a budget the longest run that fits by what stages take here."""

import copy
import dataclasses
import gc
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from common import UserError
from common.config import RecordSettings, as_plain
from common.data.sources.base import Source
from common.data.sources.cache import cache_folder, fingerprint_of
from common.engine.evaluate import GRID_EVALUATIONS
from common.engine.measure import measure, measure_costs, slowest, timed_images
from common.engine.probe import fit_evaluations, losses_by_statistics
from common.engine.setup import assembled, facts_of
from common.engine.trainer import Trainer
from common.model.pretrained_cfg import PretrainedCfg
from common.run.checkpoint import write_durably
from common.run.processes import rank0_errors
from common.run.progress import clock, device_name
from common.run.run import Run
from common.scheduling import EpochPlan, Plan, scale_stages
from common.scheduling.budget import Budgeted, BudgetSettings, Costs, Measured, Outcome, plan_budget
from common.scheduling.recipe import Facts, Recipe, adapt, is_short

# Epochs whose batches are measured, and the share of the budget for the steps that are timed.
FIRST_LENGTH, SHARE = 12, 0.005
# Times the loss on trained features, at least, where BatchNorm's batch statistics spoil them: 1.7 and 1.9 with an EfficientNet, 1.0 and 1.1
# with a weak ResNet (docs/results.md).
WORSE = 1.25


# What a look at a trainer that is set up for a recipe tells; nothing is left of it, on the device either.
Tried = Callable[[Recipe, Callable[[Trainer], Any]], Any]


def settle_stages(
    run: Run, model: nn.Module, train: Source, val: Source, source: PretrainedCfg | None = None
) -> dict[str, Any]:
    """Settle the stages and the defaults that fit data, length and machine; a resumed run brings its own along.

    Returns `Progress.forecast` of a run with a budget, otherwise {}. A collective.
    """
    cfg, forecast = run.cfg, dict[str, Any]()
    if run.stages:
        return forecast
    facts = facts_of(run, model, train)
    tried = partial(_tried, run, model, train, val, source)
    listed, fixed = cfg.stages_in_force(), cfg.recipe == "listed" or "stages" in cfg.given
    if cfg.pretrained and facts.linear_head and not fixed and (cfg.budget or is_short(listed)):
        recipe = adapt(listed, vars(cfg), cfg.given, facts)
        by_weights, by_batch = tried(recipe, losses_by_statistics)
        if by_weights:
            text = "a head's loss on images held out: %.3f by the weights' BatchNorm statistics, %.3f by the batch's"
            run.log.info(text, by_weights, by_batch)
        facts = dataclasses.replace(facts, batch_spoils=by_batch > WORSE * by_weights)
    if cfg.budget:
        fitting, forecast = within_budget(run, train, val, facts, tried)
    else:
        fitting = adapt(listed, vars(cfg), cfg.given, facts)
    run.stages = fitting.stages
    for name, value in fitting.values.items():
        setattr(cfg, name, value)
    for note in fitting.notes:
        run.log.info("adapted: %s", note)
    return forecast


def within_budget(
    run: Run, train: Source, val: Source, facts: Facts, tried: Tried
) -> tuple[Recipe, dict[str, Any]]:
    """Stages and settings of the longest run that fits into `--budget`, and `Progress.forecast`. A collective."""
    cfg, budget_s, listed = run.cfg, run.cfg.budget_s(), run.cfg.stages_in_force()
    if "epochs" in cfg.given:
        raise UserError("--budget decides the number of epochs; leave out --epochs, or --budget")
    evaluations = cfg.final_eval * GRID_EVALUATIONS
    if cfg.pretrained and facts.linear_head:
        evaluations += fit_evaluations(train, val)

    def plan(costs: Costs) -> Outcome:
        streaming = train.group_rows is not None
        return plan_budget(
            listed, vars(cfg), cfg.given, facts, costs, budget_s, evaluations=evaluations, streaming=streaming
        )

    kept = _calibration_file(run, train, val)
    # Another machine may have kept another calibration, or none.
    (costs,) = broadcast_object_list([_read(run, kept) if cfg.dry_run and run.is_main else None])
    if costs is None:
        recipe = adapt(scale_stages(listed, FIRST_LENGTH), vars(cfg), cfg.given, facts)
        costs = _calibrated(run, tried, recipe, plan)
        with rank0_errors():
            if run.is_main:
                try:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_durably(kept, json.dumps({"time": time.time(), **costs._asdict()}).encode())
                except OSError as error:
                    run.log.info("the calibration is not kept for --dry_run: %s", error)
    outcome = plan(costs)
    run.log.info("%s", _describe(run, outcome, costs.drift, budget_s))
    low_s, high_s = outcome.whole.interval_s()
    forecast = {"budget_s": budget_s, "low_s": low_s, "high_s": high_s, "parts": outcome.whole.parts}
    return outcome.whole.recipe, forecast


def _calibrated(run: Run, tried: Tried, recipe: Recipe, plan: Callable[[Costs], Outcome]) -> Costs:
    """What a recipe's stages take, and those that are planned by it, if their batches are larger. A collective."""
    budget_s = run.cfg.budget_s()

    def first(t: Trainer) -> Costs:
        # To put a run together takes long the first time only, and every run pays it.
        (start_s,) = slowest(run, time.monotonic() - run.started)
        ends = _smallest_and_largest(t.plan)
        return measure_costs(t, SHARE * budget_s / len(ends), start_s, ends)

    def timed(costs: Costs) -> Costs:
        return costs._replace(calibration_s=slowest(run, time.monotonic() - run.started)[0] - costs.start_s)

    costs = timed(tried(recipe, first))
    whole = plan(costs).whole
    known = {m.img_size: m.images for m in sorted(costs.measured, key=lambda m: m.images)}
    larger = [
        epoch
        for epoch in _smallest_and_largest(whole.plan)
        if timed_images(whole.plan, epoch, run.accelerator.device) > known.get(epoch.stage.img_size, 0)
    ]
    if larger:
        # More images may be what keeps a GPU busy.
        limit_s = SHARE * budget_s / len(larger)
        more = tried(whole.recipe, lambda t: measure(t, limit_s, larger))
        costs = timed(costs._replace(measured=(*costs.measured, *more)))
    return costs


def _smallest_and_largest(plan: Plan) -> list[EpochPlan]:
    """Of each shape and frozen set, an epoch of the smallest images and one of the largest: between them lies a line."""
    kinds = dict[tuple, list[EpochPlan]]()
    for epoch in plan.epochs():
        kinds.setdefault((epoch.stage.shape, epoch.stage.frozen), []).append(epoch)
    size = attrgetter("stage.img_size")
    return [end(epochs, key=size) for epochs in kinds.values() for end in (min, max)]


def _calibration_file(run: Run, train: Source, val: Source) -> Path:
    """Where the pre-flight finds what was measured with the same data, machine and settings, for any budget."""
    machine = (
        device_name(run.accelerator.device),
        run.accelerator.num_processes,
        run.accelerator.mixed_precision,
        torch.__version__,
    )
    idle = {f.name for kind in (RecordSettings, BudgetSettings) for f in dataclasses.fields(kind)}
    settings = {name: value for name, value in as_plain(run.cfg).items() if name not in idle}
    given = sorted(run.cfg.given - idle)
    # What an older version measured has other fields.
    fields = Costs._fields, Measured._fields
    name = fingerprint_of(machine, settings, given, fields, train.fingerprint, val.fingerprint)
    return cache_folder() / "calibrations" / f"{name}.json"


def _read(run: Run, path: Path) -> Costs | None:
    """The calibration that was kept, if there is one."""
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    run.log.info("calibrated %s ago; a run calibrates anew", clock(time.time() - kept.pop("time")))
    measured = (Measured(*values) for values in kept.pop("measured"))
    return Costs(tuple(m._replace(frozen=tuple(m.frozen)) for m in measured), **kept)


def _tried(
    run: Run,
    model: nn.Module,
    train: Source,
    val: Source,
    source: PretrainedCfg | None,
    recipe: Recipe,
    look: Callable[[Trainer], Any],
) -> Any:
    """What `look` makes of a copy of the model, ready for a recipe's stages and settings; it says little and leaves no trace."""
    cfg, accelerator = run.cfg, run.accelerator
    run.cfg, run.stages = copy.copy(cfg), recipe.stages
    for name, value in recipe.values.items():
        setattr(run.cfg, name, value)
    run.log.setLevel(logging.WARNING)
    scale = accelerator.scaler and accelerator.scaler.state_dict()
    try:
        with assembled(run, copy.deepcopy(model), train, val, source) as t:
            result = look(t)
    finally:
        run.cfg, run.stages = cfg, []
        run.log.setLevel(logging.INFO)
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(scale)
    # Accelerate holds on to all that it prepared, and would unscale the copy's gradients too.
    accelerator._models.clear()
    accelerator._optimizers.clear()
    # The copy's forward with autocast refers to itself, and a full GPU does not make Python look for cycles.
    del t
    gc.collect()
    return result


def _describe(run: Run, outcome: Outcome, drift: float, budget_s: float) -> str:
    """The plan's length and forecast, and what other budgets would buy."""
    whole, rate = outcome.whole, run.cfg.usd_per_hour

    def price(seconds: float) -> str:
        return f", {seconds / 3600 * rate:.2f} USD" if rate else ""

    def length(other: Budgeted | None) -> str:
        return f"{other.plan.total_epochs} epochs" if other else "no run"

    low, high = map(clock, whole.interval_s())
    measured, epochs = whole.parts["calibration"], [stage.epochs for stage in whole.plan.stages]
    return (
        f"budget {clock(budget_s)}{price(budget_s)}: {length(whole)} {epochs}, forecast {clock(whole.total_s)}"
        f"{price(whole.total_s)}; 90 % interval {low} to {high}; half of it {length(outcome.half)}, twice of it "
        f"{length(outcome.double)}\n  calibration {measured:.1f} s, {measured / budget_s:.1%} of the budget; "
        f"the machine's speed is taken to drift by {drift:.1%}"
    )
