"""Checkpoints: folders of safetensors and JSON, each named once, by its step, for life; never a pickle.

    checkpoints/step_00001234/model.safetensors      weights and buffers, as the main process has them
                              ema.safetensors        their average, with --ema
                              optimizer.safetensors  one tensor for each parameter and kind of state
                              ranks.safetensors      what differs between processes, each [processes, ...]
                              state.json             progress, the rest of the optimizer, settings
                              manifest.json          size and SHA-256 of the others

A checkpoint exists when its manifest does: it is written last and deleted first. The highest step is the newest.
Files are flushed to the disk, folders' names are not: a power cut may take the newest checkpoint, and leaves the one before.
Not `Accelerator.save_state`: that pickles, and a run could not go on with another number of processes.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from accelerate.utils.operations import recursively_apply
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from common import UserError

FORMAT_VERSION = 2
MANIFEST, STATE = "manifest.json", "state.json"
TEMPORARY = ".tmp"

Files = dict[str, Any]


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not the ones that were written."""


@dataclass
class Progress:
    """Where a run stands: all plain numbers, kept in `state.json`."""

    step: int = 0
    """optimizer steps taken"""
    epochs_done: int = 0
    """epochs trained, evaluated and recorded"""
    epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """loss and hits, summed over the images of the epoch under way"""
    skipped_steps: int = 0
    images_seen: int = 0
    wall_s: float = 0.0
    peak_lr: float = 0.0
    """of the first stage; found, or given"""
    best_top1: float = -1.0
    best_epoch: int = 0
    best_step: int = 0
    """names the checkpoint with the best weights"""
    best_is_ema: bool = False
    global_batches: list[int] = field(default_factory=list)
    num_images: int = 0
    labels: str = ""
    """a hash of the training images' classes, name by name and image by image"""
    val_labels: str = ""
    """the same of the validation images"""
    wandb_id: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """of wall time by part of the run: "start", "finder", "train 1" ..., "wait", "evaluate", "save" """
    energy_j: dict[str, float] = field(default_factory=dict)
    """joules of the main process's machine, by "cpu" and "gpu"; NaN = not all was counted"""
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    """for which the model's images are normalised, by channel; weights that it started from may have brought them along"""
    forecast: dict[str, Any] = field(default_factory=dict)
    """of a run with --budget: `budget_s`, `low_s`, `high_s`, and `parts`, seconds as above; otherwise empty"""


@dataclass
class TrainState:
    """Everything that an interrupted run needs to go on as if nothing had happened."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Any | None
    scaler: Any | None
    progress: Progress

    @property
    def models(self) -> dict[str, nn.Module]:
        """The weights that are trained, and their average where there is one, by the names of their files."""
        return {"model": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})


# --- to and from plain tensors -------------------------------------------------------------------------------------


def _pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name `<parameter>.<key>` and the rest as JSON."""
    packed = optimizer.state_dict()
    tensors, rest = dict[str, Tensor](), dict[str, Any]()
    for index, entries in packed["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{index}.{key}"] = value
    # LAMB counts its steps there, in a tensor that it makes anew of a number.
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in packed["param_groups"]
    ]
    return tensors, {"state": rest, "param_groups": groups}


def _unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in {**tensors, **rest["state"]}.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        # `step` stays on the CPU: an optimizer that is not fused would wait for the GPU to read it, at every step.
        if isinstance(value, Tensor) and key != "step" and value.shape == parameter.shape:
            # In the parameter's memory layout, on its device.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
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


def _host_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    contiguous = torch.contiguous_format
    return {k: t.detach().to("cpu", copy=True, memory_format=contiguous) for k, t in tensors.items()}


def _rows(state: TrainState, accelerator: Accelerator) -> dict[str, Tensor]:
    """Random numbers and BatchNorm's running statistics, which differ between processes: by name, [processes, ...]."""
    own = {f"rng.{name}": value for name, value in rng_state().items()}
    if accelerator.num_processes == 1:
        return {name: value[None] for name, value in own.items()}
    for prefix, module in state.models.items():
        saved = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point() and name in saved:
                own[f"{prefix}.{name}"] = buffer
    device = accelerator.device
    return {k: accelerator.gather(v.to(device).contiguous()[None]).cpu() for k, v in own.items()}


def capture(state: TrainState, accelerator: Accelerator, config: dict[str, Any]) -> Files:
    """Everything a checkpoint holds, by file name; all processes must call it, and all but the main get nothing.

    The tensors are copies on the host that later steps do not change, so a thread may write them.
    """
    rows = _rows(state, accelerator)
    if not accelerator.is_main_process:
        return {}
    optimizer_tensors, optimizer_rest = _pack_optimizer(state.optimizer)
    return {
        **{f"{name}.safetensors": _host_copies(model.state_dict()) for name, model in state.models.items()},
        "optimizer.safetensors": _host_copies(optimizer_tensors),
        "ranks.safetensors": rows,
        STATE: {
            "progress": asdict(state.progress),
            "optimizer": optimizer_rest,
            "scaler": state.scaler.state_dict() if state.scaler else None,
            "config": config,
        },
    }


def apply(files: Files, state: TrainState, accelerator: Accelerator) -> None:
    """Put what `capture` took back in place; every process takes its own row of `ranks.safetensors`.

    With another number of processes than before, all take the mean of the buffers' rows, and a process that
    did not exist keeps the random numbers it was seeded with.
    """
    meta, rows = files[STATE], files["ranks.safetensors"]
    rank, saved_processes = accelerator.process_index, len(rows["rng.torch"])
    same = saved_processes == accelerator.num_processes

    def weights(prefix: str) -> dict[str, Tensor]:
        own = {name: r for name, r in rows.items() if name.startswith(f"{prefix}.")}
        buffers = {name.removeprefix(f"{prefix}."): r[rank] if same else r.mean(0) for name, r in own.items()}
        return {**files[f"{prefix}.safetensors"], **buffers}

    try:
        for name, model in state.models.items():
            model.load_state_dict(weights(name))
        _unpack_optimizer(state.optimizer, files["optimizer.safetensors"], meta["optimizer"])
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"the checkpoint holds another model or optimizer than --model and --optimizer say ({str(error).splitlines()[0]})"
        ) from error
    if state.scaler and meta["scaler"]:
        state.scaler.load_state_dict(meta["scaler"])
    if rank < saved_processes:
        rng = {name.removeprefix("rng."): r[rank] for name, r in rows.items() if name.startswith("rng.")}
        set_rng_state(rng)
    state.progress = Progress(**meta["progress"])


def share(files: Files | None, accelerator: Accelerator) -> Files | None:
    """Send a checkpoint that the main process has read to all others, which may not see its disk; a collective.

    Tensor by tensor, so that the device, through which they go, never holds more than one.
    """
    if accelerator.num_processes == 1:
        return files
    outline = [recursively_apply(lambda tensor: tensor.to("meta"), files)]
    broadcast_object_list(outline)

    def send(tensor: Tensor) -> Tensor:
        device = accelerator.device
        own = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        return broadcast(own).cpu()

    return recursively_apply(send, outline[0] if files is None else files)


# --- files ---------------------------------------------------------------------------------------------------------


def write_durably(path: Path, content: bytes) -> None:
    """Write and flush to the disk under a temporary name, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, manifest first: one that is half deleted is none, and the next `prune` deletes the rest."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def name_of(step: int) -> str:
    """The name of a step's checkpoint; names sort as steps do."""
    return f"step_{step:08d}"


def _by_step(checkpoints: Path) -> list[Path]:
    """A run's checkpoints, whole or not, the oldest first; "last" is an old version's, and others are the user's copies."""
    return sorted(path for path in checkpoints.glob("*/") if re.fullmatch(r"step_\d+|last", path.name))


def names(checkpoints: Path) -> list[str]:
    """Of a run's checkpoints, whole or not, the oldest first."""
    return [path.name for path in _by_step(checkpoints)]


def write(checkpoints: Path, files: Files) -> Path:
    """Write a checkpoint under the name of its step; one of that step that is whole and says the same stays as it is.

    It says otherwise when a run was stopped within an evaluation, which is now over, or when `--resume` of an older checkpoint
    has left its course. Those of later steps are deleted: they are damaged or of that course, and the next resume would
    take them for the newest.

    Raises:
        UserError: the disk is full or not writable; the earlier checkpoints are untouched.
    """
    folder = checkpoints / name_of(files[STATE]["progress"]["step"])
    temporary = folder.with_name(folder.name + TEMPORARY)
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": {}}
    try:
        if not _says_the_same(folder, files):
            _remove(temporary)
            temporary.mkdir(parents=True)
            for name, content in files.items():
                data = _to_json(content) if name == STATE else to_safetensors(content)
                manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                write_durably(temporary / name, data)
            write_durably(temporary / MANIFEST, _to_json(manifest))
            _remove(folder)
            temporary.rename(folder)
        in_order = _by_step(checkpoints)
        for later in in_order[in_order.index(folder) + 1 :]:
            _remove(later)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {folder}: {error.strerror}; the one before it is whole, set --output"
        ) from error
    return folder


def _to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def read(folder: Path) -> Files:
    """The files of a checkpoint as `capture` made them, each compared with the manifest.

    Raises:
        DamagedCheckpoint: names the file that is missing, cut short or altered.
        UserError: it is of another format.
    """
    files: Files = {}
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder} has checkpoint format {version} and this version reads {FORMAT_VERSION}: go on with the "
                "version that wrote it, or choose another --run_name"
            )
        for name, entry in manifest["files"].items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                size = f"{len(data)} of {entry['bytes']} bytes"
                raise DamagedCheckpoint(f"{folder / name} is damaged ({size}, or altered)")
            files[name] = json.loads(data) if name == STATE else from_safetensors(data)
    # Those are ValueErrors too.
    except UserError:
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename} is missing or unreadable ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} is damaged") from error
    return files


def _says_the_same(folder: Path, files: Files) -> bool:
    """Whether a checkpoint is whole and holds these tensors, after as many epochs."""
    try:
        there = read(folder)
    except DamagedCheckpoint:
        return False
    if there[STATE]["progress"]["epochs_done"] != files[STATE]["progress"]["epochs_done"]:
        return False
    names = [name for name in files if name != STATE]
    return there.keys() == files.keys() and all(
        there[name].keys() == files[name].keys()
        and all(torch.equal(there[name][key], tensor) for key, tensor in files[name].items())
        for name in names
    )


def left_behind(checkpoints: Path, step: int) -> bool:
    """Whether there are checkpoints, whole or not, of later steps."""
    return any(name > name_of(step) for name in names(checkpoints))


def newest_whole(checkpoints: Path) -> tuple[Files | None, list[str]]:
    """The files of the newest checkpoint that is not damaged, and a sentence for each newer one that is.

    UserError: it is of an older format.
    """
    damaged: list[str] = []
    for folder in reversed(_by_step(checkpoints)):
        try:
            return read(folder), damaged
        except DamagedCheckpoint as error:
            damaged.append(str(error))
    return None, damaged


def prune(checkpoints: Path, keep: int = 2, also: Collection[str] = ()) -> None:
    """Delete all checkpoints but the newest `keep` (>= 1) and those named in `also`; not while one is written."""
    complete = [folder.name for folder in _by_step(checkpoints) if (folder / MANIFEST).exists()]
    kept = {*complete[-keep:], *also}
    for folder in checkpoints.glob("step_*/"):
        if folder.name not in kept and re.fullmatch(r"step_\d+", folder.name.removesuffix(TEMPORARY)):
            # SMB refuses while the S3 mirror reads the manifest: then next time.
            with contextlib.suppress(OSError):
                _remove(folder)
