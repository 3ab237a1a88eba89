"""A run's model, optimizer and data: entering a stage, taking a step, looking up, and evaluating."""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice

import torch
from torch import nn

from common import UserError
from common.augment import Augment
from common.data.batches import Batches, stage_shapes
from common.data.loader import Batch, Loader
from common.engine.evaluate import Score, evaluate
from common.engine.memory import warm_up
from common.model.freezing import set_trainable_layers, train_mode
from common.model.loss import LOSSES
from common.model.pretrained_cfg import PretrainedCfg, architecture
from common.run import checkpoint
from common.run.checkpoint import TrainState
from common.run.progress import Meter
from common.run.run import Run
from common.scheduling import EpochPlan, Plan

# Micro-batches in a row without a finite loss before training stops.
NAN_PATIENCE = 10


class Trainer:
    """Model, optimizer and data of a run, set up for its present stage.

    Attributes:
        loss: from logits and soft targets, both float32 [B, classes], to the mean over the batch.
        net: the model as training calls it: with autocast, and wrapped for several processes.
        optimizer: Accelerate's, which steps at the end of an accumulation window only.
        left_to_learn: of trained weights, the loss of a head that was fitted to their features, as a share of a guess's; 0 without one.
        recent: step and images of the last micro-batches, for when the loss is not finite.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        plan: Plan,
        batches: Batches,
        loader: Loader,
        source: PretrainedCfg | None = None,
    ) -> None:
        self.run, self.state, self.plan, self.batches, self.loader = run, state, plan, batches, loader
        cfg, classes = run.cfg, batches.train.classes
        # Trained on these very classes, in this order, the weights bring a head along.
        self.knows_classes = source is not None and source.classes == classes
        name, labels = architecture(cfg.model), batches.train.labels
        known = source or PretrainedCfg(name, [], 0)
        progress = state.progress
        # A resumed run brings its own.
        progress.mean, progress.std = progress.mean or list(known.mean), progress.std or list(known.std)
        mean, std = tuple(progress.mean), tuple(progress.std)
        self.model_cfg = replace(known, architecture=name, classes=classes, mean=mean, std=std)
        self.augment = Augment(
            cfg, num_classes=len(classes), seed=cfg.seed, mean=mean, std=std, train_labels=labels
        )
        # Accelerate would move all of its state to the device, and reading AdamW's counters there waits in every step.
        self.optimizer = run.accelerator.prepare_optimizer(state.optimizer, device_placement=False)
        self.loss = LOSSES[cfg.loss]
        self.net: nn.Module = state.model
        self.stage_index = -1
        self.left_to_learn = 0.0
        self.meter: Meter
        self.not_finite = torch.zeros((), dtype=torch.int64, device=run.accelerator.device)
        self.recent: deque = deque(maxlen=2 * NAN_PATIENCE)
        self.started = time.monotonic() - state.progress.wall_s
        self.energy_before = state.progress.energy_j
        self.lapped = run.started
        self.lap("start")
        if run.cfg.compile:
            # One graph per shape and frozen set, known beforehand.
            torch._dynamo.config.recompile_limit = 64
            state.model.compile(dynamic=False)

    def lap(self, part: str) -> None:
        """Count the time since the last lap as a part's of the run, and what has been drawn until now."""
        progress, now = self.state.progress, time.monotonic()
        progress.seconds[part] = progress.seconds.get(part, 0.0) + now - self.lapped
        self.lapped = now
        drawn = self.run.energy.joules()
        known = {kind: self.energy_before.get(kind, 0.0) + drawn[kind] for kind in drawn}
        progress.energy_j = self.energy_before | known

    def lap_training(self) -> None:
        """The same for the present stage's steps, and for what they have waited for data."""
        self.lap(f"train {self.stage_index + 1}")
        waited, self.meter.to_lap = self.meter.to_lap, 0.0
        self.lapped -= waited
        self.state.progress.seconds[f"train {self.stage_index + 1}"] -= waited
        self.lap("wait")

    def enter_stage(self, epoch: EpochPlan) -> None:
        """Make the model ready for a stage: what trains, how gradients are shared, what is compiled."""
        if epoch.stage_index == self.stage_index:
            return
        run, accelerator, model, stage = self.run, self.run.accelerator, self.state.model, epoch.stage
        before = {p for p in model.parameters() if p.requires_grad}
        set_trainable_layers(model, stage.frozen)
        trained = {p for p in model.parameters() if p.requires_grad}
        for parameter in before - trained:
            # Old momentum must not move it when it thaws.
            self.state.optimizer.state.pop(parameter, None)
        if self.stage_index < 0 or trained != before:
            if accelerator.num_processes > 1:
                # Wrapped anew, so that only what trains now is reduced: with the autocast taken off, or it would be put around
                # itself; and Accelerate forgets the old wrapper, whose buckets are as large as the gradients.
                accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)
                accelerator._models.clear()
            # Only then: a new autocast is a new function, for which all would be compiled again.
            self.net = accelerator.prepare_model(model)
        if accelerator.device.type == "cuda":
            # `memory_mb` is to tell the stage's.
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        # Accelerate counts micro-batches over the whole run; a stage begins with a new window.
        accelerator.gradient_accumulation_steps = self.plan.accumulation(epoch.stage_index)
        accelerator.step = 0
        self.stage_index = epoch.stage_index
        train_mode(model, stage.frozen)
        place = f"stage {epoch.stage_index + 1} of {len(self.plan.stages)}: {stage.epochs} epochs"
        frozen = f", frozen: {', '.join(stage.frozen)}" if stage.frozen else ""
        share = f"{stage.data_fraction:.0%} of the data"
        run.log.info("%s at %d px (%s), %s%s", place, stage.img_size, stage.shape, share, frozen)
        size = self.plan.micro_batch(epoch.stage_index)
        warm_up(run, self.net, model, size, stage_shapes(stage, self.batches.train, run.cfg))
        self.lap("compile")

    def begin_epoch(self, epoch: EpochPlan) -> None:
        train_mode(self.state.model, epoch.stage.frozen)
        self.meter = Meter(self.run, self.plan, epoch, self.state.progress, self.not_finite)

    def train_step(self, epoch: EpochPlan, lr: float, momentum: float, stream: Iterator[Batch]) -> None:
        """One optimizer step on the next micro-batches of the stream."""
        accelerator, clip_grad, state = self.run.accelerator, self.run.cfg.clip_grad, self.state
        scaler = accelerator.scaler
        set_rates(self.optimizer, lr, momentum)
        for batch in islice(stream, accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(self.net):
                images, targets = self.augment(
                    batch.images, batch.labels, batch.item, mix=epoch.mix, strength=epoch.stage.strength
                )
                # Autocast in, float32 out: prepare_model saw to it.
                logits = self.net(images)
                loss = self.loss(logits, targets)
                # Scales for fp16, and divides by the accumulation.
                accelerator.backward(loss)
                if clip_grad and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.net.parameters(), clip_grad)
                # fp16's scaling leaves steps out: counted on the device, for `scaler.get_scale()` waits for it, and
                # `optimizer.step_was_skipped` misses them with fused optimizers. There is a scale after a backward pass.
                scale = scaler._scale.clone() if scaler else None
                self.optimizer.step()
                if scaler:
                    self.meter.skipped += scaler._scale < scale
                self.optimizer.zero_grad()
            self.meter.add(loss.detach(), logits.detach(), targets, batch.wait_s)
            self.recent.append((state.progress.step, batch.item.indices))
        if state.ema is not None:
            state.ema.update(state.model, step=state.progress.step + 1)

    def look(self) -> bool:
        """Look at the device and, with all processes, at signals and the clock; returns whether to save now."""
        run, progress = self.run, self.state.progress
        bad, skipped = torch.stack([self.meter.not_finite, self.meter.skipped]).tolist()
        self.meter.skipped.zero_()
        progress.skipped_steps += skipped
        self.meter.show()
        save, bad = run.look(progress.step, bad)
        if bad >= NAN_PATIENCE:
            ids = {str(step): (indices % progress.num_images).tolist() for step, indices in self.recent}
            path = run.folder / f"not_finite_rank{run.accelerator.process_index}.json"
            checkpoint.write_durably(path, json.dumps(ids).encode())
            raise UserError(
                f"the loss has not been finite for {bad} micro-batches (step {progress.step}): lower --lr (peak "
                f"{progress.peak_lr:.3g} now), set --clip_grad 1.0, or check --weight_decay; the last good checkpoint is "
                f"kept, and the samples of these steps are in {path}"
            )
        return save

    def evaluate(self, epoch: EpochPlan, stream: Iterator[Batch]) -> list[Score]:
        """Score the raw and the EMA weights on the whole validation set."""
        run, state = self.run, self.state
        models = [*state.models.values()]
        # Each process has BatchNorm statistics of its own, of images that no other one sees: all evaluate their mean.
        for buffer in chain.from_iterable(model.buffers() for model in models):
            if run.accelerator.num_processes > 1 and buffer.is_floating_point():
                buffer.copy_(run.accelerator.reduce(buffer, "mean"))
        items = self.batches.eval_items(epoch.stage.img_size, self.plan.micro_batch(epoch.stage_index))
        try:
            return evaluate(run, models, stream, len(items), len(self.batches.val), self.augment)
        finally:
            # Also when a signal ends it.
            self.lap("evaluate")


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Set every group's learning rate, and its momentum or first beta."""
    # By hand: `AcceleratedScheduler` steps once for every process, and a rate that is asked for by step needs no state.
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = momentum
        elif "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
