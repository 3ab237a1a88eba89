"""Learning rate and momentum of every optimizer step: pure functions of a plan and a peak, tested against torch's OneCycleLR."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt, UserError
from common.scheduling.plan import Plan, images_of

# A base learning rate is per this many images (Goyal et al., 2017).
LR_PER_IMAGES = 256
# In timm's names of SGD in all its forms, those with a rate for each layer included.
SGD_LIKE = ("sgd", "momentum", "nesterov", "lars", "larc")
# Peak of all others, per 256 images and by the square root of the batch (Malladi et al., 2022); ConvNeXt's 0.004 at 4,096 images lies on it.
ADAPTIVE_LR = 1e-3
# The peak of trained weights, which a fresh network's washes out, times what that would be. SGD, 3 epochs from ImageNet's weights: two thirds
# of the rate at which the loss blows up left 23 % of top-1, a fifth of it 81, a fifteenth 75 (docs/results.md).
KEEPING_WEIGHTS = 1 / 5
# First / last learning rate.
FINAL_DIV_FACTOR = 1e4
# Share of a stage over which a cycle over the whole run glides from the previous stage's peak to its own.
DAMPENING = 0.1


@dataclass
class ScheduleSettings:
    """Learning rate"""

    lr: PositiveFloat | Literal["auto"] = "auto"
    """Base learning rate per 256 images; auto = the peak that the LR finder suggests, for Adam and its like 0.001 x sqrt(global batch / 256)."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """linear = multiply a numeric --lr by global batch / 256; none = take it as it is."""
    max_lr: PositiveFloat | None = None
    """Upper limit of every stage's peak learning rate; null = none."""
    stage_wise: bool = False
    """One OneCycle per stage instead of one over the whole run."""
    pct_start: ClosedUnitInterval = 0.3
    """Share of the cycle spent warming up."""
    div_factor: PositiveFloat = 25.0
    """Peak / first learning rate."""
    lr_finder_iterations: PositiveInt = 100
    """Steps of the LR finder's sweep."""
    momentum: ClosedUnitInterval = 0.9
    """Centre of the momentum cycle (SGD), or of the first beta (Adam)."""
    momentum_swing: NonNegativeFloat = 0.05
    """The momentum cycles between momentum + swing and momentum - swing; 0 = constant."""

    def check_momentum(self) -> None:
        """UserError: the momentum would leave its range."""
        if self.momentum + self.momentum_swing >= 1 or self.momentum < self.momentum_swing:
            raise UserError("--momentum plus or minus --momentum_swing must stay from 0 to below 1")


def resolve_lr(base_lr: float, global_batch: int, lr_scaling: Literal["linear", "none"]) -> float:
    """A base learning rate per 256 images, scaled to a global batch (Goyal et al., 2017)."""
    return base_lr * global_batch / LR_PER_IMAGES if lr_scaling == "linear" else base_lr


def is_sgd(optimizer: str) -> bool:
    """Whether an optimizer of timm's steps in proportion to the gradient, or moves every weight by about the rate."""
    return any(name in optimizer for name in SGD_LIKE)


def known_peak(settings: Mapping[str, Any], global_batch: int) -> float | None:
    """The peak of the learning rate, where no sweep has to find it: a given one, or an adaptive optimizer's.

    Adam and its like move every weight by about the rate, whatever the gradient. Where that is too much the loss is back at guessing, and
    does not explode: sweeps suggested 0.08 for a ViT and 0.57 for a ConvNeXt (docs/results.md).
    """
    if settings["lr"] != "auto":
        return resolve_lr(settings["lr"], global_batch, settings["lr_scaling"])
    if is_sgd(settings["optimizer"]):
        return None
    kept = KEEPING_WEIGHTS if settings.get("weights") else 1.0
    return kept * ADAPTIVE_LR * math.sqrt(global_batch / LR_PER_IMAGES)


def batch_power(settings: Mapping[str, Any]) -> float:
    """The peak of a later stage follows this power of its batch: 1, or 1/2 by the rule for Adam and its like (`known_peak`)."""
    return 1.0 if settings["lr"] != "auto" or is_sgd(settings["optimizer"]) else 0.5


def cosine_cycle(step: int, total: int, rise: float, start: float, peak: float, end: float) -> float:
    """A cosine from `start` to `peak` over the first share `rise` of `total` steps, then a cosine to `end`.

    Smith and Topin's OneCycle (2018) in the form of `torch.optim.lr_scheduler.OneCycleLR`. A cosine with warm-up is a
    cycle with a short rise.
    """
    if total == 1:
        # Torch's would be the last, and hardly move.
        return peak
    top, last = rise * total - 1, total - 1
    if step <= top:
        return _cosine(start, peak, step / top if top > 0 else 1.0)
    return _cosine(peak, end, (step - top) / (last - top) if last > top else 1.0)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Rates:
    """The learning-rate and momentum curves of a plan; `peak_lr` is the first stage's highest rate, before `max_lr`."""

    plan: Plan
    settings: ScheduleSettings
    peak_lr: float
    batch_power: float = 1.0

    def peak(self, stage_index: int) -> float:
        """A stage's highest learning rate: the first stage's times `lr_scale`, or by the `batch_power` of the stage's batch."""
        stage, batches = self.plan.stages[stage_index], self.plan.global_batches
        limit = math.inf if self.settings.max_lr is None else self.settings.max_lr
        if stage.lr_scale is not None:
            scale = stage.lr_scale / (self.plan.stages[0].lr_scale or 1.0)
            return min(min(self.peak_lr, limit) * scale, limit)
        return min(self.peak_lr * (batches[stage_index] / batches[0]) ** self.batch_power, limit)

    def lr(self, step: int) -> float:
        """Learning rate of an optimizer step, before a parameter group's own scale."""
        stage_index, place = self.plan.locate(step)
        peak, glide = self.peak(stage_index), DAMPENING * self.plan.stage_steps(stage_index)
        if stage_index > 0 and place < glide and not self.settings.stage_wise:
            peak = _cosine(self.peak(stage_index - 1), peak, place / glide)
        start = peak / self.settings.div_factor
        return self._cycle(step, start, peak, start / FINAL_DIV_FACTOR)

    def momentum(self, step: int) -> float:
        """Momentum (SGD) or first beta (Adam) of an optimizer step: it moves against the learning rate."""
        centre, swing = self.settings.momentum, self.settings.momentum_swing
        return self._cycle(step, centre + swing, centre - swing, centre + swing)

    def _cycle(self, step: int, start: float, peak: float, end: float) -> float:
        """The value at a step of the cycle over the run, or over the step's stage."""
        total = self.plan.total_steps
        if self.settings.stage_wise:
            stage_index, step = self.plan.locate(step)
            total = self.plan.stage_steps(stage_index)
        return cosine_cycle(step, total, self.settings.pct_start, start, peak, end)

    def table(self) -> str:
        """Plan and rates as a person reads them: one line per stage."""
        plan, lines = self.plan, list[str]()
        head = "stage epochs px shape data batch steps mixup strength peak end frozen"
        rows = [head.split()]
        first_step = 0
        for i, stage in enumerate(plan.stages):
            steps = range(first_step, first_step + plan.stage_steps(i))
            first_step = steps.stop
            rates = [self.lr(step) for step in steps]
            batch = f"{plan.micro_batch(i)}×{plan.processes}"
            if plan.accumulation(i) > 1:
                batch += f"×{plan.accumulation(i)}"
            cells = [i + 1, stage.epochs, stage.img_size, stage.shape, f"{stage.data_fraction:.0%}", batch]
            cells += [len(steps), f"{float(stage.mixup):.0%}", f"{stage.strength:.2g}"]
            cells += [f"{max(rates):.3g}", f"{rates[-1]:.3g}", ", ".join(stage.frozen) or "–"]
            rows.append([str(cell) for cell in cells])
            images, size = images_of(stage, plan.num_images), plan.global_batches[i] // plan.processes
            if images < stage.batch_size * plan.processes:
                lines.append(
                    f"stage {i + 1} has {images:,} images: --batch_size {stage.batch_size} is cut to {size}"
                )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(["  ".join(map(str.rjust, row, widths)) for row in rows] + lines)
