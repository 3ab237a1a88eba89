"""From a name to batches: what is found, what is refused, what is cached, and what a worker hands over."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from PIL import Image

from common import UserError
from common.data import loader as data
from common.data.loader import Loader, available_workers, open_dataset
from common.data.order import BatchItem, View
from common.data.sources import cache as cache_module
from common.data.sources import folder as sources
from common.data.sources.folder import FolderSource, MissingSplit, open_source

RANDOM, CENTRED = View((0.08, 1.0)), View(None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache" / "image-classification-training"


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


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "tree")


def opened(data_dir) -> tuple[sources.Source, sources.Source]:
    return open_dataset(SimpleNamespace(data_dir=str(data_dir), streaming=False, workers=None))


def item(*indices: int, size=(32, 32), split: int = 0, epoch: int = 0, view: View = RANDOM) -> BatchItem:
    return BatchItem(split, np.array(indices, np.int64), *size, epoch, view)


def items(count: int, batch: int = 4, images: int = 18, size=(32, 32), epoch: int = 0) -> list[BatchItem]:
    order = np.random.default_rng(epoch).integers(0, images, (count, batch))
    return [item(*row, size=size, epoch=epoch) for row in order]


# --- folders ------------------------------------------------------------------------------------------------


def test_a_tree_is_listed_by_class_and_name(tree):
    train, val = opened(tree)
    assert train.classes == val.classes == ["cat", "dog", "owl"]
    assert train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert train.labels.dtype == np.int64
    assert len(val) == 9
    assert train.describe(7) == str(tree / "train" / "dog" / "1.jpg")
    assert train.read(7, 32).tobytes() == (tree / "train" / "dog" / "1.jpg").read_bytes()
    assert train.fingerprint != val.fingerprint


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_the_validation_split(tree, name):
    (tree / "val").rename(tree / name)
    assert len(opened(tree)[1]) == 9


def test_extensions_nested_folders_and_files_that_are_no_images(tree):
    cat = tree / "train" / "cat"
    (cat / "more" / "deep").mkdir(parents=True)
    picture(1).save(cat / "more" / "deep" / "x.PNG")
    picture(1).save(cat / "y.webp")
    for name in ("notes.txt", "Thumbs.db", "._0.jpg"):
        (cat / name).write_text("no image")
    train, _ = opened(tree)
    assert np.bincount(train.labels).tolist() == [8, 6, 6]


def test_names_in_any_script_and_no_valid_utf8(tree):
    strange = os.fsencode(tree / "train" / "cat") + b"/\xff \xc3\xa9\n.jpg"
    shutil.copy(tree / "train" / "cat" / "0.jpg", strange)
    train, _ = opened(tree)
    place = [i for i in range(len(train)) if os.fsencode(train.describe(i)) == strange]
    assert train.read(place[0], 32).tobytes() == (tree / "train" / "cat" / "0.jpg").read_bytes()


def count_scans(monkeypatch) -> list[int]:
    scans = []
    scan = sources._scan
    monkeypatch.setattr(sources, "_scan", lambda root: scans.append(1) or scan(root))
    return scans


def test_the_second_start_reads_the_manifest(tree, monkeypatch, cache):
    before = opened(tree)
    scans = count_scans(monkeypatch)
    after = opened(tree)
    assert not scans
    assert [s.fingerprint for s in before] == [s.fingerprint for s in after]
    assert len(list((cache / "manifests").iterdir())) == 2
    assert sorted(path.name for path in tree.iterdir()) == [
        "train",
        "val",
    ]  # nothing is written into the dataset


@pytest.mark.parametrize("change", ["add", "remove", "rename", "new class", "deep"])
def test_a_changed_folder_is_noticed(tree, monkeypatch, change):
    train = tree / "train"
    (train / "cat" / "deep").mkdir()
    shutil.copy(train / "cat" / "0.jpg", train / "cat" / "deep" / "0.jpg")
    before = open_source(str(tree), "train")
    scans = count_scans(monkeypatch)
    time.sleep(0.02)  # a directory's time has the resolution of the kernel's clock
    if change == "add":
        shutil.copy(train / "cat" / "0.jpg", train / "cat" / "9.jpg")
    elif change == "remove":
        (train / "owl" / "0.jpg").unlink()
    elif change == "rename":
        (train / "dog" / "0.jpg").rename(train / "dog" / "zero.jpg")
    elif change == "new class":
        shutil.copytree(train / "cat", train / "ant")
    else:
        shutil.copy(train / "cat" / "0.jpg", train / "cat" / "deep" / "1.jpg")
    after = open_source(str(tree), "train")
    assert scans
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("damage", ["empty", "text", "cut short", "one bit"])
def test_a_damaged_manifest_is_made_again(tree, monkeypatch, cache, damage):
    before = open_source(str(tree), "train")
    labels = before.labels.tolist()
    [manifest] = (cache / "manifests").iterdir()
    content = bytearray(manifest.read_bytes())
    if damage == "empty":
        content.clear()
    elif damage == "text":
        content = bytearray(b"not Arrow")
    elif damage == "cut short":
        del content[len(content) // 2 :]
    else:
        content[content.index(b"dog/1.jpg") + 4] ^= 1
    manifest.unlink()  # or the map of `before` would change
    manifest.write_bytes(content)
    scans = count_scans(monkeypatch)
    after = open_source(str(tree), "train")
    assert scans
    assert after.describe(7) == before.describe(7)
    assert after.labels.tolist() == labels


def test_sizes_are_as_seen_and_cached(tree, monkeypatch, cache, caplog):
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(0, 70, 30).save(tree / "train" / "cat" / "0.jpg", exif=turned)
    picture(0, 33, 44).save(tree / "train" / "cat" / "1.jpg", icc_profile=bytes(200_000))
    (tree / "train" / "cat" / "2.jpg").write_text("no image")
    train = open_source(str(tree), "train")
    assert train.sizes()[:4].tolist() == [[70, 30], [44, 33], [1, 1], [40, 50]]
    assert "cat/2.jpg" in caplog.text
    monkeypatch.setattr(sources, "_scan_sizes", None)
    again = open_source(str(tree), "train").sizes()
    assert again.shape == (18, 2)
    assert again.dtype == np.int32
    assert again[0].tolist() == [70, 30]


def test_damaged_sizes_are_made_again(tree, cache):
    open_source(str(tree), "train").sizes()
    [cached] = (cache / "sizes").iterdir()
    cached.write_bytes(b"not Arrow")
    assert open_source(str(tree), "train").sizes()[0].tolist() == [40, 50]


def test_sizes_of_a_resized_copy_are_its_own(tree, tmp_path):
    """The same names, other pixels."""
    copy = shutil.copytree(tree, tmp_path / "copy")
    for path in copy.rglob("*.jpg"):
        picture(0, 20, 10).save(path)
    first, second = open_source(str(tree), "train"), open_source(str(copy), "train")
    assert first.fingerprint == second.fingerprint
    assert first.sizes()[0].tolist() == [40, 50]
    assert second.sizes()[0].tolist() == [10, 20]


def test_a_cache_folder_that_cannot_be_written(tree, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file in the way")
    train, _ = opened(tree)
    assert len(train) == 18
    assert train.sizes()[0].tolist() == [40, 50]
    assert "not kept for the next start" in caplog.text


def refused(data_dir) -> str:
    with pytest.raises(UserError) as caught:
        opened(data_dir)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_what_is_refused_is_named(tree, tmp_path):
    assert "--data_dir is empty" in refused("")
    assert "/nowhere is not a folder" in refused("/nowhere")
    assert "readme is not a folder" in refused(write(tmp_path / "readme"))
    (tree / "train" / "empty").mkdir()
    assert f"{tree}/train/empty holds no images" in refused(tree)
    (tree / "train" / "empty").rmdir()
    (tree / "val" / "owl").rename(tree / "val" / "eagle")
    assert "val lacks 1 classes: owl" in refused(tree)
    shutil.rmtree(tree / "val" / "eagle")
    assert "val lacks 1 classes: owl" in refused(tree)
    shutil.copytree(tree / "val" / "dog", tree / "val" / "owl")
    shutil.rmtree(tree / "train" / "dog")
    assert "train lacks 1 classes: dog" in refused(tree)
    shutil.rmtree(tree / "val")
    assert "has no val or validation" in refused(tree)
    with pytest.raises(MissingSplit, match=r"common\.tools\.split"):
        open_source(str(tree / "train"), "train")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    assert "no class folders" in refused(tmp_path / "flat")


def write(path: Path) -> Path:
    path.write_text("text")
    return path


def test_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    assert "the hub gave no such dataset: no network" in refused("org/name")


# --- Arrow and Parquet --------------------------------------------------------------------------------------


def encoded(image: Image.Image) -> dict:
    import io

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


@pytest.mark.parametrize(
    ("image", "label", "val"), [("img", "label", "test"), ("image", "fine", "validation")]
)
def test_parquet_columns_are_found_by_type(tmp_path, image, label, val):
    train, evaluation = opened(make_parquet(tmp_path / "data", image, label, val))
    assert train.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [k % 3 for k in range(12)]
    assert len(evaluation) == 6
    assert train.read(5, 32).tobytes() == encoded(picture(5))["bytes"]
    assert train.sizes().tolist() == [[40, 50]] * 12
    assert train.describe(5).startswith("row 5 of train")
    assert not train.prepared


def make_pyramid(root: Path, sizes=((500, 400), (200, 100), (50, 40), (300, 250)), shard: int = 3) -> Path:
    """As `prepare` writes it: levels above an image's own size are null."""
    from datasets import ClassLabel, Features, Value
    from datasets import Image as ImageFeature

    levels = (256, 146, 73)
    features = Features(
        {f"image_{level}": ImageFeature() for level in levels}
        | {"label": ClassLabel(names=["a", "b"]), "height": Value("int32"), "width": Value("int32")}
    )
    rows = []
    for number, (width, height) in enumerate(sizes):
        row = dict.fromkeys(features) | {"label": number % 2, "height": height, "width": width}
        own = min((level for level in levels if level >= min(width, height)), default=10**6)
        for level in levels:
            if level <= own:
                scale = min(1, level / min(width, height))
                row[f"image_{level}"] = encoded(picture(number, round(width * scale), round(height * scale)))
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


def test_a_pyramid_gives_the_level_that_serves_the_size(tmp_path):
    train, val = opened(make_pyramid(tmp_path / "pyramid"))

    def short_side(index: int, size: int) -> int:
        return min(sources.read_header(train.read(index, size))[:2])

    assert train.prepared
    assert len(val) == 4
    assert [short_side(0, size) for size in (32, 56, 64, 65, 112, 128, 129, 160, 224, 384)] == [
        *(73, 73, 73),
        *(146, 146, 146),
        *(256, 256, 256, 256),
    ]
    assert [short_side(1, size) for size in (56, 128, 224)] == [73, 100, 100]  # stored once, at its own size
    assert [short_side(2, size) for size in (56, 128, 224)] == [40, 40, 40]
    assert train.sizes().tolist() == [[400, 500], [100, 200], [40, 50], [250, 300]]
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert train.describe(3) == f"row 0 of {tmp_path}/pyramid/data/train-00001-of-00002.arrow"


def test_plain_datasets_opens_a_pyramid(tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(make_pyramid(tmp_path / "pyramid")), split="train")
    assert loaded[1]["image_146"].size == (200, 100)
    assert loaded[1]["image_256"] is None


def test_a_damaged_shard_is_named(tmp_path):
    root = make_pyramid(tmp_path / "pyramid")
    shard = root / "data" / "train-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} is damaged" in refused(root)


def test_levels_and_original_give_the_same_crop(tmp_path):
    """Through the whole loader: a gradient tells where a crop lies."""
    ramp = np.linspace(0, 255, 800, dtype=np.uint8)
    gradient = Image.fromarray(
        np.dstack([np.tile(ramp, (800, 1)), np.tile(ramp[:, None], (1, 800)), np.zeros((800, 800), np.uint8)])
    )
    tree = make_tree(tmp_path / "tree", classes=("a",), train=1, val=1)
    for split in ("train", "val"):
        gradient.save(tree / split / "a" / "0.jpg", quality=98, subsampling=0)
    (tmp_path / "pyramid").mkdir()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "common.tools.prepare",
            "--data_dir",
            tree,
            "--out",
            tmp_path / "pyramid" / "p",
            "--workers",
            "0",
        ],
        check=True,
        capture_output=True,
        cwd=Path(data.__file__).parents[2],
    )
    for size in (48, 112, 224):
        shown = []
        for place in (tree, tmp_path / "pyramid" / "p"):
            loader = Loader(*opened(place), seed=3, workers=0)
            [batch] = loader.stream([item(0, size=(size, size), epoch=7)])
            shown.append(batch.images.float())
        assert (shown[0] - shown[1]).abs().mean() < 3


# --- the loader ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_are_what_the_items_say(tree, workers):
    train, val = opened(tree)
    wanted = [
        item(3, 1, 17),
        item(8, size=(48, 64), split=1, view=CENTRED),
        *items(20),
        item(0, 1, size=(40, 24)),
    ]
    loader = Loader(train, val, seed=0, workers=workers)
    batches = list(loader.stream(wanted))
    loader.close()
    assert len(batches) == len(wanted)
    for batch, want in zip(batches, wanted, strict=True):
        source = (train, val)[want.split]
        np.testing.assert_array_equal(batch.item.indices, want.indices)
        assert batch.images.shape == (len(want.indices), 3, want.height, want.width)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.tolist() == source.labels[want.indices].tolist()
        numbers = want.indices + (18 if want.split else 0)  # the colour is the picture's number
        assert (batch.images[:, 0].float().mean((1, 2)).numpy() - numbers * 8 % 256).max() < 4
        assert batch.wait_s >= 0


def test_pixels_do_not_depend_on_workers_or_what_was_loaded_before(tree):
    train, val = opened(tree)
    wanted = items(12)
    streams = []
    for workers in (0, 1, 2):
        loader = Loader(train, val, seed=4, workers=workers)
        list(loader.stream(items(workers, epoch=9)))
        streams.append(torch.stack([batch.images for batch in loader.stream(wanted)]))
        loader.close()
    assert torch.equal(streams[0], streams[1])
    assert torch.equal(streams[0], streams[2])


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("taken", [0, 1, 5, 19])
def test_a_stream_that_is_left_does_not_disturb_the_next(tree, taken):
    train, val = opened(tree)
    loader = Loader(train, val, seed=0, workers=2, prefetch=2)
    first = loader.stream(items(20, epoch=1))
    for _ in range(taken):
        next(first)
    processes = children()
    wanted = items(15, epoch=2)
    for _ in range(3):
        batches = list(loader.stream(wanted))
        assert [b.item.indices.tolist() for b in batches] == [w.indices.tolist() for w in wanted]
    if taken:
        assert children() == processes  # the same workers
        with pytest.raises(AssertionError, match="ended when another one was begun"):
            next(first)
    del batches, first
    assert len(loader._slots._free) == len(loader._slots.slots)
    loader.close()
    assert not children() & processes


def test_slots_are_used_again_and_never_while_somebody_looks(tree):
    train, val = opened(tree)
    loader = Loader(train, val, seed=0, workers=1, prefetch=2)
    wanted = items(40)
    kept = list(loader.stream(wanted))  # far more than there are slots
    alone = [next(Loader(train, val, seed=0, workers=0).stream([want])).images for want in wanted[:40:13]]
    list(loader.stream(items(30, epoch=5)))
    for batch, image in zip(kept[::13], alone, strict=True):
        assert torch.equal(batch.images, image)
    del kept, batch
    places = {batch.images.data_ptr() for batch in loader.stream(items(60, epoch=6))}
    assert len(places) <= len(loader._slots.slots)
    loader.close()


def test_a_larger_batch_than_before_fits(tree):
    train, val = opened(tree)
    loader = Loader(train, val, seed=0, workers=1, prefetch=1)
    for size in (16, 96, 32, 200):
        [*_, last] = loader.stream(items(8, size=(size, size)))
        [want] = Loader(train, val, seed=0, workers=0).stream([last.item])
        assert torch.equal(last.images, want.images)
    loader.close()


BAD = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "truncated"),
    "text": (lambda path: path.write_text("<html>"), "not an image"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_image_is_named(tree, kind, workers):
    train, val = opened(tree)
    bad = tree / "train" / "dog" / "2.jpg"
    damage, why = BAD[kind]
    damage(bad)
    loader = Loader(train, val, seed=0, workers=workers)
    stream = loader.stream([item(0, 1), item(2, 8, 3), item(4)])
    next(stream)
    with pytest.raises(UserError) as caught:
        next(stream)
    assert str(bad) in str(caught.value)
    assert why in str(caught.value)
    assert "--skip_unreadable" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(list(loader.stream([item(0), item(1)]))) == 2  # the loader lives on
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BAD)
def test_another_image_of_the_class_stands_in(tree, kind, workers, caplog):
    train, val = opened(tree)
    for name in ("2.jpg", "3.jpg", "5.jpg"):
        BAD[kind][0](tree / "train" / "dog" / name)
    loader = Loader(train, val, seed=0, workers=workers, skip_unreadable=True)
    for epoch in range(2):
        [batch] = loader.stream([item(0, 8, 11, epoch=epoch)])
        assert batch.labels.tolist() == [0, 1, 1]
        assert batch.item.indices.tolist() == [0, 8, 11]
        shown = batch.images[:, 0].float().mean((1, 2))
        assert (shown - torch.tensor([0, 10, 6]) * 8).abs().max() < 4  # 8 and 9 are bad: 10; 11 is: 6
    loader.close()
    assert sorted(Path(path).name for path in loader.unreadable) == ["2.jpg", "3.jpg", "5.jpg"]
    assert len(caplog.records) == 3


def test_a_class_without_any_readable_image(tree):
    train, val = opened(tree)
    for path in (tree / "train" / "dog").iterdir():
        path.write_text("no image")
    loader = Loader(train, val, seed=0, workers=0, skip_unreadable=True)
    with pytest.raises(UserError, match="nor any other image of its class"):
        next(loader.stream([item(0, 8)]))


def test_workers_come_from_the_cpus_this_process_may_use(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(data, "CGROUP_QUOTAS", ((quota, None),))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert available_workers() == 12
    quota.write_text("max 100000\n")
    assert available_workers() == 12
    quota.write_text("350000 100000\n")
    assert available_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_workers() == 1
    quota.write_text("max 100000\n")
    assert available_workers() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert available_workers() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(256)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert available_workers() == data.MAX_WORKERS


ORPHANS = """
import json, sys, time
from pathlib import Path
from common.data.loader import Loader
from tests.test_data import children, items, opened

loader = Loader(*opened(Path(sys.argv[1])), seed=0, workers=2, prefetch=8)
stream = loader.stream(items(20, batch=4000, size=(8, 8)))  # answers that fill a pipe, when nobody reads it
next(stream)
print(json.dumps(sorted(children())), flush=True)
time.sleep(60)
"""


def test_workers_end_when_the_trainer_is_killed(tree):
    root = Path(__file__).parents[2]
    trainer = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tree)], cwd=root, stdout=subprocess.PIPE)
    workers = json.loads(trainer.stdout.readline())
    assert len(workers) == 2
    time.sleep(3)  # for the pipe to fill
    trainer.kill()
    deadline = time.monotonic() + 20
    while (left := list(filter(psutil.pid_exists, workers))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    trainer.communicate()
    assert not left


# --- scale --------------------------------------------------------------------------------------------------


MEMORY = """
import json, os, sys
from pathlib import Path
import psutil
from common.data.loader import Loader
from tests.test_data import children, items, opened

train, val = opened(Path(sys.argv[1]))
others = children()
loader = Loader(train, val, seed=0, workers=2)

def memory():
    for _ in loader.stream(items(150, batch=16, size=(96, 96))):
        pass
    processes = map(psutil.Process, [os.getpid(), *sorted(children() - others)])
    return [process.memory_full_info().uss / 1e6 for process in processes]

print(json.dumps([memory() for _ in range(6)]))
loader.close()
"""


def test_memory_is_flat_over_many_epochs(tree):
    """In a process of its own: a worker slowly copies what it inherits, which here would be all earlier tests' memory."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tree)], cwd=root, capture_output=True, check=True
    )
    epochs = json.loads(done.stdout)
    assert len(epochs[0]) == 3
    assert max(now - then for now, then in zip(epochs[-1], epochs[1], strict=True)) < 4


MANY = 1_281_167

IMAGENET = """
import json, resource, sys, time
import numpy as np
from common.data.sources.folder import FolderSource
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

start, before = time.process_time(), resident()
source = FolderSource(Path(sys.argv[1]))
opened = time.process_time() - start
start = time.process_time()
sizes = source.sizes()
sized = time.process_time() - start
print(json.dumps([len(source), source.describe(1_000_000), sizes.shape, opened, sized, resident() - before]))
"""


def test_one_million_images_start_at_once(tmp_path, monkeypatch, cache):
    """A made-up manifest of ImageNet's size: no files, but directories with the times it says."""
    root = tmp_path / "train"
    names = [f"n{k:08d}" for k in range(1000)]
    for name in names:
        (root / name).mkdir(parents=True)
    per_class = np.diff(np.linspace(0, MANY, 1001).astype(int))
    labels = np.repeat(np.arange(1000), per_class)
    numbers = np.arange(MANY)
    digits = (
        (labels[:, None] // 10 ** np.arange(7, -1, -1)) % 10,
        (numbers[:, None] // 10 ** np.arange(7, -1, -1)) % 10,
    )
    paths = np.empty((MANY, 9 + 1 + 9 + 8 + 5), np.uint8)
    paths[:] = np.frombuffer(b"n00000000/n00000000_00000.JPEG  "[:32].ljust(32), np.uint8)
    paths[:, 1:9] = digits[0] + 48
    paths[:, 11:19] = digits[0] + 48
    paths[:, 20:25] = digits[1][:, 3:] + 48
    paths = paths[:, :30]
    offsets = np.arange(MANY + 1) * paths.shape[1]
    blob = paths.tobytes()
    array = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), MANY, [None, pa.py_buffer(offsets), pa.py_buffer(blob)]
    )
    folders = [("", root.stat().st_mtime_ns)] + [
        (f"{name}/", (root / name).stat().st_mtime_ns) for name in names
    ]
    digest = cache_module.fingerprint_of(names, offsets, np.frombuffer(blob, np.uint8), labels)
    table = pa.table({"path": array, "label": labels}).replace_schema_metadata(
        {"classes": json.dumps(names), "directories": json.dumps(folders), "fingerprint": digest}
    )
    key = sources._manifest_path(os.fsencode(root) + b"/")
    cache_module.write_arrow(key, table)
    sides = np.full(MANY, 500, np.int32)
    place = cache_module.fingerprint_of(os.fsencode(root) + b"/", json.dumps(folders), digest)
    cache_module.write_arrow(cache / "sizes" / f"{place}.arrow", pa.table({"height": sides, "width": sides}))
    result = subprocess.run(
        [sys.executable, "-c", IMAGENET, root], capture_output=True, text=True, check=True
    )
    count, path, shape, opened_s, sized_s, added_mb = json.loads(result.stdout)
    assert count == MANY
    assert path.startswith(f"{root}/n00000780/n00000780_")
    assert shape == [MANY, 2]
    assert opened_s < 2
    assert sized_s < 2
    assert added_mb < 200  # on top of what importing torch takes
    assert isinstance(FolderSource(root)._manifest.paths, np.ndarray)
