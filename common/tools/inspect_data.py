"""Look at a dataset before training: classes, sizes, aspect ratios, formats, what is broken or there twice.

    python -m common.tools.inspect_data --data_dir photos --out inspection

Every image is decoded by the code that training uses. The report is printed, and written beside its plots:

    report.txt, classes.csv          the table; the images of every class
    unreadable.txt, duplicates.txt   where there are any: files and why; groups of files with the same content
    classes.png, sizes.png, aspect_ratios.png, formats.png
"""

import argparse
import csv
import hashlib
import io
import math
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import UserError
from common.data.decode import DecodeError, decode_batch, read_header
from common.data.loader import available_workers
from common.data.order import BatchItem, View
from common.data.sources.folder import MissingSplit, Source, open_source
from common.run import plots
from common.tools.prepare import as_it_is, start_worker

PIECE = 64  # images a worker looks at at a time
UNREADABLE = "unreadable"
COLOURS = {"train": plots.BLUE, "val": plots.VERMILION}

# One image. `kind` is its format and mode, "JPEG RGB"; `digest` identifies its bytes.
RECORD = np.dtype(
    [
        ("bytes", "i8"),
        ("height", "i4"),
        ("width", "i4"),
        ("kind", "U20"),
        ("digest", "u8", 2),
        ("label", "i8"),
    ]
)


class Findings(NamedTuple):
    """What was found in one split."""

    source: Source
    images: np.ndarray  # RECORD [N]
    unreadable: dict[int, str]  # index -> why

    @property
    def readable(self) -> np.ndarray:
        return self.images[self.images["kind"] != UNREADABLE]

    @property
    def per_class(self) -> np.ndarray:
        """Images of each class, int64 [classes]."""
        return np.bincount(self.source.labels, minlength=len(self.source.classes))


class _Inspector(Dataset):
    """Runs in a worker: the first index of a piece in, its records out."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, begin: int) -> tuple[np.ndarray, dict[int, str]]:
        indices = range(begin, min(begin + PIECE, len(self.source)))
        records, unreadable = np.zeros(len(indices), RECORD), {}
        pixels = torch.empty((1, 3, 32, 32), dtype=torch.uint8, memory_format=torch.channels_last)
        for record, index in zip(records, indices, strict=True):
            record["label"], record["kind"] = self.source.labels[index], UNREADABLE
            try:
                encoded = self.source.read(index, 1 << 20)
                record["bytes"] = len(encoded)
                digest = hashlib.blake2b(encoded, digest_size=16).digest()
                record["digest"] = np.frombuffer(digest, np.uint64)
                record["height"], record["width"] = read_header(encoded)[:2]
                item = BatchItem(0, np.array([index]), *pixels.shape[2:], 0, View(scale=None))
                decode_batch([encoded], item, 0, pixels)
                with Image.open(io.BytesIO(encoded)) as opened:
                    record["kind"] = f"{opened.format} {opened.mode}"
            except (DecodeError, OSError) as error:
                unreadable[index] = getattr(error, "strerror", None) or str(error)
        return records, unreadable


def inspect(source: Source, split: str, workers: int) -> Findings:
    """Decode all images of a split in worker processes."""
    starts = range(0, len(source), PIECE)
    loader = DataLoader(
        _Inspector(source),
        batch_size=None,
        sampler=starts,
        num_workers=min(workers, len(starts)),
        collate_fn=as_it_is,
        worker_init_fn=partial(start_worker, os.getpid()),
    )
    parts, unreadable = [], {}
    with tqdm(total=len(source), desc=f"inspect {split}", unit="image") as bar:
        for records, failures in loader:
            parts.append(records)
            unreadable |= failures
            bar.update(len(records))
    images = np.concatenate(parts)
    if source.prepared:  # what was read is the largest copy
        images["height"], images["width"] = source.sizes().T
    return Findings(source, images, unreadable)


class Duplicates(NamedTuple):
    """Images with the same bytes, over all splits."""

    groups: list[list[tuple[str, int]]]  # (split, index) of the members
    across_classes: int  # groups whose members have different classes
    across_splits: int  # groups with members in train and val


def find_duplicates(found: dict[str, Findings]) -> Duplicates:
    digests = np.concatenate([findings.images["digest"] for findings in found.values()])
    members = [(split, index) for split, findings in found.items() for index in range(len(findings.images))]
    _, group_of, counts = np.unique(digests, axis=0, return_inverse=True, return_counts=True)
    group_of = group_of.reshape(-1)
    sizes = np.concatenate([findings.images["bytes"] for findings in found.values()])
    repeated = np.flatnonzero(
        (counts[group_of] > 1) & (sizes > 0)
    )  # empty files are unreadable, that says it
    groups: dict[int, list[tuple[str, int]]] = {}
    for place in repeated.tolist():
        groups.setdefault(int(group_of[place]), []).append(members[place])
    across_classes = across_splits = 0
    for group in groups.values():
        names = {found[split].source.classes[found[split].source.labels[index]] for split, index in group}
        across_classes += len(names) > 1
        across_splits += len({split for split, _ in group}) > 1
    return Duplicates(list(groups.values()), across_classes, across_splits)


# --- the report -----------------------------------------------------------------------------------


def report(data_dir: str, found: dict[str, Findings], duplicates: Duplicates) -> str:
    """Everything in words and tables."""
    parts = [data_dir, _splits_table(found), _sizes_table(found), _kinds_table(found), _classes_table(found)]
    unreadable = sum(len(findings.unreadable) for findings in found.values())
    extra = sum(len(group) - 1 for group in duplicates.groups)
    verdicts = [f"unreadable images: {unreadable or 'none'}" + (" (unreadable.txt)" if unreadable else "")]
    if extra:
        verdicts.append(
            f"duplicates: {extra} images repeat another's content, in {len(duplicates.groups)} groups; "
            f"{duplicates.across_classes} groups span classes, {duplicates.across_splits} span train and val "
            "(duplicates.txt)"
        )
    else:
        verdicts.append("duplicates: none")
    return "\n\n".join([*parts, "\n".join(verdicts)]) + "\n"


def _table(rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    return "\n".join(lines)


def _splits_table(found: dict[str, Findings]) -> str:
    rows = [["split", "images", "classes", "fewest", "median", "most per class", "unreadable", "MB"]]
    for split, findings in found.items():
        counts = findings.per_class
        numbers = [len(findings.images), len(counts), counts.min(), int(np.median(counts)), counts.max()]
        numbers += [len(findings.unreadable)]
        rows.append([split, *(f"{n:,}" for n in numbers), f"{findings.images['bytes'].sum() / 1e6:,.1f}"])
    return _table(rows)


def _sizes_table(found: dict[str, Findings]) -> str:
    rows = [["", "smallest", "5 %", "median", "95 %", "largest"]]
    for split, findings in found.items():
        images = findings.readable
        if not len(images):
            continue
        height, width = images["height"].astype(float), images["width"].astype(float)
        for name, values, style in (
            ("short side (px)", np.minimum(height, width), "{:.0f}"),
            ("long side (px)", np.maximum(height, width), "{:.0f}"),
            ("width / height", width / height, "{:.2f}"),
            ("file (kB)", images["bytes"] / 1e3, "{:.1f}"),
        ):
            # Percentiles that are images' own values: nothing between two of them.
            shown = np.percentile(values, [0, 5, 50, 95, 100], method="nearest")
            rows.append([f"{split}: {name}", *(style.format(value) for value in shown)])
    return _table(rows)


def _kinds(found: dict[str, Findings]) -> list[tuple[str, dict[str, int]]]:
    """Images of each format and mode by split, the most frequent first."""
    counts: dict[str, dict[str, int]] = {}
    for split, findings in found.items():
        for kind, count in zip(*np.unique(findings.images["kind"], return_counts=True), strict=True):
            counts.setdefault(str(kind), {})[split] = int(count)
    return sorted(counts.items(), key=lambda kind: -sum(kind[1].values()))


def _kinds_table(found: dict[str, Findings]) -> str:
    rows = [["format and mode", *found]]
    for kind, counts in _kinds(found):
        rows.append([kind, *(f"{counts.get(split, 0):,}" for split in found)])
    return _table(rows)


def _classes_table(found: dict[str, Findings], most: int = 24) -> str:
    """Images per class, or the largest and smallest ones where there are many."""
    if all(findings.per_class.min() == findings.per_class.max() for findings in found.values()):
        return "all classes have the same number of images"
    classes = next(iter(found.values())).source.classes
    counts = np.stack([_counts_of(findings, classes) for findings in found.values()])
    order = np.argsort(-counts[0], kind="stable").tolist()
    names = [[classes[label], *(f"{count:,}" for count in counts[:, label])] for label in order]
    if len(names) > most:
        gap = [f"... {len(names) - most} more in classes.csv", *([""] * len(found))]
        names = [*names[: most // 2], gap, *names[-most // 2 :]]
    return _table([["class", *found], *names])


def _counts_of(findings: Findings, classes: list[str]) -> np.ndarray:
    """Images of each of these classes, which may be numbered otherwise in this split."""
    counts = dict(zip(findings.source.classes, findings.per_class.tolist(), strict=True))
    return np.array([counts.get(name, 0) for name in classes])


def write_lists(out: Path, found: dict[str, Findings], duplicates: Duplicates) -> None:
    """Write the lists that are too long for the report."""
    classes = sorted({name for findings in found.values() for name in findings.source.classes})
    counts = [_counts_of(findings, classes) for findings in found.values()]
    with open(out / "classes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *found])
        writer.writerows(zip(classes, *(column.tolist() for column in counts), strict=True))
    unreadable = [
        f"{findings.source.describe(index)}: {why}\n"
        for findings in found.values()
        for index, why in sorted(findings.unreadable.items())
    ]
    repeated = [
        "".join(f"{found[split].source.describe(index)}\n" for split, index in group) + "\n"
        for group in duplicates.groups
    ]
    for name, lines in (("unreadable.txt", unreadable), ("duplicates.txt", repeated)):
        if lines:
            (out / name).write_text("".join(lines))
        else:
            (out / name).unlink(missing_ok=True)  # of an earlier inspection


# --- plots ----------------------------------------------------------------------------------------


def write_plots(out: Path, name: str, found: dict[str, Findings]) -> None:
    """Draw the four plots; `name` is the dataset's, in their corner."""
    for stem, draw in (
        ("classes", _draw_classes),
        ("sizes", _draw_sizes),
        ("aspect_ratios", _draw_aspects),
        ("formats", _draw_kinds),
    ):
        axes = plots.new_axes()
        draw(axes, found, name)
        plots.save(axes, out / f"{stem}.png")


def _legend(axes) -> None:
    """Name the splits in a row under the title."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.3}
    axes.legend(**place, ncols=2, fontsize=9, frameon=False, labelcolor=plots.INK)


def _draw_classes(axes, found: dict[str, Findings], name: str) -> None:
    plots.begin_plot(axes, "Images per class", "classes, the largest first", "images", name)
    for split, findings in found.items():
        counts = np.sort(findings.per_class)[::-1]
        steps = np.arange(len(counts) + 1)
        label = f"{split}: {len(findings.images):,} images, {counts.min():,} to {counts.max():,} per class"
        axes.stairs(counts, steps, fill=True, alpha=0.25, color=COLOURS[split])
        axes.stairs(counts, steps, color=COLOURS[split], linewidth=1.6, label=label)
    axes.set_xlim(0, max(len(findings.source.classes) for findings in found.values()))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)


def _sides(found: dict[str, Findings]) -> tuple[np.ndarray, np.ndarray]:
    readable = np.concatenate([findings.readable for findings in found.values()])
    return readable["width"].astype(float), readable["height"].astype(float)


def _draw_sizes(axes, found: dict[str, Findings], name: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    plots.begin_plot(axes, "Image sizes", "width (pixels)", "height (pixels)", name)
    width, height = _sides(found)
    if not len(width):
        return
    # The largest hundredth is left out: one panorama would push all others into a corner.
    limit = float(np.percentile(np.concatenate([width, height]), 99)) * 1.08
    shades = LinearSegmentedColormap.from_list("blues", ["#CFE3F1", plots.BLUE, "#00263D"])
    inside = (width <= limit) & (height <= limit)
    grid = axes.hexbin(
        width[inside],
        height[inside],
        gridsize=(50, 17),
        extent=(0, limit, 0, limit),
        norm=LogNorm(),
        mincnt=1,
        cmap=shades,
        linewidths=0.2,
    )
    for ratio, words in ((3 / 4, "3:4"), (1, "1:1"), (4 / 3, "4:3"), (2, "2:1")):
        axes.plot([0, limit], [0, limit / ratio], color=plots.GREY, linewidth=0.6, linestyle=":")
        x, y = (limit, limit / ratio) if ratio >= 1 else (limit * ratio, limit)
        axes.annotate(words, (x, y), (3, 3), textcoords="offset points", fontsize=8, color=plots.GREY)
    axes.set_xlim(0, limit)
    axes.set_ylim(0, limit)
    bar = axes.figure.colorbar(grid, ax=axes, pad=0.05, label="images", format="{x:,.0f}")
    bar.outline.set_visible(False)
    left = int(np.sum(~inside))
    words = f"median {np.median(width):.0f} × {np.median(height):.0f}"
    words += f"; {left:,} larger ones outside" if left else ""
    axes.text(0, 1.02, words, transform=axes.transAxes, fontsize=9, color=plots.GREY)


def _draw_aspects(axes, found: dict[str, Findings], name: str) -> None:
    plots.begin_plot(axes, "Aspect ratios", "width : height (logarithmic)", "share of the images (%)", name)
    edges = np.linspace(-2, 2, 65) - 1 / 32  # a bin about each common ratio, in powers of 2
    for split, findings in found.items():
        images = findings.readable
        logs = np.clip(np.log2(images["width"] / np.maximum(images["height"], 1)), edges[0], edges[-1])
        shares = 100 * np.histogram(logs, edges)[0] / max(1, len(logs))
        axes.stairs(shares, edges, fill=True, alpha=0.25, color=COLOURS[split])
        axes.stairs(
            shares, edges, color=COLOURS[split], linewidth=1.6, label=f"{split}: {len(logs):,} images"
        )
    ratios = ((1, 4), (1, 3), (1, 2), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (2, 1), (3, 1), (4, 1))
    axes.set_xticks([math.log2(w / h) for w, h in ratios], [f"{w}:{h}" for w, h in ratios])
    axes.set_xlim(edges[0], edges[-1])
    _legend(axes)


def _draw_kinds(axes, found: dict[str, Findings], name: str) -> None:
    plots.begin_plot(axes, "Formats and colour modes", "images (logarithmic)", "", name)
    kinds = _kinds(found)[:10]
    height = 0.8 / len(found)
    for place, (split, findings) in enumerate(found.items()):
        y = np.arange(len(kinds)) + (place - (len(found) - 1) / 2) * height
        counts = [kind.get(split, 0) for _, kind in kinds]
        axes.barh(y, counts, height * 0.92, color=COLOURS[split], label=split)
        for where, count in zip(y, counts, strict=True):
            share = f"{count:,} ({count / len(findings.images):.1%})"
            axes.annotate(
                share if count else "0",
                (max(count, 0.7), where),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=plots.INK,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0.7, 12 * max(len(findings.images) for findings in found.values()))
    axes.set_yticks(range(len(kinds)), [kind for kind, _ in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_position((0.17, plots.BOTTOM, plots.RIGHT - 0.17, plots.TOP - plots.BOTTOM))
    _legend(axes)


# --- command line ---------------------------------------------------------------------------------


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.inspect_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data_dir", required=True, help="a folder, Parquet or Arrow files, or hub dataset org/name"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("inspection"), help="for the results (default: inspection)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU that may be used)")
    options = parser.parse_args(args)
    try:
        workers = available_workers() if options.workers is None else options.workers
        if workers < 0:
            raise UserError(f"--workers must not be negative, not {workers}")
        sources: dict[str, Source] = {}
        for split in COLOURS:
            try:
                sources[split] = open_source(options.data_dir, split)
            except MissingSplit as error:
                missing = error
        if not sources:
            raise missing
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written: {error.strerror}") from error
        found = {split: inspect(source, split, workers) for split, source in sources.items()}
        duplicates = find_duplicates(found)
        text = report(options.data_dir, found, duplicates)
        (options.out / "report.txt").write_text(text)
        write_lists(options.out, found, duplicates)
        write_plots(options.out, Path(options.data_dir).name, found)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(text)
    print(f"plots and lists are in {options.out}")


if __name__ == "__main__":
    main()
