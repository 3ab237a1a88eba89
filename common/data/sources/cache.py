"""What is derived from datasets and kept between runs: in the user's cache folder, never in the dataset."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import UserError
from common.data.decode import DecodeError, read_header
from common.data.sources.base import Source

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
    path: Path,
    make: Callable[[], pa.Table],
    current: Callable[[pa.Table], bool] = lambda table: True,
    required: bool = False,
) -> pa.Table:
    """Map the table in the cache file `path`, or make it where that is missing, damaged or not `current`.

    One process of the machine makes it, the others wait and map it. UserError: it is `required` and cannot be written.
    """
    with locked(path.with_suffix(".lock")):
        table = map_arrow(path)
        if table is None or not current(table):
            table = make()
            try:
                write_arrow(path, table)
            except OSError as error:
                if required:
                    raise UserError(f"cannot write {path}: {error.strerror}") from error
                log.warning("%s is not kept for the next start: %s", path, error.strerror)
            # Rather the pages that all processes share than this memory.
            table = map_arrow(path) or table
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


def cached_sizes(source: Source, key: str, read_head: Callable[[int], np.ndarray]) -> np.ndarray:
    """Take a source's sizes, int32 [N, 2], from the images' headers: scanned once, and kept under a key that changes with the data."""
    table = derived(cache_folder() / "sizes" / f"{key}.arrow", lambda: _scan_sizes(source, read_head))
    return np.stack([table.column(side).to_numpy() for side in ("height", "width")], 1)


def _scan_sizes(source: Source, read_head: Callable[[int], np.ndarray]) -> pa.Table:
    import pyarrow as pa
    from tqdm import tqdm

    sizes = np.ones((len(source), 2), np.int32)

    def scan(begin: int) -> None:
        for index in range(begin, min(begin + 1024, len(source))):
            try:
                try:
                    header = read_header(read_head(index))
                except DecodeError:  # a long EXIF block or colour profile comes first
                    header = read_header(source.read(index, 0))
            except (DecodeError, OSError) as error:
                log.warning("no size in the header of %s: %s", source.describe(index), error)
            else:
                sizes[index] = header[:2]

    # Threads, because on a network disk the time goes into waiting; one core reads 20,000 headers a second.
    begins = range(0, len(source), 1024)
    with ThreadPoolExecutor(16) as pool:
        done = pool.map(scan, begins)
        list(tqdm(done, "image headers", len(begins), delay=2, leave=False, unit_scale=1024))
    return pa.table({"height": sizes[:, 0].copy(), "width": sizes[:, 1].copy()})
