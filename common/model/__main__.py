"""`python -m common.model --model resnet50` prints its layers and the FLOPs per image size, and tries it out."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common import UserError
from common.model.create import check_size, create_model
from common.model.resnet import RESNETS


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

    if problem := check_size(model, height, width):
        return math.nan, problem
    with FlopCounterMode(display=False) as counter:
        logits = _forward(model, height, width)
    good = logits.shape == (2, num_classes) and bool(logits.isfinite().all())
    problem = "" if good else f"logits {[*logits.shape]}, not all finite or expected"
    return counter.get_total_flops() / 2, problem


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
