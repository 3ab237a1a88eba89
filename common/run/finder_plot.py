"""The plot of a learning-rate sweep, drawn from its CSV file alone: why the suggestion is where it is."""

import csv
from pathlib import Path

import numpy as np

BLUE, VERMILION, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"  # Okabe and Ito (2008)
INK, GREY, PALE = "#222222", "#6B6B6B", "#E2E2E2"


def plot_lr_finder(run_dir: Path) -> None:
    """Draw `plots/lr_finder_plot.png` from `lr_finder.csv` (step,lr,loss,smoothed,threshold,suggested,problem).

    Raises:
        FileNotFoundError: the run has no `lr_finder.csv`.
        ValueError: a cell is not a number.
    """
    from matplotlib.figure import Figure

    with (run_dir / "lr_finder.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lr, loss, smoothed, threshold = (
        np.array([float(row[column] or "nan") for row in rows])
        for column in ("lr", "loss", "smoothed", "threshold")
    )
    suggested, problem = float(rows[0]["suggested"]), rows[0]["problem"]

    figure = Figure(figsize=(8.4, 4.8), dpi=110)
    axes = figure.add_axes((0.1, 0.125, 0.875, 0.66))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (logarithmic)", color=INK)
    axes.set_ylabel("training loss (nats)", color=INK)
    figure.text(0.1, 0.94, "Learning-rate finder", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.975, 0.94, run_dir.resolve().name, fontsize=9, color=GREY, ha="right")

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
    words = f"suggested: {suggested:.3g}"
    if problem:
        words = f"taken instead: {suggested:.3g}"
        figure.text(0.1, 0.89, f"not trusted: {problem}", fontsize=10, color=VERMILION)
    axes.text(
        suggested, 1.015, words, transform=axes.get_xaxis_transform(), ha="center", fontsize=9, color=INK
    )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=5, frameon=False, fontsize=8, borderpad=0)
    (run_dir / "plots").mkdir(exist_ok=True)
    figure.savefig(run_dir / "plots" / "lr_finder_plot.png")
