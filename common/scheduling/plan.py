"""The vocabulary of a curriculum and what follows from it: which stage, epoch, learning rate and momentum every step has.

Pure Python, nothing to save: a resumed run asks the same `Plan` again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from common import UserError

BACKBONE = "backbone"  # in `Stage.frozen`: every module but the classifier

LR_PER_IMAGES = 256  # a base learning rate is per this many images (Goyal et al., 2017)


@dataclass(frozen=True)
class Stage:
    """A stretch of training in which nothing changes but the learning rate. Stages have lengths, never positions.

    Args:
        epochs: passes over the stage's share of the data.
        img_size: side of the square training image in pixels (`shape: rect`: short side or side of equal area).
        batch_size: images per process and optimizer step, before accumulation.
        data_fraction: share of the training images, 0 to 1; a smaller share is contained in a larger one.
        mixup: share of the stage's epochs, from its first, that use MixUp/CutMix (true = 1.0, false = 0.0).
        lr_scale: peak learning rate relative to the first stage's; null = by the linear rule from the stage's own batch.
        frozen: module-name prefixes that do not train; "backbone" means everything but the classifier.
        shape: "square", or "rect" for batches of one aspect ratio each.
        strength: multiplies how strongly MixUp, CutMix, Random Erasing and random crops act; 0 = not at all.
    """

    epochs: int
    img_size: int = 224
    batch_size: int = 256
    data_fraction: float = 1.0
    mixup: float | bool = 1.0
    lr_scale: float | None = None
    frozen: tuple[str, ...] = ()
    shape: Literal["square", "rect"] = "square"
    strength: float = 1.0

    def __post_init__(self) -> None:
        requirements = {
            "epochs must be at least 1": self.epochs >= 1,
            "img_size must be at least 8": self.img_size >= 8,
            "batch_size must be at least 1": self.batch_size >= 1,
            "data_fraction must be above 0 and at most 1": 0 < self.data_fraction <= 1,
            "mixup must be a share from 0 to 1": 0 <= self.mixup <= 1,
            "lr_scale must be positive": self.lr_scale is None or self.lr_scale > 0,
            "strength must not be negative": self.strength >= 0,
        }
        for requirement, met in requirements.items():
            if not met:
                name = requirement.split()[0]
                raise UserError(f"--{requirement}, not {getattr(self, name)}")


def one_cycle(
    step: int, total_steps: int, peak: float, *, pct_start: float, div_factor: float, final_div_factor: float
) -> float:
    """The value of OneCycle at `step`: cosine from peak/div_factor up to `peak`, then down to peak/div_factor/final_div_factor.

    Smith and Topin (2018) in the form of `torch.optim.lr_scheduler.OneCycleLR`, to which the tests compare every step.
    """
    start = peak / div_factor
    end = start / final_div_factor
    top, last = pct_start * total_steps - 1, total_steps - 1
    if step <= top:
        return _cosine(start, peak, step / top if top > 0 else 1.0)
    return _cosine(peak, end, (step - top) / (last - top) if last > top else 1.0)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """The shape of the learning-rate curve; a cosine with warm-up is a OneCycle with a small `pct_start` and no momentum swing.

    Args:
        peak_lr: highest learning rate of the first stage.
        max_lr: no stage's peak exceeds it.
        stage_wise: one OneCycle per stage; otherwise one over the whole run, scaled stage by stage.
        dampening: share of a stage over which a global curve glides from the previous stage's scale to its own.
    """

    peak_lr: float
    max_lr: float = math.inf
    stage_wise: bool = False
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    momentum: float = 0.9
    momentum_swing: float = 0.05
    dampening: float = 0.1


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of the run, all the loop needs to know about it."""

    index: int  # over the whole run, from 0
    stage_index: int
    stage: Stage
    first_step: int  # optimizer step of the run at which it begins
    steps: int
    mix: bool
    global_batch: int


@dataclass(frozen=True)
class Plan:
    """Stages laid out over optimizer steps.

    Args:
        stages: the curriculum.
        num_images: size of the training set.
        processes: processes that train together.
        global_batches: images per optimizer step, by stage; they stay when a run moves to another number of processes.
        schedule: the learning-rate curve.
    """

    stages: tuple[Stage, ...]
    num_images: int
    processes: int
    global_batches: tuple[int, ...]
    schedule: Schedule

    def __post_init__(self) -> None:
        for number, (stage, batch) in enumerate(zip(self.stages, self.global_batches, strict=True), 1):
            if batch % self.processes:
                raise UserError(
                    f"the global batch of stage {number}, {batch} images, cannot be shared by {self.processes} processes; "
                    f"set --num_processes to a divisor of it"
                )
            if self.images(stage) < self.processes:
                raise UserError(
                    f"stage {number} has {self.images(stage)} images, fewer than processes; set --num_processes to that or less"
                )
            if self.images(stage) < batch:
                raise UserError(
                    f"stage {number} has {self.images(stage)} images, fewer than its global batch of {batch}; "
                    f"lower --batch_size to {self.images(stage) // self.processes} or less"
                )

    def images(self, stage: Stage) -> int:
        """Images that the stage draws from."""
        return max(1, round(self.num_images * stage.data_fraction))

    def accumulation(self, stage_index: int) -> int:
        """Micro-batches per optimizer step that keep each at `batch_size` images per process or fewer."""
        per_process = self.global_batches[stage_index] // self.processes
        count = math.ceil(per_process / self.stages[stage_index].batch_size)
        while per_process % count:
            count += 1
        return count

    def steps_per_epoch(self, stage_index: int) -> int:
        return self.images(self.stages[stage_index]) // self.global_batches[stage_index]

    def stage_steps(self, stage_index: int) -> int:
        return self.stages[stage_index].epochs * self.steps_per_epoch(stage_index)

    @property
    def total_steps(self) -> int:
        return sum(map(self.stage_steps, range(len(self.stages))))

    @property
    def total_epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    @property
    def images_to_see(self) -> int:
        return sum(self.stage_steps(i) * batch for i, batch in enumerate(self.global_batches))

    def with_peak(self, peak_lr: float) -> "Plan":
        return replace(self, schedule=replace(self.schedule, peak_lr=peak_lr))

    def epochs(self, start_epoch: int = 0) -> Iterator[EpochPlan]:
        """The run's epochs in order, from the one with this index."""
        index = first_step = 0
        for stage_index, stage in enumerate(self.stages):
            steps = self.steps_per_epoch(stage_index)
            mixed_epochs = round(float(stage.mixup) * stage.epochs)
            for epoch_in_stage in range(stage.epochs):
                if index >= start_epoch:
                    yield EpochPlan(
                        index=index,
                        stage_index=stage_index,
                        stage=stage,
                        first_step=first_step,
                        steps=steps,
                        mix=epoch_in_stage < mixed_epochs,
                        global_batch=self.global_batches[stage_index],
                    )
                index += 1
                first_step += steps

    def _locate(self, step: int) -> tuple[int, int]:
        """Stage of an optimizer step, and the step's place in it."""
        for stage_index in range(len(self.stages)):
            if step < self.stage_steps(stage_index):
                return stage_index, step
            step -= self.stage_steps(stage_index)
        raise IndexError(f"step is {step} beyond the plan")

    def peak(self, stage_index: int) -> float:
        """A stage's highest learning rate: the first stage's times `lr_scale`, or in proportion to the stage's batch."""
        schedule, stage = self.schedule, self.stages[stage_index]
        if stage.lr_scale is not None:
            return min(schedule.peak_lr, schedule.max_lr) * stage.lr_scale
        return min(
            schedule.peak_lr * self.global_batches[stage_index] / self.global_batches[0], schedule.max_lr
        )

    def lr(self, step: int) -> float:
        """Learning rate of an optimizer step, before a parameter group's own scale."""
        schedule = self.schedule
        stage_index, place = self._locate(step)
        if schedule.stage_wise:
            return self._cycle(place, self.stage_steps(stage_index), self.peak(stage_index))
        scale = self.peak(stage_index)
        glide = schedule.dampening * self.stage_steps(stage_index)
        if stage_index > 0 and place < glide:
            scale = _cosine(self.peak(stage_index - 1), scale, place / glide)
        return self._cycle(step, self.total_steps, scale)

    def _cycle(self, step: int, total: int, peak: float) -> float:
        s = self.schedule
        return one_cycle(
            step,
            total,
            peak,
            pct_start=s.pct_start,
            div_factor=s.div_factor,
            final_div_factor=s.final_div_factor,
        )

    def momentum(self, step: int) -> float:
        """Momentum (SGD) or first beta (Adam) of an optimizer step: it moves against the learning rate."""
        s = self.schedule
        stage_index, place = self._locate(step)
        place, total = (place, self.stage_steps(stage_index)) if s.stage_wise else (step, self.total_steps)
        high, low = s.momentum + s.momentum_swing, s.momentum - s.momentum_swing
        top, last = s.pct_start * total - 1, total - 1
        if place <= top:
            return _cosine(high, low, place / top if top > 0 else 1.0)
        return _cosine(low, high, (place - top) / (last - top) if last > top else 1.0)

    def table(self) -> str:
        """The plan as a person reads it: one line per stage."""
        head = (
            "stage",
            "epochs",
            "px",
            "shape",
            "data",
            "batch",
            "steps",
            "mixup",
            "lr start",
            "peak",
            "end",
            "frozen",
        )
        rows, first = [head], 0
        for i, stage in enumerate(self.stages):
            steps = self.stage_steps(i)
            lrs = [self.lr(step) for step in range(first, first + steps)]
            accumulation = self.accumulation(i)
            micro = self.global_batches[i] // self.processes // accumulation
            batch = f"{micro}×{self.processes}" + (f"×{accumulation}" if accumulation > 1 else "")
            rows.append(
                (
                    str(i + 1), str(stage.epochs), str(stage.img_size), stage.shape, f"{stage.data_fraction:.0%}",
                    batch, str(steps), f"{float(stage.mixup):.0%}", f"{lrs[0]:.3g}", f"{max(lrs):.3g}", f"{lrs[-1]:.3g}",
                    ", ".join(stage.frozen) or "–",
                )
            )  # fmt: skip
            first += steps
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        for i, stage in enumerate(self.stages):
            images = self.images(stage)
            if images < stage.batch_size * self.processes:
                size = self.global_batches[i] // self.processes
                lines.append(
                    f"stage {i + 1} has {images:,} images: --batch_size {stage.batch_size} is cut to {size}"
                )
        return "\n".join(lines)


def make_plan(
    stages: list[Stage],
    num_images: int,
    processes: int,
    accumulation: int,
    schedule: Schedule,
    global_batches: tuple[int, ...] | None = None,
) -> Plan:
    """Lay stages out; a batch larger than the stage's images is cut down to them.

    `global_batches` are those of the run that is resumed, which hold on any number of processes.
    """
    if global_batches is None:
        share = [
            max(1, round(num_images * stage.data_fraction)) // (processes * accumulation) for stage in stages
        ]
        global_batches = tuple(
            min(stage.batch_size, max(1, limit)) * processes * accumulation
            for stage, limit in zip(stages, share, strict=True)
        )
    return Plan(tuple(stages), num_images, processes, global_batches, schedule)


def scaled_lr(base_lr: float, global_batch: int, lr_scaling: Literal["linear", "none"]) -> float:
    """A base learning rate per 256 images, scaled to a global batch (Goyal et al., 2017)."""
    return base_lr * global_batch / LR_PER_IMAGES if lr_scaling == "linear" else base_lr


def couple_strength(stages: list[Stage]) -> list[Stage]:
    """Regularise small images less, in proportion to their side (the idea of EfficientNetV2, Tan and Le, 2021)."""
    largest = max(stage.img_size for stage in stages)
    return [replace(stage, strength=stage.strength * stage.img_size / largest) for stage in stages]
