"""The one loop. It runs any list of stages, and nothing in it knows which strategy that is."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import nn

from common.data.loader import Batch
from common.data.sources.base import Source
from common.engine.calibrate import within_budget
from common.engine.doctor import preflight
from common.engine.evaluate import final_grid
from common.engine.memory import out_of_memory_advice
from common.engine.peak import settle_rates
from common.engine.profiler import traced
from common.engine.recording import begin, finish, out_of_patience, record, save
from common.engine.setup import adapt_settings, assembled
from common.engine.trainer import Trainer
from common.model.pretrained_cfg import PretrainedCfg
from common.run.processes import Interrupted
from common.run.run import Run
from common.scheduling import EpochPlan, Rates


def fit(
    run: Run,
    model: nn.Module,
    train: Source,
    val: Source,
    source: PretrainedCfg | None = None,
    start: Callable[[Trainer], None] | None = None,
) -> None:
    """Train `model` through the run's stages; evaluate, record and save as it goes.

    Args:
        source: what weights that it starts from expect of their images.
        start: called once, before the learning rate is found and the first step taken.
    """
    forecast = adapt_settings(run, model, train, partial(within_budget, run, model, train, val, train_step))
    with assembled(run, model, train, val, source) as trainer:
        if run.cfg.dry_run:
            preflight(trainer, train_step, source)
            return
        begin(trainer, forecast)
        begun = trainer.state.progress.step
        if start and not begun:
            start(trainer)
        rates = settle_rates(trainer, train_step)
        run.log.info("%s", "\n".join(filter(None, (rates.table(), trainer.batches.bucket_tables()))))
        train_epochs(trainer, rates)
        if run.cfg.final_eval:
            final_grid(run, trainer.state, trainer.augment, trainer.batches, trainer.loader)
            trainer.lap("evaluate")
    finish(trainer, trained=trainer.state.progress.step > begun)


def train_epochs(t: Trainer, rates: Rates) -> None:
    """Train, evaluate and record every epoch that is left."""
    run, progress = t.run, t.state.progress
    stream = t.loader.stream(t.batches.run_items(progress.epochs_done, progress.step))
    try:
        for epoch in t.plan.epochs(progress.epochs_done):
            if out_of_patience(run.cfg, progress):
                break
            t.enter_stage(epoch)
            train_epoch(t, epoch, rates, stream)
            record(t, epoch, rates, t.evaluate(epoch, stream) if epoch.evaluated else [])
    except Interrupted:
        save(t)
        run.background.drain()
        raise


def train_epoch(t: Trainer, epoch: EpochPlan, rates: Rates, stream: Iterator[Batch]) -> None:
    """Train from where the progress stands to the end of the epoch."""
    run, state, progress = t.run, t.state, t.state.progress
    t.begin_epoch(epoch)
    last_step = epoch.first_step + epoch.steps - 1
    with out_of_memory_advice(epoch, t.plan.micro_batch(epoch.stage_index)):
        for step in traced(run, range(progress.step, last_step + 1)):
            train_step(t, epoch, rates.lr(step), rates.momentum(step), stream)
            progress.step += 1
            progress.images_seen += epoch.global_batch
            if state.ema is not None:
                state.ema.update(state.model, step=progress.step)
            t.meter.tick()
            # Between two looks nothing waits for the device.
            if step < last_step and run.look_due(progress.step) and t.look():
                save(t)
    t.look()
    t.lap_training(waited=t.meter.waited)


def train_step(t: Trainer, epoch: EpochPlan, lr: float, momentum: float, stream: Iterator[Batch]) -> None:
    """One optimizer step on the next micro-batches of the stream."""
    accelerator, optimizer, clip_grad = t.run.accelerator, t.optimizer, t.run.cfg.clip_grad
    set_rates(optimizer, lr, momentum)
    for batch in islice(stream, accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(t.net):
            images, targets = t.augment(
                batch.images, batch.labels, batch.item, mix=epoch.mix, strength=epoch.stage.strength
            )
            # Autocast in, float32 out: prepare_model saw to it.
            logits = t.net(images)
            loss = t.loss(logits, targets)
            # Scales for fp16, and divides by the accumulation.
            accelerator.backward(loss)
            if clip_grad and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(t.net.parameters(), clip_grad)
            with t.counting_skips():
                optimizer.step()
            optimizer.zero_grad()
        t.meter.add(loss.detach(), logits.detach(), targets, batch.wait_s)
        t.recent.append((t.state.progress.step, batch.item.indices))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Set every group's learning rate, and its momentum or first beta.

    By hand: `AcceleratedScheduler` steps once for every process, and a rate that is asked for by step needs no state.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = momentum
        elif "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
