"""The one loop. It runs any list of stages, and nothing in it knows which strategy that is."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import accumulate, islice

import torch
from torch import nn

from common.data.batches import Batches
from common.data.loader import Batch, Loader
from common.data.sources.base import Source
from common.engine.calibrate import within_budget
from common.engine.evaluate import final_grid
from common.engine.memory import out_of_memory_advice
from common.engine.peak import settle_rates
from common.engine.profiler import traced
from common.engine.recording import out_of_patience, record, save
from common.engine.setup import adapt_settings, preflight, prepare_state, settle_plan
from common.engine.trainer import Trainer
from common.model.pretrained_cfg import PretrainedCfg
from common.run.processes import Interrupted, rank0_errors
from common.run.progress import closing_block, outlook
from common.run.receipt import write_receipt
from common.run.records import upload_model
from common.run.run import Run
from common.scheduling import EpochPlan, Rates


def fit(run: Run, model: nn.Module, train: Source, val: Source, source: PretrainedCfg | None = None) -> None:
    """Train `model` through the run's stages; evaluate, record and save as it goes.

    `source` is what weights that it starts from expect of their images.
    """
    cfg, accelerator = run.cfg, run.accelerator
    adapt_settings(run, model, train, partial(within_budget, run, model, train, val, train_step))
    state = prepare_state(run, model, train)
    progress = state.progress
    plan = settle_plan(run, state, train)
    batches = Batches(plan, train, val, cfg, cfg.seed, accelerator.process_index, accelerator.num_processes)
    if cfg.dry_run:
        if run.is_main:
            print(preflight(run, plan, batches))
        return
    run.begin(progress)
    with rank0_errors():
        if run.is_main and run.forecast:
            run.records.write_json("forecast.json", run.forecast)
    # Not prepared: Accelerate's loader fills the last batch up with images seen before, and its order is another one on
    # another number of processes.
    loader = Loader(
        train,
        val,
        seed=cfg.seed,
        settings=cfg,
        device=accelerator.device,
        channels_last=cfg.channels_last,
    )
    with closing(loader):
        trainer = Trainer(run, state, plan, batches, loader, source)
        if run.forecast and progress.step:
            run.log.info("%s", outlook(run, plan, progress))
        rates = settle_rates(trainer, train_step)
        trainer.lap("finder")
        run.log.info("%s", "\n".join(filter(None, (rates.table(), batches.bucket_tables()))))
        complete = progress.epochs_done == plan.total_epochs
        had_receipt = complete or out_of_patience(cfg.patience, progress)
        if complete:
            run.log.info("this run is complete: %d of %d epochs", progress.epochs_done, plan.total_epochs)
        stream = loader.stream(batches.run_items(progress.epochs_done, progress.step))
        try:
            for epoch in plan.epochs(progress.epochs_done):
                if out_of_patience(cfg.patience, progress):
                    run.log.info(
                        "stopped after epoch %d: no new best in %d epochs; --patience 0 goes on",
                        progress.epochs_done,
                        cfg.patience,
                    )
                    break
                trainer.enter_stage(epoch)
                train_epoch(trainer, epoch, rates, stream)
                scores = trainer.evaluate(epoch, stream)
                trainer.lap("evaluate")
                record(trainer, epoch, rates, scores)
                trainer.lap("save")
                # After the first epoch, and at each stage's end.
                if run.forecast and progress.epochs_done in {1, *accumulate(s.epochs for s in plan.stages)}:
                    run.log.info("%s", outlook(run, plan, progress))
        except Interrupted:
            trainer.lap(f"train {trainer.stage_index + 1}")
            save(trainer)
            run.background.drain()
            raise
        if loader.unreadable:
            run.log.info(
                "%d unreadable images were replaced by others of their class", len(loader.unreadable)
            )
        if cfg.final_eval:
            final_grid(run, state, trainer.augment, batches, loader)
            trainer.lap("evaluate")
    run.background.drain()
    trainer.lap("save")
    if run.is_main:
        run.log.info("%s", closing_block(run, progress))
        if not had_receipt:
            run.log.info("%s", write_receipt(run, progress, len(val)))
        upload_model(accelerator, run.folder)
    run.sync()


def train_epoch(t: Trainer, epoch: EpochPlan, rates: Rates, stream: Iterator[Batch]) -> None:
    """Train from where the progress stands to the end of the epoch."""
    run, state, progress = t.run, t.state, t.state.progress
    t.begin_epoch(epoch)
    part = f"train {epoch.stage_index + 1}"
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
                t.lap(part)
                save(t)
                t.lap("save")
    t.look()
    t.lap(part)
    # What the loader was waited for has a line of its own.
    seconds, waited = progress.seconds, t.meter.waited
    seconds["wait"] = seconds.get("wait", 0.0) + waited
    seconds[part] -= waited


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
