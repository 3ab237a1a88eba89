"""A folder of class folders, listed once.

No source keeps Python objects per image, but long arrays, memory-mapped where they are large, so that 1.28 million
images start at once and all processes share the pages.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import UserError
from common.data.sources.base import EXTENSIONS
from common.data.sources.cache import cache_folder, cached_sizes, derived, fingerprint_of

log = logging.getLogger(__name__)

MANIFEST = b"manifest"
# How names begin that are not the user's: notebooks' and file servers' copies and thumbnails.
HIDDEN = (b".", b"@eaDir")
HEAD_BYTES = 16 << 10  # enough for most headers; the whole file is read where it is not


class FolderSource:
    """One split of an ImageFolder tree: `<folder>/<class>/**/*.jpg`.

    The list of files is a manifest in the user's cache folder, valid as long as no directory has changed.
    """

    prepared = False
    group_rows = None

    def __init__(self, folder: Path):
        folder = folder.resolve()
        self.location = str(folder)
        self._root = root = os.fsencode(folder) + b"/"
        cached = cache_folder() / "manifests" / f"{fingerprint_of(root, HIDDEN)}.arrow"
        manifest = derived(cached, lambda: _scan(root), lambda table: _current(table, root))
        facts = json.loads(manifest.schema.metadata[MANIFEST])
        self.classes, self.fingerprint, self._place = facts["classes"], facts["fingerprint"], facts["place"]
        self._paths, self.labels = manifest.column("path").chunk(0), manifest.column("label").to_numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, short_side: int, limit: int = -1) -> np.ndarray:
        with open(self._root + self._paths[index].as_py(), "rb", buffering=0) as file:
            return np.frombuffer(file.read(limit), np.uint8)

    def describe(self, index: int) -> str:
        return os.fsdecode(self._root + self._paths[index].as_py())

    def sizes(self) -> np.ndarray:
        return cached_sizes(self, self._place, lambda index: self.read(index, 0, HEAD_BYTES))


def _scan(root: bytes) -> pa.Table:
    """List a tree: a row per image, by class and name, and in the metadata what a `FolderSource` has to know.

    Raises:
        UserError: no class folders, an empty one, or one that changes meanwhile.
    """
    log.info("listing the images of %s", os.fsdecode(root))
    directories = [("", os.stat(root).st_mtime_ns)]
    paths: list[bytes] = []
    counts: list[int] = []

    def images_below(prefix: bytes) -> Iterator[bytes]:
        directories.append((os.fsdecode(prefix), os.stat(root + prefix).st_mtime_ns))
        with os.scandir(root + prefix) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(HIDDEN):
                    continue
                if entry.is_dir():
                    yield from images_below(prefix + entry.name + b"/")
                elif entry.name.lower().endswith(_EXTENSIONS):
                    yield prefix + entry.name

    classes = class_folders(root)
    if not classes:
        raise UserError(f"{os.fsdecode(root)} holds no class folders; expected <class>/<image>.jpg below it")
    for name in classes:
        if os.fsencode(name) != name.encode(errors="replace"):
            raise UserError(
                f"{os.fsdecode(root)} has a class folder whose name is not UTF-8, {name!a}; rename it"
            )
        try:
            found = list(images_below(os.fsencode(name) + b"/"))
        except OSError as error:
            raise UserError(f"cannot list {os.fsdecode(root)}{name}: {error.strerror}") from error
        if not found:
            raise UserError(f"{os.fsdecode(root)}{name} holds no images; remove the folder or fill it")
        paths += found
        counts.append(len(found))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    # Of names and classes: the same for a copy elsewhere.
    fingerprint = fingerprint_of(classes, np.frombuffer(b"\0".join(paths), np.uint8), labels)
    facts = {
        "classes": classes,
        "directories": directories,
        "fingerprint": fingerprint,
        # Of this folder at this time: copies may hold other pixels under the same names.
        "place": fingerprint_of(root, directories, fingerprint),
    }
    table = pa.table({"path": pa.array(paths, pa.large_binary()), "label": labels})
    manifest = table.replace_schema_metadata({MANIFEST: json.dumps(facts)})
    if not _current(manifest, root):
        raise UserError(f"{os.fsdecode(root)} changes while it is being listed")
    return manifest


def class_folders(root: bytes) -> list[str]:
    """Names of the folders in a split's folder, in order."""
    names = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(HIDDEN)]
    return sorted(map(os.fsdecode, names))


_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)


def _current(manifest: pa.Table, root: bytes) -> bool:
    """Whether no directory has changed since."""
    try:
        times = json.loads(manifest.schema.metadata[MANIFEST])["directories"]
        return all(os.stat(root + os.fsencode(name)).st_mtime_ns == modified for name, modified in times)
    except OSError:
        return False
