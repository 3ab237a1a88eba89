"""Steps on blank images leave no trace, and what does not fit is said instead of ending the run."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from common import UserError
from common.engine import memory
from common.model import create_model
from common.scheduling import EpochPlan, Stage
from train_standard import StandardConfig


@pytest.fixture
def run():
    return SimpleNamespace(cfg=StandardConfig(), accelerator=Accelerator(cpu=True))


def traces(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
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
    assert memory._fits(run, model, stage, 4, 32, 32) == fits
    assert same(before, traces(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_out_of_memory_names_what_to_change():
    epoch = EpochPlan(0, 2, Stage(1, 96, 64), 0, 1, mix=False, evaluated=True, global_batch=64)
    with (
        pytest.raises(UserError, match=r"stage 3 at 96 px with 16 images .* --batch_size"),
        memory.out_of_memory_advice(epoch, 16),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
