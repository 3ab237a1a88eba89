"""The processes of a run: what Accelerate starts, what they agree on, and how one that fails lets the others go."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Literal, cast

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)

from common import UserError
from common.config import TrainConfig

Precision = Literal["no", "fp16", "bf16"]
# A launcher forwards what its whole process group was sent: that is one signal, not two.
REPEAT_S = 2.0
# How long processes wait for one that fetches a run or a dataset for all: gloo's own, where NCCL's ten minutes are short.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# What Accelerate would take from its configuration file or the environment, and we would not honour.
UNSUPPORTED = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_DYNAMO_BACKEND",
)
# Of those that Accelerate knows; each is the name of its package.
TRACKERS = ("wandb", "tensorboard", "trackio")
FAST_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "asimdbf16"}


class Interrupted(Exception):
    """All processes have agreed to stop here."""


# --- Accelerate ----------------------------------------------------------------------------------------------------


def start_processes() -> PartialState:
    """Join the processes that were launched, on GPUs or, without them, on CPUs.

    UserError: Accelerate was asked for what these scripts do not do, or would train N models side by side.
    """
    for variable in UNSUPPORTED:
        if os.environ.get(variable, "").lower() not in ("", "no", "false", "0"):
            raise UserError(
                f"{variable} is not supported; take it out of accelerate's --config_file (instead of dynamo pass --compile)"
            )
    # DDP takes the device the model is on. Accelerate would name the local rank, which is no device where a scheduler
    # shows each process one GPU.
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=COLLECTIVE_TIMEOUT)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise UserError(
            f"{launched} processes were launched but Accelerate sees {state.num_processes}; "
            "use distributed_type: MULTI_GPU in the --config_file, also on CPUs"
        )
    return state


def make_accelerator(cfg: TrainConfig) -> tuple[Accelerator, str]:
    """Accelerate for the device and the precision in force, which is written into `cfg`, and a line about it."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(cfg.accumulation)):
        raise UserError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} is set: pass --accumulation {steps}")
    cfg.mixed_precision, note = resolve_precision(cfg.mixed_precision, cpu=not torch.cuda.is_available())
    note = "\n".join(filter(None, (idle_accelerator(), note)))
    hooks = {"fp16": DDPCommunicationHookType.FP16, "bf16": DDPCommunicationHookType.BF16}
    ddp = DistributedDataParallelKwargs(
        comm_hook=hooks.get(cfg.grad_compression, DDPCommunicationHookType.NO),
        gradient_as_bucket_view=True,
        # Each process keeps its own BatchNorm statistics, averaged before they are used (Trainer.evaluate). DDP would
        # overwrite them with those of rank 0 in every forward pass.
        broadcast_buffers=False,
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=cfg.mixed_precision,
        log_with=tracker_names(cfg.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=f"{cfg.output}/{cfg.run_name}/tensorboard"),
        kwargs_handlers=[ddp],
    )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator, note


def tracker_names(trackers: str) -> list[str]:
    """What --trackers names; UserError: unknown, or not installed, which Accelerate would pass over."""
    names = [] if trackers == "none" else trackers.split(",")
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--trackers takes none or some of {','.join(TRACKERS)}, not {name or 'nothing'}")
        if find_spec(name) is None:
            raise UserError(f"--trackers {name} needs its package: pip install {name}")
    return names


def idle_accelerator() -> str:
    """A line about an accelerator that is there while the CPU trains, such as an Apple GPU (mps); "" if there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type == "cuda":
        return ""
    return f"the accelerator ({device.type}) stays idle: these scripts train on CUDA GPUs or on the CPU"


def resolve_precision(asked: Precision | None, cpu: bool) -> tuple[Precision, str]:
    """The precision in force and a line that says why, or ""; UserError: fp16 on a CPU.

    On a CPU, `mixed_precision: no` of a launcher's file means that nobody asked, for Accelerate writes it always.
    """
    told = cast(Precision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if told not in ("no", "fp16", "bf16"):
        raise UserError(f"mixed_precision: {told} is not supported; the --config_file takes no, fp16 or bf16")
    if not cpu:
        return asked or told, ""
    fast = has_fast_bf16()
    wanted: Precision = asked or (told if told != "no" else "bf16" if fast else "no")
    if wanted == "fp16":
        raise UserError("--mixed_precision fp16 needs a GPU; use bf16 or no on a CPU")
    if wanted == "bf16" and not fast:
        return (
            wanted,
            "this CPU is slow at bf16: it takes many times as long as in fp32; pass --mixed_precision no",
        )
    if asked or told != "no":
        return wanted, ""
    why = "bf16, which this CPU is fast at" if fast else "fp32, since this CPU has no fast bf16"
    return wanted, f"precision: {why}; --mixed_precision sets it"


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    info = Path("/proc/cpuinfo")
    return info.exists() and not FAST_BF16_FLAGS.isdisjoint(info.read_text().split())


def program_age_s() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


# --- agreement -----------------------------------------------------------------------------------------------------


@contextmanager
def rank0_errors() -> Iterator[None]:
    """What only the main process does, and all depend on: when it fails there, the others end too, without a word.

    A collective: all processes enter and leave it.
    """
    failed = [True]
    try:
        yield
        failed = [False]
    finally:
        if PartialState().num_processes > 1:
            broadcast_object_list(failed)
    if failed[0]:
        raise SystemExit(2)


class Votes:
    """Decisions that all processes take together, on the CPU, so that no GPU has to be waited for."""

    def __init__(self, num_processes: int) -> None:
        self._group = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None

    def largest(self, *values: int) -> list[int]:
        """For each value, the largest of all processes; a collective."""
        if self._group is None:
            return list(values)
        assert not isinstance(self._group, int), "every process is a member"
        numbers = torch.tensor(values)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self._group)
        return numbers.tolist()


class Signals:
    """Notes a first SIGTERM, SIGINT or SIGUSR1 for the loop to stop at its next look; a second one ends the process."""

    def __init__(self) -> None:
        self.number, self._at = 0, 0.0
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and now > self._at + REPEAT_S:
            os._exit(128 + number)
        if not self.number:
            self.number, self._at = number, now
            os.write(2, b"\nstopping after this step; a second signal stops at once\n")

    def ignore(self) -> None:
        """From now on: the first process to leave makes a launcher signal the others."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
