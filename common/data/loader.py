"""From batch items to batches on the device: the one `Loader` of a run.

The sampler yields `BatchItem`s (which images, how large, which crop) and a worker answers with one finished uint8 tensor.
So the workers know nothing of stages, and live through all of them.
"""

import ctypes
import importlib
import logging
import math
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from common import NonNegativeInt, UserError
from common.data.auto_augment import auto_augment
from common.data.decode import DecodeError, decode_batch
from common.data.order import BatchItem
from common.data.slots import Slot, Slots
from common.data.sources.base import Source

log = logging.getLogger(__name__)

PREFETCH = 4  # batches that each worker keeps ready
MAX_WORKERS = 16
PR_SET_PDEATHSIG = 1  # as in <linux/prctl.h>
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # a container's quota and period, us


@dataclass
class LoaderSettings:
    """Loading images"""

    workers: NonNegativeInt | None = None
    """Loader processes per training process; 0 = none, null = the CPUs this process may use, shared out."""

    skip_unreadable: bool = False
    """Let another image of its class stand in for one that cannot be decoded."""


def available_workers() -> int:
    """Share the CPUs this process may use (affinity, cgroup quota) among the machine's training processes."""
    cpus = float(len(os.sched_getaffinity(0)))
    if CPU_MAX.exists():
        quota, period = CPU_MAX.read_text().split()
        if quota != "max":
            cpus = min(cpus, int(quota) / int(period))
    return max(1, min(MAX_WORKERS, math.ceil(cpus) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class Batch(NamedTuple):
    """One micro-batch, on the device."""

    images: torch.Tensor  # uint8 [B, 3, H, W]
    labels: torch.Tensor  # int64 [B]
    item: BatchItem
    wait_s: float  # seconds that the caller waited for it


class _Answer(NamedTuple):
    """What a worker sends back. Errors travel as text; a DataLoader would wrap them in a traceback."""

    item: BatchItem
    slot: int | None  # where the images are
    images: torch.Tensor | None  # or themselves, if there was no slot
    replaced: list[tuple[str, str]]  # images another stood in for, and why
    failure: str | None


class _BatchDecoder(Dataset):
    """Runs in a worker: a `BatchItem` in, a finished batch out."""

    def __init__(self, sources: tuple[Source, Source], seed: int, skip_unreadable: bool, slots: list[Slot]):
        self.sources, self.seed, self.skip_unreadable, self.slots = sources, seed, skip_unreadable, slots

    def __getitem__(self, item_and_slot: tuple[BatchItem, int | None]) -> _Answer:
        item, slot = item_and_slot
        shape = (len(item.indices), item.height, item.width, 3)
        array = self.slots[slot].images(item) if slot is not None else np.empty(shape, np.uint8)
        images = torch.from_numpy(array).permute(0, 3, 1, 2)
        replaced: list[tuple[str, str]] = []
        # Many images at once, not many threads on one.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        failure = self._fill(images, item, replaced)
        torch.set_num_threads(threads)
        return _Answer(item, slot, images if slot is None else None, replaced, failure)

    def _fill(self, images: torch.Tensor, item: BatchItem, replaced: list[tuple[str, str]]) -> str | None:
        """Decode a batch into `images`; returns what the user has to be told if it cannot be done."""
        source = self.sources[item.split]
        wanted = item.indices % len(source)
        indices = wanted.copy()
        while True:
            encoded: list[np.ndarray] = []
            try:
                for index in indices.tolist():
                    encoded.append(source.read(index, min(item.height, item.width)))
                sizes = source.sizes()[indices] if source.prepared else None
                decode_batch(encoded, item, self.seed, images, sizes)
                if item.view.auto_augment != "none":
                    auto_augment(images.permute(0, 2, 3, 1).numpy(), item, self.seed)
                return None
            except UserError as error:  # the storage cannot be reached: no image can stand in
                return str(error)
            except DecodeError as error:
                position, why = error.position, str(error)
            except OSError as error:
                position, why = len(encoded), error.strerror or str(error)
            path = source.describe(int(indices[position]))
            if not self.skip_unreadable:
                return f"cannot decode {path}: {why}; remove it, or pass --skip_unreadable"
            replaced.append((path, why))
            # The next image of the same class, cyclically, stands in.
            same = np.flatnonzero(source.labels == source.labels[indices[position]])
            indices[position] = same[np.searchsorted(same, indices[position], "right") % len(same)]
            if indices[position] == wanted[position]:
                return f"cannot decode {path}: {why}; nor any other image of its class"


def _start_worker(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # Ctrl-C and a scheduler's SIGTERM reach workers too; they are still needed for the step under way.
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def end_with_parent(_worker: int = 0) -> None:
    """Have the kernel kill this worker process when its parent was; with answers that nobody takes it would wait for ever."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Loader:
    """Loads any batches of a train and a validation source with one set of workers, for a whole run.

    `seed` is the run's, for random crops; `channels_last` = False gives contiguous NCHW. Workers start with the first batch.
    """

    def __init__(
        self,
        train: Source,
        val: Source,
        *,
        seed: int,
        settings: LoaderSettings,
        device: torch.device | str = "cpu",
        channels_last: bool = True,
    ):
        self.device = torch.device(device)
        self.workers = available_workers() if settings.workers is None else settings.workers
        self.unreadable: dict[str, str] = {}  # path -> why, of every image replaced so far
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._sources = (train, val)
        # As many as can be waiting, and a few for the batches in the caller's hands.
        self._slots = Slots(self.workers * PREFETCH + 4 if self.workers else 0)
        self._loader = DataLoader(
            _BatchDecoder(self._sources, seed, settings.skip_unreadable, self._slots.slots),
            batch_size=None,
            collate_fn=lambda answer: answer,  # the default would turn an item's arrays into tensors
            sampler=self._slots,
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            persistent_workers=self.workers > 0,
            multiprocessing_context="fork" if self.workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or each new iterator would draw from the one that dropout uses
        )
        self._streams = 0
        # Before the workers fork, or each would import it.
        importlib.import_module("torchvision.io")

    def stream(self, items: Iterable[BatchItem]) -> Iterator[Batch]:
        """Yield one batch per item, in order. A stream may be left before its end, and ends when the next one is begun.

        Raises:
            UserError: an image cannot be decoded; the sentence names it.
        """
        self._streams += 1
        this = self._streams
        self._slots.items = items
        answers = self._answers(iter(self._loader))
        batches = self._prefetched(answers) if self.device.type == "cuda" else answers
        while True:
            assert this == self._streams, "this stream ended when another one was begun"
            began = perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            images = batch.images.contiguous(memory_format=self._layout)
            yield batch._replace(images=images, wait_s=perf_counter() - began)

    def _answers(self, answers: Iterator[_Answer]) -> Iterator[Batch]:
        for answer in answers:
            for path, why in answer.replaced:
                if path not in self.unreadable:
                    log.warning("%s cannot be decoded (%s); another image of its class stands in", path, why)
                    self.unreadable[path] = why
            if answer.failure:
                raise UserError(answer.failure)
            item = answer.item
            images = answer.images if answer.slot is None else self._slots.images(answer.slot, item)
            assert images is not None
            source = self._sources[item.split]
            labels = torch.from_numpy(source.labels[item.indices % len(source)])
            if self.device.type == "cuda":
                # Only from pinned memory do copies run beside the host's work. It is torch's own, which is handed
                # out again when the copies from it are done; the slot is free at once.
                images, labels = images.pin_memory(), labels.pin_memory()
            yield Batch(images, labels, item, 0.0)

    def _prefetched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Copy one batch ahead on a stream of its own, while the device works on the one before."""
        side = torch.cuda.Stream(self.device)
        ahead: deque[tuple[Batch, torch.cuda.Event]] = deque()
        for batch in batches:
            with torch.cuda.stream(side):
                images = batch.images.to(self.device, non_blocking=True)
                labels = batch.labels.to(self.device, non_blocking=True)
                ahead.append((batch._replace(images=images, labels=labels), side.record_event()))
            if len(ahead) == 2:
                yield self._copied(*ahead.popleft())
        for last in ahead:
            yield self._copied(*last)

    def _copied(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(copied)
        for tensor in (batch.images, batch.labels):
            # Its memory may not be used anew before compute is done with it.
            tensor.record_stream(compute)
        return batch

    def close(self) -> None:
        """End the workers."""
        # They last from epoch to epoch, and have no public end.
        if isinstance(self._loader._iterator, _MultiProcessingDataLoaderIter):
            self._loader._iterator._shutdown_workers()
            self._loader._iterator = None
