"""What happens before the first step: state, resume, plan, and a batch that fits into memory."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import TrainConfig, UserError, as_plain, differences
from common.data.batches import Batches
from common.data.loader import Source
from common.model.create import create_ema, create_optimizer, set_trainable_layers
from common.run import checkpoint
from common.run.checkpoint import Progress, TrainState
from common.run.run import Run, main_process_problems
from common.scheduling import Plan, make_plan


def new_state(run: Run, model: nn.Module) -> TrainState:
    cfg, device = run.cfg, run.accelerator.device
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    ema = create_ema(model, cfg.ema_decay) if cfg.ema else None
    checkpoint.seed_everything(
        cfg.seed + run.accelerator.process_index
    )  # dropout differs, the first weights did not
    return TrainState(model, create_optimizer(cfg, model), ema, run.accelerator.scaler, Progress())


def resume(run: Run, state: TrainState, train: Source) -> None:
    """Go on from a checkpoint if there is one. What is taken, in this order:

    1. `--resume none`: nothing.
    2. `--resume PATH` of one checkpoint: that one.
    3. the newest undamaged one of the run's folder, also after `--resume PATH` or `s3://…` of a whole run.
    """
    cfg, folder = run.cfg, run.folder / "checkpoints"
    found: Path | None = None
    files = None
    with main_process_problems(run.accelerator):
        if run.is_main and cfg.resume != "none":
            if (Path(cfg.resume) / checkpoint.MANIFEST).exists():
                found = Path(cfg.resume)
                checkpoint.verify(found)
            else:
                found, damaged = checkpoint.newest_whole(folder)
                for sentence in damaged:
                    run.log.info("damaged checkpoint passed over: %s", sentence)
                if damaged and found is None:
                    raise UserError(
                        f"no whole checkpoint is left in {folder}; start anew with another --run_name"
                    )
            files = checkpoint.read(found) if found else None
            _must_match(files, cfg, train)
    files = checkpoint.share(files, run.accelerator)
    if files is not None:
        checkpoint.apply(files, state, run.accelerator.process_index)
        run.log.info(
            "resumed %s: epoch %d, step %d", found or "", state.progress.epochs_done + 1, state.progress.step
        )
    run.keep_epochs(state.progress.epochs_done)
    state.progress.wandb_id = run.start_tracker(state.progress.wandb_id)
    state.progress.num_images = len(train)


def _must_match(files: dict[str, Any] | None, cfg: TrainConfig, train: Source) -> None:
    if files is None:
        return
    meta = files["state.json"]
    changed = differences(as_plain(cfg), meta["config"])
    if changed:
        raise UserError(
            f"the checkpoint was made with other settings: {', '.join(changed)}; choose another --run_name"
        )
    if meta["progress"]["num_images"] != len(train):
        raise UserError(
            f"the checkpoint was made with {meta['progress']['num_images']} training images, --data_dir has {len(train)}"
        )


def make_run_plan(cfg: TrainConfig, processes: int, train: Source, progress: Progress) -> Plan:
    """The plan of the run; a resumed one keeps its global batches, whatever the number of processes now."""
    held = tuple(progress.global_batches) or None
    plan = make_plan(
        cfg.stages_in_force(),
        len(train),
        processes,
        cfg.accumulation,
        cfg.schedule(progress.peak_lr or 1.0),
        held,
    )
    progress.global_batches = list(plan.global_batches)
    return plan


def fit_memory(run: Run, state: TrainState, batches: Batches) -> Plan:
    """With `--auto_batch`, halve each stage's batch until a step of its largest shape fits.

    Accumulation keeps the global batch.
    """
    plan = batches.plan
    if not run.cfg.auto_batch:
        return plan
    stages = list(plan.stages)
    for index, stage in enumerate(stages):
        set_trainable_layers(state.model, stage.frozen)
        size = batches.micro_batch(index)
        height, width = max(batches.stage_shapes(stage), key=math.prod)
        while True:
            try:
                trial_step(run, state.model, size, height, width)
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise UserError(
                        f"one image of {stage.img_size} px does not fit; lower the image size"
                    ) from None
                size //= 2
                torch.cuda.empty_cache()
        size = run.agreed_minimum(size)
        if size < stage.batch_size:
            run.log.info("stage %d: %d images per process and micro-batch fit", index + 1, size)
            stages[index] = replace(stage, batch_size=size)
    set_trainable_layers(state.model, ())
    return replace(plan, stages=tuple(stages))


def trial_step(run: Run, model: nn.Module, batch_size: int, height: int, width: int) -> None:
    """Forward and backward on blank images, without a trace: no gradients, statistics or random numbers are kept."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rng = checkpoint.rng_state()
    images_nchw = torch.zeros(batch_size, 3, height, width, device=run.accelerator.device)
    with run.accelerator.autocast():
        logits = model(images_nchw.contiguous(memory_format=torch.channels_last))
    logits.float().logsumexp(1).mean().backward()
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    checkpoint.set_rng_state(rng)
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
