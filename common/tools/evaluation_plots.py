"""The PNGs of `evaluate`: what was confused, how far probabilities can be believed, and the surest mistakes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common.data.decode import DecodeError, decode_one
from common.data.order import View
from common.data.sources.base import Source
from common.run import plots

# Classes up to which cells hold numbers, and up to which every class is named at the axes.
MOST_NUMBERS, MOST_NAMES = 30, 150
MOST_LISTED = 40
# Longer names are cut.
LETTERS = 24
# Inches: the matrix's side, its cells' smallest and largest, what the axes take besides names, title, and a line of the list.
SIDE, SMALLEST_CELL, LARGEST_CELL = 8.0, 0.115, 0.55
AXES, HEAD, GAP, LINE = 0.75, 0.9, 0.35, 0.22
# A letter's width as a share of its height, which is in 72nds of an inch.
LETTER_WIDTH = 0.58 / 72
TILE, COLUMNS, ROWS = 160, 6, 4


def shortened(name: str) -> str:
    return plots.as_it_is(name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…")


def draw_confusion(
    path: Path, matrix: np.ndarray, names: Sequence[str], pairs: pd.DataFrame, note: str
) -> None:
    """Draw images by class and answer (int [C, C]), with the most confused `pairs` as a list beside it."""
    from matplotlib.figure import Figure

    count = len(names)
    named = count <= MOST_NAMES
    side = max(2.4, count * np.clip(SIDE / count, SMALLEST_CELL, LARGEST_CELL)) if named else SIDE
    letter = min(9.0, 0.8 * 72 * side / count) if named else 9.0
    longest = max(len(shortened(name)) for name in names) if named else 0
    margin = AXES + LETTER_WIDTH * letter * longest
    lines = [
        f"{images} ({share:.0%})  {shortened(name)} → {shortened(answer)}"
        for name, answer, images, share in pairs.head(MOST_LISTED).itertuples(index=False)
    ][: int((side + margin) / LINE) - 2]
    column = max(2.0, LETTER_WIDTH * 8 * max(map(len, lines), default=0))
    width, height = margin + side + 1.5 * GAP + column, HEAD + side + margin
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    if named:
        _draw_cells(axes, matrix, names, letter)
    else:
        note += f"\nclasses in the order of per_class.csv; blue: right, red: {len(pairs):,} confused pairs; area: share of the class"
        _draw_dots(axes, matrix)
    axes.set_xlabel("answer", color=plots.INK)
    axes.set_ylabel("class", color=plots.INK)
    axes.spines[:].set_color(plots.PALE)

    def write(x: float, y: float, text: str, size: float, colour: str, weight: str = "normal") -> None:
        place = {"x": x / width, "y": 1 - y / height, "va": "top"}
        figure.text(s=text, fontsize=size, fontweight=weight, color=colour, **place)

    write(GAP / 2, 0.15, "Confusion", 13, plots.INK, "bold")
    write(GAP / 2, 0.43, plots.as_it_is(note), 9, plots.GREY)
    x = margin + side + GAP
    write(x, HEAD, "Most confused", 10, plots.INK, "bold")
    for row, line in enumerate(lines):
        write(x, HEAD + LINE * (row + 1.5), line, 8, plots.INK)
    plots.save(axes, path)


def _draw_cells(axes, matrix: np.ndarray, names: Sequence[str], letter: float) -> None:
    """A cell for each class and answer: right ones blue, wrong ones red, the darker the larger the class's share."""
    from matplotlib.colors import PowerNorm

    count = len(names)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    diagonal = np.eye(count, dtype=bool)
    # By the square root, so that single images can be seen beside whole classes.
    norm = PowerNorm(0.5, 0, 1)
    for colours, elsewhere in (("Blues", ~diagonal), ("Oranges", diagonal)):
        cells = np.ma.masked_where(elsewhere | (matrix == 0), shares)
        axes.imshow(cells, cmap=colours, norm=norm, interpolation="nearest")
    axes.set_xticks(range(count), map(shortened, names), rotation=90, fontsize=letter, color=plots.INK)
    axes.set_yticks(range(count), map(shortened, names), fontsize=letter, color=plots.INK)
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=plots.PALE, linewidth=0.4)
    axes.tick_params(which="both", length=0)
    if count <= MOST_NUMBERS:
        for row, column in np.argwhere(matrix):
            ink = "white" if shares[row, column] > 0.35 else plots.INK
            axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize=letter, color=ink)


def _draw_dots(axes, matrix: np.ndarray) -> None:
    """A dot for each class and answer, its area by the class's share, where cells would be too small to see."""
    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    rows, columns = np.nonzero(matrix)
    for chosen, area, colour in (
        (rows != columns, 60, plots.VERMILION),
        (rows == columns, 12, plots.BLUE),
    ):
        y, x = rows[chosen], columns[chosen]
        axes.scatter(x, y, s=area * shares[y, x], color=colour, alpha=0.6, linewidths=0)
    axes.set_xlim(-1, count)
    axes.set_ylim(count, -1)
    axes.grid(color=plots.PALE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(color=plots.GREY, labelcolor=plots.INK, labelsize=9)


def draw_reliability(
    path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]], bins: int, note: str
) -> None:
    """Draw accuracy against confidence; `curves`: by their label, confidence (float [N]) and right (bool [N])."""
    axes = plots.new_plot("Reliability", "confidence (%)", "accuracy; bars: share of the images (%)", note)
    axes.plot([0, 100], [0, 100], color=plots.GREY, linewidth=1, linestyle=":", label="as sure as right")
    edges = np.linspace(0, 1, bins + 1)
    for (label, (confidence, right)), colour, marker in zip(
        curves.items(), (plots.BLUE, plots.VERMILION), "os", strict=True
    ):
        number = np.minimum((confidence * bins).astype(int), bins - 1)
        images = np.bincount(number, minlength=bins)
        shares = 100 * images / len(confidence)
        axes.stairs(shares, 100 * edges, fill=True, color=colour, alpha=0.15, linewidth=0)
        some = images > 0
        sure, hits = (
            np.bincount(number, values, bins)[some] / images[some] for values in (confidence, right)
        )
        axes.plot(
            100 * sure, 100 * hits, f"{marker}-", color=colour, markersize=5, linewidth=1.6, label=label
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    plots.add_legend(axes)
    plots.save(axes, path)


def draw_mistakes(path: Path, source: Source, predictions: pd.DataFrame, note: str) -> None:
    """Draw the images of the surest mistakes as a sheet, each with the answer it was given and its class."""
    from matplotlib.figure import Figure

    wrong = predictions[predictions["right"] == 0]
    surest = wrong.sort_values("probability_1", ascending=False, kind="stable").head(COLUMNS * ROWS)
    rows = max(1, -(-len(surest) // COLUMNS))
    width, height = COLUMNS * 1.75 + 0.2, rows * 2.2 + 0.6
    figure = Figure(figsize=(width, height), dpi=120)
    figure.text(
        0.12 / width, 1 - 0.3 / height, "Surest mistakes", fontsize=13, fontweight="bold", color=plots.INK
    )
    figure.text(
        1 - 0.12 / width, 1 - 0.3 / height, plots.as_it_is(note), fontsize=9, color=plots.GREY, ha="right"
    )
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for place, (index, one) in enumerate(surest.iterrows()):
        row, column = divmod(place, COLUMNS)
        answer = f"{one['probability_1']:.0%} {shortened(one['label_1'])}"
        left, bottom = 0.15 + 1.75 * column, height - 0.55 - 2.2 * (row + 1) + 0.1
        axes.imshow(tile(source, index), extent=(left, left + 1.6, bottom, bottom + 1.6), aspect="auto")
        axes.text(left, bottom + 1.83, answer, fontsize=7.5, color=plots.VERMILION)
        axes.text(left, bottom + 1.67, f"is {shortened(one['class'])}", fontsize=7.5, color=plots.INK)
    axes.set(xlim=(0, width), ylim=(0, height))
    plots.save(axes, path)


def tile(source: Source, index: int) -> np.ndarray:
    """The largest centred square of an image, uint8 [TILE, TILE, 3]; grey if it cannot be read (--skip_unreadable)."""
    sizes = source.sizes()[[index]] if source.prepared else None
    try:
        pixels = decode_one(source.read(index, TILE), TILE, TILE, View(None, crop_pct=1.0), sizes)
    except (DecodeError, OSError):
        pixels = torch.full((1, 3, TILE, TILE), 128, dtype=torch.uint8)
    return pixels[0].permute(1, 2, 0).numpy()
