"""What is derived from datasets and kept between runs: in the user's cache folder, never in the dataset."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME`, or ~/.cache, and the project's name."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "image-classification-training"


def fingerprint_of(*parts: object) -> str:
    """Hash arrays by their bytes, and anything else by its `repr`."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode())
    return state.hexdigest()


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write an uncompressed Arrow file of one record batch; it has its name only when it is whole."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    temporary.replace(path)


def map_arrow(path: Path) -> pa.Table | None:
    """Memory-map an Arrow file; None where it is missing or damaged, for it can be derived again."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError):
        return None


def derived(
    path: Path, make: Callable[[], pa.Table], current: Callable[[pa.Table], bool] = lambda table: True
) -> pa.Table:
    """Map the table in the cache file `path`, or make it where that is missing, damaged or not `current`.

    One process of the machine makes it, the others wait and map it.
    """
    with locked(path.with_suffix(".lock")):
        table = map_arrow(path)
        if table is None or not current(table):
            table = make()
            try:
                write_arrow(path, table)
            except OSError as error:
                log.warning("%s is not kept for the next start: %s", path, error.strerror)
    return table


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process in at a time; where the cache folder cannot be written, all derive the same for themselves."""
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # To close it lets the next process in.
            fcntl.flock(held.enter_context(open(path, "w")), fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked, so every process derives it: %s", path, error.strerror)
        yield
