"""Measure the input pipeline on this machine, beside torchvision's and timm's, and say what to set.

    python -m common.tools.benchmark_dataloader --data_dir imagenet-pyramid --originals imagenet

All loaders are measured in turn, several times over, and the median counts: other work on the machine
disturbs all of them alike, so ratios can be trusted further than rates. A pass takes whole batches as the
training loop receives them on the CPU, random crops included, from warm worker processes with full queues.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
import psutil
from torch.utils.data import DataLoader

from common import UserError
from common.data.loader import Loader, available_workers
from common.data.order import BatchItem, View
from common.data.sources.folder import FolderSource, Source, open_source

SCALE = (0.08, 1.0)  # of the random crops, the same for all
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REPEATED = 1 << 16  # images in an epoch of the other loaders: enough for a pass of any dataset


@dataclass
class Row:
    """One loader at one size and number of workers."""

    loader: str
    files: str  # originals or pyramid
    img_size: int
    workers: int
    images_per_s: float = 0.0  # median of the passes
    cpu_us_per_image: float = 0.0  # of all processes together
    memory_mb: float = 0.0  # of the workers, shared pages shared out
    passes: list[float] = field(default_factory=list)


class Contender:
    """A loader under test: `start` makes batches for ever, for a size, a number of workers and a prefetch."""

    def __init__(self, loader: str, files: str, start: Callable[[int, int, int], Iterator[int]]):
        self.loader, self.files, self.start = loader, files, start


def ours(source: Source, files: str, batch_size: int) -> Contender:
    def start(size: int, workers: int, prefetch: int) -> Iterator[int]:
        loader = Loader(source, source, seed=0, workers=workers, prefetch=prefetch)
        view = View(SCALE)
        order = np.random.default_rng(0)

        def items() -> Iterator[BatchItem]:
            for epoch in count():
                indices = order.permutation(len(source))
                # A dataset smaller than a batch still fills one.
                indices = np.resize(indices, max(len(indices) // batch_size, 1) * batch_size)
                for chosen in indices.reshape(-1, batch_size):
                    yield BatchItem(0, chosen, size, size, epoch, view)

        try:
            for batch in loader.stream(items()):
                yield len(batch.labels)
        finally:
            loader.close()

    return Contender("ours", files, start)


def others(folder: Path, batch_size: int) -> list[Contender]:
    """torchvision's ImageFolder with a DataLoader, and timm's create_loader, on a folder of class folders."""
    from timm.data import create_loader
    from torchvision import datasets, transforms

    class Repeated(datasets.ImageFolder):
        """A small folder as often as a pass needs it."""

        def __len__(self) -> int:
            return REPEATED

        def __getitem__(self, index: int):
            return super().__getitem__(index % len(self.samples))

    def with_torchvision(size: int, workers: int, prefetch: int) -> Iterator[int]:
        steps = [
            transforms.RandomResizedCrop(size, SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
        loader = DataLoader(
            Repeated(folder, transforms.Compose(steps)),
            batch_size,
            shuffle=True,
            num_workers=workers,
            prefetch_factor=prefetch,
        )
        for images, _ in loader:
            yield len(images)

    def with_timm(size: int, workers: int, prefetch: int) -> Iterator[int]:
        loader = create_loader(
            Repeated(folder),
            (3, size, size),
            batch_size,
            is_training=True,
            use_prefetcher=False,
            scale=SCALE,
            color_jitter=None,
            interpolation="bilinear",
            mean=MEAN,
            std=STD,
            num_workers=workers,
            persistent_workers=False,
        )
        for images, _ in loader:
            yield len(images)

    return [
        Contender("torchvision", "originals", with_torchvision),
        Contender("timm", "originals", with_timm),
    ]


# --- measuring ----------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def worker_memory_mb() -> float:
    children = psutil.Process().children(recursive=True)
    return sum(getattr(full := child.memory_full_info(), "pss", full.uss) for child in children) / 1e6


def run_pass(batches: Iterator[int], warm_up: int, seconds: float) -> tuple[float, float, float]:
    """Measure images/s, CPU microseconds per image and the workers' memory.

    Args:
        batches: their sizes, as they come.
        warm_up: batches that are taken before the clock starts: what is in the queues was made before.
        seconds: at least as long, and at least 8 batches.
    """
    for _ in islice(batches, warm_up):
        pass
    images, began, cpu = 0, time.perf_counter(), cpu_seconds()
    for number, size in enumerate(batches, 1):
        images += size
        if number >= 8 and time.perf_counter() - began >= seconds:
            break
    took, used = time.perf_counter() - began, cpu_seconds() - cpu
    return images / took, used / images * 1e6, worker_memory_mb()


def measure(
    contenders: list[Contender],
    sizes: list[int],
    workers: list[int],
    prefetch: int,
    passes: int,
    seconds: float,
) -> list[Row]:
    """Measure every loader at every size and number of workers, in turn; the medians of all passes."""
    rows = []
    for number in workers:
        for size in sizes:
            group = [Row(each.loader, each.files, size, number) for each in contenders]
            samples: list[list[tuple[float, float, float]]] = [[] for _ in contenders]
            for _ in range(passes):
                for each, taken in zip(contenders, samples, strict=True):
                    batches = each.start(size, number, prefetch)
                    taken.append(run_pass(batches, number * (prefetch + 1), seconds))
                    batches.close()
            for row, taken in zip(group, samples, strict=True):
                row.passes = [round(rate, 1) for rate, _, _ in taken]
                medians = [statistics.median(column) for column in zip(*taken, strict=True)]
                row.images_per_s, row.cpu_us_per_image, row.memory_mb = (round(value, 1) for value in medians)
            rows += group
            print("\n".join(format_row(row, group) for row in group), flush=True)
    return rows


HEADER = (
    f"{'size':>5} {'workers':>8}  {'loader':12} {'files':10} {'images/s':>9} {'x':>6} {'CPU us':>7} {'MB':>6}"
)


def format_row(row: Row, group: list[Row]) -> str:
    reference = next((each.images_per_s for each in group if each.loader == "torchvision"), None)
    factor = f"{row.images_per_s / reference:6.2f}" if reference else "     -"
    return (
        f"{row.img_size:5} {row.workers:8}  {row.loader:12} {row.files:10} {row.images_per_s:9,.0f} {factor} "
        f"{row.cpu_us_per_image:7,.0f} {row.memory_mb:6,.0f}"
    )


# --- advice -------------------------------------------------------------------------------------------------


def recommend_workers(rows: list[Row], rates: dict[int, float]) -> int:
    """The fewest workers that feed the device, or come within 5 % of the best rate, at every size."""
    enough = 0
    for size in {row.img_size for row in rows}:
        of_size = sorted((row for row in rows if row.img_size == size), key=lambda row: row.workers)
        wanted = 0.95 * max(row.images_per_s for row in of_size)
        wanted = min(wanted, rates.get(size, math.inf))
        enough = max(enough, next(row.workers for row in of_size if row.images_per_s >= wanted))
    return enough


def verdict(size: int, needed: float, row: Row, cpus: int) -> str:
    """One sentence: does the loader keep up with the device at this size, and what to do if not."""
    given = f"{row.workers} workers give {row.images_per_s:,.0f}"
    begin = f"{size} px: the device takes {needed:,.0f} images/s, {given}"
    if row.images_per_s >= needed:
        return f"{begin}: bound by the device"
    more = math.ceil(row.workers * needed / row.images_per_s) - row.workers
    remedies = []
    if row.files == "originals":
        remedies.append("prepare a pyramid (python -m common.tools.prepare)")
    if row.workers + more <= cpus:
        remedies.append(f"add {more} workers")
    if not remedies:
        remedies.append(f"about {row.workers + more} CPUs are needed and there are {cpus}")
    return f"{begin}: bound by the loader; {' or '.join(remedies)}"


def best_prefetch(contender: Contender, size: int, workers: int, passes: int, seconds: float) -> int:
    """The fewest batches ahead per worker within 3 % of the best rate."""
    rates: dict[int, list[float]] = {2: [], 4: [], 8: []}
    for _ in range(passes):
        for prefetch, taken in rates.items():
            batches = contender.start(size, workers, prefetch)
            taken.append(run_pass(batches, workers * (prefetch + 1), seconds)[0])
            batches.close()
    medians = {prefetch: statistics.median(taken) for prefetch, taken in rates.items()}
    return min(prefetch for prefetch, rate in medians.items() if rate >= 0.97 * max(medians.values()))


def worker_counts(most: int) -> list[int]:
    return sorted({2**power for power in range(most.bit_length())} | {most})


def benchmark(options: argparse.Namespace) -> list[Row]:
    if options.device_rate and len(options.device_rate) != len(options.sizes):
        raise UserError(f"--device_rate needs one number for each of --sizes {options.sizes}")
    source = open_source(options.data_dir, "train")
    files = "pyramid" if source.prepared else "originals"
    contenders = [ours(source, files, options.batch_size)]
    originals = open_source(options.originals, "train") if options.originals else source
    if originals is not source:
        contenders.append(ours(originals, "originals", options.batch_size))
    if isinstance(originals, FolderSource):
        contenders += others(originals.folder, options.batch_size)
    else:
        print("torchvision and timm are left out: they need --originals with a folder of class folders")

    cpus = available_workers()
    workers = options.workers or worker_counts(cpus)
    print(f"{len(source):,} images, {cpus} CPUs, batches of {options.batch_size}")
    print(HEADER)
    rows = measure(contenders, options.sizes, workers, options.prefetch, options.passes, options.seconds)

    rates = dict(zip(options.sizes, options.device_rate or (), strict=False))
    mine = [row for row in rows if (row.loader, row.files) == ("ours", files)]
    chosen = recommend_workers(mine, rates)
    prefetch = best_prefetch(contenders[0], options.sizes[0], chosen, options.passes, options.seconds)
    print(f"recommended: --workers {chosen} --prefetch {prefetch}")
    for row in mine:
        if row.workers == chosen and row.img_size in rates:
            print(verdict(row.img_size, rates[row.img_size], row, cpus))
    return rows


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.benchmark_dataloader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data_dir", required=True, help="whatever the training scripts read")
    add("--originals", help="the folder of class folders a pyramid was made of, for the other loaders")
    add("--sizes", type=int, nargs="+", default=[224, 128, 56], help="of the stages (default: 224 128 56)")
    add("--workers", type=int, nargs="+", help="counts to try (default: 1, 2, 4 ... up to the CPUs)")
    add("--prefetch", type=int, default=4, help="batches ahead per worker (default: 4)")
    add("--batch_size", type=int, default=64)
    add("--passes", type=int, default=3, help="of which the median counts (default: 3)")
    add("--seconds", type=float, default=3.0, help="that a pass takes (default: 3)")
    add("--device_rate", type=float, nargs="+", help="images/s the device trains on, for each of --sizes")
    add("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(args)
    try:
        rows = benchmark(options)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
