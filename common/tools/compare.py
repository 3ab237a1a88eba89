"""Compare runs by their logs: a table, and plots of accuracy against minutes and images seen, and of the LR.

    python -m common.tools.compare runs/*
    python -m common.tools.compare runs/* --target 60 70 --usd_per_hour 5.67 --markdown

A run may still be going on; what it has logged so far is compared. What is no run yet is left out.
"""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from common import UserError
from common.run import plots
from common.tools.command_line import make_folder, new_parser, one_sentence

COLOURS = (plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE, plots.ORANGE, plots.SKY, plots.INK)
DASHES = ("-", "--", "-.", ":")
UNKNOWN = "–"
WORDS = 3  # columns: run, strategy, model; the others are numbers


class NoRunYet(UserError):
    """The folder holds no epoch that could be compared."""


class Run(NamedTuple):
    """What a run's folder says about it."""

    name: str
    strategy: str
    model: str
    log: pd.DataFrame  # the CSV, `minutes` of wall time, and `accuracy`, the better of raw and EMA top-1
    lr: pd.DataFrame  # epoch, lr: by step as planned, or by epoch as logged


def load_run(folder: Path) -> Run:
    """Read a run's folder. NoRunYet: it is none, or no epoch has ended; UserError: its files cannot be read."""
    path = folder / "training_log.csv"
    if not path.is_file():
        raise NoRunYet(f"{folder} is not a run: it has no training_log.csv")
    try:
        log = pd.DataFrame(plots.read_log(path))
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a training log: {error}") from error
    if log.empty:
        raise NoRunYet(f"{folder} cannot be compared yet: no epoch of it has ended")
    if missing := {"epoch", "lr", "val_top1", "total_s", "images_seen"} - set(log):
        raise UserError(f"{path} is not a training log: it lacks {', '.join(sorted(missing))}")
    log["minutes"] = log["total_s"] / 60
    log["accuracy"] = log.reindex(columns=["val_top1", "ema_top1"]).max(axis=1)
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError:
        # The run is not over.
        summary = {}
    except ValueError as error:
        raise UserError(f"{folder / 'summary.json'} cannot be read: {error}") from error
    words = (str(summary.get(key, UNKNOWN)) for key in ("strategy", "model"))
    return Run(
        folder.resolve().name, *words, log, pd.DataFrame(plots.read_schedule(folder) or log)[["epoch", "lr"]]
    )


def load_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read several runs; those whose folders have the same name go by their paths.

    Returns the runs, and a sentence for each folder that is left out.
    UserError: nothing can be compared, or a run's files cannot be read.
    """
    runs, left_out = {}, []
    for folder in folders:
        try:
            runs[folder] = load_run(folder)
        except NoRunYet as reason:
            left_out.append(f"Left out: {reason}.")
    if not runs:
        raise UserError(f"no run to compare. {' '.join(left_out)}")
    names = [run.name for run in runs.values()]
    return [
        run if names.count(run.name) == 1 else run._replace(name=str(folder)) for folder, run in runs.items()
    ], left_out


def make_table(runs: Sequence[Run], targets: Sequence[float], usd_per_hour: float | None) -> pd.DataFrame:
    """The comparison, formatted; each target adds a column, or two where costs are wanted."""
    rows = []
    for run in runs:
        last = run.log.iloc[-1]
        row = {"run": run.name, "strategy": run.strategy, "model": run.model}
        row["best %"], row["last %"] = f"{run.log['accuracy'].max():.2f}", f"{last['accuracy']:.2f}"
        row["epochs"], row["minutes"] = f"{last['epoch']:.0f}", f"{last['minutes']:.1f}"
        row["images seen"] = f"{last['images_seen']:,.0f}"
        row["images/s"] = f"{last['images_seen'] / last['total_s']:,.0f}"
        for target in targets:
            # NaN where it is not reached.
            minutes = run.log["minutes"][run.log["accuracy"] >= target].min()
            row[f"min to {target:g} %"] = f"{minutes:.1f}"
            if usd_per_hour:
                row[f"$ to {target:g} %"] = f"{minutes / 60 * usd_per_hour:,.2f}"
        if usd_per_hour:
            row["$ in all"] = f"{last['minutes'] / 60 * usd_per_hour:,.2f}"
        rows.append(row)
    return pd.DataFrame(rows).replace("nan", UNKNOWN)


def as_text(table: pd.DataFrame, markdown: bool) -> str:
    """Lay cells out in columns, words to the left and numbers to the right."""
    columns = []
    for place, (name, cells) in enumerate(table.items()):
        width = max(3, len(name), *map(len, cells))
        rule = ["-" * width if place < WORDS else "-" * (width - 1) + ":"] if markdown else []
        align = str.ljust if place < WORDS else str.rjust
        columns.append([align(cell, width) for cell in [name, *rule, *cells]])
    rows = zip(*columns, strict=True)
    return "\n".join(f"| {' | '.join(row)} |" if markdown else "  ".join(row) for row in rows)


def draw(runs: Sequence[Run], targets: Sequence[float], out: Path) -> list[Path]:
    """Draw the three plots into the folder `out`, and return their paths. UserError: it cannot be written."""
    most = max(run.log["images_seen"].iloc[-1] for run in runs)
    unit, images = ("millions", 1e6) if most >= 1e6 else ("thousands", 1e3)
    dots = "dots: first epoch at " + ", ".join(f"{target:g} %" for target in targets) if targets else ""
    x_labels = {"minutes": "minutes since the run began", "images_seen": f"training images seen ({unit})"}
    accuracy = {
        column: plots.new_plot("Top-1 accuracy", label, "validation top-1 (%)", dots)
        for column, label in x_labels.items()
    }
    lr = plots.new_plot("Learning rate by epoch", "epoch", "learning rate", "")
    # Ever thinner, so that the rates of one plan (other seeds) can be seen under one another.
    widths = np.linspace(3.5, 1.5, len(runs))
    for number, (run, width) in enumerate(zip(runs, widths, strict=True)):
        turns, colour = divmod(number, len(COLOURS))
        look = {
            "color": COLOURS[colour],
            "linestyle": DASHES[turns % len(DASHES)],
            "label": plots.as_it_is(run.name),
        }
        lr.plot(run.lr["epoch"], run.lr["lr"], **look, linewidth=width, marker=_marker(run.lr))
        # An epoch that was not evaluated leaves no gap.
        known = run.log[np.isfinite(run.log["accuracy"])]
        known = known.assign(images_seen=known["images_seen"] / images)
        for column, axes in accuracy.items():
            axes.plot(known[column], known["accuracy"], **look, linewidth=1.8, marker=_marker(known))
            for target in targets:
                for _, dot in known[known["accuracy"] >= target].head(1).iterrows():
                    axes.plot(dot[column], dot["accuracy"], "o", color=look["color"], mec="white", ms=9)
    for axes, target in product(accuracy.values(), targets):
        axes.axhline(target, color=plots.GREY, linewidth=1, linestyle=":")
    stems = {"accuracy_time": accuracy["minutes"], "accuracy_images": accuracy["images_seen"], "lr": lr}
    paths = {out / f"{stem}.png": axes for stem, axes in stems.items()}
    make_folder(out, "--out")
    for path, axes in paths.items():
        save(axes, path)
    return list(paths)


def save(axes, path: Path) -> None:
    """Save a plot with its legend inside the axes, for there may be many runs."""
    axes.set_position((plots.LEFT, plots.BOTTOM, plots.RIGHT - plots.LEFT, 0.77))
    axes.set_xlim(left=0)
    # By hand: left to itself it leaves out what begins with "_"; but matplotlib's own lines do too.
    named = [line for line in axes.lines if not line.get_label().startswith("_child")]
    names = [line.get_label() for line in named]
    axes.legend(named, names, loc="best", fontsize=8, framealpha=0.8, edgecolor="none", labelcolor=plots.INK)
    plots.save(axes, path)


def _marker(table: pd.DataFrame) -> str:
    """Dots that crowd together would hide the dashes."""
    return "." if len(table) <= 50 else ""


def compare(
    folders: Sequence[Path],
    targets: list[float] | None = None,
    usd_per_hour: float | None = None,
    out: Path = Path("comparison"),
    markdown: bool = False,
) -> str:
    """Compare runs: draw the plots into `out`, and return the table with its notes as text.

    `targets` are in percent; by default there is one, the highest accuracy that every run reached.
    UserError: no folder is a run, a number makes no sense, or `out` cannot be written.
    """
    for target in targets or []:
        if not 0 < target <= 100:
            raise UserError(f"--target must be a percentage above 0 and at most 100, not {target:g}")
    if usd_per_hour is not None and not usd_per_hour > 0:
        raise UserError(f"--usd_per_hour must be above 0, not {usd_per_hour:g}")
    runs, notes = load_runs(folders)
    notes += [
        "Top-1: the better of raw and EMA weights. Minutes and images/s: evaluation and saving included."
    ]
    if targets is None:
        # Cut to a tenth of a percent, so that the number shown is one that every run did reach.
        lowest_best = np.floor(np.fmin.reduce([run.log["accuracy"].max() for run in runs]) * 10) / 10
        targets = [float(lowest_best)] if lowest_best > 0 else []
        notes += [f"Target {target:g} %: the lowest best top-1 (--target sets others)." for target in targets]
    if targets:
        notes.append("A target counts as reached at the end of the first epoch that has it.")
    paths = draw(runs, targets, out)
    notes.append(f"Plots: {', '.join(map(str, paths))}")
    return "\n".join([as_text(make_table(runs, targets, usd_per_hour), markdown), "", *notes])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(
        "compare", "Compare runs by their logs: accuracy, time and cost, as a table and three plots."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, such as runs/*")
    to = "validation top-1 to take the time to, in percent (default: the highest that every run reached)"
    add("--target", nargs="+", type=float, metavar="PERCENT", help=to)
    add("--usd_per_hour", type=float, metavar="USD", help="price of the machine; adds costs")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--out", type=Path, default=Path("comparison"), help="folder for the plots (default: %(default)s)")
    args = parser.parse_args(arguments)
    with one_sentence(parser):
        print(compare(args.runs, args.target, args.usd_per_hour, args.out, args.markdown))


if __name__ == "__main__":
    main()
