"""`--dry_run`: the pre-flight. What could spoil a run is looked at, and what it will cost is measured, before it begins."""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, repeat
from typing import Literal, NamedTuple

import numpy as np
import torch

from common import UserError
from common.data.decode import DecodeError, decode_batch
from common.data.order import BatchItem, View
from common.data.sources.base import Source
from common.engine.evaluate import evaluate
from common.engine.memory import out_of_memory_advice
from common.engine.peak import TrainStep
from common.engine.recording import KEEP_CHECKPOINTS
from common.engine.setup import plan_table
from common.engine.trainer import Trainer
from common.model.pretrained_cfg import PretrainedCfg
from common.run.processes import rank0_errors
from common.run.progress import clock, peak_memory_mb
from common.run.records import wandb_mode
from common.scheduling import EpochPlan, Plan
from common.scheduling.recipe import STEPS_PER_EPOCH

DECODED, HASHED = 200, 5000  # images of each split that are looked at
# Seconds for the timed steps of a stage, and for its loader; images of a batch that the loader is timed with.
STEPS_S, LOADER_S, LOADED = 2.0, 1.5, 64
MOST_STEPS, EVAL_BATCHES = 20, 2
# Pixels of a timed batch on a CPU, whose time grows with them; a GPU takes whole batches, of which it tells the memory.
CPU_PIXELS = 16 * 224 * 224
# So small that no weight moves; some optimizers divide by their rate.
NO_RATE = 1e-9
FULL = 0.95  # share of a GPU's memory at which little is left for fragments
FEWEST_OF_A_CLASS = 10


class Finding(NamedTuple):
    level: Literal["ok", "warning", "error"]
    sentence: str

    def __str__(self) -> str:
        return f"{self.level:<9}{self.sentence}"


def judged(bad: bool, text: str, remedy: str) -> Finding:
    """`text` alone where all is well, a warning with what to do elsewhere."""
    return Finding("warning", f"{text}; {remedy}") if bad else Finding("ok", text)


@dataclass(frozen=True)
class StageCost:
    """What a stage costs on this machine, all processes together.

    Attributes:
        step_s: seconds of an optimizer step whose images are there.
        eval_s: seconds of one evaluation whose images are there, raw and EMA weights.
        loader_rate: images/s of the loader while nothing else works.
        first_loss: mean loss of the first batch, as the weights are.
        memory_mb: most that this process has held, the GPU's memory if it has one.
    """

    step_s: float
    eval_s: float
    loader_rate: float
    first_loss: float
    memory_mb: float


def preflight(t: Trainer, train_step: TrainStep, source: PretrainedCfg | None) -> None:
    """Print the plan, what was found, and what the run will cost; nothing is written. A collective.

    Raises:
        SystemExit: with 2, on all processes, if something is an error.
    """
    run, cfg, found = t.run, t.run.cfg, list[Finding]()

    def tell(findings: Iterator[Finding]) -> None:
        for finding in findings:
            print(finding, flush=True)
            found.append(finding)

    with rank0_errors():
        if run.is_main:
            print(plan_table(cfg, t.plan, t.batches))
            tell(checks(t, source))
            if any(finding.level == "error" for finding in found):
                conclude(found)
    first_epochs = {epoch.stage_index: epoch for epoch in reversed(list(t.plan.epochs()))}
    costs = [measure(t, epoch, train_step) for _, epoch in sorted(first_epochs.items())]
    with rank0_errors():
        if run.is_main:
            tell(verdicts(t, costs))
            conclude(found)


def conclude(found: list[Finding]) -> None:
    """Count what was found; SystemExit with 2 if there are errors."""
    errors, warnings = (sum(finding.level == level for finding in found) for level in ("error", "warning"))
    print(
        f"pre-flight: {errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}",
        flush=True,
    )
    if errors:
        raise SystemExit(2)


# --- what can be seen at rest --------------------------------------------------------------------------------------


def checks(t: Trainer, source: PretrainedCfg | None) -> Iterator[Finding]:
    """What data, model and surroundings show before a step; for the main process."""
    cfg, plan, train, val = t.run.cfg, t.plan, t.batches.train, t.batches.val
    parameters = sum(p.numel() for p in t.state.model.parameters()) / 1e6
    sizes = ", ".join(map(str, sorted({stage.img_size for stage in plan.stages})))
    yield Finding(
        "ok", f"model: {cfg.model}, {parameters:.1f} million parameters, takes images of {sizes} px"
    )
    whose = "the weights' own" if source else "ImageNet's, as no weights tell theirs"
    yield Finding("ok", f"normalisation: mean {t.model_cfg.mean}, std {t.model_cfg.std}: {whose}")
    yield classes(train)
    if train.group_rows is None:
        yield readable((train, val), cfg.skip_unreadable)
        yield duplicates(train, val)
    else:
        yield Finding("ok", "images: streamed shards are not sampled; they are met as they come")
    yield steps(plan)
    yield from surroundings(t)


def classes(train: Source) -> Finding:
    """How many images the classes have."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    most = f" to {counts.max():,}" if counts.max() > counts.min() else ""
    text = f"classes: {len(counts)}, the same in train and val, {counts.min():,}{most} training images each"
    rare = train.classes[int(counts.argmin())]
    remedy = f"{rare} can hardly be learnt: add images to it in --data_dir"
    return judged(counts.min() < FEWEST_OF_A_CLASS, text, remedy)


def sample(source: Source, most: int) -> list[int]:
    """Indices of images spread evenly over a split."""
    return np.linspace(0, len(source) - 1, min(len(source), most)).astype(int).tolist()


def readable(sources: tuple[Source, Source], skip_unreadable: bool) -> Finding:
    """Decode some images of both splits as training does."""
    pixels = torch.empty((1, 3, 32, 32), dtype=torch.uint8, memory_format=torch.channels_last)
    broken, looked_at = list[str](), 0
    for source in sources:
        for index in sample(source, DECODED):
            looked_at += 1
            item = BatchItem(0, np.array([index]), 32, 32, 0, View(scale=None))
            try:
                decode_batch([source.read(index, 32)], item, 0, pixels)
            except (DecodeError, OSError) as error:
                broken.append(f"{source.describe(index)} ({error})")
    text = f"images: {looked_at - len(broken)} of {looked_at} sampled ones can be read"
    if not broken:
        return Finding("ok", text)
    text += f", not {broken[0]}"
    if skip_unreadable:
        return Finding("warning", f"{text}; others stand in for such (--skip_unreadable)")
    return Finding("error", f"{text}; remove such, or pass --skip_unreadable")


def duplicates(train: Source, val: Source) -> Finding:
    """Look for files of the same bytes in both splits: validation would praise what was learnt by heart."""

    def digests(source: Source, most: int) -> Iterator[tuple[bytes, int]]:
        for index in sample(source, most):
            try:
                yield hashlib.blake2b(source.read(index, 1 << 20).data, digest_size=16).digest(), index
            except OSError:
                continue  # `readable` names those

    known = dict(digests(train, HASHED))
    twice = [(known[digest], index) for digest, index in digests(val, HASHED) if digest in known]
    text = f"duplicates: {len(twice)} in {min(len(val), HASHED):,} of val and {min(len(train), HASHED):,} of train"
    names = f"{val.describe(twice[0][1])} is {train.describe(twice[0][0])}" if twice else ""
    return judged(bool(twice), text, f"{names}; take them out of --data_dir")


def steps(plan: Plan) -> Finding:
    """Are there enough optimizer steps in an epoch?"""
    fewest = min(map(plan.steps_per_epoch, range(len(plan.stages))))
    remedy = f"{STEPS_PER_EPOCH} are better: lower --batch_size, if there are images enough"
    return judged(fewest < STEPS_PER_EPOCH, f"steps: {fewest:,} or more per epoch", remedy)


def surroundings(t: Trainer) -> Iterator[Finding]:
    """S3 and trackers, without starting a run on either."""
    cfg = t.run.cfg
    if cfg.s3:
        from common.run.s3 import probe

        try:
            trouble = probe(cfg.s3)
        except UserError as error:
            yield Finding("error", str(error))
        else:
            text = (
                f"out of reach ({trouble}); training would go on and retry (--s3)" if trouble else "answers"
            )
            yield Finding("warning" if trouble else "ok", f"S3: {cfg.s3} {text}")
    text = f"trackers: {cfg.trackers}"
    if "wandb" in cfg.trackers:
        mode = wandb_mode()
        text += f"; W&B is {mode}" + (
            "; `wandb login` or --trackers change that" if mode == "offline" else ""
        )
    yield Finding("ok", text)


# --- what has to be tried ------------------------------------------------------------------------------------------


def measure(t: Trainer, epoch: EpochPlan, train_step: TrainStep) -> StageCost:
    """Time a stage: its loader, some warm steps at next to no learning rate, some batches of an evaluation.

    A collective. On a CPU batches are cut down, and their time is scaled up; weights stay, momentum and BatchNorm's
    statistics do not.
    """
    run, micro_batch = t.run, t.plan.micro_batch(epoch.stage_index)
    device = run.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    t.enter_stage(epoch)
    t.begin_epoch(epoch)
    loader_rate = time_loader(t, epoch)
    most = max(1, micro_batch if device.type == "cuda" else CPU_PIXELS // epoch.stage.img_size**2)
    batch = next(t.loader.stream(_items(t, epoch, most)))

    def timed(number: int) -> float:
        began = time.perf_counter()
        for _ in range(number):
            train_step(t, epoch, NO_RATE, run.cfg.momentum, repeat(batch))
        # Waits for the device.
        t.meter.sums.tolist()
        return time.perf_counter() - began

    with out_of_memory_advice(epoch, micro_batch):
        timed(1)
        first_loss = float(t.meter.sums[0]) / (
            len(batch.labels) * run.accelerator.gradient_accumulation_steps
        )
        # All processes have to take the same number of steps.
        slowest_ms = run.votes.largest(math.ceil(1000 * timed(1)))[0]
        number = min(max(int(1000 * STEPS_S / slowest_ms), 1), MOST_STEPS)
        step_s = timed(number) / number * micro_batch / len(batch.labels)
        eval_s = time_evaluation(t, epoch, most)
    t.meter.bar.close()
    return StageCost(step_s, eval_s, loader_rate, first_loss, peak_memory_mb(device))


def _items(t: Trainer, epoch: EpochPlan, most: int) -> Iterator[BatchItem]:
    """The stage's micro-batches for ever, cut down to `most` images."""
    passes = (replace(epoch, index=index) for index in count(epoch.index))
    for item in chain.from_iterable(map(t.batches.train_items, passes)):
        yield item._replace(indices=item.indices[:most])


def time_loader(t: Trainer, epoch: EpochPlan) -> float:
    """Images/s of all processes' loaders, in batches that are small where the stage's are large; a collective."""
    stream = t.loader.stream(_items(t, epoch, LOADED))
    # The first batch of every worker is late.
    for _ in range(max(1, t.loader.workers)):
        next(stream)
    images, began = 0, time.perf_counter()
    for batch in stream:
        images += len(batch.labels)
        if time.perf_counter() > began + LOADER_S:
            break
    rate = images / (time.perf_counter() - began)
    # Training goes at the pace of the slowest.
    return -t.run.votes.largest(-int(rate))[0] * t.plan.processes


def time_evaluation(t: Trainer, epoch: EpochPlan, most: int) -> float:
    """Seconds of an evaluation whose images are there, from its first batches of up to `most` images; a collective."""
    state, accelerator, seconds = t.state, t.run.accelerator, 0.0
    models = [state.model] if state.ema is None else [state.model, state.ema.module]
    items = t.batches.eval_items(epoch.stage.img_size, min(most, t.plan.micro_batch(epoch.stage_index)))
    loaded = list(t.loader.stream(items[:EVAL_BATCHES]))
    own = torch.tensor(sum(len(batch.labels) for batch in loaded), device=accelerator.device)
    images = int(accelerator.reduce(own, "sum"))
    # Once to warm up.
    for _ in range(2):
        began = time.perf_counter()
        evaluate(models, iter(loaded), len(loaded), images, accelerator, t.augment)
        seconds = time.perf_counter() - began
    return seconds * len(t.batches.val) / images


def verdicts(t: Trainer, costs: list[StageCost]) -> Iterator[Finding]:
    """What the measurements say; for the main process."""
    yield labels(costs[0].first_loss, len(t.batches.train.classes))
    for index, cost in enumerate(costs):
        yield pace(t, index, cost)
    yield memory(t, costs)
    yield disk(t)
    yield Finding("ok", duration(t, costs))


def labels(loss: float, num_classes: int) -> Finding:
    """Is the first loss what a network that knows nothing has, the logarithm of the number of classes?"""
    chance = math.log(num_classes)
    text = f"first loss: {loss:.3g}, and by chance it is ln {num_classes} = {chance:.3g}"
    if not math.isfinite(loss):
        return Finding("error", f"{text}; check the images in --data_dir, or try --mixed_precision no")
    text += "; the weights know the classes already" if loss < 0.7 * chance else ""
    return judged(loss > 1.5 * chance + 1, text, "check the classes in --data_dir, and what --weights names")


def pace(t: Trainer, index: int, cost: StageCost) -> Finding:
    """Does the loader keep up with the device in a stage?"""
    rate = t.plan.global_batches[index] / cost.step_s
    ratio = cost.loader_rate / rate
    text = f"stage {index + 1}, {t.plan.stages[index].img_size} px: training takes {rate:,.0f} images/s, {cost.step_s:.3g} s a step;"
    text += f" the loader {'keeps up' if ratio >= 1 else 'starves the device'}: {ratio:.2g} x"
    pyramid = "" if t.batches.train.prepared else " or prepare a pyramid (python -m common.tools.prepare)"
    return judged(ratio < 1, text, f"raise --workers{pyramid}")


def memory(t: Trainer, costs: list[StageCost]) -> Finding:
    """The most a stage holds, against what the GPU has."""
    most = max(cost.memory_mb for cost in costs)
    device = t.run.accelerator.device
    if device.type != "cuda":
        return Finding("ok", f"memory: {most / 1000:.2g} GB in this process, loader processes come on top")
    total = torch.cuda.get_device_properties(device).total_memory / 2**20
    stages = ", ".join(f"{cost.memory_mb / 1000:.2g}" for cost in costs)
    text = f"memory: {stages} GB by stage, of {total / 1000:.2g}"
    return judged(most > FULL * total, text, "lower --batch_size or pass --auto_batch")


def disk(t: Trainer) -> Finding:
    """Is there room for the checkpoints: the newest, the best, one that is being written, and those of --keep_every?"""
    run, state = t.run, t.state
    folder = next(path for path in (run.folder.absolute(), *run.folder.absolute().parents) if path.exists())
    tensors = [*state.model.state_dict().values()] * (1 if state.ema is None else 2)
    tensors += [v for s in state.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    one = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9
    kept = KEEP_CHECKPOINTS + 2 + (t.plan.total_epochs // run.cfg.keep_every if run.cfg.keep_every else 0)
    free = shutil.disk_usage(folder).free / 1e9
    text = f"disk: {kept} checkpoints of {one:.2g} GB, {free:,.3g} GB free in {folder} (--output)"
    if not os.access(folder, os.W_OK):
        return Finding("error", f"disk: {folder} cannot be written; choose another --output")
    if kept * one > free:
        return Finding("error", f"{text}; choose another --output or a larger --keep_every")
    return judged(2 * kept * one > free, text, "little is left beside them: choose another --output")


def duration(t: Trainer, costs: list[StageCost]) -> str:
    """Time of the run that is left, and of its stages."""
    plan, cfg, progress = t.plan, t.run.cfg, t.state.progress
    # Workers load beside an accelerator's work; a CPU has to do both.
    beside = t.run.accelerator.device.type != "cpu" and t.loader.workers > 0
    together: Callable[..., float] = max if beside else lambda *parts: sum(parts)
    seconds = [0.0] * len(costs)
    for epoch in plan.epochs(progress.epochs_done):
        cost = costs[epoch.stage_index]
        images = epoch.steps * epoch.global_batch
        seconds[epoch.stage_index] += together(epoch.steps * cost.step_s, images / cost.loader_rate)
        seconds[epoch.stage_index] += together(cost.eval_s, len(t.batches.val) / cost.loader_rate)
    found = cfg.lr == "auto" and progress.peak_lr == 0
    finder = cfg.lr_finder_iterations * costs[0].step_s if found else 0.0
    parts = [f"stage {index + 1} {clock(stage_s)}" for index, stage_s in enumerate(seconds)]
    parts += [f"LR finder {clock(finder)}"] if finder else []
    whole_s = sum(seconds) + finder
    price = f", {whole_s / 3600 * cfg.usd_per_hour:.2f} USD" if cfg.usd_per_hour else ""
    return f"time: about {clock(whole_s)}{price} with evaluation ({', '.join(parts)})"
