"""`--dry_run`: the pre-flight. What could spoil a run is looked at, and what it will cost is measured, before it begins."""

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from common.data.decode import DecodeError, decode_one
from common.data.order import View
from common.data.sources.base import Source
from common.data.sources.cache import fingerprint_of
from common.engine.evaluate import GRID_EVALUATIONS
from common.engine.measure import measure_costs
from common.engine.probe import fit_evaluations, head_to_fit
from common.engine.recording import KEEP_CHECKPOINTS
from common.engine.setup import sample
from common.engine.trainer import Trainer
from common.model.pretrained_cfg import PretrainedCfg
from common.run.processes import rank0_errors
from common.run.progress import LOADER_BOUND, clock
from common.run.records import wandb_mode
from common.scheduling import Rates, batch_power, known_peak
from common.scheduling.budget import Costs, Measured, seconds_by_part
from common.scheduling.recipe import STEPS_PER_EPOCH

DECODED, HASHED = 200, 5000  # images of each split that are looked at
STEPS_S = 2.0  # seconds for the timed steps of a stage
FULL = 0.95  # share of a GPU's memory at which little is left for fragments
FEWEST_OF_A_CLASS = 10


class Finding(NamedTuple):
    level: str  # ok, warning or error
    sentence: str


def judged(bad: bool, text: str, remedy: str) -> Finding:
    """`text` alone where all is well, a warning with what to do elsewhere."""
    return Finding("warning", f"{text}; {remedy}") if bad else Finding("ok", text)


def preflight(t: Trainer, source: PretrainedCfg | None) -> None:
    """Print the plan, what was found, and what the run will cost; nothing is written. A collective.

    Raises:
        SystemExit: with 2, on all processes, if something is an error.
    """
    start_s, found = time.monotonic() - t.run.started, Counter[str]()
    with rank0_errors():
        if t.run.is_main:
            print(plan_table(t))
            tell(checks(t, source), found)
            if found["error"]:
                conclude(found)
    costs = measure_costs(t, STEPS_S, start_s)
    with rank0_errors():
        if t.run.is_main:
            stages = costs.by_stage(t.plan)
            first = labels(stages[0].first_loss, len(t.batches.train.classes), t.run.cfg.pretrained)
            paces = [pace(t, index, measured) for index, measured in enumerate(stages)]
            tell([first, *paces, memory(t, stages), disk(t), Finding("ok", duration(t, costs))], found)
            conclude(found)


def tell(findings: Iterable[Finding], found: Counter[str]) -> None:
    """Print what is found when it is found, and count it by level."""
    for level, sentence in findings:
        print(f"{level:<9}{sentence}", flush=True)
        found[level] += 1


def conclude(found: Counter[str]) -> None:
    """Say how much was found; SystemExit with 2 if there are errors."""
    errors, warnings = found["error"], found["warning"]
    print(f"pre-flight: {errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    if errors:
        raise SystemExit(2)


def plan_table(t: Trainer) -> str:
    """The plan in words and numbers."""
    cfg, plan, train, val = t.run.cfg, t.plan, t.batches.train, t.batches.val
    peak = known_peak(vars(cfg), plan.global_batches[0])
    note = "in force" if peak else "relative to the LR finder's peak"
    seen = sum(epoch.steps * epoch.global_batch for epoch in plan.epochs())
    processes = f"{plan.processes} process{'es' * (plan.processes > 1)}"
    parts = [
        f"{len(train):,} training and {len(val):,} validation images, {len(train.classes)} classes, {processes}",
        Rates(plan, cfg, peak or 1.0, batch_power(vars(cfg))).table(),
        t.batches.bucket_tables(),
        f"{plan.total_epochs} epochs, {plan.total_steps:,} optimizer steps, {seen:,} images to be seen; "
        f"learning rates are {note}",
    ]
    return "\n".join(filter(None, parts))


def checks(t: Trainer, source: PretrainedCfg | None) -> Iterator[Finding]:
    """What data, model and surroundings show before a step; for the main process."""
    cfg, plan, train, val = t.run.cfg, t.plan, t.batches.train, t.batches.val
    parameters = sum(p.numel() for p in t.state.model.parameters()) / 1e6
    sizes = ", ".join(map(str, sorted({stage.img_size for stage in plan.stages})))
    yield Finding("ok", f"model: {cfg.model}, {parameters:.1f} million parameters, images of {sizes} px")
    whose = "this run's" if t.state.progress.step else "ImageNet's, as no weights tell theirs"
    whose = "the weights' own" if source else whose
    yield Finding("ok", f"normalisation: mean {t.model_cfg.mean}, std {t.model_cfg.std}: {whose}")
    counts = np.bincount(train.labels, minlength=len(train.classes))
    most = f" to {counts.max():,}" if counts.max() > counts.min() else ""
    text = f"classes: {len(counts)}, the same in train and val, {counts.min():,}{most} training images each"
    remedy = f"{train.classes[counts.argmin()]} can hardly be learnt: add images to it in --data_dir"
    yield judged(counts.min() < FEWEST_OF_A_CLASS, text, remedy)
    if train.group_rows is None:
        yield readable((train, val), cfg.skip_unreadable)
        yield duplicates(train, val)
    else:
        yield Finding("ok", "images: streamed shards are not sampled; they are met as they come")
    fewest = min(map(plan.steps_per_epoch, range(len(plan.stages))))
    remedy = f"{STEPS_PER_EPOCH} are better: lower --batch_size, if there are images enough"
    yield judged(fewest < STEPS_PER_EPOCH, f"steps: {fewest:,} or more per epoch", remedy)
    if cfg.s3:
        from common.run.s3 import probe

        if trouble := probe(cfg.s3):
            late = "training would go on and retry (--s3)"
            yield Finding("warning", f"S3: {cfg.s3} is out of reach ({trouble}); {late}")
        else:
            yield Finding("ok", f"S3: {cfg.s3} answers and takes writes")
    mode = f"; W&B is {wandb_mode()}" if "wandb" in cfg.trackers else ""
    yield Finding("ok", f"trackers: {cfg.trackers}{mode}")


def readable(sources: tuple[Source, Source], skip_unreadable: bool) -> Finding:
    """Decode some images of both splits as training does."""
    looked_at = [(source, index) for source in sources for index in sample(source, DECODED)]
    broken = list[str]()
    for source, index in looked_at:
        try:
            decode_one(source.read(index, 32), 32, 32, View(scale=None))
        except (DecodeError, OSError) as error:
            broken.append(f"{source.describe(index)} ({error})")
    text = f"images: {len(looked_at) - len(broken)} of {len(looked_at)} sampled ones can be read"
    if not broken:
        return Finding("ok", text)
    text += f", not {broken[0]}"
    if skip_unreadable:
        return Finding("warning", f"{text}; others stand in for such (--skip_unreadable)")
    return Finding("error", f"{text}; remove such, or pass --skip_unreadable")


def duplicates(train: Source, val: Source) -> Finding:
    """Look for files of the same bytes in both splits: validation would praise what was learnt by heart."""

    def digests(source: Source) -> Iterator[tuple[str, int]]:
        for index in sample(source, HASHED):
            # `readable` names those.
            with suppress(OSError):
                yield fingerprint_of(source.read(index, 1 << 20)), index

    known = dict(digests(train))
    twice = [(known[digest], index) for digest, index in digests(val) if digest in known]
    text = f"duplicates: {len(twice)} in {min(len(val), HASHED):,} of val and {min(len(train), HASHED):,} of train"
    names = f"{val.describe(twice[0][1])} is {train.describe(twice[0][0])}" if twice else ""
    return judged(bool(twice), text, f"{names}; take them out of --data_dir")


def labels(loss: float, num_classes: int, pretrained: bool) -> Finding:
    """Is the first loss what a network that knows nothing has, the logarithm of the number of classes?"""
    chance = math.log(num_classes)
    text = f"first loss: {loss:.3g}, and by chance it is ln {num_classes} = {chance:.3g}"
    if not math.isfinite(loss):
        return Finding("error", f"{text}; check the images in --data_dir, or try --mixed_precision no")
    text += "; the weights know the classes already" if loss < 0.7 * chance else ""
    # A new head on trained weights may be far above it: some networks begin with large random heads.
    return judged(not pretrained and loss > 1.5 * chance + 1, text, "check the classes in --data_dir")


def pace(t: Trainer, index: int, measured: Measured) -> Finding:
    """Does the loader keep up with the device in a stage?"""
    rate = t.plan.global_batches[index] / measured.step_s
    waiting = measured.wait_s / (measured.wait_s + measured.step_s)
    slow = waiting > LOADER_BOUND
    text = (
        f"stage {index + 1}, {measured.img_size} px: training takes {rate:,.0f} images/s, {measured.step_s:.3g} s a step; "
        f"the loader {'starves the device' if slow else 'keeps up'}, {waiting:.0%} of the time is waiting for it"
    )
    pyramid = "" if t.batches.train.prepared else " or prepare a pyramid (python -m common.tools.prepare)"
    return judged(slow, text, f"raise --workers{pyramid}")


def memory(t: Trainer, stages: list[Measured]) -> Finding:
    """The most a stage holds, against what the GPU has."""
    held = ", ".join(f"{measured.memory_mb / 1000:.2g}" for measured in stages)
    text, device = f"memory: {held} GB by stage", t.run.accelerator.device
    if device.type != "cuda":
        return Finding("ok", f"{text}, loader processes come on top")
    total = torch.cuda.get_device_properties(device).total_memory / 2**20
    full = max(measured.memory_mb for measured in stages) > FULL * total
    return judged(full, f"{text}, of {total / 1000:.2g}", "lower --batch_size or pass --auto_batch")


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
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("error", f"disk: {folder} cannot be written; choose another --output")
    if kept * one > free:
        return Finding("error", f"{text}; choose another --output or a larger --keep_every")
    return judged(2 * kept * one > free, text, "little is left beside them: choose another --output")


def duration(t: Trainer, costs: Costs) -> str:
    """Time of the run that is left, and of its parts."""
    plan, cfg, progress = t.plan, t.run.cfg, t.state.progress
    known = progress.peak_lr or known_peak(vars(cfg), plan.global_batches[0])
    sweep = 0 if known else cfg.lr_finder_iterations
    evaluations = cfg.final_eval * GRID_EVALUATIONS
    if cfg.pretrained and not progress.step and head_to_fit(t):
        evaluations += fit_evaluations(t.batches.train, t.batches.val)
    parts = seconds_by_part(plan, costs, sweep, evaluations, progress.epochs_done)
    whole_s = sum(parts.values())
    price = f", {whole_s / 3600 * cfg.usd_per_hour:.2f} USD" if cfg.usd_per_hour else ""
    said = ", ".join(f"{part} {clock(seconds)}" for part, seconds in parts.items() if round(seconds))
    return f"time: about {clock(whole_s)}{price} with evaluation ({said})"
