"""The plot of a learning-rate sweep, drawn from its CSV file alone: why the suggestion is where it is."""

import csv
from pathlib import Path

import numpy as np

from common.run.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PALE,
    SKY,
    VERMILION,
    add_legend,
    label_above,
    new_plot,
    save,
)


def plot_lr_finder(run_dir: Path) -> None:
    """Draw `plots/lr_finder_plot.png` from `lr_finder.csv` (step,lr,loss,smoothed,threshold,suggested,problem).

    Raises:
        FileNotFoundError: the run has no `lr_finder.csv`.
        ValueError: a cell is not a number.
    """
    with (run_dir / "lr_finder.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lr, loss, smoothed, threshold = (
        np.array([float(row[column] or "nan") for row in rows])
        for column in ("lr", "loss", "smoothed", "threshold")
    )
    suggested, problem = float(rows[0]["suggested"]), rows[0]["problem"]

    axes = new_plot(
        "Learning-rate finder", "learning rate (logarithmic)", "training loss (nats)", run_dir.resolve().name
    )
    axes.set_xscale("log")
    finite = np.isfinite(smoothed)
    if finite.any():
        # An exploding loss may leave through the top: the descent is what one looks at.
        bottom, start = np.nanmin(loss), np.median(loss[: 1 + len(loss) // 3])
        room = max(start - bottom, 0.1 * start, 1e-3)
        axes.set_ylim(bottom - 0.1 * room, start + room)
        axes.plot(lr, loss, color=SKY, linewidth=1, marker=".", markersize=3, label="loss of each step")
        counts = np.isfinite(threshold)
        lowest = [np.nanmin(smoothed[counts.argmax() - 1 : step]) for step in np.flatnonzero(counts)]
        axes.fill_between(
            lr[counts], lowest, threshold[counts], color=PALE, label="no rise: noise, or under 5 %"
        )
        axes.plot(lr, threshold, color=GREY, linewidth=1, linestyle="--", label="threshold")
        axes.plot(lr[finite], smoothed[finite], color=BLUE, linewidth=2, label="smoothed")
        rise = np.where(smoothed > threshold, np.where(finite, smoothed, np.nan), np.nan)
        axes.plot(lr, rise, color=VERMILION, linewidth=3, label="above threshold")
    else:
        axes.text(0.5, 0.5, "no step was taken", transform=axes.transAxes, ha="center", color=GREY)
    axes.axvline(suggested, color=VERMILION if problem else GREEN, linewidth=1.4, linestyle="-.")
    label_above(axes, suggested, f"{'taken instead' if problem else 'suggested'}: {suggested:.3g}", INK)
    if problem:
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        where = axes.transAxes
        axes.text(0.01, 0.95, f"not trusted: {problem}", transform=where, va="top", color=VERMILION, bbox=box)
    if finite.any():
        add_legend(axes)
    (run_dir / "plots").mkdir(exist_ok=True)
    save(axes, run_dir / "plots" / "lr_finder_plot.png")
