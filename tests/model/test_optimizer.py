import copy

import pytest
import torch
from torch import nn

from common import UserError
from common.model import create_model
from common.model.freezing import set_trainable_layers, train_mode
from common.model.optimizer import create_ema, create_optimizer, param_groups
from tests.model.models import changed, config, small, snapshot, step


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("decay_all", [True, False])
def test_every_parameter_is_in_one_group(name, layer_decay, decay_all):
    model = create_model(name, 5)
    set_trainable_layers(model, ["backbone"])
    groups = param_groups(model, 0.05, decay_all, layer_decay)
    found = [parameter for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == set(model.parameters())
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        exempt = not decay_all and (parameter.ndim == 1 or key in ("pos_embed", "cls_token"))
        assert decay[parameter] == (0.0 if exempt else 0.05)


def test_layer_decay_lowers_rates_towards_the_stem():
    model = create_model("resnet18", 5)
    groups = param_groups(model, 0.05, False, 0.5)
    scale = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    scales = {name: scale[parameter] for name, parameter in model.named_parameters()}
    assert scales["fc.weight"] == scales["fc.bias"] == 1.0
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    for height, block in enumerate(reversed(blocks), start=1):
        assert {value for name, value in scales.items() if name.startswith(f"{block}.")} == {0.5**height}
    assert scales["conv1.weight"] == scales["bn1.weight"] == 0.5**9
    assert {group["lr_scale"] for group in param_groups(model, 0.05, False, None)} == {1.0}

    vit = create_model("vit_tiny_patch16_224", 5)
    scale = {p: group["lr_scale"] for group in param_groups(vit, 0.05, False, 0.5) for p in group["params"]}
    climb = [scale[p] for p in (vit.patch_embed.proj.weight, *(b.mlp.fc1.weight for b in vit.blocks))]
    assert climb == sorted(set(climb))
    assert scale[vit.head.weight] == 1.0

    with pytest.raises(UserError, match="--layer_decay"):
        param_groups(nn.Linear(2, 2), 0.05, False, 0.5)
    with pytest.raises(UserError, match="--layer_decay"):
        param_groups(model, 0.05, False, 1.5)


def test_sgd_steps_like_plain_sgd_also_after_thawing():
    ours = small().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(ours)
    mine = create_optimizer(config(decay_norm_and_bias=True), ours)
    theirs = torch.optim.SGD(
        plain.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05, fused=False, foreach=False
    )
    for frozen in (["backbone"], ["backbone"], [], []):
        for model, optimizer in ((ours, mine), (plain, theirs)):
            set_trainable_layers(model, frozen)
            train_mode(model, ["backbone"])  # statistics as they are: rounding must not be amplified
            step(model, optimizer)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_sgd_goes_on_from_a_state_in_another_memory_layout():
    first = small()
    saved = create_optimizer(config(), first)
    step(first, saved)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(first).to(memory_format=layout)
        optimizer = create_optimizer(config(), model)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        for mine, other in zip(model.parameters(), first.parameters(), strict=True):
            mine.grad = torch.zeros_like(mine).copy_(other.grad)
        optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5)


def test_optimizers_by_name():
    model = create_model("resnet18", 5)
    optimizer = create_optimizer(config(optimizer="lamb", layer_decay=0.5), model)
    assert type(optimizer).__name__ == "Lamb"
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.5**height for height in range(10)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    before = snapshot(model)
    step(model, optimizer)
    assert "conv1.weight" in changed(model, before)
    with pytest.raises(UserError, match=r"--optimizer addamw is unknown; did you mean .*adamw"):
        create_optimizer(config(optimizer="addamw"), model)
    with pytest.raises(UserError, match="--nesterov"):
        create_optimizer(config(momentum=0.0), model)


def test_ema_follows_weights_and_statistics():
    model = small()
    model.compile(backend="eager")
    ema = create_ema(model, decay=0.99)
    optimizer = create_optimizer(config(), model)
    start = snapshot(model)
    path = []
    for done in range(1, 4):
        step(model.train(), optimizer)
        ema.update(model, step=done)
        path.append(snapshot(model))
    decays = [0.0, *(1 - (1 + late) ** -0.75 for late in (1, 2))]  # the first update copies
    for name in ("conv1.weight", "bn1.running_mean", "fc.bias"):
        expected = start[name]
        for decay, now in zip(decays, path, strict=True):
            expected = decay * expected + (1 - decay) * now[name]
        average = ema.module.state_dict()[name]
        torch.testing.assert_close(average, expected, atol=1e-6, rtol=1e-4)
        assert not torch.equal(average, path[-1][name])
    assert ema.module.state_dict()["bn1.num_batches_tracked"] == 3
    assert ema.get_decay(10**9) == 0.99
    assert not ema.module.training
