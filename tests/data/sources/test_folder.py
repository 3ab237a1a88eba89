"""Folders of class folders: listed once, by one process, and again when they change."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from common import UserError
from common.data.sources import cache as cache_module
from common.data.sources import folder as sources
from common.data.sources.folder import FolderSource
from common.data.sources.open import open_source
from tests.data.examples import opened, picture


def test_a_tree_is_listed_by_class_and_name(tree):
    train, val = opened(tree)
    assert train.classes == val.classes == ["cat", "dog", "owl"]
    assert train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert train.labels.dtype == np.int64
    assert len(val) == 9
    assert train.describe(7) == str(tree / "train" / "dog" / "1.jpg")
    assert train.read(7, 32).tobytes() == (tree / "train" / "dog" / "1.jpg").read_bytes()
    assert train.fingerprint != val.fingerprint


def test_extensions_nested_folders_and_files_that_are_no_images(tree):
    cat = tree / "train" / "cat"
    (cat / "more" / "deep").mkdir(parents=True)
    picture(1).save(cat / "more" / "deep" / "x.PNG")
    picture(1).save(cat / "y.webp")
    for name in ("notes.txt", "Thumbs.db", "._0.jpg"):
        (cat / name).write_text("no image")
    train, _ = opened(tree)
    assert np.bincount(train.labels).tolist() == [8, 6, 6]


def test_what_notebooks_and_file_servers_leave_behind_is_passed_over(tree):
    for folder in (".ipynb_checkpoints", "@eaDir/0.jpg"):
        (tree / "train" / "cat" / folder).mkdir(parents=True)
        shutil.copy(tree / "train" / "cat" / "0.jpg", tree / "train" / "cat" / folder / "copy.jpg")
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    train, _ = opened(tree)
    assert np.bincount(train.labels).tolist() == [6, 6, 6]


def test_folders_that_cannot_be_listed_are_named(tree):
    (tree / "train" / "cat" / "self").symlink_to(tree / "train" / "cat")
    with pytest.raises(UserError, match="Too many levels"):
        opened(tree)
    (tree / "train" / "cat" / "self").unlink()
    os.rename(tree / "train" / "owl", os.fsencode(tree / "train") + b"/\xe9t\xe9")
    with pytest.raises(UserError, match="name is not UTF-8"):
        opened(tree)


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
    assert len(list((cache / "manifests").glob("*.arrow"))) == 2
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


@pytest.mark.parametrize("damage", ["empty", "text", "cut short"])
def test_a_damaged_manifest_is_made_again(tree, monkeypatch, cache, damage):
    before = open_source(str(tree), "train")
    labels = before.labels.tolist()
    [manifest] = (cache / "manifests").glob("*.arrow")
    content = bytearray(manifest.read_bytes())
    if damage == "empty":
        content.clear()
    elif damage == "text":
        content = bytearray(b"not Arrow")
    elif damage == "cut short":
        del content[len(content) // 2 :]
    manifest.unlink()  # or the map of `before` would change
    manifest.write_bytes(content)
    scans = count_scans(monkeypatch)
    after = open_source(str(tree), "train")
    assert scans
    assert after.describe(7) == before.describe(7)
    assert after.labels.tolist() == labels


def test_a_cache_folder_that_cannot_be_written(tree, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file in the way")
    train, _ = opened(tree)
    assert len(train) == 18
    assert train.sizes()[0].tolist() == [40, 50]
    assert "not kept for the next start" in caplog.text


def test_one_process_of_a_machine_lists_the_folder_and_reads_the_headers(tree, tmp_path, monkeypatch):
    """Three processes start at once; each notes what it scans and what it gets."""
    notes = tmp_path / "notes"

    def note(line: str) -> None:
        with open(notes, "a") as file:
            file.write(line + "\n")

    def slow(function, name):
        def noted(*args):
            note(name)
            time.sleep(0.5)  # long enough for the others to come
            return function(*args)

        return noted

    monkeypatch.setattr(sources, "_scan", slow(sources._scan, "scan"))
    monkeypatch.setattr(cache_module, "_scan_sizes", slow(cache_module._scan_sizes, "sizes"))

    def start() -> None:
        source = FolderSource(tree / "train")
        note(f"got {source.fingerprint} {source.sizes().tolist()}")

    processes = [multiprocessing.get_context("fork").Process(target=start) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    lines = notes.read_text().splitlines()
    assert sorted(line for line in lines if not line.startswith("got")) == ["scan", "sizes"]
    results = [line for line in lines if line.startswith("got")]
    assert len(results) == 3
    assert len(set(results)) == 1


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
    facts = {"classes": names, "directories": folders, "fingerprint": "made up", "place": "place"}
    table = pa.table({"path": array, "label": labels}).replace_schema_metadata(
        {"manifest": json.dumps(facts)}
    )
    name = cache_module.fingerprint_of(os.fsencode(root) + b"/", sources.HIDDEN)
    cache_module.write_arrow(cache / "manifests" / f"{name}.arrow", table)
    sides = np.full(MANY, 500, np.int32)
    cache_module.write_arrow(cache / "sizes" / "place.arrow", pa.table({"height": sides, "width": sides}))
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
