"""Models: ResNets written here, any timm model by name, and weights to start from."""

import argparse
import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from common import UserError, first_line
from common.model.pretrained_cfg import (
    CONFIG,
    SMALL_STEM,
    PretrainedCfg,
    architecture,
    read_pretrained_cfg,
    size_args,
    timm_pretrained_cfg,
)
from common.model.resnet import RESNETS, ResNet

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
BODY_THAT_FITS = 0.95  # share of the tensors outside the classifier; less is another network
# What models raise at image sizes that they cannot take.
SIZE_ERRORS = (AssertionError, IndexError, RuntimeError, ValueError)
# What torch.load may stumble over, besides, in a file of something else.
LOAD_ERRORS = (*SIZE_ERRORS, AttributeError, EOFError, LookupError, OSError, TypeError, UnpicklingError)


def create_model(
    name: str, num_classes: int, img_size: int | None = None, drop_path: float = 0.0
) -> nn.Module:
    """Build a model with random weights; nothing is ever downloaded.

    Args:
        name: one of `RESNETS` for those written here, "timm/<name>" or any other timm name for timm's.
        num_classes: length of the logits.
        img_size: side in pixels for networks that fit one size only; None = timm's default.
        drop_path: highest probability of stochastic depth (Huang et al., 2016), the last block's.

    Raises:
        UserError: nobody knows the name, and the message offers similar ones; or it cannot be built for the size, or with drop_path.
    """
    if name in RESNETS:
        block, depths, small_stem = RESNETS[name]
        return ResNet(block, depths, num_classes, small_stem, drop_path)
    import timm

    timm_name = name.removeprefix("timm/")
    is_known = timm.models.is_model_pretrained if "." in timm_name else timm.is_model
    if not is_known(timm_name):
        raise UserError(
            f"--model {name} is unknown{did_you_mean(timm_name, [*RESNETS, *timm.list_models()])}"
        )
    args = size_args(architecture(name), img_size)
    drops: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        return timm.create_model(architecture(name), num_classes=num_classes, **args, **drops)
    except TypeError as error:
        if not drops:
            raise
        raise UserError(f"--drop_path {drop_path}: {name} has no stochastic depth") from error
    except SIZE_ERRORS as error:
        if img_size is None or not args:
            raise
        raise UserError(f"--model {name} cannot be built for images of {img_size} px: {error}") from error


def takes_one_size(name: str) -> bool:
    """Whether `create_model` builds this network for one image size, so that it takes no other."""
    return name not in RESNETS and size_args(architecture(name), None).keys() == {"img_size"}


def check_size(model: nn.Module, height: int, width: int) -> str:
    """Why the model cannot take images of this size, in one sentence; "" if it can. Runs one blank image through it.

    A real pass: a fake tensor's takes ten times as long on a CPU.
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval().forward(torch.zeros(1, 3, height, width, device=device))
    except SIZE_ERRORS as error:
        reason = first_line(error).rstrip(".")
        return f"the model cannot take images of {height}x{width} px: {reason}"
    finally:
        for module, training in modes.items():
            module.training = training
    return ""


# ---------------------------------------------------------------------------------------------- from weights


def create_finetuned_model(
    name: str, classes: Sequence[str], weights: str, img_size: int | None = None, drop_path: float = 0.0
) -> tuple[nn.Module, PretrainedCfg | None]:
    """Build a model and load `weights`; the head's rows follow the names of the classes.

    A class that the weights know by name keeps its row, in whatever place; the others start fresh. Where the names
    are not known, as in a bare file of tensors, the whole head does: an equal number of classes says nothing.

    Args:
        name, img_size, drop_path: as for `create_model`; timm interpolates the weights that depend on the size.
        classes: names of the classes, in the order of the logits.
        weights: a run folder (its model/), a model folder (model.safetensors and config.json), a .safetensors,
            .pth or .pt file of tensors, "timm" for timm's default weights of this model, or a timm pretrained name
            or tag such as "resnet50.a1_in1k" or "a1_in1k" (timm downloads its weights).

    Returns the model, and what the weights know about themselves: None for a bare file, and no classes for another network's.

    Raises:
        UserError: the weights cannot be found or read, or are another network's.
    """
    if not weights:
        raise UserError("--weights is needed: a run folder, a weights file, or a timm pretrained tag")
    model = create_model(name, len(classes), img_size, drop_path)
    state, source = _read_weights(name, weights, img_size)
    own = model.state_dict()
    with torch.device("meta"):
        wider = create_model(name, len(classes) + 1, img_size).state_dict()
    head_keys = {key for key in own if own[key].shape != wider[key].shape}
    body = own.keys() - head_keys
    fitting = {key: state[key] for key in body & state.keys() if state[key].shape == own[key].shape}
    fit, total = len(_learnt(fitting)), max(len(_learnt(body)), len(_learnt(state.keys() - head_keys)))
    if fit < BODY_THAT_FITS * total:
        advice = f"; they are of --model {source.architecture}" if source else "; are they another model's?"
        raise UserError(f"--weights {weights}: {fit} of {total} tensors fit --model {name}{advice}")
    known = source.classes if source else []
    head = _head_by_names({key: own[key] for key in head_keys & state.keys()}, state, known, classes)
    model.load_state_dict(fitting | head, strict=False)
    names = f"the head knows {len(set(known) & set(classes))} of the {len(classes)} classes by name"
    log.info("loaded %d of %d tensors from %s; %s", fit, total, weights, names)
    problems = {
        "of another shape": body & state.keys() - fitting.keys(),
        "missing from the weights": _learnt(own if head else body) - state.keys(),
        "not in the model": state.keys() - own.keys(),
    }
    if listing := "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys):
        log.warning("%s: %s", weights, listing)
    if source and source.architecture != architecture(name):
        # The rows of its head are a start, no more: they were learnt on other features.
        log.warning("%s: they are of --model %s, not of %s", weights, source.architecture, name)
        source = replace(source, classes=[])
    return model, source


def _learnt(keys: Iterable[str]) -> set[str]:
    """Without BatchNorm's counts of steps, which old files lack and from which nothing follows."""
    return {key for key in keys if not key.endswith("num_batches_tracked")}


def _head_by_names(
    fresh: Mapping[str, Tensor], state: Mapping[str, Tensor], known: Sequence[str], classes: Sequence[str]
) -> dict[str, Tensor]:
    """The fresh head's tensors with the rows of those classes that the weights know; {} if they know none."""
    rows = {name: row for row, name in enumerate(known)}
    into = [row for row, name in enumerate(classes) if name in rows]
    out_of = [rows[name] for name in classes if name in rows]
    head = {}
    for key, tensor in fresh.items() if into else ():
        if len(state[key]) != len(known):
            raise UserError(f"--weights: {key} has {len(state[key])} rows for {len(known)} classes")
        head[key] = tensor.clone()
        head[key][into] = state[key][out_of].to(tensor.dtype)
    return head


def _read_weights(
    name: str, weights: str, img_size: int | None
) -> tuple[dict[str, Tensor], PretrainedCfg | None]:
    path = Path(weights)
    if not path.exists():
        timm_name = _pretrained_name(name, weights)
        args = size_args(architecture(timm_name), img_size)
        return _load_timm(timm_name, weights, args), timm_pretrained_cfg(timm_name)
    if path.is_file():
        folder = path.parent
        if path.name != WEIGHTS or not (folder / CONFIG).exists():
            return _read_file(path), None
    else:
        folder = path / "model" if (path / "model" / CONFIG).exists() else path
        if not (folder / CONFIG).exists():
            raise UserError(f"--weights {path} is neither a run's folder nor a model's: it has no {CONFIG}")
    source = read_pretrained_cfg(folder)
    if source.architecture.endswith(SMALL_STEM):
        return _read_file(folder / WEIGHTS), source
    return _load_timm(f"local-dir:{folder}", weights, size_args(source.architecture, img_size)), source


def _load_timm(timm_name: str, weights: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Let timm load a model, which also fits what depends on the image size."""
    import timm
    from safetensors import SafetensorError

    try:
        return timm.create_model(timm_name, pretrained=True, **args).state_dict()
    except (OSError, *SIZE_ERRORS, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--weights {weights}: timm cannot load {timm_name}: {reason}") from error


def _read_file(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors; wrappers' names are taken off the keys."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # timm's and torchvision's own checkpoints hold the arguments of their scripts.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (*LOAD_ERRORS, SafetensorError) as error:
        # torch goes on with ways to run what is in the file.
        reason = first_line(error).partition(". ")[0]
        raise UserError(f"--weights {path} cannot be read as a file of tensors only: {reason}") from error
    # Where there is an average, that, as timm does.
    for wrapper in ("model_state", "state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--weights {path} holds no dictionary of named tensors")
    # torch.compile and DistributedDataParallel put these before the names.
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()}


def _pretrained_name(name: str, weights: str) -> str:
    """timm's full name of pretrained weights: "resnet18.a1_in1k" for the tag "a1_in1k" of --model resnet18."""
    import timm

    known = timm.list_pretrained(f"{architecture(name)}.*")
    source = name.removeprefix("timm/") if weights == "timm" else weights.removeprefix("timm/")
    if f"{architecture(name)}.{source}" in known:
        source = f"{architecture(name)}.{source}"
    if not timm.models.is_model_pretrained(source):
        raise UserError(
            f"--weights {weights} is neither a file, a run folder nor pretrained weights that timm has for "
            f"--model {name}{did_you_mean(source, known)}"
        )
    return source


def did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
