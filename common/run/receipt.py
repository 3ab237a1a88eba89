"""The receipt of a run: what it was to take and what it took, what it cost, and how good it is, with what is needed to do it again."""

import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.run.checkpoint import Progress
from common.run.plots import plot_receipt
from common.run.progress import clock
from common.run.records import draw
from common.run.run import Run

Z_95 = 1.959964
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy")
ROOT = Path(__file__).parents[2]
RECEIPT = "receipt.json"


def wilson(hits: int, images: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    share, z2 = hits / images, Z_95**2
    centre = share + z2 / (2 * images)
    spread = math.sqrt(share * (1 - share) * z2 / images + (z2 / (2 * images)) ** 2)
    return (centre - spread) / (1 + z2 / images), (centre + spread) / (1 + z2 / images)


def write_receipt(run: Run, progress: Progress, val_images: int) -> str:
    """Write `receipt.json` and its plot into the run's folder, and return it in two lines; for the main process."""
    cfg, rows = run.cfg, run.records.rows()
    total_s = sum(progress.seconds.values())
    receipt: dict[str, Any] = {
        "minutes": _minutes(progress.seconds),
        "total_minutes": total_s / 60,
        "forecast": None,
        "usd_per_hour": cfg.usd_per_hour,
        "price_usd": total_s / 3600 * cfg.usd_per_hour if cfg.usd_per_hour else None,
        "epochs": progress.epochs_done,
        "images_seen": progress.images_seen,
        "val_images": val_images,
        **accuracy(rows, val_images),
        "energy_wh": {k: None if math.isnan(j) else j / 3600 for k, j in progress.energy_j.items()},
        "hardware": _hardware(run),
        "software": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "seed": cfg.seed,
        "strategy": cfg.strategy,
        "model": cfg.model,
        "command": shlex.join(["python", *sys.argv]),
    }
    text = f"receipt: {clock(total_s)}"
    if progress.forecast:
        planned_s = sum(progress.forecast["parts"].values())
        receipt["forecast"] = {
            "minutes": _minutes(progress.forecast["parts"]),
            "total_minutes": planned_s / 60,
            "interval_90_minutes": [progress.forecast["low_s"] / 60, progress.forecast["high_s"] / 60],
            "budget_minutes": progress.forecast["budget_s"] / 60,
            "error": total_s / planned_s - 1,
        }
        text += f", forecast {clock(planned_s)} ({receipt['forecast']['error']:+.1%}), budget {clock(progress.forecast['budget_s'])}"
    text += f", {receipt['price_usd']:.2f} USD" if cfg.usd_per_hour else ""
    low, high = receipt["interval_95"]
    text += (
        f"; top-1 {receipt['last_top1']:.2f} %, 95 % interval {low:.1f} to {high:.1f} ({val_images:,} images)"
    )
    run.records.write_json(RECEIPT, receipt)
    draw(plot_receipt, run.folder)
    return f"{text}\n  python -m common.tools.receipt {run.folder} checks it against the log"


def accuracy(rows: list[dict[str, str]], val_images: int) -> dict[str, Any]:
    """Last top-1 of the raw weights in percent, its interval, and the best of raw or averaged ones, from the training log."""
    evaluated = [row for row in rows if row["val_top1"]]
    last = float(evaluated[-1]["val_top1"])
    best = max(float(row[weights] or 0) for row in evaluated for weights in ("val_top1", "ema_top1"))
    low, high = wilson(round(last * val_images / 100), val_images)
    return {"last_top1": last, "best_top1": best, "interval_95": [100 * low, 100 * high]}


def _minutes(seconds: Mapping[str, float]) -> dict[str, float]:
    return {part: spent / 60 for part, spent in seconds.items()}


def _hardware(run: Run) -> dict[str, Any]:
    device = run.accelerator.device
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": run.accelerator.num_processes,
        "precision": run.cfg.mixed_precision,
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Of the last minute: another program on the machine makes a forecast wrong.
        "load_average": os.getloadavg()[0],
    }


def _commit() -> str | None:
    """Of this code, with a plus if it has been changed since; None where it is no checkout."""
    if not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
