"""Make a trained model into a folder that can be given away: weights in timm's format, a model card, ONNX and torch.export programs.

    python -m common.tools.export runs/flowers --to flowers-model --license apache-2.0
    python -m common.tools.export runs/flowers --to flowers-model --onnx --pt2 --evaluation evaluation --push me/flowers

The folder needs nothing of this project:

    config.json, model.safetensors    timm.create_model("local-dir:flowers-model", pretrained=True)
    README.md                         the card, as the Hugging Face Hub reads it, with the lines that load the model
    accuracy.png, confusion.png       what the card shows, where there is a run, or an evaluation
    training.yaml                     the run's settings, for the card's training command
    model.onnx, model.pt2             the network as a program, for any number of images; compared with PyTorch first

It is there whole or not at all. Networks that timm has not, as resnet18_cifar, are given away as programs: with --onnx or --pt2.
"""

import argparse
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common import UserError, first_line
from common.model.create import WEIGHTS
from common.model.pretrained_cfg import CONFIG, SMALL_STEM, read_pretrained_cfg
from common.tools.command_line import new_parser, one_sentence
from common.tools.model_card import Card, write_card
from common.tools.model_folder import TrainedModel, add_target, check_target, fingerprint, model_place

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Largest difference of a logit, as a share of the largest logit where that is above 1.
TOLERANCE = 1e-4
# Numbers of images with which a program is made, and with which it is tried.
MADE_WITH, TRIED_WITH = 2, (1, 3)


class Normalise(nn.Module):
    """(images - mean) / std for RGB from 0 to 1, float32 [N, 3, H, W]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def write_onnx(net: nn.Module, side: int, path: Path) -> float:
    """Write an ONNX program of any batch size, and return how far onnxruntime's answers are from PyTorch's."""
    import onnxruntime

    torch.onnx.export(
        net,
        (torch.rand(MADE_WITH, 3, side, side),),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return compared(run, net, side, path)


def write_pt2(net: nn.Module, side: int, path: Path) -> float:
    """Write a torch.export program of any batch size, and return how far its answers are from the network's."""
    example = torch.rand(MADE_WITH, 3, side, side)
    program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return compared(torch.export.load(path).module(), net, side, path)


@torch.no_grad()
def compared(program: Callable[[Tensor], Tensor], net: nn.Module, side: int, path: Path) -> float:
    """The largest difference of a logit for random images. UserError: it is above `TOLERANCE`; the file is removed."""
    worst = 0.0
    for count in TRIED_WITH:
        images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        expected = net(images)
        # NaN is the larger of the two, in either order.
        gap = (program(images) - expected).abs().max() / expected.abs().max().clamp(min=1)
        worst = max(float(gap.nan_to_num(nan=torch.inf)), worst)
    if worst > TOLERANCE:
        path.unlink()
        raise UserError(
            f"--{path.suffix[1:]}: the program's logits are up to {worst:.1e} beside PyTorch's, more than {TOLERANCE:g}; "
            "nothing was written"
        )
    return worst


def push(folder: Path, repo: str) -> str:
    """Upload a folder to a model repository on the Hub, which is made private if it is not there; returns its address.

    UserError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model and card")
    # Its bases are the errors of whatever HTTP client the Hub's library uses.
    except (*HfHubHTTPError.__bases__, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--push {repo}: {reason}; the folder {folder} is complete") from error
    return str(address)


def check(args: argparse.Namespace) -> None:
    """Everything that can be refused before work begins. UserError: one of them is."""
    check_target(args.to)
    if args.onnx and not all(importlib.util.find_spec(name) for name in ONNX_PACKAGES):
        packages = " ".join(ONNX_PACKAGES)
        raise UserError(f"--onnx needs packages that are not installed: pip install {packages}")
    if args.normalized and not (args.onnx or args.pt2):
        raise UserError("--normalized is about the programs; pass --onnx or --pt2 too")
    name = read_pretrained_cfg(model_place(args.model)).architecture
    if name.endswith(SMALL_STEM) and not (args.onnx or args.pt2):
        raise UserError(
            f"{args.model} is a {name}, which timm has not, so that timm cannot load its weights; pass --onnx or --pt2"
        )
    if args.push:
        from huggingface_hub import get_token

        if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
            raise UserError(f"--push takes a name like organisation/model, not {args.push}")
        if get_token() is None:
            raise UserError(
                f"--push {args.push} needs a login at the Hub: run `hf auth login`, or set HF_TOKEN"
            )


def export(args: argparse.Namespace) -> str:
    """Write the folder and return what is to be said about it. UserError: as the functions called here say."""
    check(args)
    place = model_place(args.model)
    trained = TrainedModel(place)
    cfg, net = trained.cfg, trained.model.to("cpu", memory_format=torch.contiguous_format)
    net = net if args.normalized else nn.Sequential(Normalise(cfg.mean, cfg.std), net).eval()
    wanted = {"model.onnx": write_onnx, "model.pt2": write_pt2}
    with tempfile.TemporaryDirectory(prefix=f".{args.to.name}-", dir=args.to.absolute().parent) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(place / name, folder / name)
        gaps = {}
        for name, write in wanted.items():
            if getattr(args, Path(name).suffix[1:]):
                try:
                    gaps[name] = write(net, cfg.img_size, folder / name)
                # All that the exporters raise for a network that they cannot write.
                except RuntimeError as error:
                    reason = first_line(error)
                    raise UserError(f"{args.model} cannot be written as {name}: {reason}") from error
        run = args.model if (args.model / "config.yaml").is_file() else None
        parameters = sum(parameter.numel() for parameter in net.parameters())
        made_from = (run, args.evaluation, args.license, gaps, args.normalized)
        write_card(
            folder,
            Card(args.push, args.push or args.to.name, cfg, fingerprint(place), parameters, *made_from),
        )
        folder.replace(args.to)
    said = [f"{args.to}: {', '.join(sorted(path.name for path in args.to.iterdir()))}"]
    said += [f"{name} agrees with PyTorch within {gap:.0e}" for name, gap in gaps.items()]
    if args.push:
        said.append(f"pushed to {push(args.to, args.push)}")
    return "\n".join(said)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser("export", __doc__)
    add = parser.add_argument
    place = "a run's folder, or one with model.safetensors and config.json"
    add("model", type=Path, metavar="RUN|MODEL_DIR", help=place)
    add_target(parser)
    add("--onnx", action="store_true", help="also model.onnx, compared with PyTorch in onnxruntime")
    add("--pt2", action="store_true", help="also model.pt2, a torch.export program")
    inside = "let the programs take images that are normalised; without it, RGB from 0 to 1"
    add("--normalized", action="store_true", help=inside)
    tables = "what common.tools.evaluate wrote, for the card's tables"
    add("--evaluation", type=Path, metavar="DIR", help=tables)
    licence = "licence of the weights as the Hub names it, such as apache-2.0 (default: %(default)s)"
    add("--license", default="unknown", metavar="NAME", help=licence)
    upload = "upload to the Hugging Face Hub, into a private repository if it is new"
    add("--push", metavar="ORG/NAME", help=upload)
    args = parser.parse_args(arguments)
    with one_sentence(parser):
        print(export(args))


if __name__ == "__main__":
    main()
