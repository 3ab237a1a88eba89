import argparse
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath

from common import UserError
from common.model import create_finetuned_model, create_model
from common.model.create import check_size, takes_one_size
from common.model.resnet import ResNet
from tests.model.models import CLASSES, IMAGES, cfg, randomise, write_model

# ------------------------------------------------------------------------------------------------ by name


def test_timm_models_by_name():
    assert isinstance(create_model("resnet18", 7), ResNet)
    assert isinstance(create_model("timm/resnet18", 7), timm.models.ResNet)
    assert create_model("resnet18.a1_in1k", 7).fc.out_features == 7


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


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "test_vit"])
def test_stochastic_depth_rises_to_the_last_block(name):
    def rates(model):
        return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]

    assert not rates(create_model(name, 5))
    model = create_model(name, 5, drop_path=0.35)
    expected = {"test_vit": [0.0, 0.35]}.get(name, [0.35 * block / 7 for block in range(8)])
    # Vision transformers have two branches a block; timm leaves the first block's out, where it is 0.
    assert sorted(set(rates(model)) | {0.0})[-1] == pytest.approx(0.35)
    if "resnet" in name:
        assert sorted({*rates(model), 0.0}) == pytest.approx(expected)


def test_stochastic_depth_drops_branches_in_training_only():
    model = randomise(create_model("resnet18", 5, drop_path=1.0))
    with torch.inference_mode():
        plain = create_model("resnet18", 5).eval()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(IMAGES), plain(IMAGES))
        model.layer4[1].train()
        model.layer4[1].bn1.eval(), model.layer4[1].bn2.eval()
        x = torch.rand(4, 512, 2, 2)
        torch.testing.assert_close(model.layer4[1](x), x)


def test_a_network_without_stochastic_depth_is_refused():
    with pytest.raises(UserError, match=r"--drop_path 0.1: vgg11 has no stochastic depth"):
        create_model("vgg11", 5, drop_path=0.1)


# ---------------------------------------------------------------------------------------------- image sizes


def test_the_small_stem_keeps_the_names_and_ends_at_an_eighth(tmp_path):
    model = randomise(create_model("resnet18_cifar", 5))
    shapes = {key: value.shape for key, value in create_model("resnet18", 5).state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes | {
        "conv1.weight": (64, 3, 3, 3)
    }
    sizes = []
    model.layer4.register_forward_hook(lambda _module, _inputs, output: sizes.append(tuple(output.shape[2:])))
    with torch.inference_mode():
        expected = model(IMAGES)
        folder = write_model(tmp_path / "model", model, cfg("resnet18_cifar"))
        loaded, source = create_finetuned_model("resnet18_cifar", CLASSES, str(folder))
        torch.testing.assert_close(loaded.eval()(IMAGES), expected)
    assert sizes == [(4, 6)]
    assert source.architecture == "resnet18_cifar"


# Sizes that each network takes of 56, 64, 112 and 224; all that are not here take all four.
TAKEN = {
    "test_coatnet": (),
    "test_maxvit": (),
    "test_vit": (64, 112, 224),
    "test_vit2": (64, 112, 224),
    "test_vit3": (64, 112, 224),
    "test_vit4": (64, 112, 224),
    "test_vit_relpos": (),
    "vit_tiny_patch16_224": (64, 112, 224),
}
LARGER = [
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "efficientnet_b0",
    "mobilenetv4_conv_small",
]


@pytest.mark.parametrize("name", [*timm.list_models("test_*"), *LARGER])
def test_every_model_runs_or_is_refused_in_one_sentence(name):
    model = create_model(name, 7)
    for size in (56, 64, 112, 224):
        problem = check_size(model, size, size)
        assert (problem == "") == (size in TAKEN.get(name, (56, 64, 112, 224))), problem
        assert "\n" not in problem
        assert f"{size}x{size}" in problem or not problem
    if name not in LARGER:  # half a minute for all
        assert check_size(create_model(name, 7, img_size=64), 64, 64) == ""


@pytest.mark.parametrize(
    ("name", "one"),
    [("resnet18", False), ("resnet18_cifar", False), ("test_resnet", False), ("test_vit", False), ("test_vit_relpos", True)],
)  # fmt: skip
def test_networks_of_one_size_are_known(name, one):
    assert takes_one_size(name) == one


def test_checking_a_size_leaves_no_trace():
    model = create_model("resnet18", 7)
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert check_size(model, 64, 96) == ""
    assert model.training
    assert not model.layer1[0].bn1.training
    assert model.layer2[0].bn1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_size_that_a_network_cannot_be_built_for_names_it():
    with pytest.raises(UserError, match="--model nest_tiny cannot be built for images of 56 px"):
        create_model("nest_tiny", 7, img_size=56)


# ---------------------------------------------------------------------------------------------- from weights


@pytest.fixture(scope="module")
def trained():
    return randomise(create_model("resnet18", 5))


@pytest.fixture
def run(trained, tmp_path):
    return write_model(tmp_path / "run" / "model", trained, cfg("resnet18")).parent


@pytest.mark.parametrize("kind", ["run", "model", "file"])
def test_the_head_of_the_same_classes_is_kept(kind, trained, run, caplog):
    path = {"run": run, "model": run / "model", "file": run / "model" / "model.safetensors"}[kind]
    with caplog.at_level(logging.INFO):
        model, source = create_finetuned_model("resnet18", CLASSES, str(path))
    assert source == cfg("resnet18")
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())
    assert "knows 5 of the 5 classes by name" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_rows_of_the_head_follow_names(trained, run, caplog):
    classes = ["wolf", CLASSES[3], "fox", CLASSES[0], CLASSES[1]]  # as many, in another order
    with caplog.at_level(logging.INFO):
        model, _ = create_finetuned_model("resnet18", classes, str(run))
    for key in ("weight", "bias"):
        new, old = getattr(model.fc, key), getattr(trained.fc, key)
        assert torch.equal(new[[1, 3, 4]], old[[3, 0, 1]])
        assert not any(torch.equal(new[row], each) for row in (0, 2) for each in old)
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
    assert "knows 3 of the 5 classes by name" in caplog.text


def test_a_head_of_strangers_is_fresh(trained, run, caplog):
    with caplog.at_level(logging.INFO):
        model, _ = create_finetuned_model("resnet18", list("vwxyz"), str(run))
    assert not torch.equal(model.fc.weight, trained.fc.weight)
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
    assert "knows 0 of the 5 classes by name" in caplog.text


@pytest.mark.parametrize("kind", ["safetensors", "pth", "state_dict", "model", "model_state", "ddp", "timm"])
def test_a_bare_file_gives_the_body_and_a_fresh_head(kind, trained, tmp_path, caplog):
    state = trained.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pth":
        torch.save(state, path)
    elif kind == "ddp":
        torch.save({"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}}, path)
    elif kind == "timm":
        torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": state}, path)
    else:
        torch.save({"epoch": 3, kind: state}, path)
    with caplog.at_level(logging.INFO):
        model, source = create_finetuned_model("resnet18", CLASSES, str(path))
    assert source is None
    loaded = {key for key, value in model.state_dict().items() if torch.equal(value, state[key])}
    assert set(state) - loaded == {"fc.weight", "fc.bias"}
    assert "knows 0 of the 5 classes by name" in caplog.text


def test_batchnorms_counters_may_be_missing(trained, tmp_path, caplog):
    state = {key: value for key, value in trained.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    with caplog.at_level(logging.INFO):
        model, _ = create_finetuned_model("resnet18", CLASSES, str(tmp_path / "old.pth"))
    assert torch.equal(model.bn1.running_var, state["bn1.running_var"])
    assert "loaded 100 of 100 tensors" in caplog.text
    assert "missing" not in caplog.text


def test_a_folder_without_class_names_gives_a_fresh_head(trained, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = write_model(tmp_path, trained, cfg("resnet18"))
    config = json.loads((folder / "config.json").read_text())
    del config["label_names"]
    (folder / "config.json").write_text(json.dumps(config))
    model, source = create_finetuned_model("resnet18", CLASSES, str(folder))
    assert source == replace(cfg("resnet18"), classes=[])
    assert not torch.equal(model.fc.weight, trained.fc.weight)
    assert "knows 0 of the 5 classes by name" in caplog.text


def test_gaps_in_the_body_are_listed(trained, tmp_path, caplog):
    state = trained.state_dict()
    del state["layer1.0.conv1.weight"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        create_finetuned_model("resnet18", CLASSES, str(tmp_path / "w.pth"))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "missing from the weights: layer1.0.conv1.weight" in caplog.text
    assert "not in the model: extra" in caplog.text


@pytest.mark.parametrize(
    ("theirs", "ours", "count"),
    [
        ("test_resnet", "resnet18", "0 of 100"),
        ("resnet18", "resnet34", "100 of 180"),
        ("resnet34", "resnet18", "100 of 180"),
    ],
)
def test_another_network_is_refused_and_named(theirs, ours, count, tmp_path):
    run = write_model(tmp_path / "run" / "model", create_model(theirs, 5), cfg(theirs)).parent
    with pytest.raises(UserError, match=f"{count} tensors fit --model {ours}; they are of --model {theirs}$"):
        create_finetuned_model(ours, CLASSES, str(run))
    torch.save(create_model(theirs, 5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="another model's"):
        create_finetuned_model(ours, CLASSES, str(tmp_path / "w.pth"))


# Two heads with a BatchNorm in each, and a head that is a convolution.
@pytest.mark.parametrize("name", ["levit_128s", "dla46_c"])
def test_all_that_has_a_row_per_class_follows_the_names(name, tmp_path):
    with torch.device("meta"):
        rows = {
            key
            for key, value in create_model(name, 5).state_dict().items()
            if len(value.shape) and len(value) == 5
        }
    trained = randomise(create_model(name, 5))
    run = write_model(tmp_path / "run" / "model", trained, cfg(name, img_size=224)).parent
    model, _ = create_finetuned_model(name, CLASSES[::-1], str(run))
    assert rows
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value.flip(0) if key in rows else value), key


def test_a_head_that_the_weights_lack_stays_fresh_and_is_named(trained, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    vit = create_model("deit_tiny_patch16_224", 5)
    run = write_model(tmp_path / "vit" / "model", vit, cfg("deit_tiny_patch16_224")).parent
    model, _ = create_finetuned_model("deit_tiny_distilled_patch16_224", CLASSES, str(run))
    assert torch.equal(model.head.weight, vit.head.weight)
    assert model.head_dist.weight.std() > 0
    assert "missing from the weights: dist_token, head_dist.bias, head_dist.weight" in caplog.text

    body = {key: value for key, value in trained.state_dict().items() if not key.startswith("fc.")}
    torch.save(body, tmp_path / "w.pth")
    create_finetuned_model("resnet18", CLASSES, str(tmp_path / "w.pth"))
    assert caplog.records[-1].levelname == "INFO"
    assert "knows 0 of the 5 classes by name" in caplog.records[-1].message


@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos", "test_coatnet"])
def test_weights_that_depend_on_the_image_size_are_interpolated(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trained = create_model(name, 5, img_size=160)
    run = write_model(tmp_path / "run" / "model", trained, cfg(name, img_size=160)).parent
    model, _ = create_finetuned_model(name, CLASSES, str(run), img_size=64)
    assert check_size(model, 64, 64) == ""
    body = sum("num_batches" not in key for key in model.state_dict()) - 2
    assert f"loaded {body} of {body} tensors" in caplog.text
    same, _ = create_finetuned_model(name, CLASSES, str(run), img_size=160)
    assert all(torch.equal(same.state_dict()[key], value) for key, value in trained.state_dict().items())


def test_another_networks_weights_do_not_know_the_classes(trained, tmp_path, caplog):
    """Nearly all tensors fit; but the features are others, so that the head is to be fitted to them."""
    folder = write_model(tmp_path, trained, cfg("resnet18"))
    _, source = create_finetuned_model("resnet18_cifar", CLASSES, str(folder))
    assert "are of --model resnet18, not of resnet18_cifar" in caplog.text
    assert source.classes == []


def test_of_a_checkpoint_the_average_is_taken(trained, tmp_path):
    raw = {key: torch.zeros_like(value) for key, value in trained.state_dict().items()}
    torch.save({"state_dict": raw, "state_dict_ema": trained.state_dict()}, tmp_path / "last.pth.tar")
    model, _ = create_finetuned_model("resnet18", CLASSES, str(tmp_path / "last.pth.tar"))
    assert torch.equal(model.conv1.weight, trained.conv1.weight)


class Malice:
    """Unpickling it runs a function."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture(scope="module")
def bad_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    torch.save({"some": torch.zeros(3)}, folder / "nothing_fits.pth")
    torch.save([1, 2], folder / "no_dict.pth")
    torch.save({"w": torch.zeros(3), "code": Malice(folder / "trace")}, folder / "code.pth")
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").touch()
    (folder / "text.safetensors").write_text("hello")
    for name in ("no_run", "no_json", "other_json", "no_tensors", "bad_tensors"):
        (folder / name).mkdir()
    (folder / "no_json" / "config.json").write_text("{")
    (folder / "other_json" / "config.json").write_text("[1]")
    write_model(folder / "no_tensors", create_model("resnet18", 5), cfg("resnet18"))
    (folder / "no_tensors" / "model.safetensors").unlink()
    write_model(folder / "bad_tensors", create_model("resnet18", 5), cfg("resnet18"))
    (folder / "bad_tensors" / "model.safetensors").write_text("hello")
    return folder


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing_fits.pth", "0 of 100 tensors fit --model resnet18"),
        ("no_dict.pth", "no dictionary of named tensors"),
        ("code.pth", "cannot be read as a file of tensors only"),
        ("text.pth", "cannot be read as a file of tensors only"),
        ("empty.pth", "cannot be read as a file of tensors only"),
        ("text.safetensors", "cannot be read as a file of tensors only"),
        ("no_run", "neither a run's folder nor a model's"),
        ("no_json", "config.json is not the description of a timm model"),
        ("other_json", "config.json is not the description of a timm model"),
        ("no_tensors", "timm cannot load"),
        ("bad_tensors", "timm cannot load"),
        ("missing.pth", "neither a file, a run folder nor pretrained weights"),
    ],
)
def test_bad_weights_are_refused_in_one_sentence(name, sentence, bad_weights):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        create_finetuned_model("resnet18", CLASSES, str(bad_weights / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (bad_weights / "trace").exists()


def test_a_head_of_another_length_than_its_names_is_refused(trained, tmp_path):
    folder = write_model(tmp_path, trained, replace(cfg("resnet18"), classes=CLASSES[:4]))
    with pytest.raises(UserError, match="--weights"):
        create_finetuned_model("resnet18", CLASSES, str(folder))


@pytest.mark.parametrize(
    ("name", "weights", "asked"),
    [
        ("resnet18", "timm", "resnet18"),
        ("timm/resnet18", "timm", "resnet18"),
        ("resnet18", "a1_in1k", "resnet18.a1_in1k"),
        ("resnet18", "timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_pretrained_weights_come_from_timm(name, weights, asked, monkeypatch):
    real, calls = timm.create_model, []
    imagenet = randomise(create_model("resnet18", 1000))

    def fake(name, pretrained=False, **options):
        if not pretrained:
            return real(name, **options)
        calls.append(name)
        return imagenet

    monkeypatch.setattr(timm, "create_model", fake)
    model, source = create_finetuned_model(name, ["n01443537", "unknown"], weights)
    assert calls == [asked]
    assert torch.equal(model.conv1.weight, imagenet.conv1.weight)
    assert torch.equal(model.fc.weight[0], imagenet.fc.weight[1])  # the second of ImageNet's classes
    assert (source.architecture, source.test_size, source.interpolation) == ("resnet18", 288, "bicubic")


def test_no_connection_is_one_sentence(monkeypatch):
    def offline(*_args, **_kwargs):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError, match=r"--weights timm: timm cannot load resnet18: name or service not known"
    ):
        create_finetuned_model("resnet18", CLASSES, "timm")


def test_similar_pretrained_weights_are_offered():
    with pytest.raises(UserError, match=r"did you mean resnet18\.a1_in1k"):
        create_finetuned_model("resnet18", CLASSES, "resnet18.a1_in2k")


def test_a_forward_pass_is_the_same_after_a_round_trip(trained, run):
    model, _ = create_finetuned_model("timm/resnet18", CLASSES, str(run))
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(IMAGES), trained(IMAGES))
