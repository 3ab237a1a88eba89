"""Everything worth knowing about a new GPU, in one command: the tests that need one, and the rows of docs/results.md.

    python -m common.tools.gpu_report --minutes 8 --out gpu_report

Rows come in the order of their importance. Each has an estimate and is left out when less time is left; what fails is
a row with the reason. `gpu_report.json` and `gpu_report.md` are written after every row, so that a kill loses nothing.
`--rehearse` does the same with tiny sizes on any machine, so that the first real run is no debugging session.

Needs what requirements.txt lists, less datasets, wandb, boto3, pandas, pyarrow and matplotlib; pytest for the tests, and what
`--cifar`'s files need.
"""

import argparse
import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
import torchvision
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from common import UserError
from common.config import TrainConfig
from common.data import open_dataset
from common.data.loader import Loader, available_workers
from common.engine import fit
from common.engine.peak import endless_items
from common.model import create_model
from common.run import start_run
from common.run.checkpoint import write_durably
from common.run.progress import peak_memory_mb
from common.scheduling import Stage
from common.tools.benchmark_loop import Bench, Blank, bare_loop, in_turns, ready
from common.tools.command_line import new_parser

ROOT = Path(__file__).parents[2]
# Steps without a look in which nothing may wait for the device.
UNWATCHED_STEPS = 20
# A GPU with less memory gets half of the batch.
LARGE_GPU_BYTES = 30 * 2**30
FROZEN = ("conv1", "bn1", "layer1")
CIFAR_GOAL = 94.0
# Short sides of a pyramid's levels in pixels.
LEVELS = (146, 256)
TIMM_FLAGS = """--train-split train --val-split val --num-classes 1000 --epochs 2 --warmup-epochs 0 --cooldown-epochs 0
    --amp --amp-dtype bfloat16 --channels-last --color-jitter 0 --log-interval 1"""
Figures = dict[str, float | str]


@dataclass(frozen=True)
class Sizes:
    """What is measured: models, image sides in pixels, images per batch, steps per repeat."""

    model: str = "resnet50"
    large: int = 224
    small: int = 128
    batch: int = 256
    steps: int = 30
    repeats: int = 3
    cifar_model: str = "resnet18"
    cifar_px: int = 64
    cifar_epochs: int = 24
    rehearsed: bool = False


REHEARSED = Sizes("test_resnet", 32, 24, 8, 2, 1, "test_resnet", 24, 1, rehearsed=True)


@dataclass
class Row:
    """One line of the report: figures, or the reason why there are none."""

    what: str
    figures: Figures = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    def cells(self) -> str:
        figures = self.figures.items()
        numbers = {k: f"{v:,.{0 if v > 99 else 3}f}" for k, v in figures if not isinstance(v, str)}
        result = ", ".join(f"{name} {value}" for name, value in (self.figures | numbers).items())
        return f"| {self.what} | {result or f'*not measured*: {self.reason}'} | {self.seconds:.0f} s |"


# --- what is measured ----------------------------------------------------------------------------------------------


def config(
    sizes: Sizes, img_size: int = 0, shape: str = "square", frozen: tuple[str, ...] = (), **settings: Any
) -> TrainConfig:
    """A run's settings; what is not said is as it is for everybody."""
    settings = {"mixed_precision": "bf16", "lr": 0.1, "trackers": "none", "resume": "none", **settings}
    if sizes.rehearsed and settings["mixed_precision"] == "fp16":
        # Which is not for CPUs.
        settings["mixed_precision"] = "bf16"
    stage = Stage(1, img_size or sizes.large, sizes.batch, shape=shape, frozen=frozen)
    return TrainConfig(model=sizes.model, stages=[stage], checkpoint_minutes=0.0, **settings)


def rates(sizes: Sizes, bench: Bench, loops: dict[str, Callable[[], None]]) -> Figures:
    """Images/s of each loop by name, and the most memory that was taken."""
    device = bench.trainer.run.accelerator.device
    seconds = in_turns(loops, sizes.repeats, device)
    images = bench.epoch.steps * bench.epoch.global_batch
    figures: Figures = {name: images / statistics.median(times) for name, times in seconds.items()}
    return figures | {"memory MB": peak_memory_mb(device)}


def speed(sizes: Sizes, tf32: bool = True, **settings: Any) -> Figures:
    """The engine on batches that lie on the device."""
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32)
    with cudnn, ready(config(sizes, **settings), sizes.steps) as bench:
        # Which the run's start has changed.
        torch.backends.cudnn.allow_tf32 = tf32
        return rates(sizes, bench, {"images/s": bench.train})


def engine_and_bare(sizes: Sizes) -> Figures:
    """What the engine costs beside a bare loop, in turns."""
    with ready(config(sizes), sizes.steps) as bench:
        figures = rates(sizes, bench, {"bare images/s": bare_loop(bench), "engine images/s": bench.train})
        return figures | {"ratio": figures["engine images/s"] / figures["bare images/s"]}


def waits(sizes: Sizes, **settings: Any) -> Figures:
    """How often a step waits for the device between two looks: never, or this row says where."""
    extras = {"clip_grad": 1.0, "ema": True, "accumulation": 2}
    with ready(config(sizes, **extras, **settings), UNWATCHED_STEPS) as bench:
        t, stream = bench.trainer, cycle(bench.batches)
        bench.train()
        t.begin_epoch(bench.epoch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")
            for step in range(UNWATCHED_STEPS):
                t.train_step(bench.epoch, bench.rates.lr(step), bench.rates.momentum(step), stream)
                t.meter.tick()
    # To ask for the warnings is itself one, whose text has the word too.
    waiting = (w for w in caught if "called a synchronizing" in str(w.message))
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waiting)
    if places:
        raise RuntimeError(f"{places.total()} waits in {UNWATCHED_STEPS} steps, at {dict(places)}")
    return {f"waits in {UNWATCHED_STEPS} steps": "0"}


class Pictures(Blank):
    """A pyramid in memory: JPEGs of two sizes that compress as photographs do; a few are repeated."""

    prepared = True
    different = 32

    def __init__(self, images: int) -> None:
        super().__init__(images)
        self.encoded: list[dict[int, np.ndarray]] = []
        generator = torch.Generator().manual_seed(0)
        for index in range(self.different):
            height, width = self.sizes()[index % 2].tolist()
            coarse = torch.rand(1, 3, height // 12, width // 12, generator=generator)
            levels = {}
            for short in LEVELS:
                size = [side * short // min(height, width) for side in (height, width)]
                pixels = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[0] * 255
                levels[short] = torchvision.io.encode_jpeg(pixels.to(torch.uint8), quality=87).numpy()
            self.encoded.append(levels)

    def read(self, index: int, short_side: int) -> np.ndarray:
        levels = self.encoded[index % self.different]
        return levels[next((short for short in LEVELS if short >= short_side), LEVELS[-1])]

    def describe(self, index: int) -> str:
        return f"picture {index}"


def pyramid(sizes: Sizes, img_size: int) -> Figures:
    """What the loader leaves of the speed: training from JPEGs in memory, beside batches that lie on the device."""
    # Longer, or the batches that were loaded ahead would count.
    steps = 2 * sizes.steps
    with ready(config(sizes, img_size), steps) as bench:
        run, batches = bench.trainer.run, bench.trainer.batches
        data = Pictures(len(batches.train))
        figures = rates(sizes, bench, {"synthetic images/s": bench.train})
        where = {"device": run.accelerator.device, "channels_last": run.cfg.channels_last}
        loader = Loader(data, data, seed=0, settings=run.cfg, **where)
        with closing(loader):
            stream = loader.stream(endless_items(bench.trainer, bench.epoch))
            figures |= rates(sizes, bench, {"pyramid images/s": lambda: bench.train(stream)})
        return figures | {"waited": f"{bench.trainer.meter.data_wait:.0%}", "workers": str(loader.workers)}


def gpu_tests(sizes: Sizes, seconds_left: float) -> Figures:
    """The tests that need a GPU."""
    files = [path for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()]
    flags = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    done = call([sys.executable, "-m", "pytest", *flags, *map(str, files)], seconds_left)
    *lines, summary = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    if done.returncode:
        raise RuntimeError("; ".join([summary, *(line for line in lines if line[:5] in ("FAILE", "ERROR"))]))
    return {"pytest:": summary}


def timm_train(sizes: Sizes, peers: str, seconds_left: float) -> Figures:
    """timm's own training script on JPEGs of a folder: the median of the images/s that it logs in its second epoch."""
    script = Path(peers).resolve() / "train.py"
    if not peers or not script.is_file():
        raise UserError("pass --peers FOLDER with timm's train.py")
    with tempfile.TemporaryDirectory() as folder:
        pictures = Pictures(sizes.steps * sizes.batch)
        for split, images in (("train", len(pictures)), ("val", sizes.batch)):
            place = Path(folder) / split / "class"
            place.mkdir(parents=True)
            for index in range(images):
                # Small files, for it is the training that is to be measured.
                pictures.read(index, 0).tofile(place / f"{index}.jpg")
        flags = f"--model {sizes.model} -b {sizes.batch} --img-size {sizes.large}"
        flags += f" --workers {available_workers()} --data-dir {folder} --output {folder}/out"
        flags += " --device cpu --no-prefetcher" if sizes.rehearsed else ""
        done = call([sys.executable, str(script), *TIMM_FLAGS.split(), *flags.split()], seconds_left)
    steps = re.findall(r"Train: 1 .*?Time: [\d.]+s, +([\d.]+)/s", done.stdout + done.stderr)
    if done.returncode or not steps:
        raise RuntimeError(f"train.py: {(done.stderr.strip() or 'no rate in its output').splitlines()[-1]}")
    return {"images/s": statistics.median(map(float, steps))}


def call(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


def cifar(sizes: Sizes, data_dir: str) -> Figures:
    """Seconds of training, with its evaluations, until CIFAR-10's test images are known well enough."""
    if not data_dir:
        raise UserError("pass --cifar with CIFAR-10 as --data_dir takes it")
    given = {"data_dir": data_dir, "lr": 0.2, "lr_scaling": "none", "weight_decay": 5e-4}
    given |= {"crop_scale": (0.35, 1.0), "crop_pct": 1.0, "recipe": "listed"}
    with tempfile.TemporaryDirectory() as output:
        cfg = config(replace(sizes, model=sizes.cifar_model), output=output, **given)
        cfg.stages = [Stage(sizes.cifar_epochs, sizes.cifar_px, sizes.batch, mixup=0.0)]
        with start_run(cfg) as run:
            train, val = open_dataset(cfg)
            fit(run, create_model(cfg.model, len(train.classes)), train, val)
        log = [(float(row["val_top1"]), float(row["total_s"])) for row in run.records.rows()]
    reached = next((seconds for top1, seconds in log if top1 >= CIFAR_GOAL), "not reached")
    return {f"s to {CIFAR_GOAL:g} %": reached, "best top-1 %": max(log)[0], "s in all": log[-1][1]}


# --- the report ----------------------------------------------------------------------------------------------------


def rows_of(sizes: Sizes, args: argparse.Namespace, left: Callable[[], float]) -> list[tuple]:
    """What, its estimate in seconds on one large GPU, and how; the most important first."""
    large, small = f"{sizes.model}, {sizes.large} px", f"{sizes.model}, {sizes.small} px"
    frozen = ", ".join(FROZEN)
    plain, fp16 = {"channels_last": False, "mixed_precision": "no"}, {"mixed_precision": "fp16"}
    return [
        ("tests that need a GPU", 40, lambda: gpu_tests(sizes, left())),
        ("waiting for the device, bf16", 20, lambda: waits(sizes)),
        ("waiting for the device, fp16", 20, lambda: waits(sizes, **fp16)),
        (f"{large}, bf16, channels-last: engine and bare loop", 40, lambda: engine_and_bare(sizes)),
        (f"{large}, fp32, contiguous, without TF32", 60, lambda: speed(sizes, tf32=False, **plain)),
        (f"{large}, fp16, channels-last, compile", 80, lambda: speed(sizes, compile=True, **fp16)),
        (f"{large}, fp16, channels-last", 20, lambda: speed(sizes, **fp16)),
        (f"{large}, from a pyramid", 50, lambda: pyramid(sizes, sizes.large)),
        (f"{small}, from a pyramid", 40, lambda: pyramid(sizes, sizes.small)),
        (f"timm's train.py, {large}, bf16, channels-last", 90, lambda: timm_train(sizes, args.peers, left())),
        (f"{large}, bf16, channels-last, {frozen} frozen", 20, lambda: speed(sizes, frozen=FROZEN)),
        (f"{large}, rect, short side held", 30, lambda: speed(sizes, shape="rect", rect_area="short")),
        (f"{large}, rect, area held", 30, lambda: speed(sizes, shape="rect", rect_area="constant")),
        (f"{large}, bf16, channels-last, compile", 70, lambda: speed(sizes, compile=True)),
        (f"{large}, fp32, contiguous, with TF32", 40, lambda: speed(sizes, **plain)),
        (f"CIFAR-10 to {CIFAR_GOAL:g} %", 150, lambda: cifar(sizes, args.cifar)),
    ]


def measure(what: str, how: Callable[[], Figures]) -> Row:
    """One row, whatever happens; afterwards nothing is left of it."""
    began, row = time.monotonic(), Row(what)
    try:
        row.figures = how()
    # The one place where catching all is right: time on a GPU is rare, what breaks one row must not cost the others,
    # and the reason is not lost but written down.
    except Exception as error:  # noqa: BLE001
        row.reason = one_line(error)
    # So a run ends after what its user can mend; a signal ends the report.
    except SystemExit as error:
        if error.code != 2:
            raise
        row.reason = one_line(error.__context__ or error)
    # Accelerate holds on to the precision, the compiler to its graphs.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row.seconds = time.monotonic() - began
    return row


def one_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text.strip().partition("\n")[0].replace("|", "/")[:300]


def environment() -> dict[str, str]:
    """The machine and the software, each as a line of text."""
    query = "nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader"
    programs = {"nvidia-smi": query, "git": "git describe --always --dirty --exclude *"}
    said = {
        name: call(line.split(), 30).stdout.strip() for name, line in programs.items() if shutil.which(name)
    }
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm, accelerate)}
    return {
        "GPU, driver, memory, power limit": said.get("nvidia-smi", "none").replace("\n", "; "),
        "CPUs": str(os.cpu_count()),
        **versions,
        "CUDA, cuDNN": f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
        "Python": platform.python_version(),
        "commit": said.get("git") or "unknown",
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "command": " ".join(["python -m common.tools.gpu_report", *sys.argv[1:]]),
    }


def write(out: Path, head: dict[str, str], sizes: Sizes, rows: list[Row]) -> None:
    """Write both files anew."""
    content = {"environment": head, "sizes": asdict(sizes), "rows": [asdict(row) for row in rows]}
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in head.items()), ""]
    lines += ["| what | result | took |", "|---|---|---|", *(row.cells() for row in rows), ""]
    write_durably(out / "gpu_report.json", json.dumps(content, indent=1).encode())
    write_durably(out / "gpu_report.md", "\n".join(lines).encode())


def main(arguments: list[str] | None = None) -> None:
    began = time.monotonic()
    parser = new_parser("gpu_report", __doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="to stop in (default: 8)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_report"), help="folder of the report (default: gpu_report)"
    )
    parser.add_argument("--peers", default="", help="folder with timm's train.py")
    parser.add_argument("--cifar", default="", help="CIFAR-10, as --data_dir takes it")
    args = parser.parse_args(arguments)
    sizes = REHEARSED
    if not args.rehearse:
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device; --rehearse works without one")
        memory = torch.cuda.get_device_properties(0).total_memory
        sizes = Sizes(batch=256 if memory >= LARGE_GPU_BYTES else 128)

    def left() -> float:
        return began + 60 * args.minutes - time.monotonic()

    args.out.mkdir(parents=True, exist_ok=True)
    head, rows = environment(), []
    # In the rehearsal nothing is compiled, but all that is around it happens.
    with torch.compiler.set_stance("force_eager") if args.rehearse else nullcontext():
        for what, estimate, how in rows_of(sizes, args, left):
            late = left() < (1 if args.rehearse else estimate)
            rows.append(Row(what, reason="out of time") if late else measure(what, how))
            print(rows[-1].cells(), flush=True)
            write(args.out, head, sizes, rows)


if __name__ == "__main__":
    main()
