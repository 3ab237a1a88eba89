"""Models: ResNets written here, any timm model by name, pretrained weights, freezing, parameter groups, EMA.

`python -m common.model --model resnet50` prints its layers and the FLOPs per image size, and tries it out.
"""

import argparse
import difflib
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common import UserError

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

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


# ---------------------------------------------------------------------------------------------- ResNet


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2015, ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        nn.init.zeros_(self.bn2.weight)  # each block starts as the identity (Goyal et al., 2017)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut; the stride sits in the 3x3, which loses no pixels ("ResNet v1.5")."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        nn.init.zeros_(self.bn3.weight)  # each block starts as the identity (Goyal et al., 2017)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet for images of any height and width: float [B, 3, H, W] -> logits [B, num_classes].

    Parameters are named as in torchvision and timm, so weights travel between the three.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                downsample = None
                if stride != 1 or channels != width * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, width * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(width * block.expansion),
                    )
                blocks.append(block(channels, width, stride, downsample))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        """The classifier, under timm's name for it."""
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Depth of each parameter in timm's terms: the stem, every block, the head."""
        return {"stem": r"^(?:conv1|bn1)", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


# ---------------------------------------------------------------------------------------------- creation


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
        raise UserError(f"--model {name} is unknown{_did_you_mean(timm_name, timm.list_models())}")
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
    heads = _classifiers(model)
    expected = all(any(_under(key, head) for head in heads) for keys in problems.values() for key in keys)
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
            f"--model {name}{_did_you_mean(source, known)}"
        )
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except OSError as error:
        raise UserError(
            f"--weights {weights}: {source} cannot be downloaded; is there a connection?"
        ) from error


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


# ---------------------------------------------------------------------------------------------- freezing


def _under(name: str, prefix: str) -> bool:
    """Whether a parameter or module is `prefix` or inside it: layer1.0 is under layer1, layer10 is not."""
    return name == prefix or name.startswith(f"{prefix}.")


def classifier_prefix(model: nn.Module) -> str:
    """Name of the module that makes the logits: "fc" for ResNets, "head" for most of timm's transformers."""
    return _classifiers(model)[0]


def _classifiers(model: nn.Module) -> list[str]:
    """Names of the modules that make logits: one, but for distilled transformers, which have two."""
    found = model.get_classifier()
    modules = found if isinstance(found, tuple) else (found,)
    return [name for name, module in model.named_modules() if any(module is each for each in modules)]


def _is_frozen(model: nn.Module, frozen: Sequence[str]) -> Callable[[str], bool]:
    """A test for names of parameters and modules; "backbone" stands for all but the classifier."""
    heads = _classifiers(model) if "backbone" in frozen else []

    def test(name: str) -> bool:
        if heads and not any(_under(name, head) or _under(head, name) for head in heads):
            return True
        return any(_under(name, prefix) for prefix in frozen)

    return test


def set_trainable_layers(model: nn.Module, frozen: Sequence[str]) -> None:
    """Freeze the parameters whose names begin with one of `frozen`, and thaw all others.

    Args:
        model: the bare model, not wrapped for distributed training.
        frozen: names of modules or parameters such as "conv1", "layer1" or "layer4.0"; "backbone" is all but
            the classifier. The backward pass ends early only if all layers below are frozen too.

    Raises:
        UserError: a name matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in frozen:
        if prefix != "backbone" and not any(_under(name, prefix) for name in names):
            layers = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UserError(f"frozen: {prefix!r} is no layer of the model, which has {layers}")
    is_frozen = _is_frozen(model, frozen)
    if all(map(is_frozen, names)):
        raise UserError(f"frozen: {', '.join(frozen)} leaves nothing to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
        if is_frozen(name):
            parameter.grad = None  # a gradient left over would let the optimizer go on moving it


def train_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """model.train(), but frozen modules in eval: BatchNorm keeps its statistics there, dropout is off."""
    model.train()
    is_frozen = _is_frozen(model, frozen)
    for name, module in model.named_modules():
        if name and is_frozen(name):
            module.eval()


# ---------------------------------------------------------------------------------------------- optimizing


def param_groups(
    model: nn.Module, weight_decay: float, decay_norm_and_bias: bool, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Split the parameters by weight decay and learning rate; frozen ones too, which a later stage may thaw.

    Args:
        model: the bare model.
        weight_decay: of convolutions and linear layers.
        decay_norm_and_bias: also of norms, biases and what timm's model names in no_weight_decay().
        layer_decay: None, or the factor between the rates of a layer and of the one above it (Clark et al.,
            2020): the head has "lr_scale" 1, the last block layer_decay, the one below its square, and so on.

    Returns:
        Groups for an optimizer: "params", "weight_decay" and "lr_scale", the factor on the plan's rate.

    Raises:
        UserError: layer_decay for a model that does not tell the order of its layers.
    """
    scales = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    if layer_decay is not None:
        if not 0 < layer_decay <= 1:
            raise UserError(f"--layer_decay must be above 0 and at most 1, not {layer_decay}")
        if not hasattr(model, "group_matcher"):
            raise UserError(f"--layer_decay: {type(model).__name__} does not tell the order of its layers")
        from timm.models import group_parameters

        depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        top = max(depths.values())
        scales = {name: layer_decay ** (top - depths[name]) for name in scales}
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decays = decay_norm_and_bias or (parameter.ndim > 1 and name not in exempt)
        key = (scales[name], weight_decay if decays else 0.0)
        group = groups.setdefault(key, {"params": [], "weight_decay": key[1], "lr_scale": key[0]})
        group["params"].append(parameter)
    return list(groups.values())


def create_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer; the loop sets group["lr"] = plan's rate x group["lr_scale"] before every step.

    Args:
        cfg: has optimizer ("sgd" or a timm name), momentum, nesterov, weight_decay, decay_norm_and_bias and
            layer_decay.
        model: the bare model.

    Raises:
        UserError: timm has no optimizer of that name, or lacks what it needs.
    """
    groups = param_groups(model, cfg.weight_decay, cfg.decay_norm_and_bias, cfg.layer_decay)
    if cfg.optimizer == "sgd":
        if cfg.nesterov and cfg.momentum == 0:
            raise UserError("--nesterov needs a --momentum above 0")
        # On a CPU the fused step is several times faster. On CUDA the default one costs next to nothing, and
        # lets the gradient scaler skip a step, where the fused one skips without telling.
        fused = not torch.cuda.is_available()
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused)
        if fused and cfg.momentum > 0:
            optimizer.register_step_pre_hook(_match_buffers)
        return optimizer
    from timm.optim import create_optimizer_v2, list_optimizers

    known = list_optimizers()
    if cfg.optimizer not in known:
        raise UserError(f"--optimizer {cfg.optimizer} is unknown{_did_you_mean(cfg.optimizer, known)}")
    try:
        return create_optimizer_v2(groups, cfg.optimizer, lr=0.1, weight_decay=0.0, momentum=cfg.momentum)
    except (AssertionError, ImportError) as error:  # needs a GPU, or a package that is not installed
        raise UserError(f"--optimizer {cfg.optimizer} cannot be used here: {error}") from error


def _match_buffers(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Give every parameter to be stepped a momentum buffer in its own memory layout.

    Fused SGD fails if only some have a buffer, as after thawing, and assumes equal layouts without looking,
    which is wrong once a checkpoint in one memory format is loaded into a model in another.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)  # steps as if it had none
            elif buffer.stride() != parameter.stride():
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)


def create_ema(model: nn.Module, decay: float) -> "ModelEmaV3":
    """Keep an average of the weights in ema.module; call ema.update(model, step=optimizer steps done).

    The decay rises as 1 - step^-0.75 up to `decay`, lest a short run's average be mostly its random start.
    BatchNorm's running statistics are averaged like weights, its counters copied.
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=0.75)


# ---------------------------------------------------------------------------------------------- summary


def layer_table(model: nn.Module, height: int, width: int) -> list[tuple[str, str, str, int]]:
    """Name, type, output shape and own parameters of each layer, in the order in which they run."""
    rows: list[tuple[str, str, str, int]] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            shape = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else "-"
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            rows.append((name, type(module).__name__, shape, own))

        return hook

    hooks = [
        module.register_forward_hook(note(name or "(the model's own)"))
        for name, module in model.named_modules()
        if not list(module.children()) or list(module.parameters(recurse=False))
    ]
    _forward(model, height, width)
    for hook in hooks:
        hook.remove()
    return rows


def try_size(model: nn.Module, num_classes: int, height: int, width: int) -> tuple[float, str]:
    """Run a forward pass; FLOPs per image, and what is wrong with its logits ("" if nothing).

    A multiplication and its addition are two operations here; most papers count them as one.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with FlopCounterMode(display=False) as counter:
            logits = _forward(model, height, width)
    except (AssertionError, RuntimeError, ValueError) as error:  # what models raise at sizes they cannot take
        return math.nan, str(error)
    good = logits.shape == (2, num_classes) and bool(logits.isfinite().all())
    return (
        counter.get_total_flops() / 2,
        "" if good else f"logits {[*logits.shape]}, not all finite or expected",
    )


@torch.inference_mode()
def _forward(model: nn.Module, height: int, width: int) -> Tensor:
    return model.eval()(torch.randn(2, 3, height, width))


def _size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a size (224) nor height x width (224x288)")
    return int(match[1]), int(match[2] or match[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return 0 if the model takes every size, 1 if not, 2 for an unknown model."""
    sizes = "56 112 128 160 224 224x288"
    parser = argparse.ArgumentParser(
        prog="python -m common.model",
        description="Print a model's layers, parameters and FLOPs, and check a forward pass at every size.",
    )
    parser.add_argument(
        "--model", default="resnet50", help=f"{', '.join(RESNETS)} or a timm model (%(default)s)"
    )
    parser.add_argument("--num_classes", type=int, default=1000, help="length of the logits (%(default)s)")
    parser.add_argument(
        "--sizes",
        type=_size,
        nargs="+",
        default=[_size(text) for text in sizes.split()],
        metavar="SIZE",
        help=f"in pixels: one number for a square, HEIGHTxWIDTH for a rectangle ({sizes})",
    )
    args = parser.parse_args(argv)
    try:
        model = create_model(args.model, args.num_classes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    trials = [(size, *try_size(model, args.num_classes, *size)) for size in args.sizes]
    if taken := [size for size, _, problem in trials if not problem]:
        print(f"{'layer':<40}{'type':<24}{f'output at {taken[-1][0]}x{taken[-1][1]}':>20}{'parameters':>14}")
        for name, kind, shape, own in layer_table(model, *taken[-1]):
            print(f"{name:<40}{kind:<24}{shape:>20}{own:>14,}")
        print(f"{'total':<84}{sum(parameter.numel() for parameter in model.parameters()):>14,}\n")
    print(f"{'height x width':<16}{'GFLOPs an image':>16}   forward pass (a multiply-add is 2 FLOPs)")
    for (height, width), flops, problem in trials:
        print(f"{f'{height} x {width}':<16}{flops / 1e9:>16.2f}   {problem or 'ok'}")
    return 0 if len(taken) == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
