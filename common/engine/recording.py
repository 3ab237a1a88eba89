"""After an epoch: a line for people, a row for programs, and a checkpoint to go on from."""

import json
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors

from common import UserError
from common.config import TrainConfig, as_plain
from common.engine.evaluate import Score
from common.engine.trainer import Trainer
from common.run import checkpoint
from common.run.checkpoint import Progress
from common.run.plots import write_plots
from common.run.processes import rank0_errors
from common.run.progress import closing_block, outlook, peak_memory_mb
from common.run.receipt import RECEIPT, write_receipt
from common.run.records import draw, upload_model
from common.scheduling import EpochPlan, Rates

# Checkpoints kept beside the best and the numbered ones: the newest may have been damaged by what ended the run.
KEEP_CHECKPOINTS = 2


def begin(t: Trainer, forecast: dict[str, Any]) -> None:
    """Write to the disk from now on; `forecast` is what this start has made for `--budget`, if it has. A collective."""
    run, progress = t.run, t.state.progress
    if forecast:
        progress.forecast = forecast
        # So far all was the program's start.
        progress.seconds["calibration"] = forecast["parts"]["calibration"]
        progress.seconds["start"] -= progress.seconds["calibration"]
    run.begin(progress)
    with rank0_errors():
        if run.is_main and checkpoint.left_behind(run.folder / "checkpoints", progress.step):
            _go_back(t)
    if progress.forecast and progress.step:
        run.log.info("%s", outlook(run, t.plan, progress))
    if progress.epochs_done == t.plan.total_epochs:
        run.log.info("this run is complete: %d epochs", progress.epochs_done)


def _go_back(t: Trainer) -> None:
    """What tells of the best weights, as it was at an older checkpoint; the course after it may have found better ones."""
    run, step = t.run, t.state.progress.best_step
    try:
        best = checkpoint.read(run.folder / "checkpoints" / checkpoint.name_of(step))
    except checkpoint.DamagedCheckpoint:
        run.log.info(
            "model/ may be of a later epoch than this checkpoint: its own best, step %d, is gone", step
        )
        return
    _write_model(t, _best_weights(best), t.plan.stages[t.plan.locate(step - 1)[0]].img_size)
    (run.folder / "per_class.csv").unlink(missing_ok=True)


def finish(t: Trainer, *, trained: bool) -> None:
    """The closing block and the receipt, if this start has trained or the last was stopped before it; a collective."""
    run, progress = t.run, t.state.progress
    if replaced := len(t.loader.unreadable):
        run.log.info("%d unreadable images were replaced by others of their class", replaced)
    if progress.epochs_done < t.plan.total_epochs:
        why = f"no new best in {run.cfg.patience} epochs; --patience 0 goes on"
        run.log.info("stopped after epoch %d: %s", progress.epochs_done, why)
    run.background.drain()
    t.lap("save")
    if run.is_main:
        # They tell of the machine that has trained.
        as_it_was = not trained and _epochs_of(run.folder / RECEIPT) == progress.epochs_done
        run.log.info("%s", closing_block(run, progress, write=not as_it_was))
        if not as_it_was:
            run.log.info("%s", write_receipt(run, progress, len(t.batches.val)))
        upload_model(run.accelerator, run.folder)
    run.sync()


def _epochs_of(receipt: Path) -> int | None:
    """Of the run that it tells of; one that was killed after `--patience 0` took it further has an earlier end's."""
    return json.loads(receipt.read_text())["epochs"] if receipt.exists() else None


def out_of_patience(cfg: TrainConfig, progress: Progress) -> bool:
    """Whether the run ends here, after an evaluation; the same on all processes, since all have the same scores."""
    waited = progress.epochs_done - progress.best_epoch
    return 0 < cfg.patience <= waited and progress.epochs_done % cfg.eval_every == 0


def record(t: Trainer, epoch: EpochPlan, rates: Rates, scores: list[Score]) -> None:
    """Write an epoch down, with its scores if it was evaluated, then save what has to be saved; a collective."""
    run, progress, meter = t.run, t.state.progress, t.meter
    last_step = epoch.first_step + epoch.steps - 1
    loss, hits = run.accelerator.reduce(meter.sums, "sum").tolist()
    images = epoch.steps * epoch.global_batch
    better = [score for score in scores if score.top1 > progress.best_top1]
    new_best = max(better, key=lambda score: score.top1, default=None)
    if new_best:
        progress.best_top1, progress.best_epoch = new_best.top1, epoch.index + 1
        progress.best_step, progress.best_is_ema = progress.step, new_best.top1 > scores[0].top1
    # Columns of the raw weights and of their average, if there is one; blank without an evaluation.
    raw, ema = [*scores, None, None][:2]
    measures = {f"val_{name}": getattr(raw, name, "") for name in ("loss", "top1", "top5", "balanced")}
    progress.epochs_done, progress.epoch_sums = epoch.index + 1, [0.0, 0.0]
    progress.wall_s = time.monotonic() - t.started
    # A checkpoint of the epoch's end holds nothing of the next.
    meter.sums.zero_()
    row = {
        "epoch": epoch.index + 1,
        "stage": epoch.stage_index + 1,
        "img_size": epoch.stage.img_size,
        "batch_size": t.plan.micro_batch(epoch.stage_index),
        "lr": rates.lr(last_step),
        "momentum": rates.momentum(last_step),
        "train_loss": loss / images,
        "train_top1": 100 * hits / images,
        **measures,
        "ema_top1": getattr(ema, "top1", ""),
        # A run that was stopped in its evaluation goes on with it, and has taken no step.
        "images_per_s": meter.images_per_s if meter.step > meter.first_step else "",
        "data_wait": meter.data_wait,
        "memory_mb": peak_memory_mb(run.accelerator.device),
        "epoch_s": meter.seconds_since_start(),
        "total_s": progress.wall_s,
        "images_seen": progress.images_seen,
        "skipped_steps": progress.skipped_steps,
    }
    with rank0_errors():
        if run.is_main:
            run.records.add(row)
            if new_best:
                run.records.write_classes(t.model_cfg.classes, new_best.class_images, new_best.class_hits)
            shown = {name: value for name, value in row.items() if value != ""}
            run.accelerator.log(shown, step=progress.step)
    run.log.info("%s", meter.line(row, progress))
    is_last = progress.epochs_done == t.plan.total_epochs or out_of_patience(run.cfg, progress)
    numbered = run.cfg.keep_every and progress.epochs_done % run.cfg.keep_every == 0
    if new_best or numbered or is_last or progress.epochs_done % run.cfg.save_freq_last == 0:
        save(t)
    if run.is_main:
        # Only now: a checkpoint waits for all work that was given before it.
        run.background.submit(draw, write_plots, run.folder)
    run.sync()
    # After the first epoch, and at each stage's end.
    if progress.forecast and progress.epochs_done in {1, *accumulate(s.epochs for s in t.plan.stages)}:
        run.log.info("%s", outlook(run, t.plan, progress))


def save(t: Trainer) -> None:
    """Write a checkpoint of this step, and the model folder if it is the best so far, beside the training; a collective."""
    run, progress = t.run, t.state.progress
    began = time.monotonic()
    t.lap_training()
    progress.wall_s = began - t.started
    progress.epoch_sums = run.accelerator.reduce(t.meter.sums, "sum").tolist()
    in_force = [as_plain(stage) for stage in run.stages]
    config = {"strategy": run.cfg.strategy, "stages_in_force": in_force, **as_plain(run.cfg)}
    files = checkpoint.capture(t.state, run.accelerator, config)
    run.saved()
    with rank0_errors():
        if run.is_main:
            # What an earlier save met is raised here; and no more than one checkpoint waits in memory.
            run.background.drain()
            if all(tensor.isfinite().all() for tensor in files["model.safetensors"].values()):
                # Of this stage, also if the next one has begun when it is written.
                size = t.plan.stages[t.stage_index].img_size
                run.background.submit(_write, t, files, size, began)
            else:
                run.log.info("not saved: the weights are not finite")
    run.sync()
    t.lap("save")


def _write(t: Trainer, files: dict[str, Any], img_size: int, began: float) -> None:
    run, folder = t.run, t.run.folder / "checkpoints"
    progress = files[checkpoint.STATE]["progress"]
    if progress["best_step"] == progress["step"]:
        # Before the checkpoint, which says that all of its step is done.
        _write_model(t, _best_weights(files), img_size)
    checkpoint.write(folder, files)
    ends = [epoch.first_step + epoch.steps for epoch in t.plan.epochs()]
    numbered = ends[run.cfg.keep_every - 1 :: run.cfg.keep_every] if run.cfg.keep_every else []
    keep = {checkpoint.name_of(step) for step in (progress["best_step"], *numbered)}
    if run.mirror is not None:
        keep |= run.mirror.uploading
    checkpoint.prune(folder, KEEP_CHECKPOINTS, keep)
    run.log.info("saved step %d in %.2f s", progress["step"], time.monotonic() - began)


def _best_weights(files: checkpoint.Files) -> checkpoint.Files:
    """Of the checkpoint with the best weights: raw, or their average."""
    average = files[checkpoint.STATE]["progress"]["best_is_ema"]
    return files["ema.safetensors" if average else "model.safetensors"]


def _write_model(t: Trainer, weights: dict[str, Any], img_size: int) -> None:
    """`model/`: weights that know their network, their classes and their images, in timm's format."""
    folder, cfg = t.run.folder / "model", t.run.cfg
    description = replace(
        t.model_cfg,
        img_size=img_size,
        test_size=None,
        crop_pct=cfg.crop_pct,
        crop_mode="center",
        interpolation="bilinear",
    )
    try:
        folder.mkdir(exist_ok=True)
        t.run.records.write_json("model/config.json", description.timm_config())
        checkpoint.write_durably(folder / "model.safetensors", to_safetensors(weights))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; set --output") from error
