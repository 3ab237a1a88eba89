"""The one loop. It runs any list of stages, and nothing in it knows which strategy that is."""

import time
from collections.abc import Callable, Iterator

from torch import nn

from common.data.loader import Batch
from common.data.sources.base import Source
from common.engine.calibrate import settle_stages
from common.engine.doctor import preflight
from common.engine.evaluate import final_grid
from common.engine.peak import settle_rates
from common.engine.profiler import traced
from common.engine.recording import begin, finish, out_of_patience, record, save
from common.engine.setup import assembled
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
    forecast = settle_stages(run, model, train, val, source)
    with assembled(run, model, train, val, source) as trainer:
        if run.cfg.dry_run:
            preflight(trainer, source)
            return
        begin(trainer, forecast)
        epochs_before = trainer.state.progress.epochs_done
        if start and not trainer.state.progress.step:
            start(trainer)
        rates = settle_rates(trainer)
        run.log.info("%s", "\n".join(filter(None, (rates.table(), trainer.batches.bucket_tables()))))
        train_epochs(trainer, rates)
        if run.cfg.final_eval:
            final_grid(run, trainer.state, trainer.augment, trainer.batches, trainer.loader)
            trainer.lap("passes")
    finish(trainer, trained=trainer.state.progress.epochs_done > epochs_before)


def train_epochs(t: Trainer, rates: Rates) -> None:
    """Train, evaluate and record every epoch that is left."""
    run, progress = t.run, t.state.progress
    stream = t.loader.stream(t.batches.run_items(progress.epochs_done, progress.step))
    try:
        for epoch in t.plan.epochs(progress.epochs_done):
            # An epoch that has begun is ended.
            if progress.step == epoch.first_step and out_of_patience(run.cfg, progress):
                break
            t.enter_stage(epoch)
            train_epoch(t, epoch, rates, stream)
            record(t, epoch, rates, t.evaluate(epoch, stream) if epoch.evaluated else [])
    except Interrupted:
        save(t)
        raise


def train_epoch(t: Trainer, epoch: EpochPlan, rates: Rates, stream: Iterator[Batch]) -> None:
    """Train from where the progress stands to the end of the epoch."""
    run, progress = t.run, t.state.progress
    t.begin_epoch(epoch)
    last_step = epoch.first_step + epoch.steps - 1
    for step in traced(run, range(progress.step, last_step + 1)):
        t.train_step(epoch, rates.lr(step), rates.momentum(step), stream)
        progress.step += 1
        progress.images_seen += epoch.global_batch
        t.meter.tick()
        # Between two looks nothing waits for the device.
        if step < last_step and progress.step >= run.next_look and t.look():
            save(t)
    t.look()
    # Until then the device had steps to do that had only been asked for.
    t.meter.stopped = time.monotonic()
    t.lap_training()
