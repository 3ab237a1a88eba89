"""Look at a dataset before training: classes, sizes, aspect ratios, formats, what is broken or there twice.

    python -m common.tools.inspect_data --data_dir photos --out inspection

Every image is decoded by the code that training uses. The report is printed, and written beside its plots:

    report.txt, classes.csv          the tables; the images of every class
    unreadable.txt, duplicates.txt   where there are any: files and why; groups of files with the same content
    classes.png, sizes.png, aspect_ratios.png

`--data_dir` is whatever the training scripts read, or one folder of class folders that is not split yet.
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from common.data.decode import DecodeError, decode_one, read_header
from common.data.loader import available_workers
from common.data.order import View
from common.data.sources.base import MissingSplit, Source
from common.data.sources.folder import FolderSource
from common.run import plots
from common.tools.command_line import check_least, in_utf8, make_folder, new_parser, one_sentence
from common.tools.prepare import PIECE, Piece, cut, map_in_workers, open_splits

UNREADABLE = "unreadable"
COLOURS = {"train": plots.BLUE, "val": plots.VERMILION, "all": plots.BLUE}
TICKS = {"1:4": 1 / 4, "1:3": 1 / 3, "1:2": 1 / 2, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1}
TICKS |= {name[::-1]: 1 / ratio for name, ratio in TICKS.items()}


def inspect_piece(sources: dict[str, Source], piece: Piece) -> pd.DataFrame:
    """Decode some images; a row for each: `kind` is its format and mode, `digest` a hash of its bytes."""
    split, indices = piece
    source, rows = sources[split], []
    for index in indices:
        row = {
            "split": split,
            "place": in_utf8(source.describe(index)),
            "class": source.classes[source.labels[index]],
        }
        row |= {"bytes": 0, "digest": 0, "height": 0, "width": 0, "kind": UNREADABLE, "why": ""}
        try:
            encoded = source.read(index, 1 << 20)
            digest = hashlib.blake2b(encoded, digest_size=8).digest()
            row |= {"bytes": len(encoded), "digest": int.from_bytes(digest, signed=True)}
            # What is read of a pyramid is the largest copy; it knows the originals' sizes.
            height, width = source.sizes()[index].tolist() if source.prepared else read_header(encoded)[:2]
            decode_one(encoded, 32, 32, View(scale=None))
            with Image.open(io.BytesIO(encoded)) as opened:
                row |= {"height": height, "width": width, "kind": f"{opened.format} {opened.mode}"}
        except (DecodeError, OSError) as error:
            row["why"] = getattr(error, "strerror", None) or str(error)
        rows.append(row)
    return pd.DataFrame(rows)


@contextmanager
def silenced() -> Iterator[TextIO]:
    """Keep what image libraries write to stderr off the screen; yields a file that still leads there."""
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "w") as screen, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield screen
        finally:
            os.dup2(screen.fileno(), 2)


def inspect(sources: dict[str, Source], workers: int) -> pd.DataFrame:
    """Decode all images; the rows of `inspect_piece`."""
    pieces = [piece for split, source in sources.items() for piece in cut(split, range(len(source)))]
    with silenced() as screen:
        answers = map_in_workers(partial(inspect_piece, sources), pieces, workers)
        bar = tqdm(answers, "inspect", total=len(pieces), unit="image", unit_scale=PIECE, file=screen)
        return pd.concat(list(bar), ignore_index=True)


def count_classes(images: pd.DataFrame) -> pd.DataFrame:
    """Images of each class (rows) in each split (columns), the largest classes first."""
    counts = pd.crosstab(images["class"], images["split"])
    return counts.sort_values(counts.columns[0], ascending=False, kind="stable")


def find_duplicates(images: pd.DataFrame) -> pd.DataFrame:
    """The rows of images whose bytes are there several times. Empty files are unreadable, that says it."""
    return images[images.duplicated(["digest", "bytes"], keep=False) & (images["bytes"] > 0)]


def report(data_dir: str, images: pd.DataFrame) -> str:
    """Everything in words and tables."""
    by_split = images.groupby("split")
    per_class = images.groupby(["split", "class"]).size().groupby("split")
    splits = pd.DataFrame(
        {
            "images": by_split.size(),
            "classes": per_class.size(),
            "fewest": per_class.min(),
            "median": per_class.median().astype(int),
            "most per class": per_class.max(),
            "unreadable": by_split["why"].agg(lambda why: (why != "").sum()),
            "MB": (by_split["bytes"].sum() / 1e6).round(1),
        }
    )
    kinds = pd.crosstab(images["kind"], images["split"])
    kinds = kinds.loc[kinds.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    classes = count_classes(images)
    tables = [splits, _sizes(images), kinds, classes]
    texts = [
        table.map("{:,}".format).to_string(index_names=False, max_rows=24, show_dimensions=False)
        for table in tables
        if not table.empty
    ]
    if (classes.nunique() == 1).all():
        same = ", all with the same number of images" if len(classes) > 1 else ""
        texts[-1] = _count(len(classes), "class") + same
    elif len(classes) > 24:
        texts[-1] += f"\n(all {len(classes)} classes: classes.csv)"
    return "\n\n".join([data_dir, *texts, _verdict(images)]) + "\n"


def _sizes(images: pd.DataFrame) -> pd.DataFrame:
    """Quantiles that are images' own values: nothing between two of them."""
    images = images[images["kind"] != UNREADABLE]
    sides = images[["height", "width"]]
    values = pd.DataFrame(
        {
            "short side (px)": sides.min(axis=1),
            "long side (px)": sides.max(axis=1),
            "width / height": (images["width"] / images["height"]).round(2),
            "file (kB)": (images["bytes"] / 1e3).round(1),
        }
    )
    names = ["smallest", "5 %", "median", "95 %", "largest"]
    tables = {}
    for split, of_split in values.groupby(images["split"]):
        table = of_split.quantile([0, 0.05, 0.5, 0.95, 1], interpolation="nearest")
        # As objects, sides stay whole numbers beside the fractions.
        tables[split] = table.astype(object).set_axis(names).T
    return pd.concat(tables) if tables else pd.DataFrame()


def _count(number: int, word: str) -> str:
    plural = word + ("es" if word.endswith("s") else "s")
    return f"{number:,} {word if number == 1 else plural}"


def _verdict(images: pd.DataFrame) -> str:
    unreadable = int((images["kind"] == UNREADABLE).sum())
    lines = [f"unreadable images: {unreadable} (unreadable.txt)" if unreadable else "unreadable images: none"]
    repeated = find_duplicates(images)
    if not len(repeated):
        return "\n".join([*lines, "duplicates: none"])
    groups = repeated.groupby("digest")
    spans = groups[["class", "split"]].nunique().gt(1).sum()
    extra = _count(len(repeated) - groups.ngroups, "image")
    lines += [
        f"duplicates: {extra} with the content of another, in {_count(groups.ngroups, 'group')} (duplicates.txt)",
        f"  across classes: {_count(spans['class'], 'group')}",
        f"  across train and val: {_count(spans['split'], 'group')}",
    ]
    return "\n".join(lines)


def write_lists(out: Path, images: pd.DataFrame) -> None:
    """Write the lists that are too long for the report."""
    count_classes(images).sort_index().to_csv(out / "classes.csv")
    unreadable = images[images["kind"] == UNREADABLE]
    groups = find_duplicates(images).groupby("digest")["place"]
    lists = {
        "unreadable.txt": unreadable["place"] + ": " + unreadable["why"] + "\n",
        "duplicates.txt": ["\n".join(group) + "\n\n" for _, group in groups],
    }
    for name, lines in lists.items():
        # One of an earlier inspection holds no longer.
        (out / name).unlink(missing_ok=True)
        if len(lines):
            (out / name).write_text("".join(lines))


def write_plots(out: Path, name: str, images: pd.DataFrame) -> None:
    """Draw the three plots; `name` is the dataset's, in their corner."""
    axes = plots.new_plot("Images per class", "classes, the largest first", "images", name)
    for split, of_split in images.groupby("split"):
        counts = of_split["class"].value_counts()
        label = f"{split}: {len(of_split):,} images, {counts.min():,} to {counts.max():,} per class"
        _draw_steps(axes, counts.to_numpy(), np.arange(len(counts) + 1), split, label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    plots.add_legend(axes)
    plots.save(axes, out / "classes.png")

    images = images[images["kind"] != UNREADABLE]
    short = images[["height", "width"]].min(axis=1)
    # The last bar holds the largest hundredth as well: one panorama would push all others into a corner.
    largest = short.quantile(0.99) if len(short) else 1
    edges = np.arange(0, largest + 2 + largest // 60, 1 + largest // 60)
    axes = plots.new_plot("Image sizes", "short side (pixels)", "share of the images (%)", name)
    _draw_shares(axes, short, images["split"], edges)
    plots.save(axes, out / "sizes.png")

    # A bar about each common ratio, in powers of 2.
    edges = 2 ** (np.linspace(-2, 2, 65) - 1 / 32)
    axes = plots.new_plot("Aspect ratios", "width : height (logarithmic)", "share of the images (%)", name)
    _draw_shares(axes, images["width"] / images["height"], images["split"], edges)
    axes.set_xscale("log")
    axes.set_xticks(list(TICKS.values()), list(TICKS), minor=False)
    axes.set_xticks([], minor=True)
    plots.save(axes, out / "aspect_ratios.png")


def _draw_shares(axes, values: pd.Series, splits: pd.Series, edges: np.ndarray) -> None:
    """One histogram per split; what lies outside counts at the ends."""
    for split, of_split in values.groupby(splits):
        inside = of_split.clip(edges[0], edges[-1])
        shares = 100 * np.histogram(inside, edges)[0] / len(inside)
        _draw_steps(axes, shares, edges, split, f"{split}: median {round(of_split.median(), 2):g}")
    if len(values):
        plots.add_legend(axes)


def _draw_steps(axes, heights: np.ndarray, edges: np.ndarray, split: str, label: str) -> None:
    axes.stairs(heights, edges, fill=True, alpha=0.25, color=COLOURS[split])
    axes.stairs(heights, edges, color=COLOURS[split], linewidth=1.6, label=label)
    axes.margins(x=0)


def main(args: list[str] | None = None) -> None:
    parser = new_parser("inspect_data", __doc__)
    add = parser.add_argument
    add("--data_dir", required=True, help="a folder, Parquet or Arrow files, or hub dataset org/name")
    add("--out", type=Path, default=Path("inspection"), help="for the results (default: inspection)")
    add("--workers", type=int, default=available_workers(), help="processes (default: one per usable CPU)")
    options = parser.parse_args(args)
    out, folder = options.out, Path(options.data_dir)
    with one_sentence(parser):
        check_least(options, workers=0)
        try:
            sources = open_splits(options.data_dir)
        except MissingSplit:
            if not folder.is_dir():
                raise
            sources = {"all": FolderSource(folder)}
        make_folder(out, "--out")
        images = inspect(sources, options.workers)
        text = report(in_utf8(options.data_dir), images)
        (out / "report.txt").write_text(text)
        write_lists(out, images)
        write_plots(out, folder.name, images)
    print(text)
    print(f"plots and lists are in {out}")


if __name__ == "__main__":
    main()
