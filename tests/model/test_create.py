import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from common import UserError
from common.model import create_finetuned_model, create_model
from common.model.resnet import ResNet
from tests.model.models import IMAGES, randomise

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
