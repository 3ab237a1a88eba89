"""Arrow tables as sources: Hugging Face datasets, and pyramids of smaller copies."""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from common import UserError, first_line
from common.data.sources.base import MissingSplit
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
    """Find the image and label columns by the features that `datasets` keeps in a schema. UserError: there are none."""
    from datasets import ClassLabel, Features, Image

    features = Features.from_arrow_schema(schema)
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    levels = {int(column[6:]): column for column in images if re.fullmatch(r"image_\d+", column)}
    if not {"height", "width"} <= features.keys():
        # No pyramid's.
        levels = {}
    if not levels and len(images) != 1:
        raise UserError(f"--data_dir: {name} has {len(images)} image columns, not one: {list(features)}")
    named = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    # Of several (coarse and fine), the finest; but what is called "label" is meant.
    numbered = "label" in features and pa.types.is_integer(schema.field("label").type)
    label = max(named, key=lambda column: len(named[column])) if named and not numbered else "label"
    if label not in features:
        raise UserError(f"--data_dir: {name} has no class label column: {list(features)}")
    return Columns(dict(sorted(levels.items())) or {0: images[0]}, label, named.get(label, []), bool(levels))


def part_of(column: pa.ChunkedArray, part: str) -> pa.ChunkedArray:
    """The "bytes" or the "path" of an image column, which has both in structs; nothing is copied."""
    field = column.type.get_field_index(part)
    return pa.chunked_array([chunk.flatten()[field] for chunk in column.chunks], column.type[field].type)


class TableSource(ABC):
    """Rows of Arrow tables: `rows` have all columns but the images, at least. UserError: some row has no label."""

    group_rows: np.ndarray | None = None

    def __init__(self, rows: pa.Table, columns: Columns, location: str, fingerprint: str):
        self.location, self.fingerprint, self.prepared = location, fingerprint, columns.prepared
        self._levels = list(columns.levels)
        labels = rows.column(columns.label)
        if labels.null_count or not pa.types.is_integer(labels.type):
            raise UserError(
                f"--data_dir: column {columns.label} of {location} is not a class number in every row"
            )
        self.labels = labels.to_numpy().astype(np.int64)
        if self.labels.min(initial=0) < 0:
            raise UserError(f"--data_dir: {location} has rows without a label (-1)")
        self.classes = columns.classes or [str(number) for number in range(self.labels.max(initial=-1) + 1)]
        self._sizes: np.ndarray | None = None
        if columns.prepared:
            self._sizes = np.stack([rows.column(side).to_numpy() for side in ("height", "width")], 1)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def _image(self, level: int, index: int) -> pa.Scalar:
        """A row's bytes at a level."""

    def read(self, index: int, short_side: int) -> np.ndarray:
        # The smallest level with a margin as Resize(256) leaves for CenterCrop(224); else the largest.
        wanted = next((level for level in self._levels if level >= short_side * 8 // 7), self._levels[-1])
        # Small images are stored once: where a level has none, the next smaller one has it.
        for level in reversed(self._levels[: self._levels.index(wanted) + 1]):
            encoded = self._image(level, index).as_buffer()
            if encoded:
                return np.frombuffer(encoded, np.uint8)
        return np.empty(0, np.uint8)


class ArrowSource(TableSource):
    """One split of an Arrow table, memory-mapped: a Hugging Face dataset, or a pyramid of smaller copies."""

    def __init__(self, table: pa.Table, location: str, fingerprint: str):
        columns = find_columns(table.schema, location)
        super().__init__(table, columns, location, fingerprint)
        self._images = {level: part_of(table.column(name), "bytes") for level, name in columns.levels.items()}
        self._files = {level: part_of(table.column(name), "path") for level, name in columns.levels.items()}

    def _image(self, level: int, index: int) -> pa.Scalar:
        image, file = self._images[level][index], self._files[level][index]
        # A folder of images that `datasets` has listed stays one of files.
        return pa.scalar(Path(file.as_py()).read_bytes()) if file.is_valid and not image.is_valid else image

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
        if saved := (Path(data_dir) / "dataset_dict.json").exists():
            splits = datasets.load_from_disk(data_dir)
        found = list(splits) if saved else datasets.get_dataset_split_names(data_dir)
        name = next((name for name in names if name in found), None)
        if name is None:
            raise MissingSplit(f"--data_dir {data_dir} has the splits {found} but no {names[0]}")
        dataset = splits[name] if saved else datasets.load_dataset(data_dir, split=name)
    except UserError:
        raise
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"--data_dir {data_dir} is no folder here, and the hub gave no such dataset: {error}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        why = first_line(error.__cause__ or error)
        raise UserError(f"--data_dir {data_dir}: a split is empty, or a file damaged: {why}") from error
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        # Several configurations, a loading script, nothing that it knows.
        raise UserError(f"--data_dir {data_dir}: `datasets` cannot load it: {first_line(error)}") from error
    return ArrowSource(dataset.data.table, f"{name} of {data_dir}", dataset._fingerprint)
