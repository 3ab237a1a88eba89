"""The PNG plots of a run, drawn from its CSV files alone, so that they can be made again at any time.

    python -c "import pathlib, common.run.plots as p; p.write_plots(pathlib.Path('runs/my_run'))"

All of it uses matplotlib's object interface: no pyplot, hence no window, no backend and no global state in
the process that trains.
"""

import csv
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Table = dict[str, np.ndarray]  # float64 [rows] by column name

# Okabe and Ito's colours (2008), which any colour vision can tell apart; dashes do it in grey.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, GREY, PALE = "#222222", "#6B6B6B", "#E2E2E2"

FIGURE_PT = (605, 346)  # width and height in points (1/72 inch)
LEFT, RIGHT, BOTTOM, TOP = 0.1, 0.975, 0.125, 0.80  # of the axes, as shares of the figure

DIVERGED = 4.0  # a sweep ends as soon as its smoothed loss is this many times the lowest so far
LETTER_PT = 4.8  # width of a letter of the stages' names
CURVE_POINTS = 2000  # of a schedule: more than the plot has pixels across


class Curve(NamedTuple):
    """A column of the log and how it looks."""

    column: str
    label: str
    colour: str
    dashes: str


class Panel(NamedTuple):
    """A quantity that is plotted against epochs and against minutes; the best of `best_of` gets a star."""

    title: str
    y_label: str
    curves: tuple[Curve, ...]
    best_of: tuple[str, ...]
    sign: int  # 1 = the highest value is the best, -1 = the lowest
    best_label: str


ACCURACY = Panel(
    "Accuracy",
    "accuracy (%)",
    (
        Curve("train_top1", "train top-1 (augmented)", BLUE, "--"),
        Curve("val_top5", "val top-5", SKY, ":"),
        Curve("val_top1", "val top-1", VERMILION, "-"),
        Curve("ema_top1", "val top-1, EMA", GREEN, "-."),
    ),
    ("val_top1", "ema_top1"),
    1,
    "best {:.2f} % (epoch {:.0f})",
)
LOSS = Panel(
    "Loss",
    "cross-entropy (nats)",
    (Curve("train_loss", "train (augmented)", BLUE, "--"), Curve("val_loss", "validation", VERMILION, "-")),
    ("val_loss",),
    -1,
    "lowest {:.3f} (epoch {:.0f})",
)


def write_plots(run_dir: Path) -> None:
    """Refresh the six live plots in `run_dir/plots` from `training_log.csv`; none before its first epoch.

    Learning rate and momentum follow the plan in `schedule.csv` (step,epoch,lr,momentum), where it exists.

    Raises:
        FileNotFoundError: the run has no `training_log.csv`.
        ValueError: a cell of the log is not a number.
    """
    log = read_log(run_dir / "training_log.csv")
    if not len(log["epoch"]):
        return
    schedule = read_schedule(run_dir)
    name = run_dir.resolve().name
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    axes = new_axes()
    for panel in (ACCURACY, LOSS):
        stem = panel.title.lower()
        begin_plot(axes, f"{panel.title} by epoch", "epoch", panel.y_label, name)
        _draw_panel(axes, panel, log, log["epoch"])
        save(axes, plots / f"{stem}_live.png")
        begin_plot(axes, f"{panel.title} over time", "minutes since the run began", panel.y_label, name)
        _draw_panel(axes, panel, log, log["total_s"] / 60)
        save(axes, plots / f"{stem}_time.png")
    for column, quantity, colour in (("lr", "Learning rate", BLUE), ("momentum", "Momentum", PURPLE)):
        begin_plot(axes, f"{quantity} by epoch", "epoch", quantity.lower(), name)
        _draw_schedule(axes, column, colour, log, schedule)
        save(axes, plots / f"{column}_live.png")


def plot_lr_finder(run_dir: Path) -> None:
    """Draw `plots/lr_finder_plot.png` from `lr_finder.csv` (step,lr,loss,smoothed,suggested).

    Raises:
        FileNotFoundError: the run has no `lr_finder.csv`.
        ValueError: a cell is not a number.
    """
    sweep = _read_table(run_dir / "lr_finder.csv")
    name = run_dir.resolve().name
    axes = new_axes()
    axes.set_xscale("log")
    begin_plot(axes, "Learning-rate finder", "learning rate (logarithmic)", "training loss (nats)", name)
    if np.isfinite(sweep["smoothed"]).any():
        _draw_sweep(axes, sweep)
    else:
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", color=GREY)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    save(axes, plots / "lr_finder_plot.png")


# ---------------------------------------------------------------------------------------------------- reading


def read_log(path: Path) -> Table:
    """Read a training log; empty cells are NaN.

    A line that was cut off (a run is writing now, or was killed while it did) is left out. Where a resumed
    run logged an epoch again, its row replaces that epoch's and all later ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a cell is not a number, or there is no column `epoch`.
    """
    with path.open(newline="") as file:
        lines = csv.reader([line for line in file if line.endswith("\n")])
    header = next(lines, ["epoch"])
    epoch = header.index("epoch")
    rows: list[list[float]] = []
    for cells in lines:
        if len(cells) != len(header):
            continue
        row = [float(cell or "nan") for cell in cells]
        while rows and rows[-1][epoch] >= row[epoch]:
            rows.pop()
        rows.append(row)
    return dict(zip(header, np.array(rows).reshape(-1, len(header)).T, strict=True))


def read_schedule(run_dir: Path) -> Table | None:
    """Read a run's whole plan from `schedule.csv` (step,epoch,lr,momentum); None where the run has none.

    Returns the columns `epoch` (epochs that are over after a step, with the fraction), `lr` and `momentum` of
    at most `CURVE_POINTS` steps.
    """
    path = run_dir / "schedule.csv"
    return _read_schedule(path, path.stat().st_mtime_ns) if path.exists() else None


@lru_cache(maxsize=4)  # a long run's plan has 10^5 lines, the same ones every epoch
def _read_schedule(path: Path, _modified_ns: int) -> Table:
    plan = _read_table(path)
    first = np.flatnonzero(np.diff(plan["epoch"], prepend=np.nan) != 0)  # step of each epoch
    steps = np.diff(first, append=len(plan["epoch"]))
    epochs_over = np.concatenate([epoch + np.arange(1, n + 1) / n for epoch, n in enumerate(steps)])
    keep = np.unique(np.linspace(0, len(epochs_over) - 1, CURVE_POINTS).astype(int))
    return {"epoch": epochs_over[keep], "lr": plan["lr"][keep], "momentum": plan["momentum"][keep]}


def _read_table(path: Path) -> Table:
    """Read a CSV of numbers that was written in one go."""
    with path.open() as file:
        header = file.readline().strip().split(",")
        return dict(zip(header, np.loadtxt(file, delimiter=",", ndmin=2).T, strict=True))


# ---------------------------------------------------------------------------------------------------- drawing


def new_axes() -> "Axes":
    """Make a figure in the house style with one pair of axes, to be given its words by `begin_plot`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(FIGURE_PT[0] / 72, FIGURE_PT[1] / 72), dpi=110)
    # Fixed margins: a layout engine would draw everything twice.
    axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def begin_plot(axes: "Axes", words: str, x_label: str, y_label: str, name: str) -> None:
    """Begin a plot on axes that may hold another, which is wiped off: new axes for each would take longer."""
    for artist in [*axes.lines, *axes.texts, *axes.figure.texts, axes.get_legend()]:
        if artist is not None:
            artist.remove()
    axes.relim()
    axes.autoscale()
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.figure.text(LEFT, 0.94, words, fontsize=13, fontweight="bold", color=INK)
    axes.figure.text(RIGHT, 0.94, name, fontsize=9, color=GREY, ha="right")


def save(axes: "Axes", path: Path) -> None:
    """Write a PNG under another name, then rename it: a viewer sees the old plot, not half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    axes.figure.savefig(temporary, format="png", pil_kwargs={"compress_level": 1})
    os.replace(temporary, path)


def _draw_panel(axes: "Axes", panel: Panel, log: Table, x: np.ndarray) -> None:
    for curve in panel.curves:
        y = log.get(curve.column, np.empty(0))
        finite = np.isfinite(y)
        if finite.any():
            missing = "" if finite.all() else f", {finite.sum()}/{len(y)} epochs"
            axes.plot(
                x[finite],
                y[finite],
                curve.dashes,
                color=curve.colour,
                linewidth=1.8,
                marker="." if len(x) <= 50 else "",  # dots that crowd together hide the dashes
                label=curve.label + missing,
            )
    if best := _best(panel, log):
        row, value = best
        label = panel.best_label.format(value, log["epoch"][row])
        axes.plot(x[row], value, "*", color=ORANGE, markeredgecolor=INK, markersize=13, label=label)
    _finish(axes, log, x, x[-1])


def _best(panel: Panel, log: Table) -> tuple[int, float] | None:
    """The row and the value of the best result; None where no value is finite."""
    values = panel.sign * np.stack([log[column] for column in panel.best_of if column in log])
    values[~np.isfinite(values)] = -np.inf
    row = int(values.max(axis=0).argmax())
    value = float(values[:, row].max())
    return (row, panel.sign * value) if np.isfinite(value) else None


def _draw_schedule(axes: "Axes", column: str, colour: str, log: Table, schedule: Table | None) -> None:
    x, y = log["epoch"], log[column]
    if schedule is None:
        axes.plot(x, y, color=colour, lw=1.8, marker=".", label="at each epoch's end")
    else:
        done = schedule["epoch"] <= x[-1]
        axes.plot(schedule["epoch"], schedule[column], color=colour, lw=1.4, alpha=0.4, label="plan")
        axes.plot(schedule["epoch"][done], schedule[column][done], color=colour, lw=2.4, label="done")
    label = f"now: {y[-1]:.3g} (epoch {x[-1]:.0f})"
    axes.plot(x[-1], y[-1], "o", color=colour, markeredgecolor="white", markersize=9, label=label)
    _finish(axes, log, x, x[-1] if schedule is None else schedule["epoch"][-1])


def _draw_sweep(axes: "Axes", sweep: Table) -> None:
    lr, loss, smoothed, suggested = (sweep[column] for column in ("lr", "loss", "smoothed", "suggested"))
    finite = np.isfinite(smoothed)
    start = smoothed[finite][0]
    bottom = smoothed[finite].min()
    axes.plot(lr, loss, color=SKY, linewidth=1, label="loss of each step")
    axes.plot(lr, smoothed, color=BLUE, linewidth=2, label="smoothed")
    # The descent is what one looks at; an exploding loss may leave through the top.
    depth = max(start - bottom, 0.1 * start)
    axes.set_ylim(min(bottom, loss[np.isfinite(loss)].min()) - 0.1 * depth, start + 0.8 * depth)

    height = np.interp(np.log(suggested[-1]), np.log(lr[finite]), smoothed[finite])
    axes.axvline(suggested[-1], color=GREEN, linewidth=1.2, linestyle="--")
    axes.plot(suggested[-1], height, "o", color=GREEN, markersize=8, markeredgecolor="white")
    _label_above(axes, suggested[-1], f"suggested: {suggested[-1]:.3g}", GREEN)
    if not smoothed[-1] <= DIVERGED * bottom:  # also where it is NaN
        axes.axvline(lr[-1], color=VERMILION, linewidth=1.2, linestyle=":")
        # One line higher than the suggestion, which may be near.
        _label_above(axes, lr[-1], f"diverged at {lr[-1]:.3g}\n", VERMILION, align="right")
    _add_legend(axes)


def _finish(axes: "Axes", log: Table, x: np.ndarray, x_end: float) -> None:
    """Limits, stages and legend: the same in every live plot."""
    axes.locator_params("x", nbins=9, steps=[1, 2, 5, 10], integer=x is log["epoch"], min_n_ticks=1)
    axes.set_xlim(0, x_end * 1.02)
    if axes.lines:
        _add_legend(axes)
    else:
        axes.text(0.5, 0.5, "no finite value yet", transform=axes.transAxes, ha="center", color=GREY)
    _add_stages(axes, log, x)


def _add_stages(axes: "Axes", log: Table, x: np.ndarray) -> None:
    """Draw a line where the stage changes; name each stage above the axes, as fully as its width allows."""
    first_rows = np.flatnonzero(np.diff(log["stage"], prepend=np.nan) != 0)
    if len(first_rows) < 2:
        return
    x_end = axes.get_xlim()[1]
    points_per_unit = (RIGHT - LEFT) * FIGURE_PT[0] / x_end
    begins = [0.0, *x[first_rows[1:] - 1]]  # a stage begins where the last epoch of the one before ended
    taken = -np.inf
    for row, begin, end in zip(first_rows, begins, [*begins[1:], x_end], strict=True):
        if begin:
            axes.axvline(begin, color=GREY, linewidth=0.8)
        stage, size = f"{log['stage'][row]:.0f}", f"{log['img_size'][row]:.0f} px"
        for text in (f"stage {stage} · {size}", f"stage {stage}\n{size}", f"{stage}\n{size}", stage):
            width = max(map(len, text.split("\n"))) * LETTER_PT / points_per_unit
            slack = 16 / points_per_unit if "\n" in text else 0  # a short name may stand out a little
            left = (begin + end - width) / 2
            if width < end - begin + slack and left > taken:
                _label_above(axes, (begin + end) / 2, text, GREY)
                taken = left + width
                break


def _label_above(axes: "Axes", x: float, text: str, colour: str, align: str = "center") -> None:
    """Write above the axes, where no curve can run through it."""
    axes.text(x, 1.015, text, transform=axes.get_xaxis_transform(), ha=align, fontsize=8, color=colour)


def _add_legend(axes: "Axes") -> None:
    """Name the curves in a row under the title, where no curve can run through it."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(LEFT, 0.875),
        bbox_transform=axes.figure.transFigure,
        ncols=6,
        frameon=False,
        fontsize=8,
        borderaxespad=0,
        borderpad=0,
        handlelength=2.4,
        columnspacing=1.4,
        labelcolor=INK,
    )
