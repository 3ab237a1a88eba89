"""The parts of the loop: an optimizer step, an epoch, entering a stage, recording and saving."""

import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from common import UserError
from common.augment import Augment
from common.config import as_plain, from_settings
from common.data.batches import WHOLE, Batches
from common.data.loader import Batch, Loader
from common.engine.evaluate import Score, average_buffers, evaluate
from common.engine.lr_finder import find_lr
from common.engine.memory import trial_step
from common.model.create import set_trainable_layers, train_mode
from common.run import checkpoint
from common.run.checkpoint import TrainState
from common.run.plots import plot_lr_finder
from common.run.progress import EpochMeter, peak_memory_mb
from common.run.run import Run, main_process_problems
from common.scheduling import EpochPlan, Plan, Stage, scaled_lr

FINAL_SIZES = (1.0, 1.15, 1.3)  # times the training size
FINAL_CROPS = (0.875, 1.0, WHOLE)


class Trainer:
    """What the steps of a run share."""

    def __init__(
        self, run: Run, state: TrainState, plan: Plan, batches: Batches, loader: Loader, num_classes: int
    ) -> None:
        self.run, self.state, self.plan, self.batches, self.loader = run, state, plan, batches, loader
        cfg = run.cfg
        self.augment = from_settings(Augment, cfg, num_classes=num_classes)
        self.stage_index = -1  # the stage that the model is set up for
        self.net: nn.Module = state.model  # the same model, as training calls it
        self.not_finite = torch.zeros((), dtype=torch.int64, device=run.accelerator.device)  # steps in a row
        self.recent: deque[tuple[int, list[int]]] = deque(maxlen=2 * cfg.nan_patience)
        self.started = time.monotonic() - state.progress.wall_s
        if cfg.compile:
            torch._dynamo.config.recompile_limit = 64  # one graph per shape and frozen set, known beforehand
            state.model.compile(dynamic=False)

    # --- one step --------------------------------------------------------------------------------------------------

    def step(
        self, stream: Iterator[Batch], epoch: EpochPlan, lr: float, momentum: float
    ) -> tuple[Tensor, float]:
        """Take one optimizer step on the next micro-batches.

        Returns:
            Sums over this process's images on the device, float64 [loss, hits, images], and the seconds waited for data.
        """
        accelerator, optimizer, scaler = self.run.accelerator, self.state.optimizer, self.state.scaler
        micro_batches = self.plan.accumulation(epoch.stage_index)
        sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        waited = 0.0
        for number in range(micro_batches):
            batch = next(stream)
            waited += batch.wait_s
            self.recent.append((self.state.progress.step, batch.item.indices))
            images_nchw, targets = self.augment(
                batch.images, batch.labels, batch.item, mix=epoch.mix, strength=epoch.stage.strength
            )
            last = number == micro_batches - 1
            with nullcontext() if last else accelerator.no_sync(self.net):
                with accelerator.autocast():
                    logits = self.net(images_nchw)
                loss = F.cross_entropy(logits.float(), targets)
                accelerator.backward(loss / micro_batches)
            with torch.no_grad():
                hits = (logits.argmax(1) == targets.argmax(1)).sum()
                sums += torch.stack([loss.detach() * len(targets), hits, hits.new_tensor(len(targets))])
                self.not_finite = torch.where(loss.detach().isfinite(), 0, self.not_finite + last)
        set_rates(optimizer, lr, momentum)
        if self.run.cfg.clip_grad is not None:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.state.model.parameters(), self.run.cfg.clip_grad)
        if scaler:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            self.state.progress.skipped_steps += scaler.get_scale() < scale
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sums, waited

    def settle_lr(self) -> Plan:
        """Find the peak learning rate, or take the one that was given or found before."""
        run, progress = self.run, self.state.progress
        if progress.peak_lr == 0 and run.cfg.lr == "auto":
            epoch = next(self.plan.epochs())
            self.enter_stage(epoch)
            passes = (replace(epoch, index=index) for index in itertools.count())
            items = itertools.chain.from_iterable(map(self.batches.train_items, passes))
            stream = self.loader.stream(items)
            iterations = run.cfg.lr_finder_iterations

            def train_step(lr: float) -> float:
                run.stop_if_asked()
                with out_of_memory_advice(epoch, self.batches.micro_batch(epoch.stage_index)):
                    sums, _ = self.step(stream, epoch, lr, self.run.cfg.momentum)
                if run.accelerator.num_processes > 1:
                    torch.distributed.all_reduce(sums)
                loss, _, images = sums.tolist()
                return loss / images

            run.log.info("finding the learning rate: %d steps", iterations)
            sweep = find_lr(self.state, train_step, iterations)
            self.not_finite.zero_()
            progress.peak_lr = sweep.suggested
            if run.is_main:
                sweep.write_csv(run.folder / "lr_finder.csv")
                plot_lr_finder(run.folder)
        elif progress.peak_lr == 0:
            progress.peak_lr = scaled_lr(run.cfg.lr, self.plan.global_batches[0], run.cfg.lr_scaling)
        run.log.info("peak learning rate %.4g (--lr %s)", progress.peak_lr, run.cfg.lr)
        self.plan = self.batches.plan = self.plan.with_peak(progress.peak_lr)
        if run.is_main:
            run.write_schedule(self.plan)
        return self.plan

    # --- one epoch -------------------------------------------------------------------------------------------------

    def train_epoch(self, epoch: EpochPlan, stream: Iterator[Batch]) -> EpochMeter:
        """Train from where the progress stands to the end of the epoch."""
        run, state, progress = self.run, self.state, self.state.progress
        train_mode(state.model, epoch.stage.frozen)
        sums = torch.tensor(progress.epoch_sums, dtype=torch.float64, device=run.accelerator.device)
        meter = EpochMeter(run, self.plan, epoch, progress.step)
        try:
            self._train_steps(epoch, stream, sums, meter)
        finally:
            progress.epoch_sums = sums.tolist()
        self._check_finite(epoch)
        return meter

    def _train_steps(
        self, epoch: EpochPlan, stream: Iterator[Batch], sums: Tensor, meter: EpochMeter
    ) -> None:
        run, state, progress = self.run, self.state, self.state.progress
        for step in range(progress.step, epoch.first_step + epoch.steps):
            with out_of_memory_advice(epoch, self.batches.micro_batch(epoch.stage_index)):
                step_sums, waited = self.step(stream, epoch, self.plan.lr(step), self.plan.momentum(step))
            sums += step_sums
            progress.step += 1
            progress.images_seen += epoch.global_batch
            if state.ema is not None:
                state.ema.update(state.model, step=progress.step)
            if meter.tick(waited):
                self._check_finite(epoch)
                meter.show(sums)
            if run.step_done():
                progress.epoch_sums = sums.tolist()
                self.save()

    def _check_finite(self, epoch: EpochPlan) -> None:
        bad = int(self.not_finite)
        if bad < self.run.cfg.nan_patience:
            return
        ids = {str(step): [int(i) for i in indices] for step, indices in self.recent}
        path = self.run.folder / f"not_finite_rank{self.run.accelerator.process_index}.json"
        checkpoint.write_durably(path, json.dumps(ids).encode())
        raise UserError(
            f"the loss has not been finite for {bad} steps (epoch {epoch.index + 1}, step {self.state.progress.step}): lower --lr "
            f"(peak {self.state.progress.peak_lr:.3g} now), set --clip_grad 1.0, or check --weight_decay; the last good "
            f"checkpoint is kept, and the samples of these steps are in {path}"
        )

    def evaluate(self, epoch: EpochPlan, stream: Iterator[Batch]) -> list[Score]:
        """Score the raw and the EMA weights on the whole validation set."""
        run, state = self.run, self.state
        average_buffers(state.model, run.accelerator)
        items = self.batches.eval_items(epoch.stage.img_size, self.batches.micro_batch(epoch.stage_index))
        models = [state.model] if state.ema is None else [state.model, state.ema.module]
        return evaluate(
            models,
            stream,
            len(items),
            len(self.batches.val),
            run.accelerator,
            self.augment,
            rounds=-run.agreed_minimum(-len(items)),
            between=run.stop_if_asked,
        )

    def final_grid(self) -> None:
        """Try the finished weights at larger sizes, other crops and flipped (FixRes, Touvron et al., 2019)."""
        run, state, stage = self.run, self.state, self.plan.stages[-1]
        models = {"raw": state.model} | ({"ema": state.ema.module} if state.ema is not None else {})
        batch_size = self.batches.micro_batch(len(self.plan.stages) - 1)
        rows = []
        in_order = self.batches.train.group_rows is not None  # streamed shards cannot be sorted by shape
        crops = [crop for crop in FINAL_CROPS if not (in_order and crop == WHOLE)]
        for factor, crop in itertools.product(FINAL_SIZES, crops):
            size = 8 * round(stage.img_size * factor / 8) if factor != 1 else stage.img_size
            items = self.batches.eval_items(size, batch_size, crop)
            for flip, transform in (("no", one_view), ("yes", with_flip)):
                scores = evaluate(
                    list(models.values()),
                    self.loader.stream(items),
                    len(items),
                    len(self.batches.val),
                    run.accelerator,
                    self.augment,
                    transform=transform,
                )
                rows += [
                    {
                        "weights": name,
                        "img_size": size,
                        "crop": "whole" if crop == WHOLE else crop,
                        "flip": flip,
                        "top1": s.top1,
                        "top5": s.top5,
                    }
                    for name, s in zip(models, scores, strict=True)
                ]
        best = max(rows, key=lambda row: row["top1"])
        lines = [f"{'weights':>8}{'px':>6}{'crop':>7}{'flip':>6}{'top-1':>8}{'top-5':>8}"]
        lines += [
            f"{r['weights']:>8}{r['img_size']:>6}{r['crop']:>7}{r['flip']:>6}{r['top1']:>8.2f}{r['top5']:>8.2f}"
            + ("  best for deployment" if r is best else "")
            for r in rows
        ]
        run.log.info(
            "final evaluation (the headline stays one view at the training size)\n%s", "\n".join(lines)
        )
        run.write_json("final_eval.json", {"rows": rows, "best": best})

    def record(self, epoch: EpochPlan, meter: EpochMeter, scores: list[Score]) -> None:
        """Write the epoch down, then save what has to be saved."""
        run, progress, last_step = self.run, self.state.progress, epoch.first_step + epoch.steps - 1
        sums = torch.tensor(progress.epoch_sums, dtype=torch.float64, device=run.accelerator.device)
        if run.accelerator.num_processes > 1:
            torch.distributed.all_reduce(sums)
        loss, hits, images = sums.tolist()
        raw, *ema = scores
        top1 = max(score.top1 for score in scores)
        improved = top1 > progress.best_top1
        if improved:
            progress.best_top1, progress.best_epoch = top1, epoch.index + 1
            progress.best_is_ema = top1 > raw.top1
        progress.epochs_done, progress.epoch_sums = epoch.index + 1, [0.0, 0.0, 0.0]
        progress.wall_s = time.monotonic() - self.started
        row = {
            "epoch": epoch.index + 1,
            "stage": epoch.stage_index + 1,
            "img_size": epoch.stage.img_size,
            "batch_size": self.batches.micro_batch(epoch.stage_index),
            "lr": self.plan.lr(last_step),
            "momentum": self.plan.momentum(last_step),
            "train_loss": loss / images,
            "train_top1": 100 * hits / images,
            "val_loss": raw.loss,
            "val_top1": raw.top1,
            "val_top5": raw.top5,
            "ema_top1": ema[0].top1 if ema else "",
            "images_per_s": meter.images_per_s,
            "data_wait": meter.data_wait,
            "memory_mb": peak_memory_mb(run.accelerator.device),
            "epoch_s": meter.seconds_since_start(),
            "total_s": progress.wall_s,
            "images_seen": progress.images_seen,
            "skipped_steps": progress.skipped_steps,
        }
        run.record(row, progress.step)
        run.log.info("%s", meter.line(row, progress))
        is_last = progress.epochs_done == self.plan.total_epochs
        numbered = run.cfg.keep_every and progress.epochs_done % run.cfg.keep_every == 0
        if improved or numbered or is_last or progress.epochs_done % run.cfg.save_freq_last == 0:
            self.save(best=improved, numbered=bool(numbered))
        run.sync()

    # --- stages and checkpoints ------------------------------------------------------------------------------------

    def enter_stage(self, epoch: EpochPlan) -> None:
        """Make the model ready for a stage: what trains, how gradients are shared, what is compiled."""
        run, model, stage = self.run, self.state.model, epoch.stage
        if epoch.stage_index == self.stage_index:
            return
        trained = {p for p in model.parameters() if p.requires_grad}
        set_trainable_layers(model, stage.frozen)
        for parameter in trained:
            if not parameter.requires_grad:
                self.state.optimizer.state.pop(parameter, None)  # old momentum must not move it when it thaws
        if run.accelerator.num_processes > 1:
            self.net = _distribute(run, model)
        self.stage_index = epoch.stage_index
        train_mode(model, stage.frozen)
        run.log.info("stage %d of %d: %s", epoch.stage_index + 1, len(self.plan.stages), describe(stage))
        with out_of_memory_advice(epoch, self.batches.micro_batch(epoch.stage_index)):
            if run.cfg.compile or run.accelerator.device.type == "cuda":
                self._warm_up(epoch)
            if stage.frozen:
                self._report_freezing(epoch)

    def _warm_up(self, epoch: EpochPlan) -> None:
        """Compile, or let cuDNN choose, for every shape of the stage, so that no step of training has to wait for it."""
        started, shapes = time.monotonic(), self.batches.stage_shapes(epoch.stage)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for height, width in shapes:
            trial_step(self.run, self.state.model, self.batches.micro_batch(epoch.stage_index), height, width)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        self.run.log.info(
            "warmed up %d shapes in %.1f s, %d graphs compiled",
            len(shapes),
            time.monotonic() - started,
            graphs,
        )

    def _report_freezing(self, epoch: EpochPlan) -> None:
        """Say what freezing saves, measured on blank images: published savings are too small to be taken on trust."""
        run, model, stage = self.run, self.state.model, epoch.stage
        height, width = self.batches.stage_shapes(stage)[0]
        seconds, memory = [], []
        for frozen in ((), stage.frozen):
            set_trainable_layers(model, frozen)
            train_mode(model, frozen)
            for _ in range(2):  # the first warms up
                if run.accelerator.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                trial_step(run, model, self.batches.micro_batch(epoch.stage_index), height, width)
                elapsed = time.perf_counter() - began
            seconds.append(elapsed)
            memory.append(peak_memory_mb(run.accelerator.device))
        text = f"freezing {', '.join(stage.frozen)}: a step takes {seconds[1] / seconds[0]:.2f} of the time"
        if run.accelerator.device.type == "cuda":
            text += f" and {memory[1] / memory[0]:.2f} of the memory"
        run.log.info("%s of one that trains all layers", text)

    def save(self, best: bool = False, numbered: bool = False) -> None:
        """Write `checkpoints/last`, and under the same bytes `best` or a numbered one; all processes must call it."""
        run, state, progress = self.run, self.state, self.state.progress
        started = time.monotonic()
        progress.wall_s = started - self.started
        if run.agreed(bool(self.not_finite > 0))[0]:
            run.log.info("not saved: the loss is not finite")
            return
        files = checkpoint.capture(state, run.accelerator, as_plain(run.cfg))
        with main_process_problems(run.accelerator):
            if run.is_main:
                folder = run.folder / "checkpoints"
                checkpoint.write(folder / "last", files)
                if best:
                    checkpoint.link(folder / "last", folder / "best")
                    weights = "ema.safetensors" if progress.best_is_ema else "model.safetensors"
                    checkpoint.link_file(folder / "best" / weights, run.folder / "best_weights.safetensors")
                if numbered:
                    checkpoint.link(folder / "last", folder / f"epoch_{progress.epochs_done}")
            run.log.info("saved step %d in %.2f s", progress.step, time.monotonic() - started)
        run.saved()
        run.sync()


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Set every group's learning rate, and its momentum or first beta."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = momentum
        elif "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])


class out_of_memory_advice:
    """Turn an out-of-memory error into a sentence that names what to change."""

    def __init__(self, epoch: EpochPlan, micro_batch: int) -> None:
        self.epoch, self.micro_batch = epoch, micro_batch

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"out of memory in stage {self.epoch.stage_index + 1} at {self.epoch.stage.img_size} px with {self.micro_batch} images "
                "per process: lower --batch_size and raise --accumulation, or pass --auto_batch; the last checkpoint is whole"
            ) from error


def one_view(model: nn.Module, images_nchw: Tensor) -> Tensor:
    return model.forward(images_nchw)


def with_flip(model: nn.Module, images_nchw: Tensor) -> Tensor:
    """Mean logits of an image and its mirror image."""
    return (model.forward(images_nchw) + model.forward(images_nchw.flip(3))) / 2


def describe(stage: Stage) -> str:
    text = (
        f"{stage.epochs} epochs at {stage.img_size} px ({stage.shape}), {stage.data_fraction:.0%} of the data"
    )
    return text + (f", frozen: {', '.join(stage.frozen)}" if stage.frozen else "")


def _distribute(run: Run, model: nn.Module) -> nn.Module:
    """Wrap for distributed training anew, so that only what trains now is reduced."""
    device_ids = [run.accelerator.local_process_index] if run.accelerator.device.type == "cuda" else None
    net = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    run.accelerator.ddp_handler.register_comm_hook(net)
    return net
