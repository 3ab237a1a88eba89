"""Small models and steps that the tests of this folder share."""

import json

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from common.model.optimizer import OptimizerSettings, create_optimizer
from common.model.pretrained_cfg import PretrainedCfg
from common.model.resnet import BasicBlock, ResNet

IMAGES = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def small():
    return ResNet(BasicBlock, (1, 1, 1, 1), 5)


def optimizer_for(model, momentum=0.9, **settings):
    defaults = {"weight_decay": 0.05, "decay_norm_and_bias": False}
    return create_optimizer(OptimizerSettings(**defaults | settings), model, momentum=momentum)


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


CLASSES = ["ant", "bee", "cat", "dog", "elk"]


def cfg(architecture, **changes):
    """A description in which nothing is as by default."""
    values = {
        "img_size": 96,
        "test_size": 128,
        "crop_pct": 0.9,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    return PretrainedCfg(architecture, CLASSES, **values | changes)


def write_model(folder, model, pretrained_cfg):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(pretrained_cfg.timm_config()))
    return folder
