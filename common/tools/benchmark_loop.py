"""What the training loop costs: images/s of the engine's epoch beside a bare PyTorch loop that does the same work.

    python -m common.tools.benchmark_loop --model resnet18 --img_size 64 --batch_size 64 --mixed_precision bf16

Both train the same model on the same ready-made batches in memory, augmentation included, in turns; the ratio is the
median over the repeats of (engine / bare loop).
"""

import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from common.config import main_with
from common.data.loader import Batch
from common.data.order import BatchItem, View
from common.engine.memory import new_state
from common.engine.trainer import Trainer, set_rates
from common.model.create import create_model
from common.run.run import start_run
from common.scheduling import EpochPlan, make_plan
from train_standard import StandardConfig


@dataclass
class LoopConfig(StandardConfig):
    """Settings of the benchmark; the rest is as in training.

    Args:
        steps: optimizer steps per repeat.
        repeats: of each loop, in turns.
        json: also write the figures to this file.
    """

    strategy = "benchmark"

    img_size: int = 64
    batch_size: int = 64
    model: str = "resnet18"
    steps: int = 40
    repeats: int = 7
    json: str = ""
    lr: float | Literal["auto"] = 0.1
    wandb: Literal["auto", "offline", "off"] = "off"


class Counted:
    """Stands for `Batches` where only the size of a micro-batch is asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def micro_batch(self, stage_index: int) -> int:
        return self.size

    def stage_shapes(self, stage: object) -> list[tuple[int, int]]:
        return []


def ready_batches(cfg: LoopConfig, device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    shape = (cfg.batch_size, 3, cfg.img_size, cfg.img_size)
    batches = []
    for number in range(8):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 1000, (cfg.batch_size,), generator=generator)
        indices = np.arange(cfg.batch_size) + number * cfg.batch_size
        item = BatchItem(0, indices, cfg.img_size, cfg.img_size, 0, View((0.08, 1.0)))
        images = images.contiguous(memory_format=torch.channels_last)
        batches.append(Batch(images.to(device), labels.to(device), item, 0.0))
    return batches


def main(cfg: LoopConfig) -> None:
    cfg.output = cfg.output if cfg.output != "runs" else tempfile.mkdtemp()
    with start_run(cfg) as run:
        device = run.accelerator.device
        state = new_state(run, create_model(cfg.model, 1000))
        plan = make_plan(cfg.curriculum(), cfg.steps * cfg.batch_size, 1, 1, cfg.schedule(0.1))
        trainer = Trainer(run, state, plan, Counted(cfg.batch_size), None, num_classes=1000)
        batches = ready_batches(cfg, device)
        epoch = next(plan.epochs())
        trainer.enter_stage(epoch)

        def engine() -> None:
            state.progress.step, state.progress.epoch_sums = 0, [0.0, 0.0, 0.0]
            trainer.train_epoch(epoch, itertools.cycle(batches))

        def bare() -> None:
            bare_loop(trainer, epoch, cfg.steps, batches)

        rates = {"bare": [], "engine": []}
        for repeat in range(cfg.repeats + 1):
            order = [("bare", bare), ("engine", engine)]
            for name, loop in order if repeat % 2 else reversed(order):
                began = time.perf_counter()
                loop()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first warms up
                    rates[name].append(cfg.steps * cfg.batch_size / (time.perf_counter() - began))
        ratio = statistics.median(e / b for e, b in zip(rates["engine"], rates["bare"], strict=True))
        figures = {name: statistics.median(values) for name, values in rates.items()} | {"ratio": ratio}
        run.log.info(
            "%s at %d px, batch %d, %s, %d threads: bare loop %.1f images/s, engine %.1f images/s, ratio %.3f (%d repeats)",
            cfg.model, cfg.img_size, cfg.batch_size, run.accelerator.mixed_precision, torch.get_num_threads(),
            figures["bare"], figures["engine"], ratio, cfg.repeats,
        )  # fmt: skip
        if cfg.json:
            Path(cfg.json).write_text(json.dumps({**figures, "all": rates}, indent=1))


def bare_loop(trainer: Trainer, epoch: EpochPlan, steps: int, batches: list[Batch]) -> None:
    """The same training steps with nothing around them."""
    model, optimizer, scaler = trainer.net, trainer.state.optimizer, trainer.state.scaler
    accelerator, augment, plan = trainer.run.accelerator, trainer.augment, trainer.plan
    model.train()
    for step, batch in zip(range(steps), itertools.cycle(batches), strict=False):
        images_nchw, targets = augment(batch.images, batch.labels, batch.item, mix=epoch.mix)
        with accelerator.autocast():
            logits = model(images_nchw)
        loss = F.cross_entropy(logits.float(), targets)
        set_rates(optimizer, plan.lr(step), plan.momentum(step))
        if scaler:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main_with(main, LoopConfig, __doc__)
