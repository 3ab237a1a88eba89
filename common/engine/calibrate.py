"""A run under a budget: measure what its steps, evaluations and checkpoints take here, then plan the longest that fits."""

import copy
import json
import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain, count, cycle
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from common import UserError
from common.data.batches import Batches
from common.data.loader import Batch, Loader
from common.data.sources.base import Source
from common.data.sources.cache import cache_folder, fingerprint_of
from common.engine.evaluate import FINAL_CROPS, FINAL_SIZES, one_view
from common.engine.peak import TrainStep
from common.engine.setup import prepare_state, settle_plan
from common.engine.trainer import Trainer
from common.run import checkpoint
from common.run.plots import write_plots
from common.run.progress import clock
from common.run.run import Run
from common.scheduling import EpochPlan, Stage, scale_stages
from common.scheduling.budget import Budgeted, Costs, Measured, Outcome, plan_budget
from common.scheduling.recipe import Facts, Recipe, adapt

# Share of the budget that measuring may take, and what it takes at least: steps after the one that warms up.
SHARE, FEWEST_STEPS, MOST_STEPS = 0.03, 2, 40
# Beyond this share what is not measured is estimated.
MOST_SHARE = 0.1
# The recipe's batches follow the length, so what was measured may not be what is planned: measured again, this often.
ROUNDS, FIRST_LENGTH = 4, 12
ONE_EPOCH = (
    "epoch,stage,img_size,lr,momentum,train_loss,val_loss,train_top1,val_top1,val_top5,total_s\n"
    "1,1,64,0.1,0.9,2,2,30,30,60,10\n"
)


def within_budget(
    run: Run, model: nn.Module, train: Source, val: Source, train_step: TrainStep, facts: Facts
) -> Recipe:
    """Stages and settings of the longest run that fits into `--budget`; its forecast becomes the run's. A collective."""
    cfg, budget_s = run.cfg, run.cfg.budget_s()
    if "epochs" in cfg.given:
        raise UserError("--budget decides the number of epochs; leave out --epochs, or --budget")
    listed, streaming = cfg.stages_in_force(), train.group_rows is not None
    evaluations = sum(2 * size**2 for size in FINAL_SIZES) * len(FINAL_CROPS) if cfg.final_eval else 0.0

    def plan(costs: Costs) -> Outcome:
        return plan_budget(
            listed,
            vars(cfg),
            cfg.given,
            facts,
            costs,
            budget_s,
            evaluations=evaluations,
            streaming=streaming,
        )

    kept = _cache_file(run, train, val, listed)
    found = [_read(run, kept) if cfg.dry_run and run.is_main else None]
    if run.accelerator.num_processes > 1:
        # Another machine's cache may hold another calibration, or none.
        broadcast_object_list(found)
    (costs,) = found
    if costs is None:
        start_s = time.monotonic() - run.started
        costs = Costs((), start_s, 0.0, 0.0)
        recipe = adapt(scale_stages(listed, FIRST_LENGTH), vars(cfg), cfg.given, facts, cfg.recipe)
        for number in range(ROUNDS):
            with _as_planned(run, recipe):
                # The first batches are a guess, and hardly worth the time; the second are measured anew if it was right.
                limit_s = SHARE / 2 * budget_s if number else 0.0
                costs = _measure(run, model, train, val, train_step, costs, limit_s, anew=number == 1)
            spent_s = time.monotonic() - run.started - start_s
            # Planned by all processes alike.
            costs = costs._replace(start_s=_slowest(run, start_s)[0], calibration_s=_slowest(run, spent_s)[0])
            if run.is_main:
                kept.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.write_durably(kept, json.dumps({"time": time.time(), **costs._asdict()}).encode())
            whole = plan(costs).whole
            recipe = whole.recipe
            known = all(_is_known(costs, whole, index) for index in range(len(recipe.stages)))
            if number and (known or costs.calibration_s > MOST_SHARE * budget_s):
                break
    outcome = plan(costs)
    whole = outcome.whole
    run.calibration_s = costs.calibration_s
    low, high = whole.interval_s()
    run.forecast = {"budget_s": budget_s, "low_s": low, "high_s": high, "parts": whole.parts}
    run.log.info("%s", _describe(run, outcome, budget_s))
    return whole.recipe


def _is_known(costs: Costs, budgeted: Budgeted, index: int) -> bool:
    plan = budgeted.plan
    images = plan.global_batches[index] // plan.processes
    return any(m.serves(plan.stages[index]) and m.images == images for m in costs.measured)


@contextmanager
def _as_planned(run: Run, recipe: Recipe) -> Iterator[None]:
    """Let the run have a recipe's stages and settings for a while, and say little."""
    cfg = run.cfg
    run.cfg, run.stages = copy.copy(cfg), recipe.stages
    for name, value in recipe.values.items():
        setattr(run.cfg, name, value)
    run.log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        run.cfg, run.stages = cfg, []
        run.log.setLevel(logging.INFO)


def _measure(
    run: Run,
    model: nn.Module,
    train: Source,
    val: Source,
    train_step: TrainStep,
    costs: Costs,
    limit_s: float,
    *,
    anew: bool,
) -> Costs:
    """Train, evaluate and save a little with a copy of the model; what is known is not measured again, unless `anew`."""
    cfg, accelerator = run.cfg, run.accelerator
    scaler = accelerator.scaler
    before = None if scaler is None else scaler.state_dict()
    state = prepare_state(run, copy.deepcopy(model), train)
    plan = settle_plan(run, state, train)
    batches = Batches(plan, train, val, cfg, cfg.seed, accelerator.process_index, accelerator.num_processes)
    loader = Loader(
        train, val, seed=cfg.seed, settings=cfg, device=accelerator.device, channels_last=cfg.channels_last
    )
    measured = {(m.img_size, m.shape, m.frozen, m.images): m for m in costs.measured}
    done = set() if anew else set(measured)
    with closing(loader):
        t = Trainer(run, state, plan, batches, loader)
        first = {epoch.stage_index: epoch for epoch in reversed(list(plan.epochs()))}
        for index, stage in enumerate(plan.stages):
            images = plan.global_batches[index] // plan.processes
            key = (stage.img_size, stage.shape, stage.frozen, images)
            if key not in done:
                share_s = limit_s / len(plan.stages)
                measured[key] = Measured(*key, *_measure_stage(t, first[index], train_step, share_s))
                done.add(key)
        began = time.monotonic()
        files = checkpoint.capture(state, accelerator, {})
        if run.is_main:
            with TemporaryDirectory() as folder:
                checkpoint.write(Path(folder), files)
                # Drawing is done beside the training, but holds the interpreter's lock.
                (Path(folder) / "training_log.csv").write_text(ONE_EPOCH)
                write_plots(Path(folder))
        save_s = time.monotonic() - began
    if scaler is not None:
        scaler.load_state_dict(before)
    # Accelerate holds on to all that it prepared, and would unscale the copy's gradients too.
    accelerator._models.clear()
    accelerator._optimizers.clear()
    return costs._replace(measured=tuple(measured.values()), save_s=_slowest(run, save_s)[0])


def _measure_stage(t: Trainer, epoch: EpochPlan, train_step: TrainStep, limit_s: float) -> list[float]:
    """`Measured` from `step_s` on: the loader runs beside the steps, as in training; the slowest process counts."""
    began = time.monotonic()
    t.enter_stage(epoch)
    t.begin_epoch(epoch)
    enter_s = time.monotonic() - began
    passes = (replace(epoch, index=index) for index in count())
    pixels: list[int] = []

    def watched() -> Iterator[Batch]:
        for batch in t.loader.stream(chain.from_iterable(map(t.batches.train_items, passes))):
            pixels.append(batch.item.height * batch.item.width)
            yield batch

    stream, seconds, waits = watched(), list[float](), list[float]()
    for number in range(MOST_STEPS):
        waited, began = t.meter.waited, time.monotonic()
        train_step(t, epoch, 1e-5, t.run.cfg.momentum, stream)
        _finish(t)
        if number == 0:
            # Also the workers' first batches; its time is no step's.
            pixels.clear()
            continue
        waits.append(t.meter.waited - waited)
        seconds.append(time.monotonic() - began - waits[-1])
        if number >= FEWEST_STEPS and t.run.votes.largest(int(sum(seconds) + sum(waits) > limit_s))[0]:
            break
    t.meter.bar.close()
    # Rectangular batches differ in size.
    whole = [item.height * item.width for item in t.batches.train_items(epoch)]
    scale = fmean(whole) / fmean(pixels)
    error = stdev(seconds) / len(seconds) ** 0.5 / fmean(seconds)
    images = -(-len(t.batches.val) // t.run.accelerator.num_processes)
    evaluate_s = images * _evaluation(t, epoch, limit_s)
    return _slowest(t.run, scale * fmean(seconds), scale * fmean(waits), evaluate_s, enter_s, error)


@torch.inference_mode()
def _evaluation(t: Trainer, epoch: EpochPlan, limit_s: float) -> float:
    """Seconds for each validation image of this process."""
    models = [t.state.model] if t.state.ema is None else [t.state.model, t.state.ema.module]
    items = t.batches.eval_items(epoch.stage.img_size, t.plan.micro_batch(epoch.stage_index))
    images, began = 0, time.monotonic()
    for number, batch in enumerate(t.loader.stream(cycle(items))):
        for model in models:
            model.eval()
            with t.run.accelerator.autocast():
                one_view(model, t.augment.normalise(batch.images))
        _finish(t)
        if number == 0:
            began = time.monotonic()
            continue
        images += len(batch.labels)
        if (number >= FEWEST_STEPS and time.monotonic() - began > limit_s / 4) or number == MOST_STEPS:
            break
    return (time.monotonic() - began) / images


def _finish(t: Trainer) -> None:
    if t.run.accelerator.device.type == "cuda":
        torch.cuda.synchronize(t.run.accelerator.device)


def _slowest(run: Run, *values: float) -> list[float]:
    """The largest of all processes, to a microsecond; a collective."""
    return [value / 1e6 for value in run.votes.largest(*(round(1e6 * value) for value in values))]


# --- what is kept for the pre-flight, and what is said -------------------------------------------------------------


def _cache_file(run: Run, train: Source, val: Source, listed: list[Stage]) -> Path:
    cfg, accelerator = run.cfg, run.accelerator
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
    machine = (device, accelerator.num_processes, torch.get_num_threads(), torch.__version__)
    settings = [
        cfg.model, cfg.mixed_precision, cfg.channels_last, cfg.compile, cfg.accumulation, cfg.auto_batch, cfg.workers,
        cfg.ema, cfg.optimizer, cfg.recipe, cfg.rect_val, cfg.rect_area, sorted(cfg.given - {"budget", "dry_run"}), listed,
    ]  # fmt: skip
    name = fingerprint_of(machine, settings, train.fingerprint, val.fingerprint)
    return cache_folder() / "calibrations" / f"{name}.json"


def _read(run: Run, path: Path) -> Costs | None:
    """The calibration that was kept, if there is one."""
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text())
    run.log.info("calibrated %s ago; a run calibrates anew", clock(time.time() - kept.pop("time")))
    measured = (Measured(**dict(zip(Measured._fields, m, strict=True))) for m in kept.pop("measured"))
    return Costs(tuple(m._replace(frozen=tuple(m.frozen)) for m in measured), **kept)


def _describe(run: Run, outcome: Outcome, budget_s: float) -> str:
    """The plan's length and forecast, and what other budgets would buy."""
    whole, rate = outcome.whole, run.cfg.usd_per_hour

    def price(seconds: float) -> str:
        return f", {seconds / 3600 * rate:.2f} USD" if rate else ""

    low, high = whole.interval_s()
    epochs = [stage.epochs for stage in whole.plan.stages]
    others = [
        f"{name} of it {'no run' if other is None else f'{other.plan.total_epochs} epochs'}"
        for name, other in (("half", outcome.half), ("twice", outcome.double))
    ]
    parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in whole.parts.items() if seconds >= 3)
    measured = whole.parts["calibration"]
    return (
        f"budget {clock(budget_s)}{price(budget_s)}: {whole.plan.total_epochs} epochs {epochs}, forecast {clock(whole.total_s)}"
        f"{price(whole.total_s)}; 90 % interval {clock(low)} to {clock(high)}; {', '.join(others)}\n"
        f"  minutes by part: {parts}\n"
        f"  calibration {measured:.1f} s, {measured / budget_s:.1%} of the budget; an evaluation after every epoch is "
        f"{whole.parts['evaluate'] / whole.total_s:.0%} of the run"
    )
