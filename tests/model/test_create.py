import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from common import UserError
from common.model.create import (
    BasicBlock,
    ResNet,
    classifier_prefix,
    create_ema,
    create_finetuned_model,
    create_model,
    create_optimizer,
    main,
    param_groups,
    set_trainable_layers,
    train_mode,
)

IMAGES = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])
EARLY = ("conv1", "bn1", "layer1", "layer2")


def config(**changes):
    return SimpleNamespace(
        **{
            "optimizer": "sgd",
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 0.05,
            "decay_norm_and_bias": False,
            "layer_decay": None,
        }
        | changes
    )


def small():
    return ResNet(BasicBlock, (1, 1, 1, 1), 5)


def randomise(model):
    """Make every parameter and buffer matter, also the zero gammas and the fresh statistics."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.uniform_(0.5, 1.0, generator=generator)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_(0, 0.1, generator=generator)
    return model.eval()


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# ------------------------------------------------------------------------------------------------ ResNet


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_names_and_shapes_are_those_of_timm_and_torchvision(name):
    with torch.device("meta"):
        ours = create_model(name, 1000)
        for theirs in (timm.create_model(name), getattr(torchvision.models, name)()):
            shapes = {key: value.shape for key, value in theirs.state_dict().items()}
            assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_outputs_are_those_of_timm_and_torchvision(name):
    ours = randomise(create_model(name, 1000))
    with torch.inference_mode():
        expected = ours(IMAGES)
        for theirs in (timm.create_model(name), getattr(torchvision.models, name)()):
            theirs.load_state_dict(ours.state_dict())
            torch.testing.assert_close(theirs.eval()(IMAGES), expected)
    assert expected.std() > 1e-3


def test_resnet50_has_25_million_parameters():
    assert sum(parameter.numel() for parameter in create_model("resnet50", 1000).parameters()) == 25_557_032


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_initialisation(name, last):
    model = create_model(name, 10)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.unique().tolist() == [0.0 if key.endswith(last) else 1.0]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 33), (224, 96), (32, 320)])
def test_any_image_size(height, width):
    with torch.inference_mode():
        logits = create_model("resnet18", 7).eval()(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


# ------------------------------------------------------------------------------------------------ by name


def test_timm_models_by_name():
    assert isinstance(create_model("resnet18", 7), ResNet)
    assert isinstance(create_model("timm/resnet18", 7), timm.models.ResNet)
    assert create_model("resnet18.a1_in1k", 7).fc.out_features == 7
    vit = create_model("vit_tiny_patch16_224", 7).eval()
    with torch.inference_mode():
        assert vit(IMAGES).shape == (4, 7)  # not only at the size it is named after


def test_creating_a_model_downloads_nothing(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    create_model("timm/resnet18.a1_in1k", 10)
    with pytest.raises(AssertionError, match="a download"):
        timm.create_model("resnet18", pretrained=True)


@pytest.mark.parametrize("name", ["resnet51", "timm/resnet51", "resnet50.a9_in1k", "hf-hub:timm/resnet50"])
def test_unknown_models_name_the_flag(name):
    with pytest.raises(UserError, match="--model") as error:
        create_model(name, 10)
    assert "hf-hub" in name or "did you mean" in str(error.value)
    assert "hf-hub" in name or "resnet50" in str(error.value).partition("did you mean")[2]


# ---------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def trained():
    return randomise(create_model("resnet18", 5))


@pytest.mark.parametrize("kind", ["run", "safetensors", "pth", "state_dict", "model", "model_state", "ddp"])
def test_weights_from_files(kind, trained, tmp_path):
    state = trained.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "run":
        path = tmp_path
        save_file(state, tmp_path / "best_weights.safetensors")
    elif kind == "safetensors":
        save_file(state, path)
    elif kind == "pth":
        torch.save(state, path)
    elif kind == "ddp":
        torch.save({"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save({"epoch": 3, kind: state}, path)
    same = create_finetuned_model("resnet18", 5, str(path)).state_dict()
    assert all(torch.equal(same[key], value) for key, value in state.items())
    other = create_finetuned_model("resnet18", 9, str(path)).state_dict()
    assert all(torch.equal(other[key], value) for key, value in state.items() if not key.startswith("fc."))
    assert other["fc.weight"].shape == (9, 512)


def test_a_new_head_is_normal_and_other_gaps_are_listed(trained, tmp_path, caplog):
    state = trained.state_dict()
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        create_finetuned_model("resnet18", 9, str(tmp_path / "w.pth"))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "fc.weight, fc.bias" in caplog.text

    caplog.clear()
    del state["layer1.0.conv1.weight"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        create_finetuned_model("resnet18", 5, str(tmp_path / "w.pth"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "missing from the weights: layer1.0.conv1.weight" in caplog.text
    assert "not in the model: extra" in caplog.text


class Malice:
    """Unpickling it runs a function."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_bad_weights_name_the_flag(trained, tmp_path):
    torch.save({"some": torch.zeros(3)}, tmp_path / "nothing_fits.pth")
    torch.save([1, 2], tmp_path / "no_dict.pth")
    torch.save({"w": torch.zeros(3), "code": Malice(tmp_path / "trace")}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "no_run").mkdir()
    names = [
        "nothing_fits.pth",
        "no_dict.pth",
        "code.pth",
        "text.pth",
        "empty.pth",
        "text.safetensors",
        "no_run",
    ]
    for name in [*names, "missing.pth"]:
        with pytest.raises(UserError, match="--weights") as error:
            create_finetuned_model("resnet18", 5, str(tmp_path / name))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()
    with pytest.raises(UserError, match=r"did you mean resnet18\.a1_in1k"):
        create_finetuned_model("resnet18", 5, "resnet18.a1_in2k")


@pytest.mark.parametrize(
    ("name", "weights", "asked"),
    [
        ("resnet18", "timm", "resnet18"),
        ("timm/resnet18", "timm", "resnet18"),
        ("resnet18", "a1_in1k", "resnet18.a1_in1k"),
        ("resnet18", "timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_pretrained_weights_come_from_timm(name, weights, asked, trained, monkeypatch):
    real, calls = timm.create_model, []

    def fake(name, pretrained=False, **options):
        if not pretrained:
            return real(name, **options)
        calls.append(name)
        return trained

    monkeypatch.setattr(timm, "create_model", fake)
    model = create_finetuned_model(name, 9, weights)
    assert calls == [asked]
    assert torch.equal(model.conv1.weight, trained.conv1.weight)


def test_no_connection_is_one_sentence(monkeypatch):
    def offline(*_args, **_kwargs):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"--weights timm: resnet18 cannot be downloaded"):
        create_finetuned_model("resnet18", 9, "timm")


# -------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    ("name", "prefix"), [("resnet18", "fc"), ("vit_tiny_patch16_224", "head"), ("convnext_atto", "head.fc")]
)
def test_backbone_is_all_but_the_classifier(name, prefix):
    model = create_model(name, 5)
    assert classifier_prefix(model) == prefix
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
        set_trainable_layers(model, frozen)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_layers_keep_weights_and_statistics():
    model = small()
    optimizer = create_optimizer(config(), model)
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


# ----------------------------------------------------------------------------------------------- optimizing


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


def test_compiling_in_place_keeps_the_names():
    model = small().eval()
    names, eager = list(model.state_dict()), model(IMAGES)
    model.compile(backend="eager")
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in small().named_parameters()]
    torch.testing.assert_close(model(IMAGES), eager)
    other = small().eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(IMAGES), eager)


# --------------------------------------------------------------------------------------------- summary


def test_summary_prints_layers_and_flops(capsys):
    assert main(["--model", "resnet50", "--sizes", "64", "32x96"]) == 0
    out = capsys.readouterr().out
    assert "25,557,032" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["layer1.0.conv2"] == ["layer1.0.conv2", "Conv2d", "64x8x24", "36,864"]
    # torchvision states 4.09 billion multiply-adds at 224 x 224; convolutions scale with the area.
    assert float(lines["64"][3]) == pytest.approx(2 * 4.09 * (64 / 224) ** 2, rel=0.01)
    assert lines["32"][4] == "ok"


def test_summary_says_what_a_model_cannot_take(capsys):
    assert main(["--model", "vit_tiny_patch16_224", "--sizes", "32", "40"]) == 1
    assert "divisible" in capsys.readouterr().out
    assert main(["--model", "resnet51"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--sizes", "big"])
