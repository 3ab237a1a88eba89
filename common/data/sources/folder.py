"""A folder of class folders, listed once.

No source keeps Python objects per image: file names, offsets and labels are a few long arrays, memory-mapped
where they are large, so that 1.28 million images start at once and all processes share the pages.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from common import UserError
from common.data.sources.base import EXTENSIONS, HEAD_BYTES
from common.data.sources.cache import cache_folder, derived, fingerprint_of
from common.data.sources.sizes import cached_sizes

log = logging.getLogger(__name__)


class FolderSource:
    """One split of an ImageFolder tree: `<folder>/<class>/**/*.jpg`.

    The list of files is a manifest in the user's cache folder. It is valid as long as no directory has
    changed, so that the second start costs one `stat` per directory.
    """

    prepared = False
    group_rows = None

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.location = str(self.folder)
        self._root = os.fsencode(self.folder) + b"/"
        root = self._root
        manifest = derived(
            _manifest_path(root), lambda: _scan(root), lambda table: _read_manifest(table, root)
        )
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
        return cached_sizes(self, self._manifest.place, self._read_head)


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
    log.info("listing the images of %s", os.fsdecode(root))
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
