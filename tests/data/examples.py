"""Small datasets of every kind, and what to ask a loader for."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image

from common.data.loader import Loader, LoaderSettings
from common.data.order import BatchItem, View
from common.data.sources.base import Source
from common.data.sources.open import DataSettings, open_dataset

RANDOM, CENTRED = View((0.08, 1.0)), View(None)


def picture(number: int, width: int = 50, height: int = 40) -> Image.Image:
    """A flat colour that tells the number."""
    return Image.new("RGB", (width, height), (number * 8 % 256, 128, 255 - number * 8 % 256))


def make_tree(root: Path, classes=("cat", "dog", "owl"), train: int = 6, val: int = 3) -> Path:
    number = 0
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                picture(number).save(root / split / name / f"{k}.jpg", quality=95)
                number += 1
    return root


def opened(data_dir: Path | str, streaming: bool = False) -> tuple[Source, Source]:
    return open_dataset(DataSettings(str(data_dir), streaming))


def make_loader(
    train: Source, val: Source, seed: int = 0, workers: int = 0, skip_unreadable: bool = False, **more
) -> Loader:
    return Loader(train, val, seed=seed, settings=LoaderSettings(workers, skip_unreadable), **more)


def item(*indices: int, size=(32, 32), split: int = 0, epoch: int = 0, view: View = RANDOM) -> BatchItem:
    return BatchItem(split, np.array(indices, np.int64), *size, epoch, view)


def items(count: int, batch: int = 4, images: int = 18, size=(32, 32), epoch: int = 0) -> list[BatchItem]:
    order = np.random.default_rng(epoch).integers(0, images, (count, batch))
    return [item(*row, size=size, epoch=epoch) for row in order]


def encoded(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return {"bytes": buffer.getvalue(), "path": None}


def make_parquet(root: Path, image: str = "img", label: str = "label", val: str = "test") -> Path:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({image: ImageFeature(), label: ClassLabel(names=["a", "b", "c"])})
    for split, count in (("train", 12), (val, 6)):
        rows = [{image: encoded(picture(k)), label: k % 3} for k in range(count)]
        root.mkdir(exist_ok=True)
        Dataset.from_list(rows, features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def make_pyramid(root: Path, images: Sequence[Image.Image] = (), shard: int = 3) -> Path:
    """As `prepare` writes it: levels above an image's own size are null."""
    from datasets import ClassLabel, Features, Value
    from datasets import Image as ImageFeature

    levels = (256, 146, 73)
    features = Features(
        {f"image_{level}": ImageFeature() for level in levels}
        | {"label": ClassLabel(names=["a", "b"]), "height": Value("int32"), "width": Value("int32")}
    )
    rows = []
    sizes = (500, 400), (200, 100), (50, 40), (300, 250)
    for number, image in enumerate(images or [picture(n, *size) for n, size in enumerate(sizes)]):
        width, height = image.size
        row = dict.fromkeys(features) | {"label": number % 2, "height": height, "width": width}
        own = min((level for level in levels if level >= min(width, height)), default=10**6)
        for level in levels:
            if level <= own:
                scale = min(1, level / min(width, height))
                size = round(width * scale), round(height * scale)
                row[f"image_{level}"] = encoded(image.resize(size, Image.Resampling.LANCZOS))
        rows.append(row)
    (root / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        for first in range(0, len(rows), shard):
            name = f"{split}-{first // shard:05d}-of-{-(-len(rows) // shard):05d}.arrow"
            batch = pa.RecordBatch.from_pylist(rows[first : first + shard], schema=features.arrow_schema)
            with (
                pa.OSFile(str(root / "data" / name), "wb") as sink,
                pa.ipc.new_file(sink, batch.schema) as writer,
            ):
                writer.write_batch(batch)
    return root


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}
