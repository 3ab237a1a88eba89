"""Stages laid out over optimizer steps: which stage, epoch and micro-batch every step has.

Pure Python, nothing to save: a resumed run asks the same `Plan` again.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from common import UserError
from common.scheduling.stages import Stage


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of the run, all the loop needs to know about it."""

    index: int  # over the whole run, from 0
    stage_index: int
    stage: Stage
    first_step: int  # optimizer step of the run at which it begins
    steps: int
    mix: bool
    evaluated: bool
    global_batch: int


@dataclass(frozen=True)
class Plan:
    """Stages laid out over optimizer steps."""

    stages: tuple[Stage, ...]
    num_images: int
    processes: int
    # Images per optimizer step, by stage; they stay when a run moves to another number of processes.
    global_batches: tuple[int, ...]
    eval_every: int = 1  # epochs; the last one is evaluated in any case

    def __post_init__(self) -> None:
        for number, (stage, batch) in enumerate(zip(self.stages, self.global_batches, strict=True), 1):
            if batch % self.processes:
                raise UserError(
                    f"the global batch of stage {number}, {batch} images, cannot be shared by {self.processes} processes; "
                    f"set --num_processes to a divisor of it"
                )
            images = images_of(stage, self.num_images)
            if stage.data_fraction == 0:
                raise UserError(f"stage {number} has a data_fraction of 0: it takes a share above 0")
            if images < self.processes:
                raise UserError(
                    f"stage {number} has {images} images, fewer than processes; set --num_processes to that or less"
                )
            if images < batch:
                # Micro-batches are down to a single image by then.
                raise UserError(
                    f"stage {number} has {images} images, fewer than its global batch of {batch}; "
                    f"lower --accumulation to {images // self.processes} or less"
                )

    def accumulation(self, stage_index: int) -> int:
        """Micro-batches per optimizer step that keep each at `batch_size` images per process or fewer."""
        per_process = self.global_batches[stage_index] // self.processes
        count = math.ceil(per_process / self.stages[stage_index].batch_size)
        while per_process % count:
            count += 1
        return count

    def micro_batch(self, stage_index: int) -> int:
        """Images per process and forward pass."""
        return self.global_batches[stage_index] // self.processes // self.accumulation(stage_index)

    def steps_per_epoch(self, stage_index: int) -> int:
        return images_of(self.stages[stage_index], self.num_images) // self.global_batches[stage_index]

    def stage_steps(self, stage_index: int) -> int:
        return self.stages[stage_index].epochs * self.steps_per_epoch(stage_index)

    @property
    def total_steps(self) -> int:
        return sum(map(self.stage_steps, range(len(self.stages))))

    @property
    def total_epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    def epochs(self, start_epoch: int = 0) -> Iterator[EpochPlan]:
        """The run's epochs in order, from the one with this index."""
        index = first_step = 0
        for stage_index, stage in enumerate(self.stages):
            steps = self.steps_per_epoch(stage_index)
            mixed_epochs = round(stage.mixup * stage.epochs)
            for epoch_in_stage in range(stage.epochs):
                if index >= start_epoch:
                    yield EpochPlan(
                        index=index,
                        stage_index=stage_index,
                        stage=stage,
                        first_step=first_step,
                        steps=steps,
                        mix=epoch_in_stage < mixed_epochs,
                        evaluated=(index + 1) % self.eval_every == 0 or index + 1 == self.total_epochs,
                        global_batch=self.global_batches[stage_index],
                    )
                index += 1
                first_step += steps

    def epochs_left(self, done: int) -> list[tuple[int, int]]:
        """By stage: the epochs to come when so many of the run's are over, and how many of them are evaluated."""
        left, end = [], 0
        for stage in self.stages:
            end += stage.epochs
            begin = min(max(end - stage.epochs, done), end)
            also_last = end == self.total_epochs > begin and end % self.eval_every > 0
            left.append((end - begin, end // self.eval_every - begin // self.eval_every + also_last))
        return left

    def locate(self, step: int) -> tuple[int, int]:
        """Stage of an optimizer step, and the step's place in it."""
        for stage_index in range(len(self.stages)):
            if step < self.stage_steps(stage_index):
                return stage_index, step
            step -= self.stage_steps(stage_index)
        raise IndexError(f"step is {step} beyond the plan")

    def with_micro_batch(self, stage_index: int, size: int) -> "Plan":
        """The plan with at most `size` images per process and forward pass in one stage.

        Accumulation keeps the global batch, unless only crumbs divide it (a prime number of images per process): then
        the batch gives up the few images that do not fill equal micro-batches.
        """
        stages, batches = list(self.stages), list(self.global_batches)
        stages[stage_index] = replace(stages[stage_index], batch_size=size)
        plan = replace(self, stages=tuple(stages))
        if plan.micro_batch(stage_index) < size / 2:
            per_process = batches[stage_index] // self.processes
            count = math.ceil(per_process / size)
            batches[stage_index] = per_process // count * count * self.processes
            plan = replace(plan, global_batches=tuple(batches))
        return plan


def images_of(stage: Stage, num_images: int) -> int:
    """Images that a stage draws from a training set."""
    return max(1, round(num_images * stage.data_fraction))


def make_plan(
    stages: Sequence[Stage],
    num_images: int,
    processes: int,
    accumulation: int = 1,
    global_batches: Sequence[int] = (),
    eval_every: int = 1,
) -> Plan:
    """Lay stages out; a batch larger than the stage's images is cut down to them.

    `global_batches` are those of the run that is resumed, which hold on any number of processes.
    """
    if not global_batches:
        limits = [images_of(stage, num_images) // (processes * accumulation) for stage in stages]
        global_batches = [
            min(stage.batch_size, max(1, limit)) * processes * accumulation
            for stage, limit in zip(stages, limits, strict=True)
        ]
    return Plan(tuple(stages), num_images, processes, tuple(global_batches), eval_every)
