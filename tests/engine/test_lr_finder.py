import math
from types import SimpleNamespace

import pytest
import torch

from common import UserError
from common.engine.lr_finder import find_lr, suggest
from common.run.checkpoint import Progress, TrainState


def state_and_step(loss_at=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = SimpleNamespace(module=torch.nn.Linear(2, 2))
    state = TrainState(model, optimizer, ema, None, Progress())
    images, labels = torch.randn(64, 4), torch.arange(64) % 2

    def step(lr):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            ema.module.weight.add_(1)
        return loss.item() if loss_at is None else loss_at(lr)

    return state, step


def everything(state):
    buffers = [v.clone() for s in state.optimizer.state.values() for v in s.values() if v is not None]
    return [
        *map(torch.clone, state.model.state_dict().values()),
        *buffers,
        state.ema.module.weight.clone(),
        torch.get_rng_state(),
    ]


def test_restores_everything_bit_for_bit():
    state, step = state_and_step()
    for _ in range(3):
        step(0.1)
    before, rates = everything(state), [g["lr"] for g in state.optimizer.param_groups]
    sweep = find_lr(state, step, iterations=30)
    assert len(sweep.lrs) > 5
    assert [g["lr"] for g in state.optimizer.param_groups] == rates
    for a, b in zip(before, everything(state), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in state.model.parameters())


def test_restores_also_when_it_is_interrupted():
    state, step = state_and_step()
    before = everything(state)

    def stops(lr):
        step(lr)
        if lr > 1e-3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        find_lr(state, stops, iterations=50)
    for a, b in zip(before, everything(state), strict=True):
        assert torch.equal(a, b)


def test_sweeps_exponentially_and_stops_on_divergence():
    state, step = state_and_step(lambda lr: 1.0 if lr < 0.1 else 1e3)
    sweep = find_lr(state, step, iterations=100)
    ratios = [b / a for a, b in zip(sweep.lrs, sweep.lrs[1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert 0.1 < sweep.lrs[-1] < 1.0
    assert len(sweep.lrs) < 100


def test_stops_at_a_loss_that_is_not_finite():
    state, step = state_and_step(lambda lr: 1.0 if lr < 0.1 else math.nan)
    assert math.isnan(find_lr(state, step, iterations=100).losses[-1])


def test_suggests_a_rate_below_the_blow_up_and_not_by_the_noise_of_the_valley():
    lrs = [10 ** (-5 + i / 20) for i in range(120)]
    losses = [5 - 2 / (1 + (0.01 / lr)) + max(0, lr - 0.3) * 10 for lr in lrs]
    rates = []
    for seed in range(5):
        noise = torch.randn(120, generator=torch.Generator().manual_seed(seed)) * 0.03
        rates.append(suggest(lrs, [a + b for a, b in zip(losses, noise.tolist(), strict=True)]))
    assert all(0.1 < rate < 0.3 for rate in rates)
    assert max(rates) < 1.3 * min(rates)


def test_no_suggestion_from_a_loss_that_never_was_finite():
    with pytest.raises(UserError, match="--lr"):
        suggest([1e-5], [math.inf])


def test_csv_has_what_the_plot_reads(tmp_path):
    state, step = state_and_step()
    sweep = find_lr(state, step, iterations=12)
    sweep.write_csv(tmp_path / "lr_finder.csv")
    lines = (tmp_path / "lr_finder.csv").read_text().splitlines()
    assert lines[0] == "step,lr,loss,smoothed,suggested"
    assert len(lines) == 1 + len(sweep.lrs)
