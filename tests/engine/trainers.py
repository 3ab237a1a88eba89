"""A trainer on the CPU with a small network and batches of noise, for tests that look at single steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from common.config import TrainConfig
from common.data.batches import Batches
from common.data.loader import Batch
from common.engine.setup import prepare_state, settle_plan
from common.engine.trainer import Trainer
from common.run import start_run
from common.scheduling import EpochPlan, Rates, Stage
from common.tools.benchmark_loop import Blank, fill

CLASSES = 4


class Small(nn.Module):
    """Two layers that can be frozen, BatchNorm, dropout, and a classifier."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.bn1(self.conv1(x)).relu()).relu()
        return self.fc(self.dropout(x.mean((2, 3))))

    def get_classifier(self) -> nn.Module:
        return self.fc


@contextmanager
def small_trainer(
    stages: Sequence[Stage],
    images: int = 64,
    model: nn.Module | None = None,
    scaler: Any = None,
    device: str = "cpu",
    **settings: Any,
) -> Iterator[Trainer]:
    """A trainer before its first stage; `scaler` takes the place of Accelerate's, which has none on a CPU.

    On the device "meta" there are shapes and no numbers, so nothing can be read that a GPU would have to be waited for.
    """
    defaults = {
        "trackers": "none",
        "resume": "none",
        "mixed_precision": "no",
        "mixup_alpha": 0.0,
        "cutmix_alpha": 0.0,
    }
    cfg = TrainConfig(stages=list(stages), **defaults | settings)
    # Accelerate holds on to the first precision that it was given.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    try:
        with start_run(cfg) as run:
            if scaler is not None:
                run.accelerator.scaler = scaler
            PartialState().device = run.accelerator.state.device = torch.device(device)
            run.stages = cfg.stages
            source = Blank(images, CLASSES)
            state = prepare_state(run, model or Small(), source, source)
            plan = settle_plan(run, state, source)
            batches = Batches(plan, source, source, cfg, cfg.seed, 0, 1)
            yield Trainer(run, state, plan, batches, None)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def alone(accelerator: Accelerator) -> SimpleNamespace:
    """What an evaluation needs of a run of one process."""
    votes = SimpleNamespace(largest=lambda own: [own])
    return SimpleNamespace(accelerator=accelerator, votes=votes, stop_if_asked=lambda: None)


def noise(t: Trainer, epoch: EpochPlan) -> Iterator[Batch]:
    """The epoch's micro-batches, of noise."""
    for item in t.batches.train_items(epoch):
        yield fill(item, t.batches.train, t.run.accelerator.device)


def rates_of(t: Trainer, peak: float = 0.1) -> Rates:
    return Rates(t.plan, t.run.cfg, peak)
