"""Labels, sizes and encoded bytes of a dataset, by index: a folder, a Hugging Face dataset, a pyramid.

No source keeps Python objects per image: file names, offsets and labels are a few long arrays, memory-mapped
where they are large, so that 1.28 million images start at once and all processes share the pages.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from common import UserError
from common.data.decode import DecodeError, read_header
from common.data.sources.cache import cache_folder, fingerprint_of, keep_arrow, map_arrow
from common.data.sources.remote import download

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VAL_NAMES = ("val", "validation", "valid", "test")  # the first that is there
HEAD_BYTES = 16 << 10  # enough for most headers; the whole file is read where it is not


class MissingSplit(UserError):
    """The dataset is there, but not the split that was asked for."""


class Source(Protocol):
    """A labelled set of encoded images."""

    classes: list[str]
    labels: np.ndarray  # int64 [N]
    fingerprint: str  # changes when the data change
    prepared: bool  # the bytes are upright JPEGs by `prepare`, maybe smaller than the originals in sizes()
    group_rows: np.ndarray | None  # int64 [G], rows that are fetched together; None for random access

    def __len__(self) -> int: ...

    def read(self, index: int, short_side: int) -> np.ndarray:
        """Return an image's bytes, uint8 [n], from the level of a pyramid that serves `short_side` pixels.

        Raises:
            OSError: the storage fails.
        """

    def describe(self, index: int) -> str:
        """Say where an image lies, for messages."""

    def sizes(self) -> np.ndarray:
        """Return the originals' heights and widths as seen, int32 [N, 2]; 1, 1 if unreadable."""


# --- a folder of class folders ------------------------------------------------------------------------------


class FolderSource:
    """One split of an ImageFolder tree: `<folder>/<class>/**/*.jpg`.

    The list of files is a manifest in the user's cache folder. It is valid as long as no directory has
    changed, so that the second start costs one `stat` per directory.
    """

    prepared = False
    group_rows = None

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._root = os.fsencode(self.folder) + b"/"
        cached = _manifest_path(self._root)
        manifest = _read_manifest(map_arrow(cached), self._root)
        if manifest is None:
            log.info("listing the images of %s", self.folder)
            table = _scan(self._root)
            keep_arrow(cached, table)
            manifest = _read_manifest(table, self._root)
            if manifest is None:
                raise UserError(f"{self.folder} changes while it is being listed")
        self._manifest = manifest
        self.classes, self.labels, self.fingerprint = manifest.classes, manifest.labels, manifest.fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def _path(self, index: int) -> bytes:
        _, _, _, offsets, paths, _ = self._manifest
        return self._root + paths[offsets[index] : offsets[index + 1]].tobytes()

    def read(self, index: int, short_side: int) -> np.ndarray:
        with open(self._path(index), "rb", buffering=0) as file:
            return np.frombuffer(file.read(), np.uint8)

    def _read_head(self, index: int) -> np.ndarray:
        with open(self._path(index), "rb", buffering=0) as file:
            return np.frombuffer(file.read(HEAD_BYTES), np.uint8)

    def describe(self, index: int) -> str:
        return os.fsdecode(self._path(index))

    def sizes(self) -> np.ndarray:
        return _cached_sizes(self, self._manifest.place, self._read_head)


class _Manifest(NamedTuple):
    classes: list[str]
    fingerprint: str  # of names and classes: the same for a copy elsewhere
    place: str  # of this folder at this time: copies may hold other pixels under the same names
    offsets: np.ndarray  # int64 [N + 1]
    paths: np.ndarray  # uint8, all names one after the other
    labels: np.ndarray  # int64 [N]


def _manifest_path(root: bytes) -> Path:
    return cache_folder() / "manifests" / f"{hashlib.sha256(root).hexdigest()[:16]}.arrow"


def _scan(root: bytes) -> pa.Table:
    """List a tree: a row per image, by class and name; directories and their times in the metadata.

    Raises:
        UserError: no class folders, or an empty one.
    """
    directories = [("", os.stat(root).st_mtime_ns)]
    classes: list[str] = []
    lengths: list[np.ndarray] = []
    blobs: list[bytes] = []
    counts: list[int] = []

    def images_below(prefix: bytes) -> Iterator[bytes]:
        directory = root + prefix
        directories.append((os.fsdecode(prefix), os.stat(directory).st_mtime_ns))
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    yield from images_below(prefix + entry.name + b"/")
                elif entry.name.lower().endswith(_EXTENSIONS) and not entry.name.startswith(b"."):
                    yield prefix + entry.name

    for name in sorted(os.fsdecode(entry.name) for entry in os.scandir(root) if entry.is_dir()):
        paths = list(images_below(os.fsencode(name) + b"/"))
        if not paths:
            raise UserError(f"{os.fsdecode(root)}{name} holds no images; remove the folder or fill it")
        classes.append(name)
        counts.append(len(paths))
        lengths.append(np.fromiter(map(len, paths), np.int64, len(paths)))
        blobs.append(b"".join(paths))
    if not classes:
        raise UserError(f"{os.fsdecode(root)} holds no class folders; expected <class>/<image>.jpg below it")

    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    blob = b"".join(blobs)
    paths = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(blob)]
    )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    metadata = {
        "classes": json.dumps(classes),
        "directories": json.dumps(directories),
        "fingerprint": fingerprint_of(classes, offsets, np.frombuffer(blob, np.uint8), labels),
    }
    return pa.table({"path": paths, "label": labels}).replace_schema_metadata(metadata)


_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)


def _read_manifest(table: pa.Table | None, root: bytes) -> _Manifest | None:
    """Unpack a manifest; None where there is none, it is damaged, or a directory has changed since."""
    if table is None or table.schema.names != ["path", "label"]:
        return None
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    try:
        for name, modified in json.loads(metadata["directories"]):
            if os.stat(root + os.fsencode(name)).st_mtime_ns != modified:
                return None
        classes, fingerprint = json.loads(metadata["classes"]), metadata["fingerprint"]
    except (OSError, KeyError, ValueError):
        return None
    _, offsets, paths = table.column("path").chunk(0).buffers()
    labels = table.column("label").chunk(0).to_numpy()
    offsets = np.frombuffer(offsets, np.int64)[: len(labels) + 1]
    paths = np.frombuffer(paths, np.uint8)[: offsets[-1]]
    if fingerprint_of(classes, offsets, paths, labels) != fingerprint:
        return None
    place = fingerprint_of(root, metadata["directories"], fingerprint)
    return _Manifest(classes, fingerprint, place, offsets, paths, labels)


# --- Arrow: Hugging Face datasets and pyramids --------------------------------------------------------------


class Columns(NamedTuple):
    """Which columns of a table hold what."""

    levels: dict[int, str]  # image columns by short side, smallest first; {0: column} of a plain dataset
    label: str
    classes: list[str]  # empty if the labels are bare numbers
    prepared: bool

    @property
    def small(self) -> list[str]:
        """All but the images."""
        return [self.label, "height", "width"] if self.prepared else [self.label]


def find_columns(schema: pa.Schema, name: str) -> Columns:
    """Find the image and label columns by the features that `datasets` keeps in a schema.

    Raises:
        UserError: there are none, or several image columns that are no pyramid.
    """
    from datasets import ClassLabel, Features, Image

    features = Features.from_arrow_schema(schema)
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    levels = {int(column[6:]): column for column in images if re.fullmatch(r"image_\d+", column)}
    if not levels and len(images) != 1:
        raise UserError(f"--data_dir: {name} has {len(images)} image columns, not one: {list(features)}")
    named = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    # Of several (coarse and fine), the finest.
    label = max(named, key=lambda column: len(named[column])) if named else "label"
    if label not in features:
        raise UserError(f"--data_dir: {name} has no class label column: {list(features)}")
    return Columns(dict(sorted(levels.items())) or {0: images[0]}, label, named.get(label, []), bool(levels))


def read_labels(table: pa.Table, columns: Columns, name: str) -> np.ndarray:
    """Return a table's labels, int64 [N].

    Raises:
        UserError: some row has none.
    """
    labels = table.column(columns.label)
    if labels.null_count or not pa.types.is_integer(labels.type):
        raise UserError(f"--data_dir: column {columns.label} of {name} is not a class number in every row")
    numbers = labels.to_numpy().astype(np.int64)
    if numbers.min(initial=0) < 0:
        raise UserError(f"--data_dir: {name} has rows without a label (-1)")
    return numbers


class Places(NamedTuple):
    """Where the bytes of each row of an image column lie."""

    chunks: list[np.ndarray]  # uint8 each
    chunk: np.ndarray  # int32 [N]
    start: np.ndarray  # int64 [N], in the chunk
    length: np.ndarray  # int32 [N]; 0 where the row is null

    def read(self, row: int) -> np.ndarray:
        begin = self.start[row]
        return self.chunks[self.chunk[row]][begin : begin + self.length[row]]


def find_places(column: pa.ChunkedArray) -> Places:
    """Look up where a column of bytes, or of structs with a field `bytes`, has them; nothing is copied."""
    chunks: list[np.ndarray] = []
    numbers, starts, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for chunk in column.chunks:
        if pa.types.is_struct(chunk.type):
            chunk = chunk.flatten()[chunk.type.get_field_index("bytes")]
        offset_type = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        _, offsets, content = chunk.buffers()
        offsets = np.frombuffer(offsets, offset_type)[chunk.offset : chunk.offset + len(chunk) + 1]
        length = np.diff(offsets)
        if chunk.null_count:
            length[chunk.is_null().to_numpy(zero_copy_only=False)] = 0
        numbers.append(np.full(len(chunk), len(chunks), np.int32))
        starts.append(offsets[:-1].astype(np.int64))
        lengths.append(length.astype(np.int32))
        chunks.append(np.frombuffer(content or b"", np.uint8))
    return Places(chunks, *map(np.concatenate, (numbers, starts, lengths)))


def choose_level(levels: list[int], short_side: int) -> int:
    """The smallest level with a margin as Resize(256) leaves for CenterCrop(224); else the largest."""
    return next((level for level in levels if level >= short_side * 8 // 7), levels[-1])


class ArrowSource:
    """One split of an Arrow table, memory-mapped: a Hugging Face dataset, or a pyramid of smaller copies.

    Where the bytes of a row lie is three numbers (chunk, start, length): reading makes no Arrow object.
    """

    group_rows = None

    def __init__(self, tables: dict[str, pa.Table], fingerprint: str):
        """Look up where everything is.

        Args:
            tables: by the name they have in messages; with the features of `datasets` in their metadata.
            fingerprint: changes when the data change.
        """
        self.fingerprint = fingerprint
        self._names = list(tables)
        self._first_rows = np.cumsum([0] + [len(table) for table in tables.values()])
        table = pa.concat_tables(tables.values())
        columns = find_columns(table.schema, self._names[0])
        self.labels = read_labels(table, columns, self._names[0])
        self.classes = columns.classes or [str(number) for number in range(self.labels.max(initial=-1) + 1)]
        self.prepared = columns.prepared
        self._places = {level: find_places(table.column(name)) for level, name in columns.levels.items()}
        self._levels = list(columns.levels)
        self._fill_missing()
        self._sizes: np.ndarray | None = None
        if self.prepared:
            self._sizes = np.stack([table.column(side).to_numpy() for side in ("height", "width")], 1)

    def _fill_missing(self) -> None:
        """Let a level point at the next smaller one for small images, which are stored once."""
        for below, above in pairwise(self._levels):
            smaller, larger = self._places[below], self._places[above]
            missing = larger.length == 0
            larger.chunk[missing] = smaller.chunk[missing] + len(larger.chunks)
            larger.start[missing], larger.length[missing] = smaller.start[missing], smaller.length[missing]
            larger.chunks.extend(smaller.chunks)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, short_side: int) -> np.ndarray:
        return self._places[choose_level(self._levels, short_side)].read(index)

    def describe(self, index: int) -> str:
        place = int(np.searchsorted(self._first_rows, index, "right")) - 1
        return f"row {index - self._first_rows[place]} of {self._names[place]}"

    def sizes(self) -> np.ndarray:
        if self._sizes is None:
            self._sizes = _cached_sizes(self, self.fingerprint, lambda i: self.read(i, 0)[:HEAD_BYTES])
        return self._sizes


# --- sizes from headers -------------------------------------------------------------------------------------


def _cached_sizes(source: Source, key: str, read_head: Callable[[int], np.ndarray]) -> np.ndarray:
    """Scan the headers once; the result lives beside the manifests, under a key that changes with the data."""
    cached = cache_folder() / "sizes" / f"{key}.arrow"
    table = map_arrow(cached)
    if table is None or table.schema.names != ["height", "width"] or len(table) != len(source):
        table = _scan_sizes(source, read_head)
        keep_arrow(cached, table)
    return np.stack([table.column(side).to_numpy() for side in ("height", "width")], 1)


def _scan_sizes(source: Source, read_head: Callable[[int], np.ndarray]) -> pa.Table:
    from tqdm import tqdm

    sizes = np.ones((len(source), 2), np.int32)

    def scan(begin: int) -> int:
        end = min(begin + 1024, len(source))
        for index in range(begin, end):
            try:
                try:
                    header = read_header(read_head(index))
                except DecodeError:  # a long EXIF block or colour profile comes first
                    header = read_header(source.read(index, 0))
            except (DecodeError, OSError) as error:
                log.warning("no size in the header of %s: %s", source.describe(index), error)
            else:
                sizes[index] = header[:2]
        return end - begin

    # Threads, because on a network disk the time goes into waiting; one core reads 20,000 headers a second.
    bar = tqdm(total=len(source), desc="image headers", delay=2, leave=False)
    with bar, ThreadPoolExecutor(16) as pool:
        for done in pool.map(scan, range(0, len(source), 1024)):
            bar.update(done)
    return pa.table({"height": sizes[:, 0].copy(), "width": sizes[:, 1].copy()})


# --- which source a name means ------------------------------------------------------------------------------


def open_source(data_dir: str, split: str) -> Source:
    """Open one split of what `--data_dir` names.

    Args:
        data_dir: an ImageFolder tree, a folder of Arrow or Parquet files, a hub dataset `org/name`, or
            s3://bucket/prefix with Arrow or Parquet files, which are downloaded.
        split: "train" or "val", which stands for the first of val, validation, valid and test that is there.

    Raises:
        MissingSplit: there are other splits, or maybe another layout.
        UserError: there is nothing, or not what is needed.
    """
    if data_dir.startswith("s3://"):
        data_dir = str(download(data_dir))
    elif data_dir.startswith("hf://"):
        data_dir = data_dir.removeprefix("hf://").removeprefix("datasets/")
    folder = Path(data_dir).expanduser()
    names = ("train",) if split == "train" else VAL_NAMES
    if not data_dir:
        raise UserError("--data_dir is empty; it names a folder with train/ and val/, or a dataset org/name")
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", data_dir):
            raise UserError(f"--data_dir {data_dir} is not a folder")
        return _open_datasets(data_dir, names)
    if shards := sorted(folder.glob("data/*.arrow")):
        return _open_shards(data_dir, shards, names)
    if any(next((folder / below).glob("*.parquet"), None) for below in ("", "data", *names)):
        return _open_datasets(data_dir, names)
    for name in names:
        if (folder / name).is_dir():
            return FolderSource(folder / name)
    raise MissingSplit(
        f"--data_dir {data_dir} has no {' or '.join(names)} folder, no data/*.arrow and no Parquet files; "
        "`python -m common.tools.split` makes train/ and val/ of one folder of class folders"
    )


def _open_shards(data_dir: str, shards: list[Path], names: tuple[str, ...]) -> ArrowSource:
    """Map the Arrow shards that `prepare` wrote."""
    for name in names:
        chosen = [shard for shard in shards if shard.name.startswith(f"{name}-")]
        if chosen:
            break
    else:
        raise MissingSplit(f"--data_dir {data_dir} has no data/{names[0]}-*.arrow")
    tables = {}
    for shard in chosen:
        try:
            tables[str(shard)] = pa.ipc.open_file(pa.memory_map(str(shard))).read_all()
        except pa.ArrowInvalid as error:
            raise UserError(f"{shard} is damaged ({error}); remove it and run prepare again") from error
    known = [(shard.name, shard.stat().st_size, len(tables[str(shard)])) for shard in chosen]
    return ArrowSource(tables, fingerprint_of(known))


def _open_datasets(data_dir: str, names: tuple[str, ...]) -> ArrowSource:
    """Let `datasets` find, fetch and convert; its cache is an Arrow file, which we map."""
    import datasets

    try:
        found = datasets.get_dataset_split_names(data_dir)
        name = next((name for name in names if name in found), None)
        if name is None:
            raise MissingSplit(f"--data_dir {data_dir} has the splits {found} but no {names[0]}")
        dataset = datasets.load_dataset(data_dir, split=name)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        why = f"is no folder here, and the hub gave no such dataset: {error}"
        raise UserError(f"--data_dir {data_dir} {why}") from error
    return ArrowSource({f"{name} of {data_dir}": dataset.data.table}, dataset._fingerprint)
