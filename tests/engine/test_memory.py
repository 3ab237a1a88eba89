"""Steps on blank images leave no trace, and what does not fit is said instead of ending the run."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from common.engine import memory
from common.model import create_model
from common.scheduling import Stage
from train_standard import StandardConfig


@pytest.fixture
def run():
    return SimpleNamespace(cfg=StandardConfig(), accelerator=Accelerator(cpu=True))


def traces(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    return state, flags, torch.get_rng_state()


def same(a, b):
    (state, flags, rng), (state_now, flags_now, rng_now) = a, b
    return (
        all(torch.equal(state[k], state_now[k]) for k in state)
        and flags == flags_now
        and torch.equal(rng, rng_now)
    )


@pytest.mark.parametrize("fits", [True, False])
def test_a_trial_leaves_no_trace_whether_it_fits_or_not(fits, run, monkeypatch):
    model = create_model("test_resnet", 3)
    before = traces(model)
    original = memory.blank_step

    def step(*args):
        original(*args)
        torch.rand(3)
        if not fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "blank_step", step)
    stage = Stage(1, 32, 4, frozen=("conv1", "bn1"))
    state = SimpleNamespace(model=model, optimizer=torch.optim.SGD(model.parameters()))
    assert memory._fits(run, state, stage, 4, 32, 32) == fits
    assert same(before, traces(model))
    assert all(parameter.grad is None for parameter in model.parameters())
