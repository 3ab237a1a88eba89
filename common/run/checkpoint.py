"""Checkpoints: a folder of safetensors and JSON, written under a temporary name, checksummed, and never a pickle."""

import errno
import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from common import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not the ones that were written."""


@dataclass
class Progress:
    """Where a run stands: all plain numbers, kept in `state.json`."""

    step: int = 0  # optimizer steps taken
    epochs_done: int = 0  # epochs trained, evaluated and recorded
    epoch_sums: list[float] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )  # loss, hits, images of the epoch under way
    skipped_steps: int = 0
    images_seen: int = 0
    wall_s: float = 0.0
    peak_lr: float = 0.0  # of the first stage; found, or given
    best_top1: float = -1.0
    best_epoch: int = 0
    best_is_ema: bool = False
    global_batches: list[int] = field(default_factory=list)
    num_images: int = 0
    wandb_id: str = ""


@dataclass
class TrainState:
    """Everything that an interrupted run needs to go on as if nothing had happened."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Any | None  # timm's ModelEmaV3
    scaler: Any | None
    progress: Progress


# --- to and from plain tensors -------------------------------------------------------------------------------------


def _pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name `<parameter>.<key>` and the rest as JSON."""
    packed = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, entries in packed["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{index}.{key}"] = value
    return tensors, {"state": rest, "param_groups": packed["param_groups"]}


def _unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in {**tensors, **rest["state"]}.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(
                value
            )  # in the parameter's memory layout
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def rng_state() -> dict[str, Tensor]:
    """This process's random-number generators as uint8 tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"].cpu().clone())  # torch 2.15 crashes on a row of a matrix
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu().clone())


def capture(state: TrainState, accelerator: Accelerator, config: dict[str, Any]) -> dict[str, Any]:
    """Everything a checkpoint holds, by file name; all processes must call it, for each one's RNG is gathered."""
    rng = {k: accelerator.gather(v.to(accelerator.device)[None]).cpu() for k, v in rng_state().items()}
    optimizer_tensors, optimizer_rest = _pack_optimizer(state.optimizer)
    files: dict[str, Any] = {
        "model.safetensors": state.model.state_dict(),
        "optimizer.safetensors": optimizer_tensors,
        "rng.safetensors": rng,
        "state.json": {
            "progress": asdict(state.progress),
            "optimizer": optimizer_rest,
            "scaler": state.scaler.state_dict() if state.scaler else None,
            "config": config,
        },
    }
    if state.ema is not None:
        files["ema.safetensors"] = state.ema.module.state_dict()
    return files


def apply(files: dict[str, Any], state: TrainState, rank: int) -> None:
    """Put what `capture` took back in place, on a process of any rank."""
    meta = files["state.json"]
    try:
        state.model.load_state_dict(files["model.safetensors"])
        _unpack_optimizer(state.optimizer, files["optimizer.safetensors"], meta["optimizer"])
        if state.ema is not None:
            state.ema.module.load_state_dict(files["ema.safetensors"])
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"the checkpoint holds another model or optimizer than --model and --optimizer say ({str(error).splitlines()[0]})"
        ) from error
    if state.scaler and meta["scaler"]:
        state.scaler.load_state_dict(meta["scaler"])
    rng = files["rng.safetensors"]
    if rank < len(rng["torch"]):  # a process that did not exist before keeps the RNG it was seeded with
        set_rng_state({name: states[rank] for name, states in rng.items()})
    state.progress = Progress(**meta["progress"])


# --- files ---------------------------------------------------------------------------------------------------------


def save_tensors(tensors: dict[str, Tensor]) -> bytes:
    return to_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def write_durably(path: Path, content: bytes) -> None:
    """Write and flush to the disk under a temporary name, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def write(folder: Path, files: dict[str, Any]) -> None:
    """Write a checkpoint; an older one of the same name becomes `previous`.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": {}}
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            data = (
                save_tensors(content)
                if name.endswith(".safetensors")
                else json.dumps(content, indent=1).encode()
            )
            manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            write_durably(temporary / name, data)
        write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        what = (
            "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        )
        raise UserError(
            f"cannot write the checkpoint {folder}: {what}; the one before it is whole, set --output"
        ) from error
    if folder.exists():
        previous = folder.with_name("previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    temporary.rename(folder)
    _flush_directory(folder.parent)


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """Give a checkpoint a second name at no cost: its files never change once written."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=os.link)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def link_file(source: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    os.replace(temporary, target)


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedCheckpoint: names the file that is missing, cut short or altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, entries = manifest["format_version"], manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} is missing or damaged") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has checkpoint format {version}, this version reads {FORMAT_VERSION}; see --resume"
        )
    for name, entry in entries:
        path = folder / Path(name).name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise DamagedCheckpoint(f"{path} is damaged ({len(data)} of {entry['bytes']} bytes, or altered)")


def read(folder: Path) -> dict[str, Any]:
    """The files of a verified checkpoint as `capture` made them."""
    files: dict[str, Any] = {"state.json": json.loads((folder / "state.json").read_text())}
    for path in folder.glob("*.safetensors"):
        files[path.name] = load_file(path)
    return files


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is not damaged, and a sentence for each that is."""
    damaged = []
    for name in ("last", "last.tmp", "previous"):  # a kill between two renames leaves the newest as last.tmp
        folder = checkpoints / name
        if not folder.is_dir():
            continue
        try:
            verify(folder)
        except DamagedCheckpoint as error:
            if name != "last.tmp":
                damaged.append(str(error))
        else:
            return folder, damaged
    return None, damaged


def share(files: dict[str, Any] | None, accelerator: Accelerator) -> dict[str, Any] | None:
    """Send a checkpoint that the main process has read to all others, which may not see its disk."""
    if accelerator.num_processes == 1:
        return files
    layout: list[Any] = [None]
    if files is not None:
        tensors = {name: content for name, content in files.items() if name.endswith(".safetensors")}
        layout = [
            {
                "state.json": files["state.json"],
                "tensors": {
                    f: {k: (tuple(t.shape), t.dtype) for k, t in c.items()} for f, c in tensors.items()
                },
            }
        ]
    broadcast_object_list(layout)
    if layout[0] is None:
        return None
    shared: dict[str, Any] = {"state.json": layout[0]["state.json"]}
    for file, entries in layout[0]["tensors"].items():
        shared[file] = {}
        for name, (shape, dtype) in entries.items():
            tensor = files[file][name] if files is not None else torch.empty(shape, dtype=dtype)
            tensor = tensor.to(accelerator.device).contiguous()
            torch.distributed.broadcast(tensor, 0)
            shared[file][name] = tensor
    return shared


def seed_everything(seed: int) -> None:
    """Seed the generators that models may draw from; data and augmentation have their own, stateless numbers."""
    random.seed(seed)
    torch.manual_seed(seed)
