"""The learning-rate range test: a short exponential sweep that leaves no trace in the training state."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from common import UserError
from common.run.checkpoint import TrainState, rng_state, set_rng_state
from common.run.progress import clock
from common.run.records import write_rows

log = logging.getLogger(__name__)
LOWEST, HIGHEST = 1e-5, 10.0
FEWEST = 15  # steps of a sweep; with fewer, noise decides
DIVERGED = 4.0  # a sweep ends as soon as its smoothed loss is this many times its first
# A rise of the smoothed loss that counts: so many nats, and at most a tenth of the loss at the start. With BatchNorm a network may rise by half
# a nat only before it collapses to guessing.
RISE = 0.25
# The suggestion, times the rate of that rise. The sweep gets there without warm-up and at full momentum, OneCycle after both; and too low
# costs more than too high: half of a good rate 2.5 to 5 points, twice none (docs/results.md).
ABOVE_BLOW_UP = 2.0
REPORT_S = 5.0  # between two lines of progress


@dataclass(frozen=True)
class Sweep:
    """What the finder saw, by step, and the peak that it suggests: the fallback where there is a `problem`."""

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    threshold: list[float]  # a rise of the smoothed loss above it counts; NaN where none does
    suggested: float
    problem: str  # why the curve cannot be trusted; empty if it can

    def write_csv(self, path: Path) -> None:
        columns = range(len(self.lrs)), self.lrs, self.losses, self.smoothed, self.threshold
        # Without a step, a line tells the problem nevertheless.
        steps: list[tuple[object, ...]] = [*zip(*columns, strict=True)] or [("",) * 5]
        head = ("step", "lr", "loss", "smoothed", "threshold", "suggested", "problem")
        write_rows(path, head, ((*step, self.suggested, self.problem) for step in steps))


def find_lr(
    state: TrainState,
    train_step: Callable[[float], float],
    iterations: int,
    *,
    fallback: float,
    factor: float = ABOVE_BLOW_UP,
) -> Sweep:
    """Raise the learning rate exponentially from 1e-5 to 10 and watch the loss (Smith, 2017).

    Args:
        state: restored bit for bit afterwards, also when a step raises.
        train_step: one optimizer step at a rate; returns the mean loss over all processes, so that all stop at the same step.
        iterations: steps to take; fewer than `FEWEST` are not taken at all.
        fallback: the rate to take when the curve cannot be trusted.
        factor: the suggestion, times the rate at which the loss begins to blow up.

    Raises:
        UserError: the first loss is not finite.
    """
    # At most a quarter of a decade per step: a short sweep is to look where losses do blow up.
    lowest = max(LOWEST, HIGHEST / 10 ** ((iterations - 1) / 4))
    lrs, losses, smoothed = list[float](), list[float](), list[float]()
    begun = reported = time.monotonic()
    with _restored(state):
        for step in range(iterations if iterations >= FEWEST else 0):
            lrs.append(lowest * (HIGHEST / lowest) ** (step / (iterations - 1)))
            losses.append(train_step(lrs[-1]))
            smoothed = smooth(losses, iterations)
            if not smoothed[-1] <= DIVERGED * losses[0] < math.inf:
                break
            if (now := time.monotonic()) > reported + REPORT_S:
                reported, left_s = now, (now - begun) * (iterations / (step + 1) - 1)
                log.info(
                    "LR finder: step %d/%d, loss %.3f, ETA %s",
                    step + 1,
                    iterations,
                    losses[-1],
                    clock(left_s),
                )
    threshold = rise_threshold(losses, smoothed, iterations)
    blow_up, problem = find_blow_up(lrs, losses, smoothed, threshold, iterations)
    if problem:
        text = "LR finder: not trusted (%s); the rate is %.3g instead, or what --lr says"
        log.info(text, problem, fallback)
    return Sweep(lrs, losses, smoothed, threshold, fallback if problem else factor * blow_up, problem)


def smooth(losses: list[float], iterations: int) -> list[float]:
    """Average exponentially over a tenth of the sweep, bias-corrected; infinite where the loss is not finite."""
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, 1):
        average += 10 / iterations * (loss - average) if math.isfinite(loss) else math.inf
        smoothed.append(average / (1 - (1 - 10 / iterations) ** step))
    return smoothed


def rise_threshold(losses: list[float], smoothed: list[float], iterations: int) -> list[float]:
    """The lowest smoothed loss so far plus `RISE`, or plus 3.75 of the smoothed loss's standard deviations if they are more.

    They follow from the changes between neighbouring losses of the last quarter of the sweep (noise grows with the
    rate), or of all if these are larger. NaN in the first third, whose rates hardly move a weight: a rise is noise.
    """
    if not losses:
        return []
    first, window = iterations // 3, max(12, iterations // 4)
    changes = [b - a for a, b in pairwise(losses) if math.isfinite(b)]
    # Of a normal distribution the median is a standard deviation / 1.4826; a blow-up hardly moves it.
    overall = 1.4826 * median(map(abs, changes or [0.0]))
    # A change has twice the variance of a loss, the average with weight a = 10 / iterations has a / (2 - a) of it.
    share = math.sqrt(10 / (2 * iterations - 10) / 2)
    counts = min(RISE, fmean(losses[:first]) / 10)
    threshold = [math.nan] * min(first, len(losses))
    for step in range(first, len(losses)):
        recent = math.sqrt(fmean(change**2 for change in changes[max(0, step - 1 - window) : step - 1]))
        rise = max(counts, 3.75 * share * max(overall, recent))
        threshold.append(min(smoothed[first - 1 : step]) + rise)
    return threshold


def find_blow_up(
    lrs: list[float], losses: list[float], smoothed: list[float], threshold: list[float], iterations: int
) -> tuple[float, str]:
    """The rate at which the smoothed loss rises above its threshold; or NaN and why there is none.

    A rise counts if most losses of the next fifteenth of the sweep keep it up. Neither the lowest point nor where the rise began is a
    guide: the curve is flat there, and noise decides.
    """
    first, kept = iterations // 3, max(2, iterations // 15)
    if not losses:
        return math.nan, f"{iterations} steps are too few, it needs {FEWEST}"
    if not math.isfinite(losses[0]):
        raise UserError("the LR finder's first loss is not finite; check the data, or give --lr a number")
    # A sweep that ended early had diverged, and would have gone on so.
    onwards = [*losses, *[math.inf] * (iterations - len(losses))]
    for step in range(first, len(losses)):
        high = sum(not loss <= threshold[step] for loss in onwards[step : step + kept])
        if smoothed[step] > threshold[step] and high > kept / 2:
            rise = (threshold[step] - min(smoothed[first - 1 : step])) / fmean(losses[:first])
            if rise > 0.4:
                return math.nan, f"noise hides what rises by less than {rise:.0%}"
            if step == first:
                return math.nan, "the loss rises too early in the sweep"
            # Between the two steps, where a straight line over the rate's logarithm crosses.
            before, after = smoothed[step - 1 : step + 1]
            share = (threshold[step] - before) / (after - before) if before < threshold[step] else 0.0
            return lrs[step - 1] * (lrs[step] / lrs[step - 1]) ** share, ""
    seen = "diverged already at" if len(losses) <= first else "did not blow up until"
    return math.nan, f"the loss {seen} {lrs[-1]:.2g}"


@contextmanager
def _restored(state: TrainState) -> Iterator[None]:
    """Put everything back bit for bit, whatever happens inside."""
    parts = [*state.models.values(), state.optimizer, *filter(None, [state.scaler])]
    before, rng = [copy.deepcopy(part.state_dict()) for part in parts], rng_state()
    try:
        yield
    finally:
        for part, values in zip(parts, before, strict=True):
            part.load_state_dict(values)
        state.optimizer.zero_grad(set_to_none=True)
        set_rng_state(rng)
