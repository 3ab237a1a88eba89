"""What is derived from datasets and kept between runs: in the user's cache folder, never in the dataset."""

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME`, or ~/.cache, and the project's name."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "image-classification-training"


def fingerprint_of(*parts) -> str:
    """Hash arrays by their bytes, and anything else by its `repr`."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else repr(part).encode())
    return state.hexdigest()


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write an uncompressed Arrow file of one record batch; it has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    temporary.replace(path)


def keep_arrow(path: Path, table: pa.Table) -> None:
    """Write what only saves time; where the cache folder cannot be written, say so and go on."""
    try:
        write_arrow(path, table)
    except OSError as error:
        log.warning("%s is not kept for the next start: %s", path, error.strerror)


def map_arrow(path: Path) -> pa.Table | None:
    """Memory-map an Arrow file; None where it is missing or damaged, for it can be derived again."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (FileNotFoundError, pa.ArrowInvalid, OSError):
        return None
