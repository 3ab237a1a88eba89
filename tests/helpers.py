"""What several test files need: a tiny dataset, and a training run in this process or in several."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from common.config import TrainConfig, parse_args
from common.engine.trainer import Trainer
from common.run.checkpoint import name_of
from common.run.run import Run
from common.scheduling import EpochPlan
from common.scheduling.budget import Measured
from tests import forked
from train_rect import RectConfig

ROOT = Path(__file__).parent.parent
FAST = [
    "--model",
    "test_resnet",
    "--trackers",
    "none",
    "--workers",
    "0",
    "--lr",
    "0.1",
    "--mixed_precision",
    "no",
    "--recipe",
    "listed",
]


def make_images(folder: Path, classes: int = 3, train: int = 24, val: int = 7) -> Path:
    """An ImageFolder tree of small noisy JPEGs whose colour tells the class; aspect ratios vary."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(30, 60, 2)
                pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
                pixels[..., label % 3] += np.uint8(60)
                Image.fromarray(pixels).save(place / f"{number}.jpg", quality=90)
    return folder


def run_training(config_class: type[TrainConfig], data: Path, output: Path, name: str, *flags: str) -> Path:
    """Train in this process; returns the run's folder. Raises SystemExit as a script would.

    Its plots are made and not painted, which would take twice the time of the training: their files are empty.
    """
    size = "--target_size" if config_class is RectConfig else "--img_size"
    args = ["--data_dir", str(data), "--output", str(output), "--run_name", name, *FAST, size, "32", *flags]

    def save(_: Any, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()

    with mock.patch("common.run.plots.save", save):
        sys.modules[config_class.__module__].main(parse_args(config_class, "", args))
    return output / name


def as_if_measured(seconds: float) -> Callable[..., Measured]:
    """In place of `measure_stage`: steps and evaluations take so many seconds each."""

    def measured(t: Trainer, epoch: EpochPlan, *_: Any) -> Measured:
        kind = epoch.stage.img_size, epoch.stage.shape, epoch.stage.frozen
        images = epoch.global_batch // t.plan.processes
        return Measured(*kind, images, seconds, 0.0, seconds, 0.0, first_loss=1.1)

    return measured


def stop_after(monkeypatch, steps: int) -> None:
    """Behave as if SIGTERM arrived during the given optimizer step, once, and was seen at once."""
    original, count = Run.look, [0]

    def look(self: Run, step: int, problem: int) -> tuple[bool, int]:
        count[0] += 1
        if count[0] == steps:
            self.signals.number = 15
        return original(self, step, problem)

    monkeypatch.setattr("common.run.run.LOOK_S", 0.0)
    monkeypatch.setattr(Run, "look", look)


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step_*"))


def weights(run: Path, file: str = "model", step: int | None = None) -> dict[str, torch.Tensor]:
    folder = last_checkpoint(run) if step is None else run / "checkpoints" / name_of(step)
    return load_file(folder / f"{file}.safetensors")


def progress(run: Path) -> dict:
    return json.loads((last_checkpoint(run) / "state.json").read_text())["progress"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def environment() -> dict[str, str]:
    """This one's, for scripts of this project on one thread each and without a GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def torchrun(processes: int, script: str, *flags: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a script of this project under torchrun with CPU processes, all of them new."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, script, *flags],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch(processes: int, script: str, *flags: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """What torchrun does, in a fraction of its time: when one process fails, the others are stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {**address, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        members = []
        for rank in range(processes):
            place = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            members.append(forked.start([script, *flags], Path(folder), environment() | place))
        alive = members
        while alive and not any(member.exitcode for member in members) and time.monotonic() < deadline:
            wait([member.sentinel for member in alive], timeout=1)
            alive = [member for member in members if member.is_alive()]
        for member in alive:
            member.terminate()
        for member in alive:
            member.join(30)
            member.kill()
        said = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    assert time.monotonic() < deadline, said
    code = next((member.exitcode for member in members if member.exitcode), 0)
    return subprocess.CompletedProcess([script, *flags], code, *said)
