"""Compare runs by their logs: a table, and plots of accuracy against minutes and images seen, and of the LR.

    python -m common.tools.compare runs/*
    python -m common.tools.compare runs/* --target 60 70 --usd_per_hour 5.67 --markdown

A run may still be going on; what it has logged so far is compared.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common import UserError
from common.run import plots
from common.run.plots import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE, plots.ORANGE, plots.SKY, plots.INK)
DASHES = ("-", "--", "-.", ":")  # the next one each time the colours are used up
UNKNOWN = "–"
WORD_COLUMNS = 3  # run, strategy, model; the others are numbers


class Run(NamedTuple):
    """What a run's folder says about it."""

    name: str
    strategy: str
    model: str
    log: Table
    schedule: Table | None

    @property
    def accuracy(self) -> np.ndarray:
        """Validation top-1 of each epoch in percent, float64 [epochs]: the better of raw and EMA weights."""
        return np.fmax(self.log["val_top1"], self.log.get("ema_top1", np.nan))

    @property
    def best(self) -> float:
        """The highest accuracy in percent; NaN where no epoch was evaluated."""
        return float(np.fmax.reduce(self.accuracy))

    @property
    def minutes(self) -> np.ndarray:
        """Wall time at the end of each epoch, evaluation and checkpoints included, float64 [epochs]."""
        return self.log["total_s"] / 60

    def first_row_at(self, target: float) -> int | None:
        """The row of the first epoch that ends with `target` percent or more; None where none does."""
        rows = np.flatnonzero(self.accuracy >= target)
        return int(rows[0]) if len(rows) else None


def load_run(folder: Path) -> Run:
    """Read a run's folder. UserError: it is no run, its files cannot be read, or no epoch of it has ended."""
    path = folder / "training_log.csv"
    if not path.is_file():
        raise UserError(f"{folder} is not a run: it has no training_log.csv")
    try:
        log = plots.read_log(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a training log: {error}") from error
    if missing := {"epoch", "lr", "val_top1", "total_s", "images_seen"} - log.keys():
        raise UserError(f"{path} is not a training log: it lacks {', '.join(sorted(missing))}")
    if not len(log["epoch"]):
        raise UserError(f"{folder} cannot be compared yet: no epoch of it has ended")
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError:
        summary = {}  # the run is not over
    except ValueError as error:
        raise UserError(f"{folder / 'summary.json'} cannot be read: {error}") from error
    return Run(
        name=folder.resolve().name,
        strategy=str(summary.get("strategy", UNKNOWN)),
        model=str(summary.get("model", UNKNOWN)),
        log=log,
        schedule=plots.read_schedule(folder),
    )


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs; those whose folders have the same name go by their paths."""
    runs = [load_run(folder) for folder in folders]
    count = Counter(run.name for run in runs)
    return [
        run if count[run.name] == 1 else run._replace(name=str(folder))
        for run, folder in zip(runs, folders, strict=True)
    ]


def make_table(runs: Sequence[Run], targets: Sequence[float], usd_per_hour: float | None) -> list[list[str]]:
    """The comparison as cells, its header first; each target adds a column, or two where costs are wanted."""
    priced = usd_per_hour is not None
    header = ["run", "strategy", "model", "best %", "last %", "epochs", "minutes", "images seen", "images/s"]
    for target in targets:
        header += [f"min to {target:g} %"] + [f"$ to {target:g} %"] * priced
    table = [header + ["$ in all"] * priced]
    for run in runs:
        minutes, seen = run.minutes[-1], run.log["images_seen"][-1]
        cells = [run.name, run.strategy, run.model]
        cells += [_number(run.best, ".2f"), _number(run.accuracy[-1], ".2f")]
        cells += [_number(run.log["epoch"][-1], ".0f"), _number(minutes, ".1f")]
        cells += [_number(seen, ",.0f"), _number(seen / (minutes * 60), ",.0f")]
        for target in targets:
            row = run.first_row_at(target)
            minutes_to_target = np.nan if row is None else run.minutes[row]
            cells.append(_number(minutes_to_target, ".1f"))
            if priced:
                cells.append(_number(minutes_to_target / 60 * usd_per_hour, ",.2f"))
        if priced:
            cells.append(_number(minutes / 60 * usd_per_hour, ",.2f"))
        table.append(cells)
    return table


def _number(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else UNKNOWN


def as_text(table: list[list[str]], markdown: bool) -> str:
    """Lay cells out in columns, words to the left and numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    if markdown:
        rule = ["-" * width for width in widths]
        rule[WORD_COLUMNS:] = ["-" * (width - 1) + ":" for width in widths[WORD_COLUMNS:]]
        table = [table[0], rule, *table[1:]]
    lines = []
    for row in table:
        words = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)][:WORD_COLUMNS]
        numbers = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)][WORD_COLUMNS:]
        lines.append(f"| {' | '.join(words + numbers)} |" if markdown else "  ".join(words + numbers))
    return "\n".join(lines)


def draw(runs: Sequence[Run], targets: Sequence[float], out: Path) -> list[Path]:
    """Draw the three plots into the folder `out`, and return their paths. UserError: it cannot be written."""
    most = max(run.log["images_seen"][-1] for run in runs)
    unit, images = ("millions", 1e6) if most >= 1e6 else ("thousands", 1e3)
    dots = "dots: first epoch at " + ", ".join(f"{target:g} %" for target in targets) if targets else ""
    paths = [out / f"{stem}.png" for stem in ("accuracy_time", "accuracy_images", "lr")]
    top1 = "validation top-1 (%)"

    axes = plots.new_axes()
    axes.set_position((plots.LEFT, plots.BOTTOM, plots.RIGHT - plots.LEFT, 0.77))  # no legend above them here
    try:
        out.mkdir(parents=True, exist_ok=True)
        plots.begin_plot(axes, "Accuracy over time", "minutes since the run began", top1, dots)
        _draw_accuracy(axes, runs, [run.minutes for run in runs], targets)
        plots.save(axes, paths[0])
        plots.begin_plot(axes, "Accuracy by images seen", f"training images seen ({unit})", top1, dots)
        _draw_accuracy(axes, runs, [run.log["images_seen"] / images for run in runs], targets)
        plots.save(axes, paths[1])
        plots.begin_plot(axes, "Learning rate by epoch", "epoch", "learning rate", "")
        _draw_lr(axes, runs)
        plots.save(axes, paths[2])
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    return paths


def _draw_accuracy(
    axes: "Axes", runs: Sequence[Run], xs: Sequence[np.ndarray], targets: Sequence[float]
) -> None:
    for target in targets:
        axes.axhline(target, color=plots.GREY, linewidth=1, linestyle=":")
    for run, x, style in zip(runs, xs, _styles(runs), strict=True):
        known = np.isfinite(run.accuracy)  # an epoch that was not evaluated leaves no gap
        axes.plot(x[known], run.accuracy[known], **style, linewidth=1.8, marker="." if len(x) <= 50 else "")
        for row in map(run.first_row_at, targets):
            if row is not None:
                axes.plot(x[row], run.accuracy[row], "o", color=style["color"], mec="white", ms=9, zorder=3)
    axes.set_xlim(0, 1.02 * max(x[-1] for x in xs))
    _add_legend(axes, "lower right")


def _draw_lr(axes: "Axes", runs: Sequence[Run]) -> None:
    # Ever thinner, so that runs of the same plan (other seeds) can be seen under one another.
    for run, style, width in zip(runs, _styles(runs), np.linspace(3.5, 1.5, len(runs)), strict=True):
        curve = run.schedule or run.log
        marker = "" if run.schedule else "."  # the log has one value per epoch
        axes.plot(curve["epoch"], curve["lr"], **style, linewidth=width, marker=marker)
    axes.set_xlim(left=0)
    _add_legend(axes, "best")


def _styles(runs: Sequence[Run]) -> list[dict[str, str]]:
    return [
        {
            "label": run.name,
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        }
        for i, run in enumerate(runs)
    ]


def _add_legend(axes: "Axes", place: str) -> None:
    axes.legend(loc=place, fontsize=8, framealpha=0.8, edgecolor="none", labelcolor=plots.INK)


def compare(
    folders: Sequence[Path],
    targets: list[float] | None = None,
    usd_per_hour: float | None = None,
    out: Path = Path("comparison"),
    markdown: bool = False,
) -> str:
    """Compare runs: draw the plots into `out`, and return the table with its notes as text.

    `targets` are in percent; by default there is one, the highest accuracy that every run reached.
    UserError: a folder is no run, a number makes no sense, or `out` cannot be written.
    """
    for target in targets or []:
        if not 0 < target <= 100:
            raise UserError(f"--target must be a percentage above 0 and at most 100, not {target:g}")
    if usd_per_hour is not None and not usd_per_hour > 0:
        raise UserError(f"--usd_per_hour must be above 0, not {usd_per_hour:g}")
    runs = load_runs(folders)
    notes = [
        "Top-1: the better of raw and EMA weights. Minutes and images/s: evaluation and saving included."
    ]
    if targets is None:
        # Cut to a tenth of a percent, so that the number shown is one that every run did reach.
        lowest_best = np.floor(np.fmin.reduce([run.best for run in runs]) * 10) / 10
        targets = [float(lowest_best)] if lowest_best > 0 else []
        notes += [f"Target {target:g} %: the lowest best top-1 (--target sets others)." for target in targets]
    if targets:
        notes.append("A target counts as reached at the end of the first epoch that has it.")
    paths = draw(runs, targets, out)
    notes.append(f"Plots: {', '.join(map(str, paths))}")
    return "\n".join([as_text(make_table(runs, targets, usd_per_hour), markdown), "", *notes])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what the user can mend ends in one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.compare",
        description="Compare runs by their logs: accuracy, time and cost, as a table and three plots.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, such as runs/*")
    parser.add_argument(
        "--target",
        nargs="+",
        type=float,
        metavar="PERCENT",
        help="validation top-1 to take the time to, in percent (default: the highest that every run reached)",
    )
    parser.add_argument("--usd_per_hour", type=float, metavar="USD", help="price of the machine; adds costs")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder for the plots (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    try:
        print(compare(args.runs, args.target, args.usd_per_hour, args.out, args.markdown))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
