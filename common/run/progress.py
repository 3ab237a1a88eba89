"""What a person sees while a run goes on: a bar or lines with ETA, a line per epoch, a closing block."""

import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.run.checkpoint import Progress
from common.run.run import Run
from common.scheduling import EpochPlan, Plan
from common.scheduling.budget import expected_end_s

# Share of an epoch spent waiting at which to say so.
LOADER_BOUND = 0.2
# Times the budget: an end that is foreseen later than that is said.
OVERRUN = 1.03


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held, in MB: the GPU's, or the resident memory of a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Meter:
    """Loss, hits, speed and waiting of one epoch, summed on the device, where nothing has to be waited for.

    Attributes:
        sums: float64 [2], loss and hits over this process's images of the epoch.
        not_finite: int64 [], micro-batches in a row without a finite loss; the run's, since an epoch may be short.
        skipped: int64 [], steps that gradient scaling left out.
        waited, to_lap: seconds that steps have waited for data, in all and since they were counted as a part of the run.
    """

    def __init__(
        self, run: Run, plan: Plan, epoch: EpochPlan, progress: Progress, not_finite: Tensor
    ) -> None:
        self.run, self.plan, self.epoch = run, plan, epoch
        device = run.accelerator.device
        # A resumed epoch's sums are all processes': each takes its share, since they are summed again in the end.
        self.sums = torch.tensor(progress.epoch_sums, dtype=torch.float64, device=device)
        self.sums /= run.accelerator.num_processes
        self.not_finite = not_finite
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.first_step = self.step = progress.step
        self.waited = self.to_lap = 0.0
        self.started = self.stopped = self.last_line = time.monotonic()
        self.bar = tqdm(
            total=epoch.steps,
            initial=self.step - epoch.first_step,
            disable=not (run.is_main and sys.stderr.isatty()),
            desc=f"epoch {epoch.index + 1}/{plan.total_epochs}",
            leave=False,
        )

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, waited: float) -> None:
        """Count a micro-batch: its mean loss, logits and soft targets [B, classes], and seconds waited for it."""
        hits = (logits.argmax(1) == targets.argmax(1)).sum()
        self.sums += torch.stack([loss * len(targets), hits])
        self.not_finite.add_(1).mul_(~loss.isfinite())
        self.waited += waited
        self.to_lap += waited

    def tick(self) -> None:
        """Count an optimizer step."""
        self.step += 1
        self.stopped = time.monotonic()
        self.bar.update()
        if self.step == self.epoch.first_step + self.epoch.steps:
            self.bar.close()

    def show(self) -> None:
        """Refresh the bar, or write a line now and then; waits for the device."""
        if not self.run.is_main:
            return
        images = (self.step - self.epoch.first_step) * self.epoch.global_batch
        loss, hits = (self.sums * self.run.accelerator.num_processes / images).tolist()
        text = f"loss {loss:.3f}, top-1 {100 * hits:.1f} %, {self.images_per_s:.0f} images/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(f"{text}, {peak_memory_mb(self.run.accelerator.device):.0f} MB")
        elif time.monotonic() - self.last_line > self.run.cfg.print_freq:
            self.last_line = time.monotonic()
            epoch = self.epoch
            place = f"epoch {epoch.index + 1}, step {self.step - epoch.first_step}/{epoch.steps}"
            self.run.log.info("%s: %s, ETA %s", place, text, clock(self.eta_s()))

    def seconds_since_start(self) -> float:
        return time.monotonic() - self.started

    @property
    def images_per_s(self) -> float:
        seconds = max(self.stopped - self.started, 1e-9)
        return (self.step - self.first_step) * self.epoch.global_batch / seconds

    @property
    def data_wait(self) -> float:
        return self.waited / max(self.stopped - self.started, 1e-9)

    def eta_s(self) -> float:
        """Seconds left in the run, taking an image's cost as proportional to its pixels."""
        done = (self.step - self.first_step) * self.epoch.global_batch * self.epoch.stage.img_size**2
        left = sum(
            (e.steps - max(0, self.step - e.first_step)) * e.global_batch * e.stage.img_size**2
            for e in self.plan.epochs(self.epoch.index)
        )
        return left * self.seconds_since_start() / max(done, 1)

    def line(self, row: dict[str, Any], progress: Progress) -> str:
        """The epoch in one line, and a warning when the loader was what limited it."""
        scored = ""
        if self.epoch.evaluated:
            ema = f" (EMA {row['ema_top1']:.2f})" if row["ema_top1"] != "" else ""
            scored = (
                f" → val {row['val_loss']:.3f}  top-1 {row['val_top1']:.2f}{ema}  top-5 {row['val_top5']:.2f}"
                f"  best {progress.best_top1:.2f}"
            )
        text = f"epoch {row['epoch']}/{self.plan.total_epochs}  {row['img_size']} px  loss {row['train_loss']:.3f}{scored}"
        if row["images_per_s"] != "":
            text += (
                f"  {row['images_per_s']:.0f} images/s  waited {row['data_wait']:.0%}  {row['epoch_s']:.1f} s"
                f"  ETA {clock(self.eta_s())}"
            )
        if row["data_wait"] > LOADER_BOUND:
            text += (
                f"\nloader-bound: {row['data_wait']:.0%} of the epoch went by waiting for data; raise --workers, or prepare a "
                "pyramid (python -m common.tools.prepare)"
            )
        return text


def outlook(run: Run, plan: Plan, progress: Progress) -> str:
    """Where a run with a budget stands against it, and whether it will overrun."""
    done, step = [], progress.step
    for index in range(len(plan.stages)):
        steps = plan.stage_steps(index)
        done.append(min(max(step / steps, 0.0), 1.0))
        step -= steps
    # An evaluation costs as its pixels do.
    pixels = [epoch.stage.img_size**2 * epoch.evaluated for epoch in plan.epochs()]
    evaluated = sum(pixels[: progress.epochs_done]) / sum(pixels)
    end_s = expected_end_s(progress.forecast["parts"], progress.seconds, done, evaluated)
    spent_s, budget_s = sum(progress.seconds.values()), progress.forecast["budget_s"]
    text = f"budget {clock(budget_s)}: {clock(spent_s)} spent, about {clock(end_s - spent_s)} to go"
    if run.cfg.usd_per_hour:
        text += f", {end_s / 3600 * run.cfg.usd_per_hour:.2f} USD in all"
    if end_s > OVERRUN * budget_s:
        late = clock(end_s - budget_s)
        text += f"\noverrun foreseen: {late} more than the budget; steps take longer than when they were calibrated"
    return text


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def closing_block(run: Run, progress: Progress, write: bool) -> str:
    """Best, last and wall time of a finished run, which `write` puts into `summary.json`; for the main process."""
    last = run.records.rows()[-1]
    # A run that an older version ended has none.
    balanced = float(last["val_balanced"]) if last.get("val_balanced") else None
    shown = "" if balanced is None else f" (balanced {balanced:.2f} %)"
    summary = {
        "strategy": run.cfg.strategy,
        "model": run.cfg.model,
        "best_top1": progress.best_top1,
        "best_epoch": progress.best_epoch,
        "best_weights": "ema" if progress.best_is_ema else "raw",
        "last_top1": float(last["val_top1"]),
        "last_balanced": balanced,
        "epochs": progress.epochs_done,
        "wall_s": progress.wall_s,
        "images_seen": progress.images_seen,
        "peak_lr": progress.peak_lr,
        "seed": run.cfg.seed,
        "hardware": f"{run.accelerator.num_processes} × {device_name(run.accelerator.device)}",
    }
    if write:
        run.records.write_json("summary.json", summary)
    return (
        f"\n  best top-1   {summary['best_top1']:.2f} % (epoch {summary['best_epoch']}, {summary['best_weights']} weights)"
        f"\n  last top-1   {summary['last_top1']:.2f} %{shown}"
        f"\n  wall time    {clock(progress.wall_s)}"
        f"\n  model        {run.folder / 'model'}"
        f"\n  plots        {run.folder / 'plots'}"
    )
