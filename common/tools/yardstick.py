"""Our scripts' defaults beside timm's train.py, on any data: nothing given but data, model, size and epochs.

    python -m common.tools.yardstick --data_dir DATA --peers pytorch-image-models/train.py --lanes 2
    python -m common.tools.yardstick --data_dir DATA --weights runs/of_other_data --epochs 4

Every job is a training of its own, one thread each. A job that has ended is not run again, so that the command goes on where it
was stopped; a run of ours that was cut off resumes, and has no time then. Ends with a table and a plot.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common import UserError
from common.data.loader import end_with_parent
from common.run import plots
from common.tools.command_line import check_least, make_folder, new_parser, one_sentence
from common.tools.compare import COLOURS, DASHES, as_text, save

SCRIPTS = ("standard", "progressive", "hybrid", "rect")
# Peak rates at a batch of 64 that cover what others choose by hand.
PEER_RATES, PEER_BATCH = (0.05, 0.1, 0.2), 64
# Our crops, in a row of their own: what of a lead is theirs.
PEER_CROPS = ("0.35", "1.0")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """One training: who trains, the whole command, and the folder it writes to."""

    trainer: str
    seed: int
    command: list[str]
    folder: Path

    def beside(self, ending: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    @property
    def receipt(self) -> Path:
        return self.beside("json")


def check_tree(data_dir: Path) -> None:
    """UserError: it is not what the inner split and timm's script take."""
    if not (data_dir / "train").is_dir() or not (data_dir / "val").is_dir():
        raise UserError(f"--data_dir {data_dir} must hold train/ and val/ with a folder for each class")


def scripts(args: argparse.Namespace) -> list[str]:
    return [*SCRIPTS, *(["finetune"] if args.weights else [])]


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """All trainings, seed by seed, so that a comparison that is stopped early is one nevertheless."""
    jobs = []
    for seed in args.seeds:
        for script in scripts(args):
            size = "--target_size" if script == "rect" else "--img_size"
            folder = args.output / f"{script}_s{seed}"
            command = [sys.executable, str(ROOT / f"train_{script}.py"), "--data_dir", str(args.data_dir)]
            command += ["--model", args.model, size, str(args.img_size), "--epochs", str(args.epochs)]
            command += ["--mixed_precision", args.mixed_precision, "--seed", str(seed), "--trackers", "none"]
            command += ["--workers", "1", "--output", str(args.output), "--run_name", folder.name]
            command += ["--weights", str(args.weights)] if script == "finetune" else []
            jobs.append(Job(script, seed, command, folder))
        if args.peers:
            rates = [(rate, ()) for rate in PEER_RATES]
            jobs += [
                peer_job(args, seed, rate, crops) for rate, crops in [*rates, (PEER_RATES[-1], PEER_CROPS)]
            ]
    return jobs


def peer_job(args: argparse.Namespace, seed: int, rate: float, crops: tuple[str, ...]) -> Job:
    """timm's train.py: SGD, cosine, one epoch of warm-up, our weight decay; else its own defaults."""
    trainer = f"timm {rate}" + (", our crops" if crops else "")
    folder = args.output / f"{trainer.replace(', our', '').replace(' ', '_')}_s{seed}"
    classes = sum(entry.is_dir() for entry in (args.data_dir / "train").iterdir())
    command = [sys.executable, str(args.peers), "--data-dir", str(args.data_dir), "--val-split", "val"]
    command += ["--model", args.model, "--num-classes", str(classes), "--img-size", str(args.img_size)]
    command += ["--epochs", str(args.epochs), "--batch-size", str(PEER_BATCH), "--lr", str(rate)]
    command += ["--opt", "sgd", "--weight-decay", "1e-4", "--warmup-epochs", "1", "--workers", "1"]
    command += ["--device", "cuda" if torch.cuda.is_available() else "cpu", "--seed", str(seed)]
    command += ["--output", str(args.output), "--experiment", folder.name]
    command += {"no": [], "bf16": ["--amp", "--amp-dtype", "bfloat16"], "fp16": ["--amp"]}[
        args.mixed_precision
    ]
    command += ["--scale", *crops] if crops else []
    return Job(trainer, seed, command, folder)


def reason(log: str) -> str:
    """A log's last error, or its last line where there is none: what was waiting to be printed may come behind the error."""
    lines = log.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1]).removeprefix(
        "error: "
    )


def run(job: Job) -> None:
    """Train, and write down what it took: CPU seconds of the process and all its loaders, and wall seconds."""
    new = {"attempts": 0, "command": job.command}
    receipt = json.loads(job.receipt.read_text()) if job.receipt.exists() else new
    # A command that was refused has trained nothing.
    if receipt.get("exit_code") == 2:
        receipt = new
    if receipt["command"] != job.command:
        raise UserError(
            f"--output {job.folder.parent} has {job.folder.name} of another command: choose another"
        )
    if receipt.get("exit_code") == 0:
        return
    receipt["attempts"] += 1
    job.receipt.write_text(json.dumps(receipt))
    print(f"{time.strftime('%H:%M:%S')}  {job.trainer}, seed {job.seed}", flush=True)
    # timm starts anew, and would write its epochs below those of before.
    (job.folder / "summary.csv").unlink(missing_ok=True)
    began = time.monotonic()
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with job.beside("log").open("a") as log:
        # Left alone, timm would go on writing into what the next attempt writes.
        process = subprocess.Popen(
            job.command, stdout=log, stderr=log, env=os.environ | threads, preexec_fn=end_with_parent
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    receipt |= {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": time.monotonic() - began}
    receipt["exit_code"] = process.returncode
    job.receipt.write_text(json.dumps(receipt, indent=1))
    if process.returncode:
        why = reason(job.beside("log").read_text(errors="replace"))
        raise UserError(f"{job.trainer} ended with exit code {process.returncode}: see {log.name} ({why})")


def read_curve(job: Job) -> pd.DataFrame:
    """`top1` in percent and `cpu_minutes`, by epoch; minutes are NaN where the job was interrupted.

    Minutes are shared out by our log's wall time; timm's has none, and its epochs are alike.
    """
    receipt = json.loads(job.receipt.read_text())
    ours = (job.folder / "training_log.csv").exists()
    log = plots.read_log(job.folder / ("training_log.csv" if ours else "summary.csv"))
    top1 = log["val_top1" if ours else "eval_top1"]
    elapsed = log["total_s"] if ours else np.arange(1.0, len(top1) + 1)
    whole = receipt["cpu_s"] / 60 if receipt["attempts"] == 1 else np.nan
    return pd.DataFrame({"cpu_minutes": whole * elapsed / elapsed[-1], "top1": top1})


def make_table(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row for each trainer: last and best top-1, mean over seeds and half their spread, and CPU time."""
    rows = []
    for trainer in dict.fromkeys(job.trainer for job in jobs):
        curves = [read_curve(job) for job in jobs if job.trainer == trainer]
        last = np.array([curve["top1"].iloc[-1] for curve in curves])
        best = np.array([curve["top1"].max() for curve in curves])
        minutes = np.array([curve["cpu_minutes"].iloc[-1] for curve in curves])
        cells = {"trainer": trainer, "last %": f"{last.mean():.1f} ± {np.ptp(last) / 2:.1f}"}
        cells |= {"best %": f"{best.mean():.1f}", "seeds": str(len(curves))}
        rows.append(cells | {"CPU min": f"{minutes.mean():.1f}"})
    return pd.DataFrame(rows).replace("nan", "–")


def draw(jobs: Sequence[Job], path: Path) -> None:
    """Accuracy over CPU time: a colour for each trainer, dashes for its seeds."""
    axes = plots.new_plot("Top-1 accuracy", "CPU minutes", "validation top-1 (%)", "dashes: further seeds")
    trainers = list(dict.fromkeys(job.trainer for job in jobs))
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    for job in jobs:
        curve, seed = read_curve(job), seeds.index(job.seed)
        colour = COLOURS[trainers.index(job.trainer) % len(COLOURS)]
        style = DASHES[(seed + trainers.index(job.trainer) // len(COLOURS)) % len(DASHES)]
        label = None if seed else job.trainer
        axes.plot(curve["cpu_minutes"], curve["top1"], color=colour, linestyle=style, label=label)
    save(axes, path)


def yardstick(args: argparse.Namespace) -> str:
    """Run what has not ended yet, and return the table as text. UserError: a path is missing, or a training failed."""
    check_tree(args.data_dir)
    if args.peers and not args.peers.is_file():
        raise UserError(f"--peers {args.peers} is no file: give the path of timm's train.py")
    check_least(args, lanes=1, epochs=1, img_size=1)
    make_folder(args.output, "--output")
    jobs = make_jobs(args)
    with ThreadPoolExecutor(args.lanes) as lanes:
        list(lanes.map(run, jobs))
    draw(jobs, args.output / "yardstick.png")
    return f"{as_text(make_table(jobs), args.markdown)}\n\nPlot: {args.output / 'yardstick.png'}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(
        "yardstick",
        "Our scripts' defaults beside timm's train.py: accuracy and CPU time, as a table and a plot.",
    )
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="ImageFolder tree with train/ and val/")
    add("--peers", type=Path, help="timm's train.py, to be trained at three rates, and with our crops")
    add("--weights", help="start train_finetune.py from these; without them it is left out")
    add("--model", default="resnet18", help="a network that both know (default: %(default)s)")
    add("--img_size", type=int, default=64, help="side of the image in pixels (default: %(default)s)")
    add("--epochs", type=int, default=12, help="passes over the training images (default: %(default)s)")
    each = "a training of each for each seed (default: 0 1)"
    add("--seeds", type=int, nargs="+", default=[0, 1], help=each)
    precisions = ("no", "bf16", "fp16")
    add("--mixed_precision", default="no", choices=precisions, help="of all (default: %(default)s)")
    add("--lanes", type=int, default=1, help="trainings side by side, a thread each (default: %(default)s)")
    add("--markdown", action="store_true", help="print the table as Markdown")
    folder = "folder of the runs (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/yardstick"), help=folder)
    args = parser.parse_args(arguments)
    with one_sentence(parser):
        print(yardstick(args))


if __name__ == "__main__":
    main()
