"""Write a resolution pyramid: every image once at a few small sizes, of which each stage reads its own.

    python -m common.tools.prepare --data_dir imagenet --out imagenet-pyramid

To show a photograph at any size, all of its bytes must go through Huffman decoding. So smaller sizes are
stored: short sides of 256, 146 and 73 pixels serve training at 224, 128 and 64 with the margin crops need.
The result is a dataset of Arrow files that `--data_dir` takes and `datasets.load_dataset(folder)` opens:

    image_256, image_146, image_73   JPEG, upright, RGB or grey, chroma 4:2:0; null where the image is smaller
    label                            class number, with the names
    height, width                    of the original, upright

Work gathers in `<out>.partial`, which gets its name when it is whole. A shard under its final name is done,
so a run that was killed goes on after it when the same command is given again; the result is the same to
the byte. `sha256sum --check sha256.txt`, given in the finished folder, verifies every shard.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import UserError
from common.data.decode import DecodeError, decode_one, read_header
from common.data.loader import available_workers, end_with_parent
from common.data.order import View
from common.data.sources.base import MissingSplit, Source
from common.data.sources.open import open_source
from common.run.checkpoint import write_durably
from common.tools.command_line import check_least, in_utf8, new_parser, one_sentence

SPLITS = {"train": "train", "val": "validation"}  # our names, and those of `datasets`
PIECE = 16  # images a worker encodes at a time
BATCH_PIECES = 64  # of a record batch: its bytes stay far below the 2 GiB that 32-bit offsets reach
SAMPLE = 256  # images encoded to estimate the disk space
NOTES = ".prepare"  # bookkeeping inside the unfinished folder


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a pyramid, besides its source."""

    levels: tuple[int, ...] = (256, 146, 73)  # short sides in pixels, largest first
    quality: int = 90  # of the JPEGs
    shard_size: int = 10_000  # images per file: about 500 MB


# --- encoding -------------------------------------------------------------------------------------


def encode_levels(encoded: np.ndarray, settings: Settings) -> tuple[list[bytes | None], int, int]:
    """Encode an image at every level below its own size; never enlarge it.

    An image that is no larger than some levels is stored in the smallest of them only, at its own size; as
    its own bytes, if they are an upright JPEG no larger than ours.

    Takes any image file, uint8 [n]; returns one JPEG or None per level, and the original's height and width.
    DecodeError: it cannot be decoded.
    """
    height, width, fast = read_header(encoded)
    # The training's own decoder, asked for the whole image at its own size: pixels, upright.
    pixels = decode_one(encoded, height, width, View(scale=None, crop_pct=1.0))
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    if (pixels == pixels[:, :1]).all():
        # One channel says as much, in less space.
        image = image.convert("L")
    short = min(width, height)
    own = max((place for place, level in enumerate(settings.levels) if level >= short), default=-1)
    copies: list[bytes | None] = [None] * len(settings.levels)
    for place in range(max(own, 0), len(copies)):
        if place != own:
            # From the level above, and from large originals by way of a box filter: faster at equal PSNR.
            size = [max(1, round(side * settings.levels[place] / short)) for side in (width, height)]
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=settings.quality, subsampling="4:2:0", optimize=True)
        copies[place] = out.getvalue()
    if own >= 0 and fast and len(encoded) <= len(copies[own]):
        with Image.open(io.BytesIO(encoded)) as opened:
            if opened.getexif().get(0x0112, 1) == 1:
                copies[own] = encoded.tobytes()
    return copies, height, width


Piece = tuple[str, range]  # split, and which of its images


class Encoded(NamedTuple):
    """A worker's answer: some images in all their sizes."""

    rows: pa.RecordBatch
    failures: list[tuple[str, str]]  # image, why
    bytes_read: int


def schema_of(source: Source, settings: Settings) -> pa.Schema:
    from datasets import ClassLabel, Features, Image, Value

    columns: dict[str, Any] = {f"image_{level}": Image() for level in settings.levels}
    columns["label"] = ClassLabel(names=source.classes)
    columns |= {side: Value("int32") for side in ("height", "width")}
    return Features(columns).arrow_schema


def encode_piece(
    sources: dict[str, Source], schemas: dict[str, pa.Schema], settings: Settings, piece: Piece
) -> Encoded:
    """Encode the images of a piece."""
    split, indices = piece
    source, rows, failures, bytes_read = sources[split], [], [], 0
    for index in indices:
        try:
            encoded = source.read(index, max(settings.levels))
            copies, height, width = encode_levels(encoded, settings)
        except (DecodeError, OSError) as error:
            failures.append((in_utf8(source.describe(index)), getattr(error, "strerror", None) or str(error)))
            continue
        bytes_read += len(encoded)
        row = {"label": int(source.labels[index]), "height": height, "width": width}
        for level, copy in zip(settings.levels, copies, strict=True):
            row[f"image_{level}"] = None if copy is None else {"bytes": copy, "path": None}
        rows.append(row)
    return Encoded(pa.RecordBatch.from_pylist(rows, schemas[split]), failures, bytes_read)


def map_in_workers(function: Callable, arguments: Sequence, workers: int) -> Iterator:
    """Call a function of one argument in worker processes; the answers come in order.

    Few answers are kept ready, so a slow taker does not fill the memory. UserError: a worker was killed.
    """
    loader = DataLoader(
        arguments,
        batch_size=None,
        collate_fn=function,
        num_workers=min(workers, len(arguments)),
        worker_init_fn=end_with_parent,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise UserError("a worker process was killed, maybe for want of memory; lower --workers") from error


# --- shards ---------------------------------------------------------------------------------------


def cut(split: str, indices: range) -> list[Piece]:
    return [(split, indices[start : start + PIECE]) for start in range(0, len(indices), PIECE)]


def list_shards(sources: dict[str, Source], shard_size: int) -> dict[str, list[Piece]]:
    """The pieces of every shard, by names like train-00003-of-00129.arrow."""
    shards = {}
    for split, source in sources.items():
        starts = range(0, len(source), shard_size)
        for number, start in enumerate(starts):
            name = f"{SPLITS[split]}-{number:05d}-of-{len(starts):05d}.arrow"
            shards[name] = cut(split, range(start, min(start + shard_size, len(source))))
    return shards


def write_shard(path: Path, schema: pa.Schema, answers: Iterator[Encoded], skip: bool) -> dict[str, Any]:
    """Write an Arrow file, uncompressed to be memory-mapped, and what there is to know of it in a note.

    The file gets its name when both are safe on the disk. Returns the note.
    UserError: an image cannot be decoded, and `skip` does not allow to leave it out.
    """
    temporary = path.with_suffix(".tmp")
    entry: dict[str, Any] = {"rows": 0, "read": 0, "skipped": []}
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                while batch := list(islice(answers, BATCH_PIECES)):
                    entry["skipped"] += [failure for answer in batch for failure in answer.failures]
                    if entry["skipped"] and not skip:
                        image, why = entry["skipped"][0]
                        raise UserError(f"cannot decode {image}: {why}; remove it, or pass --skip_unreadable")
                    rows = pa.Table.from_batches([answer.rows for answer in batch]).combine_chunks()
                    writer.write_table(rows)
                    entry["rows"] += len(rows)
                    entry["read"] += sum(answer.bytes_read for answer in batch)
            os.fsync(file.fileno())
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entry |= {"sha256": digest, "bytes": temporary.stat().st_size}
        write_durably(note_of(path), json.dumps(entry).encode())
        temporary.rename(path)
        return entry
    finally:
        # A full disk is given back what this took.
        temporary.unlink(missing_ok=True)


def note_of(shard: Path) -> Path:
    return shard.parents[1] / NOTES / f"{shard.name}.json"


# --- the unfinished pyramid -----------------------------------------------------------------------


def occupy(partial_dir: Path) -> TextIO:
    """Make the unfinished pyramid's folder, and keep other processes out as long as the file returned is open.

    UserError: another process is there, or something else.
    """
    notes = partial_dir / NOTES
    if partial_dir.exists() and not notes.is_dir() and os.listdir(partial_dir):
        raise UserError(f"{partial_dir} is in the way and no unfinished pyramid; choose another --out")
    notes.mkdir(parents=True, exist_ok=True)
    (partial_dir / "data").mkdir(exist_ok=True)
    lock = (notes / "lock").open("w")
    try:
        # A POSIX lock is this process's own and ends with it; workers that outlive it do not hold it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is preparing {partial_dir} right now") from error
    return lock


def agree(partial_dir: Path, data_dir: str, settings: Settings, sources: dict[str, Source]) -> None:
    """Write down what is done here from which images; if that is written down already, compare.

    UserError: the settings are others, or images have come or gone.
    """
    plan, anew = partial_dir / NOTES / "plan.json", f"remove {partial_dir} to start anew"
    names = {split: source.fingerprint for split, source in sources.items()}
    if not plan.exists():
        write_durably(plan, json.dumps([asdict(settings), names]).encode())
    begun, names_then = json.loads(plan.read_text())
    for name, value in asdict(settings).items():
        if json.dumps(value) != json.dumps(begun[name]):
            raise UserError(f"{partial_dir} was begun with --{name} {begun[name]}; take that, or {anew}")
    if names != names_then:
        raise UserError(f"--data_dir {data_dir} has got or lost images since {partial_dir} was begun; {anew}")


def complete(partial_dir: Path, out: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Give the pyramid its name."""
    lines = (f"{entries[name]['sha256']}  data/{name}\n" for name in sorted(entries))
    (partial_dir / "sha256.txt").write_text("".join(lines))
    skipped = [f"{path}: {why}\n" for name in sorted(entries) for path, why in entries[name]["skipped"]]
    if skipped:
        (partial_dir / "skipped.txt").write_text("".join(skipped))
    partial_dir.rename(out)
    shutil.rmtree(out / NOTES)


# --- the whole ------------------------------------------------------------------------------------


def tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def prepare(
    data_dir: str, out: Path, settings: Settings, workers: int, skip_unreadable: bool = False
) -> None:
    """Write the pyramid of `data_dir` to `out`, or finish one that was begun.

    Args:
        data_dir: whatever the training scripts read; one split is enough.
        out: a folder that does not exist yet.
        workers: processes; 0 works in this one.
        skip_unreadable: leave out images that cannot be decoded, listed in `skipped.txt`.

    UserError: an image cannot be decoded, the disk is too small, another process is at work, ...
    """
    if (out / NOTES).is_dir():
        # Killed between its very last two steps.
        shutil.rmtree(out / NOTES)
        tell(f"{out} is whole")
        return
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another name")
    if Path(data_dir).is_dir() and out.resolve().is_relative_to(Path(data_dir).resolve()):
        raise UserError(f"--out {out} lies inside --data_dir {data_dir}; choose a place outside")
    sources = open_splits(data_dir)
    if any(source.prepared for source in sources.values()):
        raise UserError(f"--data_dir {data_dir} is a pyramid already")
    for name in set(SPLITS) - sources.keys():
        tell(
            f"there is no {name}, which training needs beside it: python -m common.tools.split makes both of one folder"
        )
    partial_dir = out.with_name(out.name + ".partial")
    try:
        with occupy(partial_dir):
            agree(partial_dir, data_dir, settings, sources)
            finished = (partial_dir / "data").glob("*.arrow")
            entries = {path.name: json.loads(note_of(path).read_text()) for path in finished}
            _write_missing(partial_dir, sources, settings, entries, workers, skip_unreadable)
            complete(partial_dir, out, entries)
    except OSError as error:
        why = f"{error.strerror or error}; the same command goes on from here"
        raise UserError(f"cannot write {error.filename or partial_dir}: {why}") from error
    images, written, read = (
        sum(entry[key] for entry in entries.values()) for key in ("rows", "bytes", "read")
    )
    tell(f"{out}: {images:,} images, {_size(written)}, {written / max(read, 1):.1%} of the originals")
    if skipped := sum(len(entry["skipped"]) for entry in entries.values()):
        tell(f"unreadable and left out: {skipped}; {out / 'skipped.txt'} lists them")


def open_splits(data_dir: str) -> dict[str, Source]:
    """Open train and val of a dataset, or the one that is there. MissingSplit: neither is."""
    sources: dict[str, Source] = {}
    for split in SPLITS:
        try:
            sources[split] = open_source(data_dir, split)
        except MissingSplit as error:
            missing = error
    if not sources:
        raise missing
    return sources


def _write_missing(
    partial_dir: Path,
    sources: dict[str, Source],
    settings: Settings,
    entries: dict[str, dict[str, Any]],
    workers: int,
    skip_unreadable: bool,
) -> None:
    """Write the shards that have no entry yet, and add their entries; say beforehand what disk space it takes."""
    shards = list_shards(sources, settings.shard_size)
    todo = {name: pieces for name, pieces in shards.items() if name not in entries}
    if not todo:
        return
    schemas = {split: schema_of(source, settings) for split, source in sources.items()}
    encode = partial(encode_piece, sources, schemas, settings)

    images = sum(len(source) for source in sources.values())
    sample = [
        piece
        for split, source in sources.items()
        for piece in cut(split, range(0, len(source), max(1, images // SAMPLE)))
    ]
    encoded = list(map_in_workers(encode, sample, workers))
    written = sum(answer.rows.nbytes for answer in encoded)
    share = written / max(1, sum(answer.bytes_read for answer in encoded))
    whole = written / max(1, sum(len(answer.rows) for answer in encoded)) * images
    pieces = [piece for pieces in todo.values() for piece in pieces]
    needed = whole * sum(len(indices) for _, indices in pieces) / images
    free = shutil.disk_usage(partial_dir).free
    tell(
        f"{images:,} images at short sides {', '.join(map(str, settings.levels))}: about {_size(whole)}, "
        f"{share:.0%} of the originals; {_size(needed)} still to be written, {_size(free)} free"
    )
    if needed > free:
        raise UserError(f"--out needs about {_size(needed)} and its disk has {_size(free)} free")

    with (
        closing(map_in_workers(encode, pieces, workers)) as answers,
        tqdm(answers, "prepare", total=len(pieces), unit="image", unit_scale=PIECE) as bar,
    ):
        shown = iter(bar)
        for name, own in todo.items():
            path, answers_of_shard = partial_dir / "data" / name, islice(shown, len(own))
            entries[name] = write_shard(path, schemas[own[0][0]], answers_of_shard, skip_unreadable)


def _size(count: float) -> str:
    return f"{count / 1e6:,.3g} MB" if count < 1e9 else f"{count / 1e9:,.3g} GB"


def main(args: list[str] | None = None) -> None:
    parser = new_parser("prepare", __doc__)
    add, defaults = parser.add_argument, Settings()
    where = "folder with train/<class>/ and val/<class>/, Parquet or Arrow files, or hub dataset org/name"
    add("--data_dir", help=where)
    add("--out", type=Path, help="folder to write; must not exist yet")
    sides = "short sides to store (default: 256 146 73)"
    add("--levels", type=int, nargs="+", default=defaults.levels, metavar="PIXELS", help=sides)
    add("--quality", type=int, default=defaults.quality, help="of the JPEGs, 1 to 100 (default: 90)")
    each = "processes (default: one per CPU that may be used)"
    add("--workers", type=int, default=available_workers(), help=each)
    add("--shard_size", type=int, default=defaults.shard_size, help="images per file (default: 10000)")
    leave = "leave out images that cannot be decoded, and list them"
    add("--skip_unreadable", action="store_true", help=leave)
    options = parser.parse_args(args)
    with one_sentence(parser):
        if not (options.data_dir and options.out):
            raise UserError("--data_dir and --out are both needed")
        check_least(options, workers=0, shard_size=1)
        levels = tuple(sorted(options.levels, reverse=True))
        if min(levels) < 8 or len(set(levels)) < len(levels):
            raise UserError(f"--levels must be different short sides of 8 pixels or more, not {levels}")
        if not 1 <= options.quality <= 100:
            raise UserError(f"--quality must be from 1 to 100, not {options.quality}")
        settings = Settings(levels, options.quality, options.shard_size)
        try:
            prepare(options.data_dir, options.out, settings, options.workers, options.skip_unreadable)
        except KeyboardInterrupt:
            parser.exit(130, "\nstopped; the same command goes on after the last finished shard\n")


if __name__ == "__main__":
    main()
