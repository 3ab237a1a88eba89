"""Measure the input pipeline on this machine, beside torchvision's and timm's, and say what to set.

    python -m common.tools.benchmark_dataloader --data_dir imagenet-pyramid --originals imagenet

All loaders are measured in turn, several times over, and the median counts: other work on the machine
disturbs all of them alike, so ratios can be trusted further than rates. A pass takes whole batches as the
training loop receives them on the CPU, random crops included, from warm worker processes with full queues.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from torch.utils.data import DataLoader

from common import UserError
from common.data.loader import PREFETCH, Loader, LoaderSettings, available_workers
from common.data.order import BatchItem, View
from common.data.sources.base import Source
from common.data.sources.folder import FolderSource
from common.data.sources.open import open_source
from common.tools.command_line import check_least, new_parser, one_sentence

SCALE = (0.08, 1.0)  # of the random crops, the same for all
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REPEATED = 1 << 16  # images in an epoch of the other loaders: enough for a pass of any dataset

# Makes batches for ever, and yields their sizes: image size and workers in.
Start = Callable[[int, int], Iterator[int]]


def ours(source: Source, batch_size: int, auto_augment: str = "none") -> Start:
    def start(size: int, workers: int) -> Iterator[int]:
        order = np.random.default_rng(0)
        view = View(SCALE, auto_augment=auto_augment, magnitude=0.9)

        def items() -> Iterator[BatchItem]:
            for epoch in count():
                indices = order.permutation(len(source))
                # A dataset smaller than a batch still fills one.
                indices = np.resize(indices, max(len(indices) // batch_size, 1) * batch_size)
                for chosen in indices.reshape(-1, batch_size):
                    yield BatchItem(0, chosen, size, size, epoch, view)

        with closing(Loader(source, source, seed=0, settings=LoaderSettings(workers))) as loader:
            for batch in loader.stream(items()):
                yield len(batch.labels)

    return start


def others(folder: Path, batch_size: int) -> dict[str, Start]:
    """torchvision's ImageFolder with a DataLoader, and timm's create_loader, on a folder of class folders."""
    from timm.data import create_loader
    from torchvision import datasets, transforms

    class Repeated(datasets.ImageFolder):
        """A small folder as often as a pass needs it."""

        def __len__(self) -> int:
            return REPEATED

        def __getitem__(self, index: int):
            return super().__getitem__(index % len(self.samples))

    def with_torchvision(size: int, workers: int) -> Iterator[int]:
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
            prefetch_factor=PREFETCH,
        )
        for images, _ in loader:
            yield len(images)

    def with_timm(size: int, workers: int) -> Iterator[int]:
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

    return {"torchvision": with_torchvision, "timm": with_timm}


def cpu_seconds() -> float:
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def run_pass(batches: Iterator[int], warm_up: int, seconds: float) -> dict[str, float]:
    """Measure images/s, CPU microseconds per image of all processes, and the workers' memory in MB.

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
    # Shared pages are shared out among the workers, where the system can tell.
    memory = [child.memory_full_info() for child in psutil.Process().children(recursive=True)]
    memory_mb = sum(getattr(one, "pss", one.uss) for one in memory) / 1e6
    return {"images/s": images / took, "CPU us/image": used / images * 1e6, "MB": memory_mb}


def measure(
    loaders: dict[tuple[str, str], Start], size: int, workers: int, passes: int, seconds: float
) -> pd.DataFrame:
    """Measure loaders in turn, several times over: a row of medians for each."""
    rows = []
    for _ in range(passes):
        for (loader, files), start in loaders.items():
            batches = start(size, workers)
            row = {"loader": loader, "files": files, "size": size, "workers": workers}
            rows.append(row | run_pass(batches, workers * (PREFETCH + 1), seconds))
            batches.close()
    keys = ["loader", "files", "size", "workers"]
    return pd.DataFrame(rows).groupby(keys, sort=False).median().reset_index()


def recommend_workers(rows: pd.DataFrame, rates: dict[int, float]) -> int:
    """The fewest workers that feed the device, or come within 5 % of the best rate, at every size."""
    enough = 0
    for size, of_size in rows.groupby("size"):
        wanted = min(0.95 * of_size["images/s"].max(), rates.get(size, math.inf))
        enough = max(enough, of_size.loc[of_size["images/s"] >= wanted, "workers"].min())
    return int(enough)


def verdict(size: int, needed: float, given: float, workers: int, prepared: bool, cpus: int) -> str:
    """One sentence: does the loader keep up with the device at this size, and what to do if not.

    `needed` and `given` are in images/s, `workers` is how many gave it.
    """
    begin = f"{size} px: the device takes {needed:,.0f} images/s, {workers} workers give {given:,.0f}"
    if given >= needed:
        return f"{begin}: bound by the device"
    enough = math.ceil(workers * needed / given)
    remedies = [] if prepared else ["prepare a pyramid (python -m common.tools.prepare)"]
    if enough <= cpus:
        remedies.append(f"take {enough} workers")
    if not remedies:
        remedies.append(f"about {enough} CPUs are needed and there are {cpus}")
    return f"{begin}: bound by the loader; {' or '.join(remedies)}"


def worker_counts(most: int) -> list[int]:
    return sorted({2**power for power in range(most.bit_length())} | {most})


def benchmark(options: argparse.Namespace) -> pd.DataFrame:
    if options.device_rate and len(options.device_rate) != len(options.sizes):
        raise UserError(f"--device_rate needs one number for each of --sizes {options.sizes}")
    # Without worker processes there are no queues, and nothing to prefetch.
    if options.workers and min(options.workers) < 1:
        raise UserError(f"--workers takes counts of at least 1, not {min(options.workers)}")
    source = open_source(options.data_dir, "train")
    mine = ("ours", "pyramid" if source.prepared else "originals")
    loaders = {mine: ours(source, options.batch_size)}
    for policy in options.auto_augment:
        loaders[f"ours, {policy}", mine[1]] = ours(source, options.batch_size, policy)
    originals = open_source(options.originals, "train") if options.originals else source
    loaders.setdefault(("ours", "originals"), ours(originals, options.batch_size))
    if isinstance(originals, FolderSource):
        for name, start in others(Path(originals.location), options.batch_size).items():
            loaders[name, "originals"] = start
    else:
        print("torchvision and timm are left out: they need --originals with a folder of class folders")

    cpus, effort = available_workers(), (options.passes, options.seconds)
    print(f"{len(source):,} images, {cpus} CPUs, batches of {options.batch_size}")
    parts = []
    for workers in options.workers or worker_counts(cpus):
        for size in options.sizes:
            parts.append(measure(loaders, size, workers, *effort))
            print(parts[-1].to_string(index=False, float_format="{:,.0f}".format), flush=True)
    rows = pd.concat(parts, ignore_index=True)

    rates = dict(zip(options.sizes, options.device_rate or (), strict=False))
    own = rows[(rows["loader"] == mine[0]) & (rows["files"] == mine[1])]
    chosen = recommend_workers(own, rates)
    print(f"recommended: --workers {chosen}")
    for _, row in own[(own["workers"] == chosen) & own["size"].isin(rates)].iterrows():
        print(verdict(row["size"], rates[row["size"]], row["images/s"], chosen, source.prepared, cpus))
    return rows


def main(args: list[str] | None = None) -> None:
    parser = new_parser("benchmark_dataloader", __doc__)
    add = parser.add_argument
    add("--data_dir", required=True, help="whatever the training scripts read")
    add("--originals", help="the folder of class folders a pyramid was made of, for the other loaders")
    add("--sizes", type=int, nargs="+", default=[224, 128, 56], help="of the stages (default: 224 128 56)")
    add("--workers", type=int, nargs="+", help="counts to try (default: 1, 2, 4 ... up to the CPUs)")
    add("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    policies = ("trivial", "rand", "three")
    add("--auto_augment", nargs="+", choices=policies, default=[], help="also measure ours with these")
    add("--passes", type=int, default=3, help="of which the median counts (default: 3)")
    add("--seconds", type=float, default=3.0, help="that a pass takes (default: 3)")
    add("--device_rate", type=float, nargs="+", help="images/s the device trains on, for each of --sizes")
    add("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(args)
    with one_sentence(parser):
        check_least(options, batch_size=1, passes=1)
        if not 0 < options.seconds < math.inf or min(options.sizes) < 1:
            raise UserError("--seconds and all of --sizes must be numbers above 0")
        rows = benchmark(options)
    if options.json:
        rows.to_json(options.json, orient="records", indent=1)


if __name__ == "__main__":
    sys.exit(main())
