"""Arrow tables as sources: Hugging Face datasets, and pyramids of smaller copies."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from common import UserError
from common.data.sources.base import MissingSplit, first_line
from common.data.sources.cache import cached_sizes, fingerprint_of


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


def read_small(
    table: pa.Table, columns: Columns, name: str
) -> tuple[np.ndarray, list[str], np.ndarray | None]:
    """Return a table's labels, int64 [N], the names of its classes, and a pyramid's original sizes, int32 [N, 2].

    Raises:
        UserError: some row has no label.
    """
    labels = table.column(columns.label)
    if labels.null_count or not pa.types.is_integer(labels.type):
        raise UserError(f"--data_dir: column {columns.label} of {name} is not a class number in every row")
    numbers = labels.to_numpy().astype(np.int64)
    if numbers.min(initial=0) < 0:
        raise UserError(f"--data_dir: {name} has rows without a label (-1)")
    classes = columns.classes or [str(number) for number in range(numbers.max(initial=-1) + 1)]
    sides = [table.column(side).to_numpy() for side in ("height", "width")] if columns.prepared else None
    return numbers, classes, np.stack(sides, 1) if sides else None


def image_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The bytes of an image column, which has them in structs or bare; nothing is copied."""
    if pa.types.is_struct(column.type):
        field = column.type.get_field_index("bytes")
        return pa.chunked_array([chunk.flatten()[field] for chunk in column.chunks], column.type[field].type)
    return column


def read_level(levels: list[int], short_side: int, read: Callable[[int], pa.Scalar]) -> np.ndarray:
    """Read an image from the smallest level with a margin as Resize(256) leaves for CenterCrop(224); else from the largest.

    Small images are stored once: where a level has none (`read(level)` is null), the next smaller one has it.
    """
    wanted = next((level for level in levels if level >= short_side * 8 // 7), levels[-1])
    for level in reversed(levels[: levels.index(wanted) + 1]):
        encoded = read(level).as_buffer()
        if encoded:
            return np.frombuffer(encoded, np.uint8)
    return np.empty(0, np.uint8)


class ArrowSource:
    """One split of an Arrow table, memory-mapped: a Hugging Face dataset, or a pyramid of smaller copies."""

    group_rows = None

    def __init__(self, table: pa.Table, location: str, fingerprint: str):
        self.location, self.fingerprint = location, fingerprint
        columns = find_columns(table.schema, location)
        self.labels, self.classes, self._sizes = read_small(table, columns, location)
        self.prepared = columns.prepared
        self._images = {level: image_bytes(table.column(name)) for level, name in columns.levels.items()}
        self._levels = list(columns.levels)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, short_side: int) -> np.ndarray:
        return read_level(self._levels, short_side, lambda level: self._images[level][index])

    def describe(self, index: int) -> str:
        return f"row {index} of {self.location}"

    def sizes(self) -> np.ndarray:
        if self._sizes is None:
            self._sizes = cached_sizes(self, self.fingerprint, lambda index: self.read(index, 0))
        return self._sizes


def open_shards(data_dir: str, shards: list[Path], names: tuple[str, ...]) -> ArrowSource:
    """Map the Arrow shards that `prepare` wrote."""
    for name in names:
        if chosen := [shard for shard in shards if shard.name.startswith(f"{name}-")]:
            break
    else:
        raise MissingSplit(f"--data_dir {data_dir} has no data/{names[0]}-*.arrow")
    tables, known = [], []
    for shard in chosen:
        try:
            tables.append(pa.ipc.open_file(pa.memory_map(str(shard))).read_all())
        except pa.ArrowInvalid as error:
            raise UserError(f"{shard} is damaged ({error}); remove it and run prepare again") from error
        known.append((shard.name, shard.stat().st_size, len(tables[-1])))
    return ArrowSource(pa.concat_tables(tables), f"{data_dir}/data/{name}-*.arrow", fingerprint_of(known))


def open_datasets(data_dir: str, names: tuple[str, ...]) -> ArrowSource:
    """Let `datasets` find, fetch and convert; its cache is an Arrow file, which we map."""
    import datasets

    try:
        found = datasets.get_dataset_split_names(data_dir)
        name = next((name for name in names if name in found), None)
        if name is None:
            raise MissingSplit(f"--data_dir {data_dir} has the splits {found} but no {names[0]}")
        dataset = datasets.load_dataset(data_dir, split=name)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"--data_dir {data_dir} is no folder here, and the hub gave no such dataset: {error}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        why = first_line(error.__cause__ or error)
        raise UserError(f"--data_dir {data_dir}: a split is empty, or a file damaged: {why}") from error
    return ArrowSource(dataset.data.table, f"{name} of {data_dir}", dataset._fingerprint)
