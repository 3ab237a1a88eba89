import json

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from common import UserError
from common.model import create_model
from common.model.pretrained_cfg import architecture, read_pretrained_cfg, timm_pretrained_cfg
from tests.model.models import CLASSES, cfg, randomise, write_model


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr("socket.socket.connect", refuse)


# One of ours, whose names are timm's; a timm network of any size; some that depend on the image size.
@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 96), ("test_resnet", 96), ("test_vit", 64), ("test_coatnet", 64), ("test_vit_relpos", 64)],
)
def test_timm_loads_a_model_folder_and_prepares_images_as_we_do(name, size, tmp_path):
    model = create_model(name, 5, img_size=size)
    if name.endswith("resnet18"):
        randomise(model)
    described = cfg(name, img_size=size, test_size=None if size == 64 else 128)
    folder = write_model(tmp_path / "runs" / "a" / "model", model, described)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model.eval()(images))

    preparation = {"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bicubic"}
    preparation |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    for use_test_size in (False, True):
        resolved = resolve_model_data_config(loaded, use_test_size=use_test_size)
        side = described.test_size or size if use_test_size else size
        resolved = {
            key: tuple(value) if isinstance(value, list) else value for key, value in resolved.items()
        }
        assert resolved == {"input_size": (3, side, side)} | preparation
    assert loaded.num_classes == 5
    assert list(loaded.pretrained_cfg["label_names"]) == CLASSES


def test_timm_finds_the_classifier_and_the_first_layer(tmp_path):
    folder = write_model(tmp_path / "model", create_model("resnet18", 5), cfg("resnet18"))
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).fc.out_features == 7
    grey = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1)
    assert grey.conv1.weight.shape == (64, 1, 7, 7)


def test_a_vision_transformer_still_takes_every_size_in_timm(tmp_path):
    folder = write_model(tmp_path / "model", create_model("test_vit", 5), cfg("test_vit", img_size=64))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        assert loaded(torch.zeros(1, 3, 96, 128)).shape == (1, 5)


@pytest.mark.parametrize("test_size", [None, 128])
def test_reading_gives_back_what_was_written(test_size, tmp_path):
    written = cfg("resnet18", test_size=test_size)
    (tmp_path / "config.json").write_text(json.dumps(written.timm_config()))
    assert read_pretrained_cfg(tmp_path) == written


def test_a_folder_that_timm_exported_is_read(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": ["a", "b", "c"]})
    read = read_pretrained_cfg(tmp_path)
    assert (read.architecture, read.classes, read.img_size) == ("test_resnet", ["a", "b", "c"], 160)
    timm.models.save_for_hf(model, tmp_path)
    assert read_pretrained_cfg(tmp_path).classes == []


def test_what_is_no_description_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is not the description of a timm model"):
        read_pretrained_cfg(tmp_path)


def test_what_timm_knows_of_its_weights():
    known = timm_pretrained_cfg("resnet18.a1_in1k")
    assert known.architecture == "resnet18"
    assert known.classes[:2] == ["n01440764", "n01443537"]
    assert len(known.classes) == 1000
    assert (known.img_size, known.test_size, known.crop_pct) == (224, 288, 0.95)
    assert timm_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k_ft_in1k").mean == (0.5, 0.5, 0.5)
    assert timm_pretrained_cfg("vit_base_patch16_clip_224.openai").classes == []


def test_the_name_of_an_architecture():
    names = ("resnet18", "timm/resnet18", "timm/resnet18.a1_in1k")
    assert {architecture(name) for name in names} == {"resnet18"}
