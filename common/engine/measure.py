"""What a run's stages take on this machine, tried for a few seconds each; the pre-flight and `--budget` forecast from it."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

from common.data.loader import PREFETCH, Batch
from common.data.order import BatchItem
from common.engine.evaluate import one_view
from common.engine.memory import finished
from common.engine.peak import endless_items
from common.engine.trainer import Trainer
from common.run import checkpoint
from common.run.plots import write_plots
from common.run.progress import peak_memory_mb
from common.run.run import Run
from common.scheduling import EpochPlan, Plan
from common.scheduling.budget import Costs, Measured

# Steps that are timed at least.
FEWEST = 2
# Images of a timed micro-batch on a CPU, whose time grows with them from about half of that on (docs/budget.md); a GPU takes whole ones, of which
# it tells the memory.
CPU_IMAGES = 32
# What is compared with a batch is so many times smaller: from a quarter on a CPU's time hardly grew, and forecasts were short.
PART = 2
# How far a machine's speed drifts from its calibration to the mean of a run, one standard deviation, relative. A CPU's as in 16 forecasts of
# minutes on two shared machines (docs/budget.md); a GPU's is assumed. Steps that follow each other agree, and do not tell it.
CPU_DRIFT, GPU_DRIFT = 0.1, 0.02
# So small that no weight moves; some optimizers divide by their rate.
NO_RATE = 1e-9
ONE_EPOCH = (
    "epoch,stage,img_size,lr,momentum,train_loss,val_loss,train_top1,val_top1,val_top5,total_s\n"
    "1,1,64,0.1,0.9,2,2,30,30,60,10\n"
)


def measure_costs(t: Trainer, limit_s: float, start_s: float, epochs: Sequence[EpochPlan] = ()) -> Costs:
    """What the kinds of stage of these epochs, or of the plan, take: steps for about `limit_s` seconds each. A collective."""
    epochs = epochs or list(t.plan.epochs())
    measured = measure(t, limit_s, epochs)
    beside_s = measure_beside_images(t, epochs[0], measured[0])
    drift = CPU_DRIFT if t.run.accelerator.device.type == "cpu" else GPU_DRIFT
    return Costs(tuple(measured), start_s, save_s=measure_save(t), beside_s=beside_s, drift=drift)


def measure(t: Trainer, limit_s: float, epochs: Iterable[EpochPlan]) -> list[Measured]:
    """Train and evaluate each kind of stage of these epochs for about `limit_s` seconds; a collective.

    Weights stay, momentum and BatchNorm's statistics do not. Times are the slowest process's.
    """
    kinds: dict[tuple, EpochPlan] = {}
    for epoch in epochs:
        stage = epoch.stage
        kinds.setdefault((stage.img_size, stage.shape, stage.frozen, epoch.global_batch), epoch)
    return [measure_stage(t, epoch, limit_s) for epoch in kinds.values()]


def measure_stage(t: Trainer, epoch: EpochPlan, limit_s: float) -> Measured:
    """Time steps with the loader beside them, as in training, and an evaluation; on a CPU of smaller batches."""
    run, stage, device = t.run, epoch.stage, t.run.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images = timed_images(t.plan, epoch, device)
    micro_batch = images // t.plan.accumulation(epoch.stage_index)
    began = time.monotonic()
    t.enter_stage(epoch)
    t.begin_epoch(epoch)
    # A resumed epoch's are not this batch's.
    t.meter.sums.zero_()
    enter_s = time.monotonic() - began
    stream = t.loader.stream(_cut(endless_items(t, epoch), micro_batch))
    # Warms up, and chooses the fastest kernels.
    pixels = _mean_pixels(t, epoch)
    first_pace = _pace(t, stream, epoch, pixels)
    first_loss = float(t.meter.sums[0]) / images
    paces = list[float]()
    began = time.monotonic()
    while len(paces) < FEWEST or not run.votes.largest(int(time.monotonic() - began > limit_s))[0]:
        paces.append(_pace(t, stream, epoch, pixels))
    t.meter.bar.close()
    step_s, loading_s = images * fmean(paces), _loading_s(t, stream)
    # Without workers, nothing is computed meanwhile.
    wait_s = max(0.0, images * loading_s - step_s * bool(t.loader.workers))
    enter_s += max(0.0, images * first_pace - step_s)
    times = step_s, wait_s, _evaluation_s(t, epoch, micro_batch, loading_s), enter_s
    kind = stage.img_size, stage.shape, stage.frozen, images
    return Measured(*kind, *slowest(run, *times))._replace(
        first_loss=first_loss, memory_mb=peak_memory_mb(device)
    )


def measure_beside_images(t: Trainer, epoch: EpochPlan, whole: Measured) -> float:
    """Seconds of an optimizer step that do not grow with its images: by one of fewer images than were measured. A collective."""
    accumulation = t.plan.accumulation(epoch.stage_index)
    part = whole.images // accumulation // PART
    # BatchNorm takes no single image; and another batch would be compiled anew.
    if part < 2 or t.run.cfg.compile:
        return 0.0
    t.enter_stage(epoch)
    t.begin_epoch(epoch)
    stream = t.loader.stream(_cut(endless_items(t, epoch), part))
    pixels = _mean_pixels(t, epoch)
    paces = [_pace(t, stream, epoch, pixels) for _ in range(1 + FEWEST)]
    t.meter.bar.close()
    (step_s,) = slowest(t.run, part * accumulation * fmean(paces[1:]))
    share = whole.images / part / accumulation
    return min(step_s, max(0.0, (share * step_s - whole.step_s) / (share - 1)))


def timed_images(plan: Plan, epoch: EpochPlan, device: torch.device) -> int:
    """Images of a step, per process, when it is timed."""
    whole = plan.micro_batch(epoch.stage_index)
    timed = whole if device.type == "cuda" else min(whole, CPU_IMAGES)
    return timed * plan.accumulation(epoch.stage_index)


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


def _cut(items: Iterable[BatchItem], images: int) -> Iterator[BatchItem]:
    return (item._replace(indices=item.indices[:images]) for item in items)


def _mean_pixels(t: Trainer, epoch: EpochPlan) -> float:
    """Of a training image: rectangular batches differ in size."""
    return fmean(item.height * item.width for item in t.batches.train_items(epoch))


def _pace(t: Trainer, stream: Iterator[Batch], epoch: EpochPlan, image_pixels: float) -> float:
    """Seconds of an optimizer step on the next micro-batches by image, if images had so many pixels."""
    batches = list(islice(stream, t.plan.accumulation(epoch.stage_index)))
    began = time.monotonic()
    t.train_step(epoch, NO_RATE, t.run.cfg.momentum, iter(batches))
    seconds = finished(t.run.accelerator.device) - began
    return seconds * image_pixels / sum(len(b.labels) * b.item.height * b.item.width for b in batches)


def _loading_s(t: Trainer, stream: Iterator[Batch]) -> float:
    """Seconds by image of the loader alone."""
    # Behind the batches that lie ready, and hide for a while how slow it is. Were they taken before the computing is timed, the
    # workers would be making up for them meanwhile, on its cores.
    workers = t.loader.workers
    deque(islice(stream, workers * PREFETCH), maxlen=0)
    began = time.monotonic()
    loaded = sum(len(batch.labels) for batch in islice(stream, max(FEWEST, workers)))
    return (time.monotonic() - began) / loaded


@torch.inference_mode()
def _evaluation_s(t: Trainer, epoch: EpochPlan, batch_size: int, loading_s: float) -> float:
    """Seconds of an evaluation of this process's validation images, whose loading takes so long by image, from one batch of it."""
    items = t.batches.eval_items(epoch.stage.img_size, batch_size)
    seconds = 0.0
    # The first batch warms up.
    for batch in t.loader.stream(islice(cycle(items), 2)):
        began = time.monotonic()
        for model in t.state.models.values():
            model.eval()
            with t.run.accelerator.autocast():
                one_view(model, t.augment.normalise(batch.images))
        seconds = (finished(t.run.accelerator.device) - began) / len(batch.labels)
    by_image = max(seconds, loading_s) if t.loader.workers else seconds + loading_s
    return by_image * sum(len(item.indices) for item in items)


def slowest(run: Run, *values: float) -> list[float]:
    """The largest of all processes, to a microsecond; a collective."""
    return [value / 1e6 for value in run.votes.largest(*(round(1e6 * value) for value in values))]
