"""Shared memory in which workers hand over finished batches."""

import math
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from common.data.order import BatchItem


class Slot:
    """Memory for one batch that this process and its workers share, used again and again.

    A DataLoader would pass each tensor in new shared memory, which costs a worker a quarter of its time. Workers inherit
    a slot when they are forked. It does not lie in /dev/shm, which has 64 MB in a container.
    """

    def __init__(self) -> None:
        self._file = open(os.memfd_create("batch"), "r+b")  # noqa: SIM115 -- lives as long as the slot
        self._map: mmap.mmap | None = None

    def images(self, item: BatchItem) -> np.ndarray:
        """Map what a batch takes, uint8 [B, H, W, 3]."""
        shape = (len(item.indices), item.height, item.width, 3)
        size = math.prod(shape)
        if self._map is None or len(self._map) < size:
            if self._file.seek(0, os.SEEK_END) < size:
                self._file.truncate(size)
            self._map = mmap.mmap(self._file.fileno(), size)
        return np.frombuffer(self._map, np.uint8, size).reshape(shape)


class Slots:
    """A sampler of whatever `items` are to be loaded next: a DataLoader keeps its workers while they change.

    Each goes with a free slot's number, or with None if the caller keeps more batches than expected. A slot is free
    again when nobody looks at its images any more.
    """

    def __init__(self, count: int):
        self.items: Iterable[BatchItem] = ()
        self.slots = [Slot() for _ in range(count)]
        self._free = list(range(count))
        self._sent: set[int] = set()

    def __iter__(self) -> Iterator[tuple[BatchItem, int | None]]:
        # Of a stream that was left: nobody waits for the answers, and the workers are done, the DataLoader saw to that.
        self._free += self._sent
        self._sent.clear()
        for item in self.items:
            number = self._free.pop() if self._free else None
            if number is not None:
                self._sent.add(number)
            yield item, number

    def images(self, number: int, item: BatchItem) -> torch.Tensor:
        """Show a slot's images, uint8 [B, 3, H, W]."""
        self._sent.discard(number)
        array = self.slots[number].images(item)
        weakref.finalize(array, self._free.append, number)
        return torch.from_numpy(array).permute(0, 3, 1, 2)
