"""Memory in which workers hand over finished batches."""

import logging
import math
import mmap
import os
import weakref

import numpy as np
import torch

from common.data.order import BatchItem

log = logging.getLogger(__name__)


class Slot:
    """Memory for one batch that this process and its workers share, used again and again.

    A DataLoader would pass each tensor in new shared memory, by a file descriptor through a socket, which
    costs a worker a quarter of its time. Workers inherit a slot when they are forked, and only its number is
    passed. It does not lie in /dev/shm, which has 64 MB in a container.
    """

    def __init__(self) -> None:
        self._file = open(os.memfd_create("batch"), "r+b")  # noqa: SIM115 -- lives as long as the slot
        self._map: mmap.mmap | None = None

    def images(self, item: BatchItem, pin: bool = False) -> np.ndarray:
        """Map what a batch takes, uint8 [B, H, W, 3]; pinned for asynchronous copies to CUDA."""
        shape = (len(item.indices), item.height, item.width, 3)
        size = math.prod(shape)
        if self._map is None or len(self._map) < size:
            if pin and self._map is not None:
                torch.cuda.cudart().cudaHostUnregister(self._address())
            if self._file.seek(0, os.SEEK_END) < size:
                self._file.truncate(size)
            self._map = mmap.mmap(self._file.fileno(), size)
            if pin and (error := int(torch.cuda.cudart().cudaHostRegister(self._address(), size, 0))):
                log.warning("CUDA error %d: batches are not pinned, so copies to the device wait", error)
        return np.frombuffer(self._map, np.uint8, size).reshape(shape)

    def _address(self) -> int:
        return np.frombuffer(self._map, np.uint8).ctypes.data


class Slots:
    """Hands out slots with the items, and takes them back when nobody looks at the images any more."""

    def __init__(self, count: int):
        self.slots = [Slot() for _ in range(count)]
        self._free = list(range(count))
        self._sent: set[int] = set()

    def take(self) -> int | None:
        if not self._free:  # the caller keeps more batches than expected; the next one travels on its own
            return None
        number = self._free.pop()
        self._sent.add(number)
        return number

    def images(self, number: int, item: BatchItem, pin: bool) -> torch.Tensor:
        """Show a slot's images, uint8 [B, 3, H, W]; the slot is free again when the tensor is gone."""
        self._sent.discard(number)
        array = self.slots[number].images(item, pin)
        weakref.finalize(array, self._free.append, number)
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def recall(self) -> None:
        """Take back what was sent with items whose answers nobody waits for any more."""
        self._free += self._sent
        self._sent.clear()
