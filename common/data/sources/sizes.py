"""Sizes of a source's images from their headers: scanned once, then read from the cache folder."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from common.data.decode import DecodeError, read_header
from common.data.sources.base import Source
from common.data.sources.cache import cache_folder, derived

log = logging.getLogger(__name__)


def cached_sizes(source: Source, key: str, read_head: Callable[[int], np.ndarray]) -> np.ndarray:
    """Scan the headers once; the result lives beside the manifests, under a key that changes with the data."""
    cached = cache_folder() / "sizes" / f"{key}.arrow"
    table = derived(cached, lambda: _scan_sizes(source, read_head))
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
