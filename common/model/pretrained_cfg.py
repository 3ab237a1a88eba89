"""What a model knows about itself: its classes and how images are prepared for it, in timm's own format.

A model folder is `model.safetensors` beside `config.json`; `timm.create_model("local-dir:FOLDER", pretrained=True)`
loads it without a connection, and `timm.data.resolve_model_data_config` gives the values it was evaluated with.
"""

import functools
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common import UserError

CONFIG = "config.json"
# Ends the names of our networks with a stem for small images, which timm has not; it describes those of the plain name.
SMALL_STEM = "_cifar"


@dataclass(frozen=True)
class PretrainedCfg:
    """A network, its classes, and the images it expects: RGB from 0 to 1, less `mean`, divided by `std`."""

    architecture: str  # timm's name of the network, without prefix and tag
    classes: list[str]  # in the order of the logits; empty if not known
    img_size: int  # side in pixels of the square images that it was trained on last
    test_size: int | None = None  # at which it is best evaluated; None = img_size
    crop_pct: float = 0.875  # share of the shorter side that the evaluation's crop keeps
    crop_mode: str = "center"  # which resizes the shorter side, or "squash" for both
    interpolation: str = "bilinear"  # or "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def timm_config(self) -> dict[str, Any]:
        """The content of config.json, plain values only."""
        import timm

        plain_name = self.architecture.removesuffix(SMALL_STEM)
        known = timm.get_pretrained_cfg(plain_name)
        assert known is not None
        args = size_args(plain_name, self.img_size)
        return {
            "architecture": self.architecture,
            "num_classes": len(self.classes),
            "label_names": self.classes,
            "model_args": args,
            "crop_pct": self.crop_pct,
            "pretrained_cfg": {
                "input_size": [3, self.img_size, self.img_size],
                "test_input_size": [3, self.test_size, self.test_size] if self.test_size else None,
                "fixed_input_size": known.fixed_input_size and "dynamic_img_size" not in args,
                "crop_pct": self.timm_crop_pct(),
                "crop_mode": self.crop_mode,
                "interpolation": self.interpolation,
                "mean": list(self.mean),
                "std": list(self.std),
                "num_classes": len(self.classes),
                "classifier": known.classifier,
                "first_conv": known.first_conv,
            },
        }

    def timm_crop_pct(self) -> float:
        """The share for which timm's own evaluation crops where ours does, as nearly as whole pixels allow.

        timm resizes the shorter side to floor(size / share) pixels and then cuts the middle out. An odd
        number of pixels to cut off would put its middle half a pixel beside ours, so the nearest even one is taken.
        """
        if self.crop_mode != "center":
            return self.crop_pct
        side = self.img_size
        resized = side + 2 * round((side / self.crop_pct - side) / 2)
        share = side / resized
        # The quotient may round to just below the whole number that it should be.
        return share if math.floor(side / share) == resized else math.nextafter(share, 0)


def read_pretrained_cfg(folder: Path) -> PretrainedCfg:
    """Read a model folder's config.json, written by `timm_config` or by timm.

    Raises:
        UserError: it is missing or no such file.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        names = config.get("label_names")
        classes = names if isinstance(names, list) else []
        cfg = _from_timm(config["architecture"], classes, config["pretrained_cfg"])
        return replace(cfg, crop_pct=config.get("crop_pct", cfg.crop_pct))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the description of a timm model ({error!r})") from error


def timm_pretrained_cfg(name: str) -> PretrainedCfg:
    """What timm knows of its pretrained weights `name`, "resnet18.a1_in1k"; ImageNet's classes by their WordNet ids."""
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    values = cfg.to_dict()
    subset = infer_imagenet_subset(values)
    classes = ImageNetInfo(subset).label_names() if subset else []
    return _from_timm(architecture(name), classes if len(classes) == cfg.num_classes else [], values)


def _from_timm(architecture: str, classes: list[str], cfg: Mapping[str, Any]) -> PretrainedCfg:
    test_input_size = cfg.get("test_input_size")
    return PretrainedCfg(
        architecture,
        classes,
        img_size=cfg["input_size"][1],
        test_size=test_input_size[1] if test_input_size else None,
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
        interpolation=cfg["interpolation"],
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )


def architecture(name: str) -> str:
    """timm's name of the network that `--model name` builds: without "timm/" and the tag of weights."""
    return name.removeprefix("timm/").partition(".")[0]


def size_args(timm_architecture: str, img_size: int | None) -> dict[str, Any]:
    """Arguments with which timm builds a network that fits one image size unless told otherwise.

    {} where every size fits anyway. A network that can be made to fit all is, around timm's size of it; the others
    are built for `img_size`, or timm's size if that is None.
    """
    import timm

    cfg = timm.get_pretrained_cfg(timm_architecture)
    assert cfg is not None
    if not cfg.fixed_input_size:
        return {}
    if _can_be_dynamic(timm_architecture):
        return {"img_size": cfg.input_size[1], "dynamic_img_size": True}
    return {"img_size": img_size or cfg.input_size[1]}


@functools.cache
def _can_be_dynamic(timm_architecture: str) -> bool:
    import timm

    with torch.device("meta"):
        kinds = type(timm.create_model(timm_architecture)).__mro__
    return any("dynamic_img_size" in inspect.signature(kind).parameters for kind in kinds)
