"""What a run's stages take on this machine, tried for a few seconds each; the pre-flight and `--budget` forecast from it."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import torch

from common.data.loader import PREFETCH, Batch
from common.engine.evaluate import one_view
from common.engine.memory import finished
from common.engine.peak import endless_items
from common.engine.trainer import Trainer
from common.run import checkpoint
from common.run.plots import write_plots
from common.run.progress import peak_memory_mb
from common.run.run import Run
from common.scheduling import EpochPlan
from common.scheduling.budget import Measured

# Steps, or batches of an evaluation, that are timed at least.
FEWEST = 2
# Pixels of a timed micro-batch on a CPU, whose time grows with them; a GPU takes whole ones, of which it tells the memory.
CPU_PIXELS = 16 * 224 * 224
# So small that no weight moves; some optimizers divide by their rate.
NO_RATE = 1e-9
ONE_EPOCH = (
    "epoch,stage,img_size,lr,momentum,train_loss,val_loss,train_top1,val_top1,val_top5,total_s\n"
    "1,1,64,0.1,0.9,2,2,30,30,60,10\n"
)


def measure(t: Trainer, limit_s: float, epochs: Iterable[EpochPlan] | None = None) -> list[Measured]:
    """Train and evaluate each kind of stage of these epochs, or of the plan, for about `limit_s` seconds; a collective.

    Weights stay, momentum and BatchNorm's statistics do not. Times are the slowest process's.
    """
    kinds: dict[tuple, EpochPlan] = {}
    for epoch in epochs or t.plan.epochs():
        stage = epoch.stage
        kinds.setdefault((stage.img_size, stage.shape, stage.frozen, epoch.global_batch), epoch)
    return [measure_stage(t, epoch, limit_s) for epoch in kinds.values()]


def measure_stage(t: Trainer, epoch: EpochPlan, limit_s: float) -> Measured:
    """Time steps with the loader beside them, as in training, and an evaluation; on a CPU of smaller batches."""
    run, stage, device = t.run, epoch.stage, t.run.accelerator.device
    micro_batch = most = t.plan.micro_batch(epoch.stage_index)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        most = max(1, CPU_PIXELS // stage.img_size**2)
    began = time.monotonic()
    t.enter_stage(epoch)
    t.begin_epoch(epoch)
    # A resumed epoch's are not this batch's.
    t.meter.sums.zero_()
    enter_s = time.monotonic() - began
    items = (item._replace(indices=item.indices[:most]) for item in endless_items(t, epoch))
    stream = t.loader.stream(items)

    def step() -> tuple[list[Batch], float]:
        batches = list(islice(stream, t.plan.accumulation(epoch.stage_index)))
        began = time.monotonic()
        t.train_step(epoch, NO_RATE, run.cfg.momentum, iter(batches))
        return batches, finished(device) - began

    # Warms up, and chooses the fastest kernels.
    batches, first_s = step()
    images = sum(len(batch.labels) for batch in batches)
    first_loss = float(t.meter.sums[0]) / images
    seconds, pixels = list[float](), list[int]()
    began = time.monotonic()
    while len(seconds) < FEWEST or not run.votes.largest(int(time.monotonic() - began > limit_s))[0]:
        batches, step_s = step()
        seconds.append(step_s)
        pixels += [batch.item.height * batch.item.width for batch in batches]
    wait_s = _wait_s(t, stream, images, fmean(seconds))
    evaluate_s = _evaluation(t, epoch, min(most, micro_batch), limit_s / 4)
    t.meter.bar.close()
    # Rectangular batches differ in size.
    scale = fmean(item.height * item.width for item in t.batches.train_items(epoch)) / fmean(pixels)
    error = stdev(seconds) / len(seconds) ** 0.5 / fmean(seconds)
    enter_s += max(0.0, first_s - fmean(seconds))
    times = slowest(run, scale * fmean(seconds), scale * wait_s, evaluate_s, enter_s, error)
    kind = stage.img_size, stage.shape, stage.frozen, images
    return Measured(*kind, *times)._replace(first_loss=first_loss, memory_mb=peak_memory_mb(device))


def measure_save(t: Trainer) -> float:
    """Seconds that an epoch's checkpoint and plots take from the training; a collective."""
    began = 0.0
    with TemporaryDirectory() as folder:
        (Path(folder) / "training_log.csv").write_text(ONE_EPOCH)
        # Once to warm up. Drawing goes on beside the training, but holds the interpreter's lock; hashing and writing do not.
        for _ in range(2):
            began = time.monotonic()
            checkpoint.capture(t.state, t.run.accelerator, {})
            if t.run.is_main:
                write_plots(Path(folder))
        return slowest(t.run, time.monotonic() - began)[0]


def _wait_s(t: Trainer, stream: Iterator[Batch], images: int, computing_s: float) -> float:
    """Seconds that a loader which is slower than the computing keeps it waiting, for so many images."""
    # By itself, and last: behind the batches that lie ready, and hide for a while how slow it is. Were they taken before the
    # computing is timed, the workers would be making up for them meanwhile, on its cores.
    workers = t.loader.workers
    deque(islice(stream, workers * PREFETCH), maxlen=0)
    began = time.monotonic()
    loaded = sum(len(batch.labels) for batch in islice(stream, max(FEWEST, workers)))
    loading_s = (time.monotonic() - began) * images / loaded
    # Without workers, nothing is computed meanwhile.
    return max(0.0, loading_s - computing_s) if workers else loading_s


@torch.inference_mode()
def _evaluation(t: Trainer, epoch: EpochPlan, batch_size: int, limit_s: float) -> float:
    """Seconds of an evaluation of this process's validation images, from a few batches of it."""
    models = [t.state.model] if t.state.ema is None else [t.state.model, t.state.ema.module]
    items = t.batches.eval_items(epoch.stage.img_size, batch_size)
    stream, images, seconds = t.loader.stream(cycle(items)), 0, 0.0
    for number, batch in enumerate(stream):
        began = time.monotonic()
        for model in models:
            model.eval()
            with t.run.accelerator.autocast():
                one_view(model, t.augment.normalise(batch.images))
        # The first batch warms up.
        if number:
            images += len(batch.labels)
            seconds += finished(t.run.accelerator.device) - began
        if number >= FEWEST and seconds > limit_s:
            break
    wait_s = _wait_s(t, stream, images, seconds)
    return (seconds + wait_s) * sum(len(item.indices) for item in items) / images


def slowest(run: Run, *values: float) -> list[float]:
    """The largest of all processes, to a microsecond; a collective."""
    return [value / 1e6 for value in run.votes.largest(*(round(1e6 * value) for value in values))]
