"""The learning-rate range test: a short exponential sweep that leaves no trace in the training state."""

import copy
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from common.run.checkpoint import TrainState, rng_state, set_rng_state
from common.run.plots import DIVERGED


@dataclass(frozen=True)
class Sweep:
    """What the finder saw: learning rates, losses and smoothed losses by step, and the peak it suggests."""

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    suggested: float

    def write_csv(self, path: Path) -> None:
        rows = zip(range(len(self.lrs)), self.lrs, self.losses, self.smoothed, strict=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "lr", "loss", "smoothed", "suggested"))
            writer.writerows((*row, self.suggested) for row in rows)


def find_lr(
    state: TrainState,
    train_step: Callable[[float], float],
    iterations: int = 100,
    lowest: float = 1e-5,
    highest: float = 10.0,
    smoothing: float = 0.9,
) -> Sweep:
    """Raise the learning rate exponentially from `lowest` to `highest` and watch the loss (Smith, 2017).

    Args:
        state: model, optimizer, scaler and RNG; restored bit for bit afterwards.
        train_step: takes one optimizer step at a learning rate; returns the mean loss over all processes, so that
            every process sees the same curve and stops at the same step.
    """
    before = _remember(state)
    lrs, losses, smoothed = [], [], []
    average, best = 0.0, math.inf
    try:
        for step in range(iterations):
            lr = lowest * (highest / lowest) ** (step / max(1, iterations - 1))
            loss = train_step(lr)
            average = smoothing * average + (1 - smoothing) * loss if math.isfinite(loss) else math.inf
            corrected = average / (1 - smoothing ** (step + 1))
            lrs.append(lr)
            losses.append(loss)
            smoothed.append(corrected)
            best = min(best, corrected)
            if not math.isfinite(loss) or (step > 10 and corrected > DIVERGED * best):
                break
    finally:
        _restore(state, before)
    return Sweep(lrs, losses, smoothed, suggest(lrs, smoothed))


def suggest(lrs: list[float], smoothed: list[float]) -> float:
    """The peak for OneCycle: four fifths of the rate at which the smoothed loss begins to blow up.

    It has done so when it lies above its lowest value so far by a twentieth of the first loss. The lowest point itself
    is no good guide: the curve is flat there, and noise decides. Four fifths, because half of that was worse in
    trainings of 20 epochs at 64 and 96 px (docs/results.md); OneCycle's warm-up carries the network there.
    """
    if not math.isfinite(smoothed[0]):
        raise UserError("the LR finder's first loss is not finite; check the data, or give --lr a number")
    lowest, at_lowest = smoothed[0], 0
    for step, loss in enumerate(smoothed):
        if loss < lowest:
            lowest, at_lowest = loss, step
        if not loss < lowest + smoothed[0] / 20:
            return 0.8 * lrs[step]
    return 0.8 * lrs[at_lowest]


def _remember(state: TrainState) -> dict:
    return {
        "model": {name: tensor.clone() for name, tensor in state.model.state_dict().items()},
        "optimizer": copy.deepcopy(state.optimizer.state_dict()),
        "ema": None
        if state.ema is None
        else {k: v.clone() for k, v in state.ema.module.state_dict().items()},
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "rng": rng_state(),
    }


def _restore(state: TrainState, before: dict) -> None:
    state.model.load_state_dict(before["model"])
    state.optimizer.load_state_dict(before["optimizer"])
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.module.load_state_dict(before["ema"])
    if state.scaler:
        state.scaler.load_state_dict(before["scaler"])
    set_rng_state(before["rng"])
