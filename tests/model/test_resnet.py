import pytest
import timm
import torch
import torchvision
from torch import nn

from common.model import create_model
from tests.model.models import IMAGES, randomise, small


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
