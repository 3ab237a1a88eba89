import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common import UserError
from common.model import create_model
from common.model.freezing import check_frozen, set_trainable_layers, train_mode
from tests.model.models import IMAGES, LABELS, changed, optimizer_for, small, snapshot, step

EARLY = ("conv1", "bn1", "layer1", "layer2")


@pytest.mark.parametrize(
    ("name", "prefix"), [("resnet18", "fc"), ("vit_tiny_patch16_224", "head"), ("convnext_atto", "head.fc")]
)
def test_backbone_is_all_but_the_classifier(name, prefix):
    model = create_model(name, 5)
    set_trainable_layers(model, ["backbone"])
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{prefix}.weight", f"{prefix}.bias"}
    train_mode(model, ["backbone"])
    assert model.get_submodule(prefix).training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_both_heads_of_a_distilled_model_are_trained():
    model = create_model("deit_tiny_distilled_patch16_224", 5)
    set_trainable_layers(model, ["backbone"])
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_prefixes_end_where_names_end():
    model = nn.Module()
    model.layer1, model.layer10 = nn.Linear(2, 2), nn.Linear(2, 2)
    set_trainable_layers(model, ["layer1"])
    assert not model.layer1.weight.requires_grad
    assert model.layer10.weight.requires_grad
    train_mode(model, ["layer1"])
    assert not model.layer1.training
    assert model.layer10.training
    set_trainable_layers(model, ["layer10.weight"])
    assert model.layer1.weight.requires_grad  # thawed again
    assert not model.layer10.weight.requires_grad
    assert model.layer10.bias.requires_grad


@pytest.mark.parametrize("frozen", [["layer9"], ["conv1", "layer"], ["backbone", "fc"], ["relu"]])
def test_useless_freezing_is_refused(frozen):
    model = small()
    with pytest.raises(UserError, match="frozen: "):
        check_frozen(model, frozen)


def test_frozen_layers_keep_weights_and_statistics():
    model = small()
    optimizer = optimizer_for(model)
    step(model.train(), optimizer)  # leaves momentum and gradients behind
    set_trainable_layers(model, EARLY)
    train_mode(model, EARLY)
    before = snapshot(model)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()
    moved = changed(model, before)
    assert moved == {name for name in before if not name.startswith(tuple(f"{each}." for each in EARLY))}
    assert "layer3.0.bn1.running_mean" in moved

    train_mode(model, ())
    model(IMAGES)
    assert "bn1.running_mean" in changed(model, before)


def test_statistics_are_kept_while_everything_trains():
    model = small()
    check_frozen(model, ["statistics"])
    set_trainable_layers(model, ["statistics"])
    train_mode(model, ["statistics"])
    before = snapshot(model)
    assert torch.equal(model(IMAGES[:2]), model(IMAGES)[:2])
    step(model, optimizer_for(model))
    moved = changed(model, before)
    assert {"conv1.weight", "bn1.weight", "fc.weight"} <= moved
    assert moved.isdisjoint(name for name, _ in model.named_buffers())


def test_backward_stops_at_the_frozen_layers():
    model = small()
    set_trainable_layers(model, EARLY)
    train_mode(model, EARLY)
    tracked = {}
    for name in ("layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: tracked.__setitem__(name, output.requires_grad)
        )
    F.cross_entropy(model(IMAGES), LABELS).backward()
    assert tracked == {"layer2": False, "layer3": True}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(tuple(f"{each}." for each in EARLY))
