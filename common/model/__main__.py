"""`python -m common.model --model resnet50` prints its layers, and the FLOPs per image size."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import UserError
from common.model.create import check_size, create_model
from common.model.resnet import RESNETS

SIZES = "56 112 128 160 224 224x288"


@torch.inference_mode()
def print_layers(model: nn.Module, height: int, width: int) -> None:
    """Name, type, output shape and own parameters of each layer, in the order in which they run."""

    def show(name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        label = name or "(the model's own)"
        shape = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else "-"
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        print(f"{label:<40}{type(module).__name__:<24}{shape:>20}{own:>14,}")

    print(f"{'layer':<40}{'type':<24}{f'output at {height}x{width}':>20}{'parameters':>14}")
    for name, module in model.named_modules():
        is_layer = not list(module.children()) or list(module.parameters(recurse=False))
        if is_layer and not isinstance(module, nn.Identity):
            module.register_forward_hook(partial(show, name))
    model(torch.zeros(1, 3, height, width))
    print(f"{'total':<84}{sum(parameter.numel() for parameter in model.parameters()):>14,}\n")


@torch.inference_mode()
def flops(model: nn.Module, height: int, width: int) -> int:
    """Of one image's forward pass. A multiplication and its addition are two; most papers count them as one."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, height, width))
    return counter.get_total_flops()


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return 0 if the model takes every size, 1 if not, 2 for an unknown model."""
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
        type=size,
        nargs="+",
        default=[size(text) for text in SIZES.split()],
        metavar="SIZE",
        help=f"in pixels: one number for a square, HEIGHTxWIDTH for a rectangle ({SIZES})",
    )
    args = parser.parse_args(argv)
    try:
        model = create_model(args.model, args.num_classes).eval()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems = {each: check_size(model, *each) for each in args.sizes}
    counts = {each: flops(model, *each) for each, problem in problems.items() if not problem}
    if counts:
        print_layers(model, *list(counts)[-1])
    print(f"{'height x width':<16}{'GFLOPs an image':>16}   forward pass (a multiply-add is 2 FLOPs)")
    for (height, width), problem in problems.items():
        billions = counts.get((height, width), float("nan")) / 1e9
        print(f"{f'{height} x {width}':<16}{billions:>16.2f}   {problem or 'ok'}")
    return 1 if any(problems.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
