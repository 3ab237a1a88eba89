"""A curriculum under a budget: what runs of every length would take by measured times, and the longest that fits.

A run is never cut off: its stages keep their proportions and its learning rate the whole cycle (Li et al., 2020, Budgeted Training, decay it
over whatever is left). Pure Python: the same measurements always give the same plan.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from common import PositiveFloat, UserError
from common.scheduling.plan import Plan, make_plan
from common.scheduling.rates import known_peak
from common.scheduling.recipe import FEWEST_IMAGES, STEPS_PER_EPOCH, Facts, Recipe, adapt
from common.scheduling.stages import Stage, scale_stages

Z_90 = 1.645
# Lengths are tried up to this many times the budget: a longer run may have larger, cheaper batches.
BEYOND = 2.0
# Share of the run that its evaluations may take before they become rarer.
EVALUATION_SHARE = 0.1
# Of what is measured of a stage, the times that grow with its pixels.
GROWING = ("step_s", "wait_s", "evaluate_s")
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass
class BudgetSettings:
    """Budget"""

    budget: str = ""
    """What the whole run may take: 90s, 45min, 2h, or 12usd with --usd_per_hour; stages are scaled to it. Empty = as listed."""
    usd_per_hour: PositiveFloat | None = None
    """Price of the machine, for a budget in usd and for the receipt."""

    def budget_s(self) -> float:
        """The budget in seconds. UserError: it cannot be read, or there is no price for it."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|usd)", self.budget)
        if not match or not float(match[1]):
            raise UserError(
                f"--budget takes a time or a sum such as 90s, 45min, 2h or 12usd, not {self.budget}"
            )
        if match[2] != "usd":
            return float(match[1]) * UNITS[match[2]]
        if self.usd_per_hour is None:
            raise UserError(f"--budget {self.budget} needs the machine's price, --usd_per_hour")
        return float(match[1]) / self.usd_per_hour * 3600


class Measured(NamedTuple):
    """What an optimizer step takes with the images, shape and layers of one stage."""

    img_size: int
    shape: str
    frozen: tuple[str, ...]
    images: int  # per process and optimizer step
    step_s: float  # computing
    wait_s: float  # waiting for the loader
    evaluate_s: float  # the whole validation set
    enter_s: float  # entering the stage: compiling, and what its first step takes longer
    first_loss: float = math.nan  # mean of the first batch, as the weights are
    memory_mb: float = 0.0  # most that the main process has held: the GPU's, if it has one


class Costs(NamedTuple):
    """What has been measured, in seconds."""

    measured: tuple[Measured, ...]
    start_s: float  # from the program's start, without calibrating
    calibration_s: float = 0.0
    save_s: float = 0.0  # what a checkpoint and the plots of an epoch take from the training
    beside_s: float = 0.0  # what an optimizer step takes beside its images: the update, launching kernels
    # Of the machine's speed, from now to the mean of a run: one standard deviation, relative.
    drift: float = 0.0

    def by_stage(self, plan: Plan) -> list[Measured]:
        """What is known of a plan's stages, at their batches."""
        batches = zip(plan.stages, plan.global_batches, strict=True)
        return [self.step(stage, batch // plan.processes) for stage, batch in batches]

    def step(self, stage: Stage, images: int) -> Measured:
        """What is known of a stage, for so many images per process and step."""
        kind = stage.shape, stage.frozen
        known = [m for m in self.measured if (m.shape, m.frozen) == kind] or self.measured
        # Of each size, the batch that is most like this one.
        sizes = {m.img_size: m for m in sorted(known, key=lambda m: -abs(m.images - images))}
        below = max((size for size in sizes if size <= stage.img_size), default=min(sizes))
        above = min((size for size in sizes if size >= stage.img_size), default=max(sizes))
        low, high = (self._with(sizes[size], images) for size in (below, above))
        if below < above:
            share = (stage.img_size**2 - below**2) / (above**2 - below**2)
            line = {name: (1 - share) * getattr(low, name) + share * getattr(high, name) for name in GROWING}
        else:
            # It was measured, or is beyond all that was: there, an image costs as its pixels do.
            line = {name: (stage.img_size / below) ** 2 * getattr(low, name) for name in GROWING}
        return high._replace(**line)

    def _with(self, m: Measured, images: int) -> Measured:
        """The same with another batch."""
        scale = images / m.images
        # Frozen layers may take less than what the first stage's steps take beside their images.
        beside_s = min(self.beside_s, m.step_s)
        return m._replace(
            images=images, step_s=beside_s + (m.step_s - beside_s) * scale, wait_s=m.wait_s * scale
        )


class Budgeted(NamedTuple):
    """A run of one length, and what it takes."""

    recipe: Recipe
    plan: Plan
    parts: dict[str, float]  # seconds by part
    deviation_s: float  # of the sum, one standard deviation

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())

    def interval_s(self) -> tuple[float, float]:
        """Holds nine of ten runs, if the machine goes on as it did."""
        spread = Z_90 * self.deviation_s
        return self.total_s - spread, self.total_s + spread


class Outcome(NamedTuple):
    """What the budget buys, and what half and twice of it would; None where it buys nothing."""

    half: Budgeted | None
    whole: Budgeted
    double: Budgeted | None


def plan_budget(
    listed: Sequence[Stage],
    settings: Mapping[str, Any],
    given: Collection[str],
    facts: Facts,
    costs: Costs,
    budget_s: float,
    *,
    evaluations: float = 0.0,
    streaming: bool = False,
) -> Outcome:
    """The longest run that ends within the budget at the late end of its interval, with the default recipe of its length.

    Args:
        listed: the stages, whose proportions stay.
        settings, given, facts: as `adapt` takes them.
        costs: of some sizes, shapes and frozen sets at least; others are estimated from them.
        evaluations: as `seconds_by_part` takes them.
        streaming: the data are read in order, so all of them.

    Raises:
        UserError: not even one epoch of each stage on the smallest share of the data fits; names the budget that would do.
    """
    # The smallest share of the data leaves every stage some steps of the smallest batch, and an image of each class.
    least = STEPS_PER_EPOCH * FEWEST_IMAGES * facts.processes * settings["accumulation"]
    fewest = min(stage.data_fraction for stage in listed) * facts.images
    runs: list[Budgeted] = []
    for share, stages in _lengths(listed, 1.0 if streaming else max(least, facts.classes) / fewest):
        runs.append(_budgeted(share, stages, settings, given, facts, costs, evaluations))
        if runs[-1].total_s > 2 * BEYOND * budget_s:
            break
    half, whole, double = (_longest(runs, share * budget_s) for share in (0.5, 1.0, 2.0))
    if whole is None:
        needed = math.ceil(min(run.interval_s()[1] for run in runs))
        price = settings["usd_per_hour"]
        dollars = f" or {math.ceil(needed / 36 * price) / 100:.2f}usd" if price else ""
        raise UserError(
            f"--budget {settings['budget']} is too small for an epoch of each stage: it takes {needed}s{dollars} or more"
        )
    return Outcome(half, whole, double)


def _longest(runs: Sequence[Budgeted], limit_s: float) -> Budgeted | None:
    """The last that fits, of those before one that is far beyond: a larger limit never gets a shorter run."""
    longest = None
    for run in runs:
        _, late_s = run.interval_s()
        if late_s > BEYOND * limit_s:
            break
        if late_s <= limit_s:
            longest = run
    return longest


def _lengths(listed: Sequence[Stage], share: float) -> Iterator[tuple[float, list[Stage]]]:
    """Ever longer runs: one epoch of each stage on a growing share of the data, then more epochs, in steps of 1 % or one."""
    while share < 1:
        yield share, [replace(stage, epochs=1) for stage in listed]
        share *= 1.1
    epochs = len(listed)
    while True:
        yield 1.0, scale_stages(listed, epochs)
        epochs += max(1, epochs // 100)


def _budgeted(
    share: float,
    stages: list[Stage],
    settings: Mapping[str, Any],
    given: Collection[str],
    facts: Facts,
    costs: Costs,
    evaluations: float,
) -> Budgeted:
    """A run of one length: its default recipe, as if the share of the data were all of them, and what it takes."""
    seen = replace(facts, images=round(share * facts.images))
    recipe = adapt(stages, settings, given, seen)
    if share < 1:
        recipe.stages[:] = [replace(s, data_fraction=share * s.data_fraction) for s in recipe.stages]
        recipe.notes.append(f"{share:.0%} of the data, to fit (--budget)")
    in_force = {**settings, **recipe.values}
    rarely = settings["eval_every"]
    plan = make_plan(
        recipe.stages, facts.images, facts.processes, settings["accumulation"], eval_every=rarely
    )
    sweep = 0 if known_peak(in_force, plan.global_batches[0]) else in_force["lr_finder_iterations"]
    parts = seconds_by_part(plan, costs, sweep, evaluations)
    while (
        "eval_every" not in given
        and rarely < plan.total_epochs
        and parts["evaluate"] > EVALUATION_SHARE * sum(parts.values())
    ):
        # In steps of a tenth where it is large: a plan is made of many such runs.
        rarely = min(rarely + max(1, rarely // 10), plan.total_epochs)
        plan = replace(plan, eval_every=rarely)
        parts = seconds_by_part(plan, costs, sweep, evaluations)
    if rarely > settings["eval_every"]:
        recipe.values["eval_every"] = rarely
        recipe.notes.append(
            f"an evaluation after every {rarely} epochs: more would be over a tenth of the run (--eval_every)"
        )
    to_come = sum(parts.values()) - parts["start"] - parts["calibration"]
    return Budgeted(recipe, plan, parts, costs.drift * to_come)


def seconds_by_part(
    plan: Plan, costs: Costs, sweep: int, evaluations: float, done: int = 0
) -> dict[str, float]:
    """What a run takes when `done` of its epochs are over, by part: "train 1" is the first stage's.

    `sweep` is the finder's steps, `evaluations` how many of the last stage's are as long as what passes over images beside the epochs.
    """
    stages = costs.by_stage(plan)
    epochs, evaluated = zip(*plan.epochs_left(done), strict=True)
    steps = [count * plan.steps_per_epoch(i) for i, count in enumerate(epochs)]
    training = {f"train {i + 1}": n * m.step_s for i, (n, m) in enumerate(zip(steps, stages, strict=True))}
    return {
        "start": costs.start_s,
        "calibration": costs.calibration_s,
        **({"finder": sweep * (stages[0].step_s + stages[0].wait_s)} if sweep else {}),
        "compile": sum(m.enter_s for m in stages),
        **training,
        "wait": sum(n * m.wait_s for n, m in zip(steps, stages, strict=True)),
        "evaluate": sum(n * m.evaluate_s for n, m in zip(evaluated, stages, strict=True)),
        **({"passes": evaluations * stages[-1].evaluate_s} if evaluations else {}),
        # Every epoch may be the best so far, and the end waits for what is being written.
        "save": (sum(epochs) + 1) * costs.save_s,
    }


def expected_end_s(
    forecast: Mapping[str, float], spent: Mapping[str, float], done: Sequence[float], evaluated: float
) -> float:
    """When a run that is under way will end, in seconds since its start, at the pace that it had so far.

    `forecast` and `spent` are seconds by part, of the whole run and until now; `done` is the share of each stage's steps that are over,
    `evaluated` that of the evaluations' time that should be.
    """
    training = [f"train {i + 1}" for i in range(len(done))]
    over = sum(forecast[part] * share for part, share in zip(training, done, strict=True))
    trained = sum(forecast[part] for part in training)
    beside = forecast["wait"] + forecast["save"]
    whole = trained + beside + forecast["evaluate"]
    planned = over * (1 + beside / trained) + evaluated * forecast["evaluate"]
    taken = sum(spent.get(part, 0.0) for part in (*training, "wait", "save", "evaluate"))
    pace = taken / planned if planned else 1.0
    # Later stages are still to be compiled for, and what comes after the last epoch is still to come.
    ahead = sum(max(0.0, forecast.get(part, 0.0) - spent.get(part, 0.0)) for part in ("compile", "passes"))
    return sum(spent.values()) + (whole - planned + ahead) * pace
