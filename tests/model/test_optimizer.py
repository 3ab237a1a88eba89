import copy
import json

import pytest
import torch
from torch.nn import functional as F

from common import UserError
from common.engine.trainer import set_rates
from common.model import create_model
from common.model.freezing import set_trainable_layers, train_mode
from common.run.checkpoint import _pack_optimizer, _unpack_optimizer
from tests.model.models import IMAGES, LABELS, changed, optimizer_for, small, snapshot, step


def by_name(model, optimizer, key):
    """A value of the groups, by the names of their parameters."""
    values = {p: group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: values[parameter] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("decay_all", [True, False])
def test_every_parameter_is_in_one_group(name, layer_decay, decay_all):
    model = create_model(name, 5)
    optimizer = optimizer_for(model, layer_decay=layer_decay, decay_norm_and_bias=decay_all)
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == set(model.parameters())
    dimensions = {key: parameter.ndim for key, parameter in model.named_parameters()}
    for key, decay in by_name(model, optimizer, "weight_decay").items():
        exempt = (not decay_all and dimensions[key] == 1) or key in ("pos_embed", "cls_token", "reg_token")
        assert decay == (0.0 if exempt else 0.05), key


def test_layer_decay_lowers_rates_towards_the_stem():
    model = create_model("resnet18", 5)
    scales = by_name(model, optimizer_for(model, layer_decay=0.5), "lr_scale")
    assert scales["fc.weight"] == scales["fc.bias"] == 1.0
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    for height, block in enumerate(reversed(blocks), start=1):
        assert {value for name, value in scales.items() if name.startswith(f"{block}.")} == {0.5**height}
    assert scales["conv1.weight"] == scales["bn1.weight"] == 0.5**9

    vit = create_model("test_vit", 5)
    scales = by_name(vit, optimizer_for(vit, layer_decay=0.5), "lr_scale")
    names = ["patch_embed.proj.weight", *(f"blocks.{i}.mlp.fc1.weight" for i in range(len(vit.blocks)))]
    assert [scales[name] for name in names] == sorted({scales[name] for name in names})
    assert scales["head.weight"] == 1.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_layer_decay_every_group_has_the_plain_rate(optimizer):
    groups = optimizer_for(small(), optimizer=optimizer).param_groups
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.0, 1.0), (0.05, 1.0)]


def test_an_optimizer_of_half_a_model_is_refused():
    model = small()
    set_trainable_layers(model, ["layer1"])
    with pytest.raises(AssertionError, match="frozen"):
        optimizer_for(model)


def plain_sgd(model, **options):
    defaults = {"momentum": 0.9, "nesterov": True, "fused": False, "foreach": False}
    return torch.optim.SGD(model.parameters(), lr=0.1, **defaults | options)


def test_sgd_steps_like_plain_sgd_also_after_thawing():
    ours = small().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(ours)
    mine = optimizer_for(ours, decay_norm_and_bias=True)
    theirs = plain_sgd(plain, weight_decay=0.05)
    for frozen in (["backbone"], ["backbone"], [], []):
        for model, optimizer in ((ours, mine), (plain, theirs)):
            set_trainable_layers(model, frozen)
            train_mode(model, ["backbone"])  # statistics as they are: rounding must not be amplified
            step(model, optimizer)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"layer_decay": 1.0}, {"layer_decay": 1.0, "decay_norm_and_bias": True}]
)
def test_grouping_changes_no_bit(settings):
    grouped = small()
    single = copy.deepcopy(grouped)
    mine = optimizer_for(grouped, **{"weight_decay": 0.0} | settings)
    theirs = plain_sgd(single, fused=True)
    for _ in range(3):
        step(grouped, mine)
        step(single, theirs)
    assert not changed(grouped, single.state_dict())


def test_without_momentum_sgd_is_plain():
    ours = small()
    plain = copy.deepcopy(ours)
    for model, optimizer in (
        (ours, optimizer_for(ours, momentum=0.0, weight_decay=0.0)),
        (plain, plain_sgd(plain, momentum=0.0, nesterov=False)),
    ):
        step(model, optimizer)
        step(model, optimizer)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_sgd_goes_on_from_a_state_in_another_memory_layout():
    first = small()
    saved = optimizer_for(first)
    step(first, saved)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(first).to(memory_format=layout)
        optimizer = optimizer_for(model)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        for mine, other in zip(model.parameters(), first.parameters(), strict=True):
            mine.grad = torch.zeros_like(mine).copy_(other.grad)
        optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradient_scaling_skips_a_step_and_scales_the_others(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = small().to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer = optimizer_for(model, weight_decay=0.0)
    plain = copy.deepcopy(model)
    before = snapshot(model)
    for bad in (True, False):
        scaler.scale(F.cross_entropy(model(IMAGES.to(device)), LABELS.to(device))).backward()
        if bad:
            model.conv1.weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            assert not {
                name for name in changed(model, before) if "running" not in name and "num" not in name
            }
            assert scaler.get_scale() == 2.0**9
            plain.load_state_dict(model.state_dict())
    theirs = plain_sgd(plain)
    F.cross_entropy(plain(IMAGES.to(device)), LABELS.to(device)).backward()
    theirs.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_optimizers_by_name():
    model = create_model("resnet18", 5)
    optimizer = optimizer_for(model, optimizer="lamb", layer_decay=0.5)
    assert type(optimizer).__name__ == "Lamb"
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.5**height for height in range(10)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    before = snapshot(model)
    step(model, optimizer)
    assert "conv1.weight" in changed(model, before)
    with pytest.raises(UserError, match=r"--optimizer addamw is unknown; did you mean .*adamw"):
        optimizer_for(model, optimizer="addamw")


@pytest.mark.parametrize("name", ["adafactor", "adopt", "lamb", "lion", "muon"])
def test_a_run_goes_on_with_the_optimizer_bit_for_bit(name):
    model = create_model("test_vit", 5, 32)
    model.eval()
    optimizer, images = optimizer_for(model, optimizer=name), IMAGES[..., :32]
    begin, untouched = snapshot(model), copy.deepcopy(optimizer.state_dict())

    def train(model, optimizer):
        for _ in range(3):
            set_rates(optimizer, 3e-3, 0.9)
            loss = F.cross_entropy(model(images), LABELS)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    start = F.cross_entropy(model(images), LABELS).item()
    first = train(model, optimizer)
    # As the LR finder puts everything back.
    model.load_state_dict(begin)
    optimizer.load_state_dict(untouched)
    assert train(model, optimizer) == first < start
    tensors, rest = _pack_optimizer(optimizer)
    other = copy.deepcopy(model)
    resumed = optimizer_for(other, optimizer=name)
    _unpack_optimizer(resumed, copy.deepcopy(tensors), json.loads(json.dumps(rest)))
    assert train(model, optimizer) == train(other, resumed)
    assert not changed(model, other.state_dict())


@pytest.mark.parametrize("name", ["adafactorbv", "adahessian", "kron"])
def test_an_optimizer_with_which_a_run_cannot_go_on_is_refused(name):
    with pytest.raises(UserError, match=f"--optimizer {name} needs second derivatives, or keeps what"):
        optimizer_for(small(), optimizer=name)


def test_muon_leaves_head_and_embeddings_to_adam():
    model = create_model("test_vit", 5, 32)
    optimizer = optimizer_for(model, optimizer="muon", decay_norm_and_bias=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    adams = [
        names[p] for group in optimizer.param_groups if group.get("use_fallback") for p in group["params"]
    ]
    assert sorted(adams) == ["cls_token", "head.bias", "head.weight", "pos_embed"]
