"""Models: ResNets written here, any timm model by name, and weights to start from."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from common import UserError
from common.model.freezing import classifiers, under
from common.model.resnet import RESNETS, ResNet

log = logging.getLogger(__name__)

# What torch.load may stumble over in a file of something else, taking its bytes for instructions.
LOAD_ERRORS = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    ValueError,
)


def create_model(name: str, num_classes: int) -> nn.Module:
    """Build a model with random weights; nothing is ever downloaded.

    Args:
        name: "resnet18", "resnet34", "resnet50" or "resnet101" for the ones written here, "timm/<name>" or
            any other timm name for timm's.
        num_classes: length of the logits.

    Raises:
        UserError: nobody knows the name; the message offers similar ones.
    """
    if name in RESNETS:
        return ResNet(*RESNETS[name], num_classes)
    import timm

    timm_name = name.removeprefix("timm/")
    architecture, _, tag = timm_name.partition(".")
    known = timm.is_model(architecture) and (
        not tag or timm_name in timm.list_pretrained(f"{architecture}.*")
    )
    if not known:
        raise UserError(f"--model {name} is unknown{did_you_mean(timm_name, timm.list_models())}")
    model = timm.create_model(timm_name, num_classes=num_classes)
    if isinstance(model, timm.models.VisionTransformer | timm.models.Eva):
        # Built for one image size unless told otherwise; stages need several.
        model = timm.create_model(timm_name, num_classes=num_classes, dynamic_img_size=True)
    return model


def create_finetuned_model(name: str, num_classes: int, weights: str) -> nn.Module:
    """Build a model and load what fits of `weights`; a head of another size stays random.

    Args:
        name: as for `create_model`.
        num_classes: length of the logits.
        weights: a run folder (its best_weights.safetensors), a .safetensors file, a .pth or .pt file of
            tensors, "timm" for timm's default weights of this model, or a timm pretrained name or tag such as
            "resnet50.a1_in1k" or "a1_in1k" (timm downloads its weights).

    Raises:
        UserError: the weights cannot be found or read, or none of them fits the model.
    """
    model = create_model(name, num_classes)
    state = _pretrained_state(name, weights) if not Path(weights).exists() else _read_weights(Path(weights))
    own = model.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if fitting.keys().isdisjoint(name for name, _ in model.named_parameters()):
        raise UserError(f"--weights {weights}: not one tensor fits --model {name}; is it another model's?")
    model.load_state_dict(fitting, strict=False)
    problems = {
        "of another shape": [key for key in state if key in own and key not in fitting],
        "missing from the weights": [key for key in own if key not in state],
        "not in the model": [key for key in state if key not in own],
    }
    listing = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
    heads = classifiers(model)
    expected = all(any(under(key, head) for head in heads) for keys in problems.values() for key in keys)
    log.log(
        logging.INFO if expected else logging.WARNING,  # a new head is what fine-tuning is about
        "loaded %d of the model's %d tensors from %s; %s",
        len(fitting),
        len(own),
        weights,
        listing or "all fit",
    )
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors, or a run folder's best one; wrappers' names are taken off the keys."""
    if path.is_dir():
        path = path / "best_weights.safetensors"
        if not path.exists():
            raise UserError(f"--weights {path.parent} is not the folder of a run: it has no {path.name}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"--weights {path} is not a readable safetensors file: {error}") from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except LOAD_ERRORS as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"--weights {path} cannot be read as a file of tensors only: {reason}") from error
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--weights {path} holds no dictionary of named tensors")
    return {_bare(key): value for key, value in state.items()}


def _bare(key: str) -> str:
    """The key without the prefixes of DistributedDataParallel and torch.compile."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _pretrained_state(name: str, weights: str) -> dict[str, Tensor]:
    import timm

    timm_name = name.removeprefix("timm/")
    architecture = timm_name.partition(".")[0]
    known = timm.list_pretrained(f"{architecture}.*")
    source = timm_name if weights == "timm" else weights.removeprefix("timm/")
    if f"{architecture}.{source}" in known:  # only the tag was given
        source = f"{architecture}.{source}"
    if not timm.models.is_model_pretrained(source):
        raise UserError(
            f"--weights {weights} is neither a file, a run folder nor pretrained weights that timm has for "
            f"--model {name}{did_you_mean(source, known)}"
        )
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except OSError as error:
        raise UserError(
            f"--weights {weights}: {source} cannot be downloaded; is there a connection?"
        ) from error


def did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
