"""Shards that stay in object storage: every image once an epoch, whoever reads, wherever one stops."""

import io
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from common import UserError
from common.data.order import BatchItem, View, local_items, streaming_epoch
from common.data.sources import remote
from common.data.sources import stream as streaming
from common.data.sources.open import DataSettings, open_dataset
from common.data.sources.stream import StreamSource, open_stream
from tests import forked
from tests.data.examples import make_loader

VIEW = View((0.5, 1.0))


def picture(number: int, width: int, height: int) -> dict:
    buffer = io.BytesIO()
    Image.new("L", (width, height), 2 * number).save(buffer, "JPEG", quality=95)
    return {"bytes": buffer.getvalue(), "path": None}


def number_of(images: torch.Tensor) -> list[int]:
    """Read the numbers back from the greys."""
    return (images.float().mean((1, 2, 3)) / 2).round().int().tolist()


def schema(levels: tuple[str, ...] = ("image",), small: tuple[str, ...] = ()) -> pa.Schema:
    from datasets import ClassLabel, Features, Value
    from datasets import Image as ImageFeature

    columns = {level: ImageFeature() for level in levels} | {"label": ClassLabel(names=["a", "b", "c"])}
    return Features(columns | {side: Value("int32") for side in small}).arrow_schema


def make_shards(root: Path, shards: int = 4, groups: int = 3, rows: int = 10, val: int = 15) -> Path:
    """Parquet files `train-0.parquet` ... of some row groups; image i has grey 2 i and label i % 3."""
    root.mkdir()
    for split, count, files in (("train", groups * rows, shards), ("validation", val, 1)):
        for shard in range(files):
            numbers = range(
                shard * count, shard * count + count - (shard == 1)
            )  # the second is shorter by one
            table = [{"image": picture(number, 40, 30), "label": number % 3} for number in numbers]
            pq.write_table(
                pa.Table.from_pylist(table, schema()),
                root / f"{split}-{shard:05d}.parquet",
                row_group_size=rows,
            )
    return root


TRAIN = [number for number in range(120) if number != 59]  # the numbers of make_shards


@pytest.fixture
def shards(tmp_path) -> Path:
    return make_shards(tmp_path / "shards")


def upload(s3, folder: Path, prefix: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.client.upload_file(str(path), s3.bucket, f"{prefix}/{path.relative_to(folder)}")
    return f"s3://{s3.bucket}/{prefix}"


@pytest.fixture
def endpoint(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    return s3


def opened(data_dir, streaming: bool = True):
    return open_dataset(DataSettings(str(data_dir), streaming))


# --- the order ----------------------------------------------------------------------------------------------


def test_an_epoch_has_every_row_once_and_another_order_each_time():
    rows = np.array([100, 3, 0, 250, 97, 100, 50])
    epochs = [streaming_epoch(rows, 32, 24, seed=1, epoch=epoch).indices for epoch in range(3)]
    for matrix in epochs:
        assert matrix.shape == (600 // 24, 24)
        assert sorted(matrix.flatten().tolist()) == list(range(600))
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(epochs[1], streaming_epoch(rows, 32, 24, seed=1, epoch=1).indices)
    assert not np.array_equal(epochs[1], streaming_epoch(rows, 32, 24, seed=2, epoch=1).indices)


def test_what_does_not_fill_a_batch_varies():
    left_out = [
        set(range(605)) - set(streaming_epoch(np.array([55] * 11), 32, 60, 0, e).indices.flat) for e in (0, 1)
    ]
    assert [len(rows) for rows in left_out] == [5, 5]
    assert left_out[0] != left_out[1]


def test_few_groups_are_in_use_at_a_time_and_each_process_has_its_own():
    """ImageNet in row groups of 100: what a process fetches, and how much of it has to be kept."""
    rows = np.full(12_812, 100)
    matrix = streaming_epoch(rows, 224, 1024, seed=0, epoch=0)
    groups_of_process = []
    for rank in range(4):
        items = list(
            local_items(matrix, epoch=0, view=VIEW, rank=rank, world=4, accumulation=2, start_step=0)
        )
        steps = [np.unique(item.indices // 100) for item in items]
        first, last = np.full(len(rows), len(steps)), np.zeros(len(rows), int)
        for step, groups in enumerate(steps):
            first[groups], last[groups] = np.minimum(first[groups], step), step
        used = first < len(steps)
        in_use = [int(((first <= step) & (step <= last)).sum()) for step in range(0, len(steps), 50)]
        assert max(in_use) < 80
        groups_of_process.append(used)
    fetched = np.sum(groups_of_process, axis=0)
    assert fetched.min() >= 1
    assert fetched.mean() < 1.05  # nearly no group travels to two processes


def test_neighbours_are_parted():
    """Rows of one group end up spread over the window, not side by side."""
    matrix = streaming_epoch(np.full(1000, 100), 224, 256, seed=0, epoch=0)
    images = [np.bincount(row // 100).max() for row in matrix.indices]
    assert np.mean(images) < 12


# --- shards on this machine ---------------------------------------------------------------------------------


def test_rows_labels_and_groups_come_from_the_footers(shards):
    train, val = opened(shards)
    assert len(train) == 119
    assert len(val) == 15
    assert train.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [number % 3 for number in TRAIN]
    assert train.group_rows.tolist() == [10] * 5 + [9] + [10] * 6
    assert [train.read(i, 32).tobytes() for i in (0, 58, 59, 118)] == [
        picture(number, 40, 30)["bytes"] for number in (0, 58, 60, 119)
    ]
    assert train.describe(60) == f"row 1 of row group 0 of {shards}/train-00002.parquet"


def test_the_second_start_does_not_read_the_footers(shards, monkeypatch):
    before, _ = opened(shards)
    monkeypatch.setattr(streaming, "read_groups", None)
    after, _ = opened(shards)
    assert after.fingerprint == before.fingerprint
    assert after.labels.tolist() == before.labels.tolist()
    monkeypatch.undo()


def test_a_group_is_fetched_once_for_all_processes(shards, monkeypatch, tmp_path):
    fetches = tmp_path / "fetches"
    original = streaming.read_groups

    def counted(storage, path, columns, group):
        with open(fetches, "a") as file:
            file.write(f"{path} {group}\n")
        return original(storage, path, columns, group)

    train, val = opened(shards)
    monkeypatch.setattr(streaming, "read_groups", counted)
    order = np.random.default_rng(0).permutation(119)
    loader = make_loader(train, val, seed=0, workers=2)
    items = [BatchItem(0, chosen, 32, 32, 0, VIEW) for chosen in np.array_split(order, 20)]
    numbers = [number for batch in loader.stream(items) for number in number_of(batch.images)]
    loader.close()
    assert numbers == [TRAIN[index] for index in order]
    lines = fetches.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 12


def test_what_is_kept_is_limited(shards, monkeypatch, cache):
    monkeypatch.setattr(streaming, "MAPPED", 2)
    train, _ = opened(shards)
    train.read(0, 32)
    [kept] = (cache / "streams" / train.fingerprint).glob("*-*.arrow")
    monkeypatch.setattr(streaming, "KEEP_BYTES", 3 * kept.stat().st_size)
    for sweep in range(2):
        for index in range(sweep, 119, 7):
            assert train.read(index, 32).tobytes() == picture(TRAIN[index], 40, 30)["bytes"]
    assert len(list((cache / "streams" / train.fingerprint).glob("*-*.arrow"))) <= 4


def test_a_damaged_copy_is_fetched_again(shards, cache):
    opened(shards)[0].read(0, 32)
    [kept] = cache.glob("streams/*/*-*.arrow")
    kept.write_bytes(kept.read_bytes()[:-50])
    assert opened(shards)[0].read(3, 32).tobytes() == picture(3, 40, 30)["bytes"]


def test_a_pyramid_is_streamed_by_level(tmp_path, cache):
    root = tmp_path / "pyramid"
    (root / "data").mkdir(parents=True)
    shape = schema(("image_256", "image_146", "image_73"), ("height", "width"))
    for split in ("train", "validation"):
        rows = []
        for number in range(12):
            small = number % 4 == 0  # stored once
            rows.append(
                {
                    "image_256": None if small else picture(number, 300, 256),
                    "image_146": picture(number, 120, 100) if small else picture(number, 170, 146),
                    "image_73": picture(number, 88, 73),
                    "label": number % 3,
                    "height": 100 if small else 512,
                    "width": 120 if small else 600,
                }
            )
        path = str(root / "data" / f"{split}-00000-of-00001.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, shape) as writer:
            for first in range(0, 12, 5):
                writer.write_batch(pa.RecordBatch.from_pylist(rows[first : first + 5], shape))
    train, val = opened(root)
    whole, _ = opened(root, streaming=False)
    assert train.prepared
    assert train.group_rows.tolist() == [5, 5, 2]
    np.testing.assert_array_equal(train.sizes(), whole.sizes())
    for size in (56, 128, 224):
        for index in range(12):
            assert train.read(index, size).tobytes() == whole.read(index, size).tobytes()
    [batch] = make_loader(train, val, seed=0, workers=0).stream(
        [BatchItem(0, np.arange(12), 128, 128, 0, VIEW)]
    )
    assert number_of(batch.images) == list(range(12))


def test_what_is_refused(tmp_path, shards):
    (tmp_path / "empty").mkdir()
    for data_dir, why in ((tmp_path / "empty", "holds no Parquet or Arrow files"), (shards, None)):
        if why:
            with pytest.raises(UserError, match=why):
                opened(data_dir)
    with pytest.raises(UserError, match="no image sizes beforehand"):
        open_stream(str(shards), ("train",)).sizes()
    (shards / "validation-00000.parquet").unlink()
    with pytest.raises(UserError, match="no shards named val or validation"):
        opened(shards)


@pytest.mark.parametrize(
    "path",
    [
        "train-00000-of-00002.parquet",
        "data/train-00000-of-00002-abc.parquet",
        "train/0000.parquet",
        "default/train/part.parquet",
        "train.parquet",
    ],
)
def test_shards_of_a_split_are_found_by_name(tmp_path, path):
    table = pa.Table.from_pylist([{"image": picture(0, 9, 9), "label": 0}], schema())
    for name in (path, path.replace("train", "test"), path.replace("train", "trainer")):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / "d" / name)
    source = open_stream(str(tmp_path / "d"), ("train",))
    assert len(source) == 1
    assert source.location.endswith(path)


# --- shards in S3 -------------------------------------------------------------------------------------------


def epoch_numbers(source: StreamSource, rank: int, world: int, steps: slice = slice(None)) -> list[list[int]]:
    """What a process sees at each step of an epoch."""
    matrix = streaming_epoch(source.group_rows, 32, 16, seed=3, epoch=2)
    items = local_items(matrix, epoch=2, view=VIEW, rank=rank, world=world, accumulation=1, start_step=0)
    loader = make_loader(source, source, seed=3, workers=2)
    numbers = [number_of(batch.images) for batch in loader.stream(list(items)[steps])]
    loader.close()
    return numbers


PROCESS = """
import json, sys
from tests.data.sources.test_stream import epoch_numbers, open_stream
source, rank = open_stream(sys.argv[1], ("train",)), int(sys.argv[2])
print(json.dumps([epoch_numbers(source, rank, 2), epoch_numbers(source, rank, 2, slice(3))]))
"""


def test_two_processes_see_every_image_once_and_resume_loses_none(shards, endpoint, tmp_path):
    url = upload(endpoint, shards, "streaming/two")
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    outputs = [tmp_path / "0", tmp_path / "1"]
    processes = []
    for rank, output in enumerate(outputs):
        output.mkdir()
        processes.append(forked.start([str(script), url, str(rank)], output, dict(os.environ)))
    for process in processes:
        process.join(500)
    whole, before = zip(*(json.loads((output / "stdout").read_text()) for output in outputs), strict=True)
    after = epoch_numbers(open_stream(url, ("train",)), 0, 1, slice(3, None))  # goes on, with one process
    steps = [a + b for a, b in zip(*whole, strict=True)]
    assert len(steps) == 119 // 16
    seen = [number for step in steps for number in step]
    assert len(seen) == len(set(seen)) == 112
    assert set(seen) <= set(TRAIN)
    assert [a + b for a, b in zip(*before, strict=True)] + after == steps


def test_without_streaming_it_is_downloaded_once(shards, endpoint, monkeypatch, cache):
    url = upload(endpoint, shards, "streaming/download")
    train, val = opened(url, streaming=False)
    assert train.labels.tolist() == [number % 3 for number in TRAIN]
    assert len(val) == 15
    assert train.group_rows is None
    monkeypatch.setattr(remote, "_copy", None)
    assert opened(url, streaming=False)[0].fingerprint == train.fingerprint
    assert not list(cache.rglob("*.tmp"))


def test_too_small_a_disk_for_a_download(shards, endpoint, monkeypatch):
    url = upload(endpoint, shards, "streaming/disk")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="pass --streaming"):
        opened(url, streaming=False)


def test_an_interruption_is_survived_and_a_long_one_is_said(shards, endpoint, monkeypatch, caplog):
    url = upload(endpoint, shards, "streaming/outage")
    train, val = opened(url)
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            endpoint.start()

    monkeypatch.setattr(remote, "sleep", sleep)
    endpoint.stop()
    with caplog.at_level(logging.WARNING):
        assert train.read(5, 32).tobytes() == picture(5, 40, 30)["bytes"]
    assert pauses == [1, 2]
    assert "trying again" in caplog.text
    endpoint.stop()
    monkeypatch.setattr(remote, "sleep", lambda seconds: None)
    loader = make_loader(train, val, seed=0, workers=0, skip_unreadable=True)
    with pytest.raises(UserError, match=r"cannot read row group 0 of .*train-00001") as caught:
        next(loader.stream([BatchItem(0, np.array([35]), 32, 32, 0, VIEW)]))
    assert "\n" not in str(caught.value)
    assert "skip_unreadable" not in str(caught.value)
    endpoint.start()


def test_a_bucket_that_is_not_there(endpoint):
    with pytest.raises(UserError, match=r"--data_dir s3://no-such-bucket/x"):
        opened("s3://no-such-bucket/x")


def test_hub_names_become_urls(monkeypatch):
    urls = []

    class Listed(Exception):
        pass

    def files(self):
        self.system()
        urls.append((self.url, self.root))
        raise Listed

    monkeypatch.setattr(remote.Storage, "files", files)
    for name in ("org/name", "hf://datasets/org/name"):
        with pytest.raises(Listed):
            open_stream(name, ("train",))
    assert urls == [("hf://datasets/org/name", "datasets/org/name")] * 2
