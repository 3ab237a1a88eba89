"""The losses, and gradient checkpointing: other ways to the same numbers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common import UserError
from common.engine.setup import checkpoint_gradients
from common.model import create_model
from common.model.loss import binary_cross_entropy
from common.scheduling import Stage
from tests.engine.trainers import noise, small_trainer

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = torch.eye(5)[:4] * 0.7 + torch.eye(5)[[1, 2, 3, 4]] * 0.3


def test_binary_cross_entropy_is_a_sum_over_classes_and_a_mean_over_images():
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    targets = torch.rand(6, 10, generator=torch.Generator().manual_seed(1))
    chances = (logits - math.log(10)).sigmoid()
    by_hand = -(targets * chances.log() + (1 - targets) * (1 - chances).log()).sum(1).mean()
    torch.testing.assert_close(binary_cross_entropy(logits, targets), by_hand)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_binary_cross_entropy_starts_near_cross_entropy(classes):
    logits, targets = torch.zeros(4, classes), F.one_hot(torch.tensor([0, 1, 0, 1]), classes).float()
    gap = binary_cross_entropy(logits, targets) - F.cross_entropy(logits, targets)
    assert 0 < gap < 1.01


def gradients(checkpointing: bool, drop_path: float, compiled: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = create_model("test_vit", 5, 32, drop_path=drop_path).train()
    if checkpointing:
        checkpoint_gradients(model)
    if compiled:
        model.compile(backend="eager", dynamic=False)
    torch.manual_seed(1)
    F.cross_entropy(model(IMAGES), TARGETS).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_changes_no_gradient(compiled):
    """Stochastic depth draws the same branches when a block is computed again; a compiled network draws others."""
    drop_path = 0.0 if compiled else 0.5
    got = gradients(True, drop_path, compiled)
    for name, gradient in gradients(False, drop_path).items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_checkpointing_keeps_less():
    kept = []
    for checkpointing in (False, True):
        model = create_model("test_vit", 5, 32)
        if checkpointing:
            checkpoint_gradients(model)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t.numel()) or t, lambda t: t
        ):
            model(IMAGES)
        kept.append(sum(saved))
    assert kept[1] < 0.5 * kept[0]


def test_checkpointing_is_refused_where_it_would_do_harm_or_nothing():
    with pytest.raises(UserError, match="--grad_checkpointing is for networks without BatchNorm"):
        checkpoint_gradients(create_model("resnet18", 5))
    with pytest.raises(UserError, match="--grad_checkpointing: timm has none for this model"):
        checkpoint_gradients(nn.Sequential(nn.Linear(2, 2)))


def test_steps_run_what_was_compiled_before_the_first(monkeypatch):
    """Also in bf16, and in a stage in which the same layers train: there Accelerate's autocast stays the same function."""
    compile_module, stats = nn.Module.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: compile_module(self, backend="eager", **kw))
    stages = [Stage(1, 32, 16), Stage(1, 32, 16), Stage(1, 32, 16, frozen=("conv1", "bn1"))]
    compiled, prepared = [], []
    with small_trainer(stages, compile=True, mixed_precision="bf16") as t:
        accelerator = t.run.accelerator
        prepare_model = accelerator.prepare_model
        monkeypatch.setattr(accelerator, "prepare_model", lambda m: prepared.append(m) or prepare_model(m))
        for epoch in t.plan.epochs():
            t.enter_stage(epoch)
            ready = stats["unique_graphs"]
            t.begin_epoch(epoch)
            t.train_step(epoch, 0.1, 0.9, noise(t, epoch))
            assert stats["unique_graphs"] == ready > 0
            compiled.append(ready)
            # Stage by stage: the first, no other, another set of layers.
            assert len(prepared) == (1, 1, 2)[t.stage_index]
    first, second, third = compiled
    assert first == second < third
