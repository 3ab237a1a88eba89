"""What the training loop costs: images/s of the engine's epoch beside a bare PyTorch loop that does the same work.

    python -m common.tools.benchmark_loop --model resnet18 --img_size 64 --batch_size 64 --mixed_precision bf16

Both train the same network on the same batches, which lie on the device, augmentation included, in turns; the ratio is
the median over the repeats of (engine / bare loop).
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from common import PositiveInt
from common.config import TrainConfig, run_script
from common.data.loader import Batch
from common.data.order import BatchItem
from common.engine.fit import train_epoch
from common.engine.setup import assembled
from common.engine.trainer import Trainer
from common.model import create_model
from common.model.optimizer import create_optimizer
from common.run import start_run
from common.scheduling import EpochPlan, Rates
from train_standard import StandardConfig

# Different batches on the device: enough that no cache holds them all.
READY_BATCHES = 8


@dataclass
class LoopConfig(StandardConfig):
    """The benchmark"""

    strategy = "benchmark"

    steps: PositiveInt = 40
    """Optimizer steps per repeat."""
    repeats: PositiveInt = 7
    """Of each loop, in turns."""
    json: str = ""
    """Also write the figures to this file."""
    img_size: PositiveInt = 64
    batch_size: PositiveInt = 64
    model: str = "resnet18"
    lr: float | Literal["auto"] = 0.1
    trackers: str = "none"


class Blank:
    """Stands for a dataset of which only numbers and sizes are asked; every second image is upright, 4 to 3."""

    group_rows = None

    def __init__(self, images: int, classes: int = 1000) -> None:
        self.labels = np.arange(images) % classes
        self.classes = [f"class {number}" for number in range(classes)]

    def __len__(self) -> int:
        return len(self.labels)

    def sizes(self) -> np.ndarray:
        return np.tile(np.array([[375, 500], [500, 375]], np.int32), (len(self) // 2 + 1, 1))[: len(self)]


class Bench(NamedTuple):
    """The engine at the entry of its first stage, and batches that lie on its device."""

    trainer: Trainer
    epoch: EpochPlan
    rates: Rates
    batches: list[Batch]

    def train(self, stream: Iterator[Batch] | None = None) -> None:
        """The engine's own epoch, on the batches of a stream instead of the ready ones if one is given."""
        progress = self.trainer.state.progress
        progress.step, progress.epoch_sums = 0, [0.0, 0.0]
        train_epoch(self.trainer, self.epoch, self.rates, stream or cycle(self.batches))


@contextmanager
def ready(cfg: TrainConfig, steps: int) -> Iterator[Bench]:
    """Set up the engine for one epoch of `steps` optimizer steps of the first stage; nothing is read or written."""
    cfg.stages = cfg.stages_in_force()[:1]
    with start_run(cfg) as run:
        train = Blank(steps * cfg.stages[0].batch_size * cfg.accumulation)
        run.stages = cfg.stages
        with assembled(run, create_model(cfg.model, len(train.classes)), train, train) as trainer:
            epoch = next(trainer.plan.epochs())
            trainer.enter_stage(epoch)
            items = islice(trainer.batches.train_items(epoch), READY_BATCHES)
            ready_batches = [fill(item, train, run.accelerator.device, cfg.channels_last) for item in items]
            yield Bench(trainer, epoch, Rates(trainer.plan, cfg, 0.1), ready_batches)


def fill(item: BatchItem, source: Blank, device: torch.device, channels_last: bool = True) -> Batch:
    """A batch of noise for an item, in the memory layout that the loader would give it."""
    shape = (len(item.indices), item.height, item.width, 3)
    noise = np.random.default_rng(int(item.indices[0])).integers(0, 256, shape, np.uint8)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    return Batch(images.to(device), torch.from_numpy(source.labels[item.indices]).to(device), item, 0.0)


def bare_loop(bench: Bench) -> Callable[[], None]:
    """The same training steps with nothing around them, on a network of their own that Accelerate has not seen."""
    trainer, cfg, device = bench.trainer, bench.trainer.run.cfg, bench.trainer.run.accelerator.device
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = (
        create_model(cfg.model, len(trainer.batches.train.classes)).to(device, memory_format=layout).train()
    )
    if cfg.compile:
        model.compile(dynamic=False)
    optimizer = create_optimizer(cfg, model, momentum=cfg.momentum)
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(cfg.mixed_precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    augment, mix = trainer.augment, bench.epoch.mix

    def loop() -> None:
        for batch in islice(cycle(bench.batches), bench.epoch.steps * cfg.accumulation):
            images, targets = augment(batch.images, batch.labels, batch.item, mix=mix)
            with torch.autocast(device.type, precision, enabled=precision is not None):
                loss = F.cross_entropy(model(images), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return loop


def in_turns(
    loops: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each repeat of each loop; they take turns, so that what disturbs one disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(repeats + 1):
        for name in loops if repeat % 2 else reversed(loops):
            began = time.perf_counter()
            loops[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            # The first warms up.
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main(cfg: LoopConfig) -> None:
    with ready(cfg, cfg.steps) as bench:
        run, images = bench.trainer.run, bench.epoch.steps * bench.epoch.global_batch
        loops = {"bare": bare_loop(bench), "engine": bench.train}
        seconds = in_turns(loops, cfg.repeats, run.accelerator.device)
        ratio = statistics.median(b / e for b, e in zip(seconds["bare"], seconds["engine"], strict=True))
        bare, engine = (images / statistics.median(seconds[name]) for name in loops)
        text = "%s at %d px, batch %d, %s, %d threads: bare loop %.1f images/s, engine %.1f, ratio %.3f (%d repeats)"
        settings = (cfg.model, cfg.img_size, cfg.batch_size, cfg.mixed_precision, torch.get_num_threads())
        run.log.info(text, *settings, bare, engine, ratio, cfg.repeats)
        if cfg.json:
            figures = {"bare": bare, "engine": engine, "ratio": ratio, "seconds": seconds}
            Path(cfg.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_script(main, LoopConfig, __doc__)
