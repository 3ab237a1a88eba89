"""The LR finder: what it restores, and how often simulated curves of known noise lead it astray."""

import csv
import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch

from common import UserError
from common.engine.lr_finder import ABOVE_BLOW_UP, Sweep, find_lr
from common.run.checkpoint import Progress, TrainState

FALLBACK = 0.025


def state_and_step() -> tuple[TrainState, Callable[[float], float]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = SimpleNamespace(module=torch.nn.Linear(2, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    state = TrainState(model, optimizer, ema, scaler, Progress())
    images, labels = torch.randn(64, 4), torch.arange(64) % 2

    def step(lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            ema.module.weight.add_(1)
        return loss.item()

    return state, step


def everything(state: TrainState) -> list[torch.Tensor]:
    buffers = [v.clone() for s in state.optimizer.state.values() for v in s.values() if v is not None]
    rates = [group["lr"] for group in state.optimizer.param_groups]
    scaler = [state.scaler.get_scale(), state.scaler.state_dict()["_growth_tracker"]]
    return [
        *map(torch.clone, state.model.state_dict().values()),
        *buffers,
        state.ema.module.weight.clone(),
        torch.tensor([*rates, *scaler]),
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("warm_steps", [0, 3])
@pytest.mark.parametrize("stops_at", [None, 7])
def test_restores_everything_bit_for_bit(warm_steps: int, stops_at: int | None) -> None:
    state, step = state_and_step()
    for _ in range(warm_steps):
        step(0.1)
    before = everything(state)
    seen = []

    def watched(lr: float) -> float:
        seen.append(lr)
        if len(seen) == stops_at:
            raise KeyboardInterrupt
        return step(lr)

    if stops_at:
        with pytest.raises(KeyboardInterrupt):
            find_lr(state, watched, 30, fallback=FALLBACK)
    else:
        find_lr(state, watched, 30, fallback=FALLBACK)
    assert len(seen) == stops_at if stops_at else len(seen) > 7
    after = everything(state)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in state.model.parameters())


# ------------------------------------------------------------------------------------------------ simulated curves

Curve = Callable[[float], float]


def curve(blow_up: float, steepness: float = 4.0, depth: float = 0.3, cap: float = math.inf) -> Curve:
    """A loss that falls from 4.6 by the share `depth`, and at the rate `blow_up` has risen again by a twentieth of 4.6.

    The rise grows with the power `steepness` of the rate, up to the share `cap`; half a decade later the network has
    collapsed to a loss near its first, as networks with batch normalisation do.
    """

    def loss(lr: float) -> float:
        descent = depth / (1 + (blow_up / 12 / lr) ** 1.2)
        rise = 0.05 * (lr / blow_up) ** steepness
        if math.isfinite(cap):
            rise = cap * rise / (cap + rise)
            peak = blow_up * (cap / 0.05) ** (1 / steepness)
            collapsed = 1 / (1 + (3 * peak / lr) ** 4)
            rise = (1 - collapsed) * rise + collapsed * depth * 0.8
        return 4.6 * (1 - descent + rise)

    return loss


def sweep(curve: Curve, steps: int, noise: float = 0.0, seed: int = 0, factors: tuple = ()) -> Sweep:
    """The finder on a curve with normal multiplicative noise, whose first losses are multiplied by `factors`."""
    state = TrainState(
        model := torch.nn.Linear(1, 1), torch.optim.SGD(model.parameters(), 0.1), None, None, Progress()
    )
    rng, first = random.Random(seed), iter(factors)
    return find_lr(
        state,
        lambda lr: curve(lr) * next(first, 1.0) * max(0.05, rng.gauss(1, noise)),
        steps,
        fallback=FALLBACK,
    )


@pytest.mark.parametrize(
    ("steps", "noise", "most_wrong", "most_untrusted"),
    [
        (15, 0.01, 0.01, 0.05),
        (25, 0.03, 0.01, 0.05),
        (30, 0.05, 0.03, 0.08),
        (50, 0.05, 0.01, 0.05),
        (100, 0.05, 0.01, 0.05),
        (100, 0.1, 0.05, 0.1),
    ],
)
def test_noise_hardly_moves_the_suggestion(
    steps: int, noise: float, most_wrong: float, most_untrusted: float
) -> None:
    rng = random.Random(0)
    wrong = untrusted = 0
    trials = 100
    for seed in range(trials):
        shape = curve(
            10 ** rng.uniform(-1, 0),
            steepness=rng.choice((2, 3, 4, 6)),
            depth=rng.uniform(0.05, 0.6),
            cap=rng.choice((0.3, 0.6, math.inf)),
        )
        clean, noisy = sweep(shape, steps), sweep(shape, steps, noise, seed)
        assert clean.problem == ""
        assert noisy.problem or noisy.suggested >= 1e-3
        untrusted += bool(noisy.problem)
        wrong += not noisy.problem and not 0.49 < noisy.suggested / clean.suggested < 2.01
    assert wrong <= most_wrong * trials
    assert untrusted <= most_untrusted * trials


@pytest.mark.parametrize("steps", [15, 25, 50, 100])
@pytest.mark.parametrize("blow_up", [0.05, 0.2, 0.8])
def test_suggests_a_multiple_of_the_rate_of_the_blow_up(steps: int, blow_up: float) -> None:
    found = sweep(curve(blow_up), steps)
    assert found.problem == ""
    spacing = found.lrs[1] / found.lrs[0]
    assert blow_up / spacing < found.suggested / ABOVE_BLOW_UP < blow_up * max(1.9, spacing**2)


@pytest.mark.parametrize("steps", [25, 30, 50, 100])
@pytest.mark.parametrize(
    "factors", [(1.0, 1.07, 1.17), (0.8, 1.2, 0.9, 1.15), (1.0, 1.1, 1.2, 1.3, 1.2, 1.1)]
)
def test_a_rise_in_the_first_steps_is_no_blow_up(steps: int, factors: tuple) -> None:
    """Three losses of a fine-tuning, 2.94, 3.15 and 3.43, once made a peak of 1e-05."""
    found = sweep(curve(0.3), steps, factors=factors)
    assert found.problem == ""
    assert found.suggested == pytest.approx(sweep(curve(0.3), steps).suggested, rel=0.8)


def test_a_single_high_loss_is_no_blow_up() -> None:
    factors = (*[1.0] * 60, 2.0)
    clean = sweep(curve(0.4), 100).suggested
    assert sweep(curve(0.4), 100, factors=factors).suggested == pytest.approx(clean, rel=0.3)


def test_a_loss_that_is_suddenly_not_finite_is_a_blow_up() -> None:
    found = sweep(lambda lr: 2.0 if lr < 0.3 else math.nan, 50)
    assert math.isnan(found.losses[-1])
    assert len(found.losses) < 50
    assert found.problem == ""
    spacing = found.lrs[1] / found.lrs[0]
    assert 0.3 / spacing < found.suggested / ABOVE_BLOW_UP < 0.3


def test_ends_when_the_loss_has_diverged() -> None:
    found = sweep(lambda lr: 2.0 if lr < 0.3 else 1e4, 100)
    assert found.lrs[-1] < 0.5
    ratios = [b / a for a, b in zip(found.lrs, found.lrs[1:], strict=False)]
    assert ratios == pytest.approx([10 ** (6 / 99)] * len(ratios))


@pytest.mark.parametrize(
    ("shape", "steps", "noise", "reason"),
    [
        (lambda lr: 0.0, 30, 0.0, "did not blow up"),
        (lambda lr: 1.8, 30, 0.01, "did not blow up"),
        (lambda lr: 4 / (1 + lr), 50, 0.05, "did not blow up"),
        (lambda lr: 4.0 if lr < 1e-4 else math.inf, 100, 0.0, "diverged already"),
        (lambda lr: 4 + 4 * (lr / 1e-3) ** 8, 100, 0.0, "too early"),
        (lambda lr: 4.0 if lr < 0.3 else 1e9, 15, 0.3, "noise"),
        (curve(0.3), 14, 0.0, "14 steps are too few"),
        (curve(0.3), 5, 0.0, "5 steps are too few"),
        (curve(0.3), 1, 0.0, "1 steps are too few"),
    ],
)
def test_says_that_a_curve_cannot_be_trusted_and_takes_the_fallback(
    shape: Curve, steps: int, noise: float, reason: str, tmp_path: Path
) -> None:
    found = sweep(shape, steps, noise)
    assert reason in found.problem
    assert found.suggested == FALLBACK
    found.write_csv(tmp_path / "lr_finder.csv")
    with (tmp_path / "lr_finder.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["problem"], float(row["suggested"])) for row in rows} == {(found.problem, FALLBACK)}


def test_no_suggestion_from_a_loss_that_never_was_finite() -> None:
    with pytest.raises(UserError, match="--lr"):
        sweep(lambda lr: math.inf, 50)


def test_recorded_sweeps_keep_their_suggestion() -> None:
    """Caltech-101, ResNet-18, seeds 0 and 1."""
    results = Path(__file__).parents[2] / "docs" / "results"
    for name, blow_up in {"sw64_s0": 0.42, "sw64_s1": 0.37, "sw96_s0": 0.44, "sw96_s1": 0.44}.items():
        with (results / name / "lr_finder.csv").open(newline="") as file:
            losses = {float(row["lr"]): float(row["loss"]) for row in csv.DictReader(file)}
        recorded = iter(losses.values())
        found = sweep(lambda lr, recorded=recorded: next(recorded), 100)
        assert found.problem == ""
        assert found.suggested / ABOVE_BLOW_UP == pytest.approx(blow_up, rel=0.02)


def test_recorded_sweeps_from_other_weights_and_batches_agree() -> None:
    """Sweeps that differ in the seed only, on two data sets: peaks scatter by a fifth (one standard deviation)."""
    path = Path(__file__).parents[2] / "docs" / "results" / "sweeps.json"
    peaks: dict[tuple, list[float]] = {}
    for recorded in json.loads(path.read_text()):
        losses = iter(recorded["losses"])
        found = sweep(lambda lr, losses=losses: next(losses), recorded["iterations"])
        assert found.problem == ""
        peaks.setdefault((recorded["script"], recorded["data"]), []).append(math.log(found.suggested))
    assert sorted(map(len, peaks.values()))[1:] == [5, 6, 8]
    assert all(stdev(logs) < 0.2 for logs in peaks.values() if len(logs) > 2)


def test_reports_progress_with_an_eta_and_the_problem(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("common.engine.lr_finder.REPORT_S", 0.0)
    with caplog.at_level(logging.INFO, "common"):
        found = sweep(lambda lr: 1.0, 20)
    *progress, last = caplog.messages
    assert len(progress) == 20
    assert progress[4].startswith("LR finder: step 5/20, loss 1.000, ETA 0:00")
    assert last == f"LR finder: not trusted ({found.problem}); the rate is 0.025 instead, or what --lr says"


def test_csv_tells_each_step(tmp_path: Path) -> None:
    found = sweep(curve(0.3), 30)
    found.write_csv(tmp_path / "lr_finder.csv")
    lines = (tmp_path / "lr_finder.csv").read_text().splitlines()
    assert lines[0] == "step,lr,loss,smoothed,threshold,suggested,problem"
    assert len(lines) == 1 + len(found.lrs)
