"""The PNG plots of a run, drawn from its CSV files alone, so that they can be made again at any time.

    python -c "import pathlib, common.run.plots as p; p.write_plots(pathlib.Path('runs/my_run'))"

Made with matplotlib's object interface: without pyplot's global state any thread may draw.
"""

import csv
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Table = dict[str, np.ndarray]  # float64 [rows] by column name

# Okabe and Ito's colours (2008), which any colour vision can tell apart; dashes do it in grey.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, GREY, PALE = "#222222", "#6B6B6B", "#E2E2E2"

WIDTH, HEIGHT = 8.4, 4.8  # of a figure, in inches
LEFT, RIGHT, BOTTOM, TOP = 0.1, 0.975, 0.125, 0.8  # of the axes, as shares of the figure
LETTER = 0.067  # width of a letter of the stages' names, in inches


# By title and label of the y axis: columns of the log with label, colour and dashes.
PANELS = {
    ("Accuracy", "accuracy (%)"): {
        "train_top1": ("train (augmented)", BLUE, "--"),
        "val_top5": ("val top-5", SKY, ":"),
        "val_top1": ("val top-1", VERMILION, "-"),
        "ema_top1": ("EMA top-1", GREEN, "-."),
    },
    ("Loss", "cross-entropy (nats)"): {
        "train_loss": ("train (augmented)", BLUE, "--"),
        "val_loss": ("validation", VERMILION, "-"),
    },
}


def write_plots(run_dir: Path) -> None:
    """Refresh the six live plots from `training_log.csv` and `schedule.csv`; none before the first epoch."""
    log = read_log(run_dir / "training_log.csv")
    if not len(log["epoch"]):
        return
    plots, name = run_dir / "plots", run_dir.resolve().name
    against = (
        ("live", "by epoch", "epoch", log["epoch"]),
        ("time", "over time", "minutes since the run began", log["total_s"] / 60),
    )
    for (title, y_label), curves in PANELS.items():
        for suffix, words, x_label, x in against:
            axes = new_plot(f"{title} {words}", x_label, y_label, name)
            _draw_curves(axes, curves, log, x)
            save(axes, plots / f"{title.lower()}_{suffix}.png")
    # A probe takes no steps, so it has no plan.
    schedule = read_schedule(run_dir) or log
    for column, quantity, colour in (("lr", "Learning rate", BLUE), ("momentum", "Momentum", PURPLE)):
        axes = new_plot(f"{quantity} by epoch", "epoch", quantity.lower(), name)
        _draw_schedule(axes, column, colour, log, schedule)
        save(axes, plots / f"{column}_live.png")


def plot_lr_finder(run_dir: Path) -> None:
    """Draw `plots/lr_finder_plot.png` from `lr_finder.csv` (step,lr,loss,smoothed,threshold,suggested,problem)."""
    with (run_dir / "lr_finder.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lr, loss, smoothed, threshold = (
        np.array([float(row[column] or "nan") for row in rows])
        for column in ("lr", "loss", "smoothed", "threshold")
    )
    suggested, problem = float(rows[0]["suggested"]), rows[0]["problem"]

    name = run_dir.resolve().name
    axes = new_plot("Learning-rate finder", "learning rate (logarithmic)", "training loss (nats)", name)
    axes.set_xscale("log")
    finite = np.isfinite(smoothed)
    if finite.any():
        # An exploding loss may leave through the top: the descent is what one looks at.
        bottom, start = np.nanmin(loss), np.median(loss[: 1 + len(loss) // 3])
        room = max(start - bottom, 0.1 * start, 1e-3)
        axes.set_ylim(bottom - 0.1 * room, start + room)
    axes.plot(lr, loss, color=SKY, linewidth=1, marker=".", markersize=3, label="loss of each step")
    axes.plot(lr, threshold, color=GREY, linewidth=1, linestyle="--", label="threshold")
    axes.plot(lr[finite], smoothed[finite], color=BLUE, linewidth=2, label="smoothed")
    rise = np.where(smoothed > threshold, np.where(finite, smoothed, np.nan), np.nan)
    axes.plot(lr, rise, color=VERMILION, linewidth=3, label="above threshold")
    axes.axvline(suggested, color=VERMILION if problem else GREEN, linewidth=1.4, linestyle="-.")
    label_above(axes, suggested, f"{'taken instead' if problem else 'suggested'}: {suggested:.3g}", INK)
    if problem:
        axes.text(0.01, 0.95, f"not trusted: {problem}", transform=axes.transAxes, va="top", color=VERMILION)
    add_legend(axes)
    save(axes, run_dir / "plots" / "lr_finder_plot.png")


def plot_receipt(run_dir: Path) -> None:
    """Draw `plots/receipt.png` from `receipt.json`: minutes by part, as planned with a budget, and as taken."""
    receipt = json.loads((run_dir / "receipt.json").read_text())
    actual, planned = receipt["minutes"], (receipt["forecast"] or {"minutes": {}})["minutes"]
    parts = list(dict.fromkeys([*planned, *actual]))
    place = np.arange(len(parts))
    axes = new_plot(f"Receipt: {receipt['total_minutes']:.1f} minutes", "minutes", "", run_dir.resolve().name)
    if planned:
        axes.barh(place - 0.2, [planned.get(part, 0) for part in parts], 0.35, color=SKY, label="forecast")
    axes.barh(place + 0.2, [actual.get(part, 0) for part in parts], 0.35, color=BLUE, label="taken")
    axes.set_yticks(place, parts)
    axes.invert_yaxis()
    low, high = receipt["interval_95"]
    price = f", {receipt['price_usd']:.2f} USD" if receipt["price_usd"] else ""
    text = f"top-1 {receipt['last_top1']:.1f} % ({low:.1f} to {high:.1f}){price}"
    label_above(axes, axes.get_xlim()[1], text, INK, "right")
    add_legend(axes)
    save(axes, run_dir / "plots" / "receipt.png")


# ---------------------------------------------------------------------------------------------------- reading


def read_log(path: Path) -> Table:
    """Read a CSV of numbers under a header; empty cells are NaN, words a ValueError."""
    header, *lines = [line.split(",") for line in path.read_text().splitlines()] or [["epoch"]]
    rows = [[float(cell or "nan") for cell in line] for line in lines]
    return dict(zip(header, np.array(rows).reshape(-1, len(header)).T, strict=True))


def read_schedule(run_dir: Path) -> Table | None:
    """A run's `schedule.csv` by step, if it has one; `epoch` counts those that are over after it, with the fraction."""
    path = run_dir / "schedule.csv"
    if not path.exists():
        return None
    plan = read_log(path)
    epoch, step = plan["epoch"], np.arange(len(plan["epoch"]))
    first, end = (np.searchsorted(epoch, epoch, side) for side in ("left", "right"))
    plan["epoch"] = epoch - 1 + (step + 1 - first) / (end - first)
    return plan


# ---------------------------------------------------------------------------------------------------- drawing


def new_plot(title: str, x_label: str, y_label: str, corner: str) -> "Axes":
    """Make a figure in the house style with one pair of axes; `corner` is small print at the top right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=110)
    # Fixed margins: a layout engine would draw everything twice.
    axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    figure.text(LEFT, 0.94, as_it_is(title), fontsize=13, fontweight="bold", color=INK)
    figure.text(RIGHT, 0.94, as_it_is(corner), fontsize=9, color=GREY, ha="right")
    return axes


def as_it_is(name: str) -> str:
    """A name for matplotlib, which takes what stands between dollars for mathematics."""
    return name.replace("$", r"\$")


def save(axes: "Axes", path: Path) -> None:
    """Write a PNG under another name, then rename it: a viewer sees the old plot, not half of one."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    axes.figure.canvas.print_figure(temporary, format="png", pil_kwargs={"compress_level": 1})
    os.replace(temporary, path)


def label_above(axes: "Axes", x: float, text: str, colour: str, align: str = "center") -> None:
    """Write above the axes, where no curve can run through it."""
    axes.text(x, 1.015, text, transform=axes.get_xaxis_transform(), ha=align, fontsize=8, color=colour)


def add_legend(axes: "Axes") -> None:
    """Name the curves in a row under the title, where no curve can run through it."""
    place = {"bbox_to_anchor": (LEFT, 0.875), "bbox_transform": axes.figure.transFigure}
    spaces = {"borderaxespad": 0, "borderpad": 0, "handlelength": 2.4, "columnspacing": 1.4}
    axes.legend(loc="lower left", **place, **spaces, ncols=6, frameon=False, fontsize=8, labelcolor=INK)


def _draw_curves(axes: "Axes", curves: dict[str, tuple[str, str, str]], log: Table, x: np.ndarray) -> None:
    # Dots that crowd together would hide the dashes.
    marker = "." if len(x) <= 50 else ""
    for column, (label, colour, dashes) in curves.items():
        y = log.get(column, np.empty(0))
        finite = np.isfinite(y)
        if finite.any():
            label += "" if finite.all() else f", {finite.sum()}/{len(y)} epochs"
            axes.plot(x[finite], y[finite], dashes, color=colour, linewidth=1.8, marker=marker, label=label)
    if "val_top1" in curves:
        top1 = np.fmax(log["val_top1"], log.get("ema_top1", np.nan))
        if np.isfinite(top1).any():
            best = np.nanargmax(top1)
            label = f"best {top1[best]:.2f} % (epoch {log['epoch'][best]:.0f})"
            axes.plot(x[best], top1[best], "*", color=ORANGE, markeredgecolor=INK, markersize=13, label=label)
    _finish(axes, log, x, x[-1])


def _draw_schedule(axes: "Axes", column: str, colour: str, log: Table, schedule: Table) -> None:
    x, y = log["epoch"], log[column]
    done = schedule["epoch"] <= x[-1]
    axes.plot(schedule["epoch"], schedule[column], color=colour, linewidth=1.4, alpha=0.4, label="plan")
    axes.plot(schedule["epoch"][done], schedule[column][done], color=colour, linewidth=2.4, label="done")
    label = f"now: {y[-1]:.3g} (epoch {x[-1]:.0f})"
    axes.plot(x[-1], y[-1], "o", color=colour, markeredgecolor="white", markersize=9, label=label)
    _finish(axes, log, x, schedule["epoch"][-1])


def _finish(axes: "Axes", log: Table, x: np.ndarray, x_end: float) -> None:
    """Limits, legend, and the stages' names and beginnings: the same in every live plot."""
    axes.locator_params(
        "x", nbins=9, steps=[1, 2, 5, 10], integer=axes.get_xlabel() == "epoch", min_n_ticks=1
    )
    x_end *= 1.02
    axes.set_xlim(0, x_end)
    if axes.lines:
        add_legend(axes)
    first_rows = np.flatnonzero(np.diff(log["stage"], prepend=np.nan) != 0)
    if len(first_rows) == 1:
        return
    # A stage begins where the last epoch of the one before ended.
    begins = [0.0, *x[first_rows[1:] - 1]]
    for row, begin, end in zip(first_rows, begins, [*begins[1:], x_end], strict=True):
        if begin:
            axes.axvline(begin, color=GREY, linewidth=0.8)
        letters = (end - begin) / x_end * (RIGHT - LEFT) * WIDTH / LETTER
        size = f"{log['img_size'][row]:.0f} px"
        names = (f"stage {log['stage'][row]:.0f} · {size}", size, size.removesuffix(" px"))
        label_above(axes, (begin + end) / 2, next((name for name in names if len(name) < letters), ""), GREY)
