"""Shards in object storage or on the hub, as a source: fetched by row group when an image of it is wanted.

A row group of a Parquet file, or a record batch of an Arrow file, is what can be fetched at once: some hundred images.
The files' footers say how many rows each has, so every image has its index from the start, and an order of training is
a matrix of indices as for any other source, only one that stays within a few row groups for a while
(`order.streaming_epoch`). What was fetched is kept in the user's cache folder, up to `KEEP_BYTES`, where all workers of
all processes of the machine map it.
"""

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from common import UserError
from common.data.sources.arrow import TableSource, find_columns, part_of
from common.data.sources.base import MissingSplit
from common.data.sources.cache import cache_folder, derived
from common.data.sources.remote import Storage

log = logging.getLogger(__name__)

KEEP_BYTES = 16 << 30  # an epoch is at 20,000 images at a time, 2 GB of photographs
MAPPED = 256  # row groups that a worker keeps mapped


def read_schema(storage: Storage, path: str) -> pa.Schema:
    with storage.system().open_input_file(path) as file:
        return pq.read_schema(file) if path.endswith(".parquet") else pa.ipc.open_file(file).schema


def read_groups(storage: Storage, path: str, columns: list[str], group: int | None = None) -> list[pa.Table]:
    """Fetch some columns of one group of a Parquet or Arrow file, or of each."""
    with storage.system().open_input_file(path) as file:
        if path.endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            groups = range(parquet.num_row_groups) if group is None else [group]
            return [parquet.read_row_group(number, columns) for number in groups]
        schema = pa.ipc.open_file(file).schema
        fields = [schema.get_field_index(column) for column in columns]
        arrow = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
        groups = range(arrow.num_record_batches) if group is None else [group]
        return [pa.Table.from_batches([arrow.get_batch(number)]) for number in groups]


class StreamSource(TableSource):
    """One split of shards that stay where they are."""

    def __init__(self, storage: Storage, files: list[fs.FileInfo]):
        self._paths, self._storage = [info.path for info in files], storage
        name, fingerprint = files[0].path, storage.fingerprint(files)
        self._folder = cache_folder() / "streams" / fingerprint
        columns = find_columns(storage.retry(name, lambda: read_schema(storage, name)), name)
        self._columns, rows = columns.levels, self._read_rows(columns.small)
        super().__init__(rows, columns, name, fingerprint)
        # A row's group is known by the number of the shard and of the group in it.
        shard, group = (rows.column(which).to_numpy() for which in ("shard", "group"))
        first = np.flatnonzero(np.diff(shard, prepend=-1) | np.diff(group, prepend=-1))
        self._first_rows, self._groups = first, np.stack([shard[first], group[first]], 1)
        self.group_rows = np.diff(first, append=len(rows))
        self._group = lru_cache(MAPPED)(self._map)

    def _read_rows(self, columns: list[str]) -> pa.Table:
        """Read all that is not images, and where each row lies: once, and then from the cache folder."""

        def read(path: str) -> list[pa.Table]:
            return self._storage.retry(path, lambda: read_groups(self._storage, path, columns))

        def read_all() -> pa.Table:
            log.info("reading the footers of %d files below %s", len(self._paths), self._storage.url)
            with ThreadPoolExecutor(16) as pool:
                shards = list(pool.map(read, self._paths))
            parts = [
                part.append_column("shard", [np.full(len(part), shard)]).append_column(
                    "group", [np.full(len(part), group)]
                )
                for shard, groups in enumerate(shards)
                for group, part in enumerate(groups)
            ]
            return pa.concat_tables(parts)

        return derived(self._folder / "rows.arrow", read_all)

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a row's group, and of the row in it."""
        number = int(np.searchsorted(self._first_rows, index, "right")) - 1
        return number, index - int(self._first_rows[number])

    def _image(self, level: int, index: int) -> pa.Scalar:
        number, row = self._place(index)
        return self._group(number, level)[row]

    def _map(self, number: int, level: int) -> pa.ChunkedArray:
        """Map the bytes of a group's images, fetching them if no process has before."""
        path = self._folder / f"{number}-{level}.arrow"
        table = derived(path, lambda: self._fetch(number, level), required=True)
        with suppress(FileNotFoundError):  # another process may need the room
            os.utime(path)  # what was not used for longest makes room first
        return part_of(table.column(0), "bytes")

    def _fetch(self, number: int, level: int) -> pa.Table:
        self._make_room()
        shard, group = self._groups[number].tolist()
        path, columns = self._paths[shard], [self._columns[level]]
        fetch = partial(read_groups, self._storage, path, columns, group)
        return self._storage.retry(f"row group {group} of {path}", fetch)[0]

    def _make_room(self) -> None:
        """Remove what was not used for longest; processes that still map it are not disturbed."""
        files = []
        for path in self._folder.glob("*-*.arrow"):
            with suppress(FileNotFoundError):  # another process made room
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= KEEP_BYTES:
                break
            path.unlink(missing_ok=True)
            total -= size

    def describe(self, index: int) -> str:
        number, row = self._place(index)
        shard, group = self._groups[number].tolist()
        return f"row {row} of row group {group} of {self._paths[shard]}"

    def sizes(self) -> np.ndarray:
        if self._sizes is None:
            raise UserError("--streaming knows no image sizes beforehand, which rectangular batches need")
        return self._sizes


def open_stream(data_dir: str, names: tuple[str, ...]) -> StreamSource:
    """Open the first of some splits of the shards below a URL or folder; a file's or folder's name begins with the split's.

    Raises:
        UserError: cannot be read, or holds no such shards.
    """
    if "://" not in data_dir and not Path(data_dir).expanduser().is_dir():
        data_dir = f"hf://datasets/{data_dir}"
    storage = Storage(data_dir)
    files = storage.files()
    for name in names:
        pattern = re.compile(rf"(^|/){name}([^a-zA-Z].*)?$")
        stems = (info.path[len(storage.root) :].removesuffix(f".{info.extension}") for info in files)
        if chosen := [info for info, stem in zip(files, stems, strict=True) if pattern.search(stem)]:
            return StreamSource(storage, chosen)
    raise MissingSplit(f"--data_dir {storage.url} has no shards named {' or '.join(names)}")
