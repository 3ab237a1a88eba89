"""Write a resolution pyramid: every image once at a few small sizes, of which each stage reads its own.

    python -m common.tools.prepare --data_dir imagenet --out imagenet-pyramid

To show a photograph at any size, all of its bytes must go through Huffman decoding. So smaller sizes are
stored: short sides of 256, 146 and 73 pixels serve training at 224, 128 and 64 with the margin crops need.
The result is a dataset of Arrow files that `--data_dir` takes and `datasets.load_dataset(folder)` opens:

    image_256, image_146, image_73   JPEG, upright, RGB or grey, chroma 4:2:0; null where the image is smaller
    label                            class number, with the names
    height, width                    of the original, upright

Work gathers in `<out>.partial`, which gets its name when it is whole. A run that was killed goes on after its
last finished shard when the same command is given again; the result is the same to the byte.
"""

import argparse
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torchvision.io
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import UserError
from common.data.decode import DecodeError, read_header
from common.data.loader import available_workers, end_with
from common.data.sources.folder import FolderSource, MissingSplit, Source, open_source

FORMAT = 1
SPLITS = {"train": "train", "val": "validation"}  # our names, and those of `datasets`
PIECE = 64  # images a worker encodes at a time
BATCH_ROWS = 1024  # rows of a record batch: its bytes stay far below the 2 GiB that 32-bit offsets reach
SAMPLE = 256  # images encoded to estimate the disk space
NOTES = ".prepare"  # bookkeeping inside the unfinished folder


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a pyramid, besides its source."""

    levels: tuple[int, ...] = (256, 146, 73)  # short sides in pixels, largest first
    quality: int = 90  # of the JPEGs
    shard_size: int = 10_000  # images per file: about 500 MB

    def validate(self) -> None:
        if min(self.levels) < 8 or len(set(self.levels)) < len(self.levels):
            raise UserError(f"--levels must be different short sides of 8 pixels or more, not {self.levels}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality must be from 1 to 100, not {self.quality}")
        if self.shard_size < 1:
            raise UserError(f"--shard_size must be at least 1 image, not {self.shard_size}")


# --- one image ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An image in all its sizes."""

    copies: list[bytes | None]  # one per level
    label: int
    height: int  # of the original, upright
    width: int


def encode_levels(encoded: np.ndarray, settings: Settings) -> tuple[list[bytes | None], int, int]:
    """Encode an image at every level below its own size; never enlarge it.

    An image that is no larger than some levels is stored in the smallest of them only, at its own size; as
    its own bytes, if they are an upright JPEG no larger than ours.

    Args:
        encoded: uint8 [n], any image file.

    Returns:
        One JPEG or None per level, and the original's height and width.

    Raises:
        DecodeError: cannot be decoded.
    """
    header = read_header(encoded)
    try:
        image = _upright(encoded, header.fast)
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise DecodeError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    width, height = image.size
    short = min(width, height)
    own = max((place for place, level in enumerate(settings.levels) if level >= short), default=-1)
    copies: list[bytes | None] = [None] * len(settings.levels)
    for place, level in enumerate(settings.levels):
        if place == own:
            copies[place] = _jpeg(image, settings.quality)
            if header.fast and len(encoded) <= len(copies[place]) and _is_upright(encoded):
                copies[place] = encoded.tobytes()
        elif place > own:
            # From the level above, and from large originals by way of a box filter: faster at equal PSNR.
            size = [max(1, round(side * level / short)) for side in (width, height)]
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
            copies[place] = _jpeg(image, settings.quality)
    return copies, height, width


def _upright(encoded: np.ndarray, fast: bool) -> Image.Image:
    """Decode to RGB, or to grey where the original is; apply the EXIF orientation."""
    if fast:
        mode = torchvision.io.ImageReadMode.UNCHANGED
        pixels = torchvision.io.decode_jpeg(torch.from_numpy(encoded), mode, apply_exif_orientation=True)
        return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())
    with Image.open(io.BytesIO(encoded)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("1", "L", "LA", "F"):
            return image.convert("L")
        if image.mode in ("P", "PA"):  # the colour that is marked transparent keeps its own value
            image = image.convert("RGBA")
        return image.convert("RGB")


def _jpeg(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    return out.getvalue()


def _is_upright(encoded: np.ndarray) -> bool:
    with Image.open(io.BytesIO(encoded)) as opened:
        return opened.getexif().get(0x0112, 1) == 1


# --- many images, in worker processes -------------------------------------------------------------


class Piece(NamedTuple):
    """A run of images, one worker's portion."""

    split: str
    begin: int
    end: int
    step: int = 1


class Encoded(NamedTuple):
    """A worker's answer."""

    rows: list[Row]
    failures: list[tuple[str, str]]  # image, why
    bytes_read: int


class _Encoder(Dataset):
    def __init__(self, sources: dict[str, Source], settings: Settings):
        self.sources, self.settings = sources, settings

    def __getitem__(self, piece: Piece) -> Encoded:
        source = self.sources[piece.split]
        rows, failures, bytes_read = [], [], 0
        for index in range(piece.begin, piece.end, piece.step):
            try:
                encoded = source.read(index, max(self.settings.levels))
                copies, height, width = encode_levels(encoded, self.settings)
            except (DecodeError, OSError) as error:
                why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                failures.append((source.describe(index), why))
            else:
                rows.append(Row(copies, int(source.labels[index]), height, width))
                bytes_read += len(encoded)
        return Encoded(rows, failures, bytes_read)


def _encode(encoder: _Encoder, pieces: list[Piece], workers: int) -> Iterator[Encoded]:
    """Encode pieces in worker processes; the answers come in order."""
    loader = DataLoader(
        encoder,
        batch_size=None,
        sampler=pieces,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        collate_fn=as_it_is,
        worker_init_fn=partial(start_worker, os.getpid()),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise UserError("a worker process was killed, maybe for want of memory; lower --workers") from error


def as_it_is(answer):
    return answer  # the default would turn arrays into tensors


def start_worker(parent: int, worker: int) -> None:
    torch.set_num_threads(1)
    end_with(parent)


# --- shards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    name: str  # train-00003-of-00129.arrow
    split: str
    begin: int
    end: int

    def pieces(self) -> list[Piece]:
        starts = range(self.begin, self.end, PIECE)
        return [Piece(self.split, start, min(start + PIECE, self.end)) for start in starts]


def list_shards(sources: dict[str, Source], shard_size: int) -> list[Shard]:
    shards = []
    for split, source in sources.items():
        total = -(-len(source) // shard_size)
        for number in range(total):
            name = f"{SPLITS[split]}-{number:05d}-of-{total:05d}.arrow"
            end = min((number + 1) * shard_size, len(source))
            shards.append(Shard(name, split, number * shard_size, end))
    return shards


def _schema(source: Source, settings: Settings) -> pa.Schema:
    from datasets import ClassLabel, Features, Image, Value

    columns: dict[str, Any] = {f"image_{level}": Image() for level in settings.levels}
    columns["label"] = ClassLabel(names=source.classes)
    columns |= {side: Value("int32") for side in ("height", "width")}
    schema = Features(columns).arrow_schema
    about = {"format": FORMAT, "source": source.fingerprint, **asdict(settings)}
    return schema.with_metadata({**schema.metadata, b"pyramid": json.dumps(about).encode()})


def _record_batch(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    columns: list[pa.Array] = []
    for copies in zip(*(row.copies for row in rows), strict=True):
        absent = pa.array([copy is None for copy in copies])
        parts = [pa.array(copies, pa.binary()), pa.nulls(len(copies), pa.string())]
        columns.append(pa.StructArray.from_arrays(parts, ["bytes", "path"], mask=absent))
    for name in ("label", "height", "width"):
        columns.append(pa.array([getattr(row, name) for row in rows], schema.field(name).type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _write_shard(path: Path, schema: pa.Schema, rows: Iterable[Row]) -> None:
    """Write an Arrow file, uncompressed to be memory-mapped; it gets its name when it is safe on the disk."""
    temporary = path.with_suffix(".tmp")
    rows = iter(rows)
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                while batch := list(islice(rows, BATCH_ROWS)):
                    writer.write_batch(_record_batch(batch, schema))
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk is given back what this took


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the unfinished pyramid, and what is known about it -------------------------------------------


class Workplace:
    """`<out>.partial`: the shards so far, and in `.prepare` the notes by which a later run goes on."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self.notes, self.data = self.folder / NOTES, self.folder / "data"

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Make the folder, and keep other processes out of it.

        Raises:
            UserError: one is there, or something else is.
        """
        if self.folder.exists() and not self.notes.is_dir() and os.listdir(self.folder):
            raise UserError(f"{self.folder} is in the way and no unfinished pyramid; choose another --out")
        self.notes.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(exist_ok=True)
        with open(self.notes / "lock", "w") as lock:
            try:
                # A POSIX lock is this process's own and ends with it; workers that outlive it do not hold it.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise UserError(f"another process is preparing {self.out} right now") from error
            yield

    def agree(self, data_dir: str, settings: Settings, sources: dict[str, Source]) -> None:
        """Write down what is done here from which images; if that is written down already, compare.

        Raises:
            UserError: settings or source differ; the sentence names the first file that has changed.
        """
        chosen = {**asdict(settings), "levels": list(settings.levels)}
        images = {split: [len(source), source.fingerprint] for split, source in sources.items()}
        if not (self.notes / "plan.json").exists():
            for split, source in sources.items():
                np.save(self.notes / f"{split}.npy", _stamps(source))
            temporary = self.notes / "plan.tmp"
            temporary.write_text(json.dumps({"settings": chosen, "images": images}))
            temporary.rename(self.notes / "plan.json")
            return
        begun = json.loads((self.notes / "plan.json").read_text())
        anew = f"remove {self.folder} to start anew"
        for name, value in begun["settings"].items():
            if value != chosen[name]:
                raise UserError(f"{self.folder} was begun with --{name} {value}; take that, or {anew}")
        if images != begun["images"]:
            then, now = (sum(count for count, _ in known.values()) for known in (begun["images"], images))
            raise UserError(
                f"--data_dir {data_dir} has changed since {self.folder} was begun "
                f"({then} images then, {now} now); {anew}"
            )
        for split, source in sources.items():
            changed = np.flatnonzero(np.load(self.notes / f"{split}.npy") != _stamps(source))
            if len(changed):
                path = source.describe(int(changed[0])) + (
                    f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                )
                raise UserError(f"{path} changed since {self.folder} was begun; {anew}")

    def finished(self) -> dict[str, dict[str, Any]]:
        """What is noted about the shards that are whole; those that are not what they were are named."""
        entries: dict[str, dict[str, Any]] = {}
        journal = self.notes / "shards.jsonl"
        for line in journal.read_bytes().splitlines() if journal.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line, if the process was killed while writing it
                continue
            entries[entry["shard"]] = entry
        for name in tqdm(list(entries), desc="verifying finished shards", unit="shard", delay=1, leave=False):
            path = self.data / name
            if not path.exists() or _checksum(path) != entries[name]["sha256"]:
                tell(f"{path} is damaged or gone; it is made again")
                del entries[name]
        return entries

    def note(self, entry: dict[str, Any]) -> None:
        with open(self.notes / "shards.jsonl", "ab") as file:
            # The newline comes first, to part this line from a half one that a kill may have left.
            file.write(b"\n" + json.dumps(entry).encode())
            file.flush()
            os.fsync(file.fileno())

    def complete(self, entries: dict[str, dict[str, Any]]) -> None:
        """Give the pyramid its name."""
        lines = (f"{entries[name]['sha256']}  data/{name}\n" for name in sorted(entries))
        (self.folder / "sha256.txt").write_text("".join(lines))
        skipped = [f"{path}: {why}\n" for name in sorted(entries) for path, why in entries[name]["skipped"]]
        if skipped:
            (self.folder / "skipped.txt").write_text("".join(skipped))
        for path in self.data.iterdir():
            if path.name not in entries:
                path.unlink()  # the temporary file of a run that was killed
        self.folder.rename(self.out)
        shutil.rmtree(self.out / NOTES)


def _stamps(source: Source) -> np.ndarray:
    """Size and modification time of each image's file as one number, uint64 [N]; [0] if they are no files."""
    if not isinstance(source, FolderSource):
        return np.zeros(0, np.uint64)  # the fingerprint of Arrow and Parquet files says it already
    stamps = np.zeros(len(source), np.uint64)

    def stamp(begin: int) -> None:
        for index in range(begin, min(begin + 1024, len(source))):
            try:
                status = os.stat(source.describe(index))
            except FileNotFoundError:
                continue
            stamps[index] = (status.st_mtime_ns * 0x9E3779B1 + status.st_size) % (1 << 64)

    with ThreadPoolExecutor(16) as pool:  # on a network disk the time goes into waiting
        list(pool.map(stamp, range(0, len(source), 1024)))
    return stamps


# --- the whole ------------------------------------------------------------------------------------


def tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def prepare(
    data_dir: str, out: Path, settings: Settings, workers: int | None = None, skip_unreadable: bool = False
) -> None:
    """Write the pyramid of `data_dir` to `out`, or finish one that was begun.

    Args:
        data_dir: whatever the training scripts read; one split is enough.
        out: a folder that does not exist yet.
        workers: processes; None takes one per CPU that may be used.
        skip_unreadable: leave out images that cannot be decoded, listed in `skipped.txt`.

    Raises:
        UserError: an image cannot be decoded, the disk is too small, the source changed meanwhile, ...
    """
    settings.validate()
    if (out / NOTES).is_dir():  # killed between its very last two steps
        shutil.rmtree(out / NOTES)
        tell(f"{out} is whole")
        return
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another name")
    if Path(data_dir).is_dir() and out.resolve().is_relative_to(Path(data_dir).resolve()):
        raise UserError(f"--out {out} lies inside --data_dir {data_dir}; choose a place outside")
    workers = available_workers() if workers is None else workers
    sources = _open_splits(data_dir)
    place = Workplace(out)
    try:
        with place.occupied():
            place.agree(data_dir, settings, sources)
            entries = place.finished()
            _write_missing(place, _Encoder(sources, settings), entries, workers, skip_unreadable)
            if Path(data_dir).is_dir():  # a hub dataset lies in a cache and does not change
                place.agree(data_dir, settings, _open_splits(data_dir))
            place.complete(entries)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "no space is left on the disk"
            then = "make room and give the same command again, finished shards are kept"
        else:
            why, then = error.strerror or str(error), "the same command goes on from here"
        raise UserError(f"cannot write {error.filename or place.folder}: {why}; {then}") from error
    images, written, read = (
        sum(entry[key] for entry in entries.values()) for key in ("rows", "bytes", "read")
    )
    tell(f"{out}: {images:,} images, {_size(written)}, {written / max(read, 1):.1%} of the originals")
    if skipped := sum(len(entry["skipped"]) for entry in entries.values()):
        tell(f"{skipped} unreadable images are left out; {out / 'skipped.txt'} lists them")


def _write_missing(
    place: Workplace,
    encoder: _Encoder,
    entries: dict[str, dict[str, Any]],
    workers: int,
    skip_unreadable: bool,
) -> None:
    """Write the shards that have no entry yet, and their entries."""
    sources, settings = encoder.sources, encoder.settings
    todo = [shard for shard in list_shards(sources, settings.shard_size) if shard.name not in entries]
    if not todo:
        return
    images = sum(len(source) for source in sources.values())
    left = sum(shard.end - shard.begin for shard in todo)
    _announce(encoder, place.out, images, left, workers)
    schemas = {split: _schema(source, settings) for split, source in sources.items()}
    pieces = [piece for shard in todo for piece in shard.pieces()]
    with (
        closing(_encode(encoder, pieces, workers)) as answers,
        tqdm(total=images, initial=images - left, desc="prepare", unit="image", smoothing=0.05) as bar,
    ):
        for shard in todo:
            entry: dict[str, Any] = {"shard": shard.name, "rows": 0, "read": 0, "skipped": []}
            rows = _rows(islice(answers, len(shard.pieces())), entry, skip_unreadable, bar)
            path = place.data / shard.name
            _write_shard(path, schemas[shard.split], rows)
            entry |= {"sha256": _checksum(path), "bytes": path.stat().st_size}
            place.note(entry)
            entries[shard.name] = entry


def _rows(
    answers: Iterable[Encoded], entry: dict[str, Any], skip_unreadable: bool, bar: tqdm
) -> Iterator[Row]:
    """The rows of one shard; what else the workers say is noted in its entry."""
    for answer in answers:
        for path, why in answer.failures:
            if not skip_unreadable:
                raise UserError(f"cannot decode {path}: {why}; remove it, or pass --skip_unreadable")
            entry["skipped"].append([path, why])
            bar.write(f"left out: {path}: {why}", sys.stderr)
        entry["rows"] += len(answer.rows)
        entry["read"] += answer.bytes_read
        bar.update(len(answer.rows) + len(answer.failures))
        yield from answer.rows


def _open_splits(data_dir: str) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for split in SPLITS:
        try:
            sources[split] = open_source(data_dir, split)
        except MissingSplit as error:
            missing = error
    if not sources:
        raise missing
    if any(source.prepared for source in sources.values()):
        raise UserError(f"--data_dir {data_dir} is a pyramid already")
    return sources


def _announce(encoder: _Encoder, out: Path, images: int, left: int, workers: int) -> None:
    """Say how much disk space it takes, by a sample.

    Raises:
        UserError: there is not as much.
    """
    step = max(1, images // SAMPLE)
    pieces = [
        Piece(split, begin, min(begin + 16 * step, len(source)), step)
        for split, source in encoder.sources.items()
        for begin in range(0, len(source), 16 * step)
    ]
    answers = list(_encode(encoder, pieces, workers))
    rows = [row for answer in answers for row in answer.rows]
    written = sum(len(copy) for row in rows for copy in row.copies if copy) + 64 * len(rows)
    share = written / max(1, sum(answer.bytes_read for answer in answers))
    whole = written / max(1, len(rows)) * images
    needed, free = whole * left / images, shutil.disk_usage(out.parent).free
    kept = f", {_size(needed)} of it still to be written" if left < images else ""
    levels = ", ".join(map(str, encoder.settings.levels))
    tell(
        f"{images:,} images at short sides {levels}: about {_size(whole)}, {share:.0%} of the "
        f"originals{kept}; {_size(free)} free; {workers} workers"
    )
    if needed > free:
        raise UserError(f"--out {out} needs about {_size(needed)} and its disk has {_size(free)} free")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def check(folder: Path) -> int:
    """Compare each shard of a finished pyramid with its checksum; return how many there are.

    Raises:
        UserError: names the damaged ones.
    """
    try:
        lines = (folder / "sha256.txt").read_text().splitlines()
    except OSError as error:
        raise UserError(f"--check {folder}: no pyramid there ({error.filename}: {error.strerror})") from error
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    damaged = [
        name
        for name, digest in tqdm(sums.items(), desc="verifying", unit="shard", delay=1)
        if not (folder / name).exists() or _checksum(folder / name) != digest
    ]
    if damaged:
        raise UserError(
            f"damaged or gone in {folder}: {', '.join(damaged)}; remove the folder and prepare it again"
        )
    return len(sums)


def main(args: list[str] | None = None) -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data_dir",
        help="folder with train/<class>/ and val/<class>/, Parquet or Arrow files, or hub dataset org/name",
    )
    add("--out", type=Path, help="folder to write; must not exist yet")
    add(
        "--levels",
        type=int,
        nargs="+",
        default=defaults.levels,
        metavar="PIXELS",
        help="short sides to store (default: 256 146 73)",
    )
    add("--quality", type=int, default=defaults.quality, help="of the JPEGs, 1 to 100 (default: 90)")
    add("--workers", type=int, help="processes (default: one per CPU that may be used)")
    add(
        "--shard_size",
        type=int,
        default=defaults.shard_size,
        metavar="IMAGES",
        help="per file (default: 10000)",
    )
    add(
        "--skip_unreadable",
        action="store_true",
        help="leave out images that cannot be decoded, and list them",
    )
    add(
        "--check",
        type=Path,
        metavar="DIR",
        help="verify the checksums of a finished pyramid, and nothing else",
    )
    options = parser.parse_args(args)
    try:
        if options.check:
            print(f"{options.check}: all {check(options.check)} shards are as they were written")
            return
        if not (options.data_dir and options.out):
            raise UserError("--data_dir and --out are both needed")
        if options.workers is not None and options.workers < 0:
            raise UserError(f"--workers must not be negative, not {options.workers}")
        levels = tuple(sorted(options.levels, reverse=True))
        settings = Settings(levels, options.quality, options.shard_size)
        prepare(options.data_dir, options.out, settings, options.workers, options.skip_unreadable)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on after the last finished shard\n")


if __name__ == "__main__":
    main()
