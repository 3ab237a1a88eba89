"""The one loop. It runs any list of stages, and nothing in it knows which strategy that is."""

import os
from contextlib import closing

from torch import nn

from common.config import TrainConfig
from common.data.batches import Batches
from common.data.loader import Loader, Source, open_dataset
from common.data.sample import ensure_sample_data
from common.engine.memory import fit_memory, make_run_plan, new_state, resume
from common.engine.trainer import Trainer
from common.model.create import create_finetuned_model, create_model
from common.run.checkpoint import Progress
from common.run.progress import closing_block
from common.run.run import Interrupted, Run, start_run
from common.scheduling import scaled_lr


def train(cfg: TrainConfig) -> None:
    """Train as the settings say: what every script does once its curriculum is known."""
    cfg.data_dir = cfg.data_dir or str(ensure_sample_data())
    train_source, val_source = open_dataset(cfg)
    if cfg.dry_run:
        print(dry_run(cfg, train_source, val_source))
        return
    with start_run(cfg) as run:
        classes = len(train_source.classes)
        if cfg.weights:
            model = create_finetuned_model(cfg.model, classes, cfg.weights)
        else:
            model = create_model(cfg.model, classes)
        fit(run, model, train_source, val_source)


def fit(run: Run, model: nn.Module, train: Source, val: Source) -> None:
    """Train `model` through the run's stages; evaluate, record and save as it goes."""
    cfg, log = run.cfg, run.log
    state = new_state(run, model)
    resume(run, state, train)
    progress = state.progress
    plan = make_run_plan(cfg, run.accelerator.num_processes, train, progress)
    batches = Batches(cfg, plan, train, val, run.accelerator.process_index, run.accelerator.num_processes)
    plan = batches.plan = fit_memory(run, state, batches)
    loader = Loader(
        train,
        val,
        seed=cfg.seed,
        workers=cfg.workers,
        prefetch=cfg.prefetch,
        device=run.accelerator.device,
        skip_unreadable=cfg.skip_unreadable,
    )
    with closing(loader):
        trainer = Trainer(run, state, plan, batches, loader, num_classes=len(train.classes))
        try:
            plan = trainer.settle_lr()
            log.info("%s", "\n".join(filter(None, (plan.table(), batches.bucket_tables()))))
            if progress.epochs_done == plan.total_epochs:
                log.info("this run is complete: %d of %d epochs", progress.epochs_done, plan.total_epochs)
            stream = loader.stream(batches.run_items(progress.epochs_done, progress.step))
            for epoch in plan.epochs(progress.epochs_done):
                trainer.enter_stage(epoch)
                meter = trainer.train_epoch(epoch, stream)
                scores = trainer.evaluate(epoch, stream)
                trainer.record(epoch, meter, scores)
            if cfg.final_eval:
                trainer.final_grid()
        except Interrupted:
            trainer.save()
            raise
        if loader.unreadable:
            log.info("%d unreadable images were replaced by others of their class", len(loader.unreadable))
        log.info("%s", closing_block(run, progress))


def dry_run(cfg: TrainConfig, train: Source, val: Source) -> str:
    """The plan in words and numbers, training nothing."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    progress = Progress()
    plan = make_run_plan(cfg, processes, train, progress)
    note = "relative to the LR finder's peak"
    if cfg.lr != "auto":
        plan, note = plan.with_peak(scaled_lr(cfg.lr, plan.global_batches[0], cfg.lr_scaling)), "in force"
    return (
        f"{len(train):,} training and {len(val):,} validation images, {len(train.classes)} classes, {processes} processes\n"
        + "\n".join(
            filter(None, (plan.table(), Batches(cfg, plan, train, val, 0, processes).bucket_tables()))
        )
        + "\n"
        f"{plan.total_epochs} epochs, {plan.total_steps:,} optimizer steps, {plan.images_to_see:,} images to be seen; "
        f"learning rates are {note}"
    )
