import fcntl
import io
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from tqdm import tqdm

from common import UserError
from common.data.sources.open import open_source
from common.tools import prepare as prepare_tool
from common.tools.prepare import NOTES, Settings, encode_levels, main, prepare
from tests.tools.pictures import files, image_folder, picture, tool

SMALL = Settings(levels=(32, 16), shard_size=10)


class Killed(Exception):
    """Stands for whatever ends a process in the middle of its work."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """35 train images in 4 shards and 7 val images, 60 to 77 pixels wide and 40 high."""
    image_folder(tmp_path / "photos" / "train", {"ant": 18, "bee": 17})
    image_folder(tmp_path / "photos" / "val", {"ant": 4, "bee": 3}, width=50)
    return tmp_path / "photos"


def jpeg(image: Image.Image, **options) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, options.pop("format", "JPEG"), **options)
    return np.frombuffer(out.getvalue(), np.uint8)


def opened(encoded: bytes | None) -> Image.Image:
    assert encoded is not None
    return Image.open(io.BytesIO(encoded))


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def interrupt_after(shards: int, monkeypatch) -> None:
    """Let `prepare` stop, as if killed, when it has finished a few shards."""
    write, written = prepare_tool.write_shard, []

    def stop(path: Path, *rest) -> dict:
        if len(written) == shards:
            raise Killed
        written.append(path)
        return write(path, *rest)

    monkeypatch.setattr(prepare_tool, "write_shard", stop)


def begin(tree: Path, out: Path, monkeypatch, shards: int = 2) -> Path:
    """An unfinished pyramid with a few finished shards; returns its folder."""
    with monkeypatch.context() as patched:
        interrupt_after(shards, patched)
        with pytest.raises(Killed):
            prepare(str(tree), out, SMALL, workers=0)
    assert not out.exists()
    return out.with_name(out.name + ".partial")


# --- one image ------------------------------------------------------------------------------------


def test_levels_have_their_short_sides_and_keep_the_picture():
    original = picture(0, 500, 333)
    copies, height, width = encode_levels(jpeg(original, quality=97), Settings())
    assert (height, width) == (333, 500)
    for copy, level in zip(copies, (256, 146, 73), strict=True):
        small = opened(copy)
        assert small.size == (round(500 * level / 333), level)
        assert JpegImagePlugin.get_sampling(small) == 2  # 4:2:0
        assert psnr(small, original.resize(small.size, Image.Resampling.LANCZOS)) > 36
    table = opened(jpeg(original, quality=90).tobytes()).quantization
    assert opened(copies[0]).quantization == table


@pytest.mark.parametrize(
    ("short", "sizes"),
    [
        (300, [256, 146, 73]),
        (256, [256, 146, 73]),
        (200, [200, 146, 73]),
        (100, [None, 100, 73]),
        (50, [None, None, 50]),
    ],
)
def test_nothing_is_enlarged_and_small_images_are_stored_once(short: int, sizes: list[int | None]):
    for width, height in ((short, short + 30), (short + 30, short)):
        copies, *_ = encode_levels(jpeg(picture(1, width, height), format="PNG"), Settings())
        assert [None if copy is None else min(opened(copy).size) for copy in copies] == sizes


def test_a_small_jpeg_keeps_its_own_bytes():
    for height in (60, 73):
        small = jpeg(picture(2, 90, height), quality=60)
        assert encode_levels(small, Settings())[0] == [None, None, small.tobytes()]
    large_for_its_size = jpeg(picture(2, 90, 60), quality=100)
    copy = encode_levels(large_for_its_size, Settings())[0][2]
    assert len(copy) < len(large_for_its_size)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
def test_grey_stays_grey(mode: str):
    original = picture(3, 120, 90, "L")
    source = (
        Image.fromarray(np.asarray(original).astype(np.uint16) << 8)
        if mode == "I;16"
        else original.convert(mode)
    )
    copy = opened(encode_levels(jpeg(source, format="PNG"), SMALL)[0][0])
    assert copy.mode == "L"
    if mode != "1":
        assert psnr(copy, original.resize(copy.size, Image.Resampling.LANCZOS)) > 34


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP")])
def test_other_modes_become_rgb(mode: str, kind: str):
    original = picture(4, 120, 90)
    encoded = jpeg(original.convert(mode), format=kind, **({} if kind == "PNG" else {"quality": 97}))
    copy = opened(encode_levels(encoded, SMALL)[0][0])
    assert copy.mode == "RGB"
    assert psnr(copy, original.resize(copy.size, Image.Resampling.LANCZOS)) > 25


def test_a_grey_jpeg_stays_grey():
    copies, *_ = encode_levels(jpeg(picture(5, 120, 90, "L")), SMALL)
    assert [opened(copy).mode for copy in copies] == ["L", "L"]


@pytest.mark.parametrize(("width", "height"), [(120, 90), (200, 30)])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_copies_are_upright(orientation: int, width: int, height: int):
    """Also of an image that is small enough to keep its own bytes, if only it were upright."""
    seen = picture(6, width, height)
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = jpeg(seen.transpose(turn[orientation]), quality=60, exif=exif)
    copies, *size = encode_levels(stored, SMALL)
    assert size == [height, width]
    copy = opened(copies[0])
    assert copy.getexif().get(0x0112, 1) == 1
    assert copy.width > copy.height
    assert psnr(copy, seen.resize(copy.size, Image.Resampling.LANCZOS)) > 20  # turned wrongly: 10


# --- a whole pyramid ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pyramid_is_read_by_our_sources_and_by_datasets_alike(tree: Path, tmp_path: Path, workers: int):
    out = tmp_path / "pyramid"
    prepare(str(tree), out, SMALL, workers=workers)
    assert not out.with_name("pyramid.partial").exists()
    assert len(list(out.glob("data/train-*-of-00004.arrow"))) == 4
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "hf"))
    for split, name in (("train", "train"), ("val", "validation")):
        original, ours, theirs = open_source(str(tree), split), open_source(str(out), split), loaded[name]
        assert theirs.features["label"].names == ours.classes == original.classes == ["ant", "bee"]
        assert theirs["label"][:] == ours.labels.tolist() == original.labels.tolist()
        np.testing.assert_array_equal(ours.sizes(), original.sizes())
        assert list(zip(theirs["height"], theirs["width"], strict=True)) == [
            tuple(s) for s in ours.sizes().tolist()
        ]
        for index in (0, len(ours) - 1):
            image = Image.open(io.BytesIO(original.read(index, 0)))
            for level, asked in ((32, 28), (16, 14)):
                copy = opened(ours.read(index, asked).tobytes())
                assert min(copy.size) == level
                assert psnr(copy, image.resize(copy.size, Image.Resampling.LANCZOS)) > 22
                assert np.array_equal(np.asarray(theirs[index][f"image_{level}"]), np.asarray(copy))


def test_the_result_does_not_depend_on_the_workers(tree: Path, tmp_path: Path):
    for workers in (0, 1, 2):
        prepare(str(tree), tmp_path / f"by{workers}", SMALL, workers)
    assert files(tmp_path / "by0") == files(tmp_path / "by1") == files(tmp_path / "by2")


def test_one_split_is_enough_and_parquet_is_read(tree: Path, tmp_path: Path):
    shutil.rmtree(tree / "val")
    prepare(str(tree), tmp_path / "from-folder", SMALL, 0)
    source = open_source(str(tree), "train")
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=source.classes)}
    images = [{"bytes": source.read(index, 0).tobytes(), "path": None} for index in range(len(source))]
    table = datasets.Dataset.from_dict(
        {"img": images, "label": source.labels.tolist()}, features=datasets.Features(features)
    )
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    prepare(str(tmp_path / "parquet"), tmp_path / "from-parquet", SMALL, 0)
    ours, theirs = (open_source(str(tmp_path / name), "train") for name in ("from-folder", "from-parquet"))
    assert len(ours) == len(theirs) == 35
    assert all(np.array_equal(ours.read(n, 16), theirs.read(n, 16)) for n in range(35))


def test_the_disk_space_is_said_beforehand(tree: Path, tmp_path: Path, capsys, monkeypatch):
    prepare(str(tree), tmp_path / "pyramid", SMALL, 0)
    said = capsys.readouterr().err
    assert "42 images at short sides 32, 16: about " in said
    assert "still to be written" in said
    assert " MB free" in said or " GB free" in said
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4321))
    with pytest.raises(UserError, match=r"needs about .* and its disk has 0.00432 MB free"):
        prepare(str(tree), tmp_path / "another", SMALL, 0)
    assert not (tmp_path / "another").exists()


def test_an_unreadable_image_is_named_or_left_out(tree: Path, tmp_path: Path, capsys):
    bad = tree / "train" / "bee" / "005.jpg"
    bad.write_bytes(b"this is no picture")
    with pytest.raises(UserError, match=rf"cannot decode {bad}: .*--skip_unreadable"):
        prepare(str(tree), tmp_path / "pyramid", SMALL, 2)
    assert not (tmp_path / "pyramid").exists()
    prepare(str(tree), tmp_path / "pyramid", SMALL, 2, skip_unreadable=True)
    assert (tmp_path / "pyramid" / "skipped.txt").read_text().startswith(f"{bad}: ")
    assert len(open_source(str(tmp_path / "pyramid"), "train")) == 34
    assert "unreadable and left out: 1; " in capsys.readouterr().err


# --- faults ---------------------------------------------------------------------------------------


def test_killed_at_ten_random_moments_it_comes_out_the_same(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(prepare_tool, "SAMPLE", 8)  # not to spend half of its time on the estimate
    tree = tmp_path / "photos"
    image_folder(tree / "train", {"ant": 130, "bee": 120}, width=90, height=70)
    settings = Settings(levels=(64, 32), shard_size=20)
    began = time.monotonic()
    prepare(str(tree), tmp_path / "undisturbed", settings, workers=2)
    seconds = time.monotonic() - began
    wanted = files(tmp_path / "undisturbed")

    rng = np.random.default_rng(0)
    out, kills, resumed = tmp_path / "pyramid", 0, 0
    while kills < 10:
        child = os.fork()
        if child == 0:
            # A lock of its own: the one that it shares with this process it might take to its grave.
            tqdm.set_lock(threading.RLock())
            prepare(str(tree), out, settings, workers=2)
            os._exit(0)
        time.sleep(rng.uniform(0.1, 1.0) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            resumed += len(list((tmp_path / "pyramid.partial" / "data").glob("*.arrow"))) > 0
            assert not out.exists() or files(out).keys() >= wanted.keys()
        else:
            assert status == 0
        if out.exists() and kills < 10:
            assert {name: content for name, content in files(out).items() if NOTES not in name} == wanted
            shutil.rmtree(out)
    if not out.exists() or (out / NOTES).exists():
        prepare(str(tree), out, settings, workers=2)
    assert files(out) == wanted
    assert resumed  # or this test has shown nothing


def test_finished_shards_are_kept(tree: Path, tmp_path: Path, monkeypatch):
    partial = begin(tree, tmp_path / "pyramid", monkeypatch)
    kept = {path.name: path.stat().st_mtime_ns for path in (partial / "data").glob("*.arrow")}
    assert len(kept) == 2
    # Killed in its third shard, while it was written or when only its note was there.
    (partial / "data" / "train-00002-of-00004.tmp").write_bytes(b"half of it")
    (partial / NOTES / "train-00002-of-00004.arrow.json").write_text("{}")
    prepare(str(tree), tmp_path / "pyramid", SMALL, 0)
    assert {name: (tmp_path / "pyramid" / "data" / name).stat().st_mtime_ns for name in kept} == kept
    prepare(str(tree), tmp_path / "undisturbed", SMALL, 0)
    assert files(tmp_path / "pyramid") == files(tmp_path / "undisturbed")


def test_images_left_out_before_an_interruption_are_listed_at_the_end(
    tree: Path, tmp_path: Path, monkeypatch
):
    bad = tree / "train" / "ant" / "005.jpg"
    bad.write_bytes(b"this is no picture")
    interrupt_after(2, monkeypatch)
    with pytest.raises(Killed):
        prepare(str(tree), tmp_path / "pyramid", SMALL, 0, skip_unreadable=True)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(str(tree), tmp_path / "pyramid", SMALL, 0, skip_unreadable=True)
    assert (tmp_path / "pyramid" / "skipped.txt").read_text().startswith(f"{bad}: ")


def test_sha256sum_names_the_corrupt_shards_of_a_finished_pyramid(tree: Path, tmp_path: Path):
    out = tmp_path / "pyramid"
    prepare(str(tree), out, SMALL, 0)
    verify = partial(
        subprocess.run, ["sha256sum", "--check", "sha256.txt"], cwd=out, capture_output=True, text=True
    )
    assert verify().stdout.count(": OK") == 5
    shard = out / "data" / "train-00002-of-00004.arrow"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert "data/train-00002-of-00004.arrow: FAILED" in verify().stdout


def test_a_new_file_is_noticed(tree: Path, tmp_path: Path, monkeypatch):
    begin(tree, tmp_path / "pyramid", monkeypatch)
    picture(99, 60, 40).save(tree / "train" / "ant" / "new.jpg")
    with pytest.raises(UserError, match="has got or lost images since"):
        prepare(str(tree), tmp_path / "pyramid", SMALL, 0)


def test_a_killed_worker_is_one_sentence(tree: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(prepare_tool, "encode_levels", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process was killed"):
        prepare(str(tree), tmp_path / "pyramid", SMALL, workers=2)


def test_other_settings_are_refused_until_the_old_ones_are_done(tree: Path, tmp_path: Path, monkeypatch):
    begin(tree, tmp_path / "pyramid", monkeypatch)
    with pytest.raises(UserError, match="was begun with --quality 90; take that, or remove"):
        prepare(str(tree), tmp_path / "pyramid", Settings((32, 16), 80, 10), 0)


def test_two_at_once_are_refused(tree: Path, tmp_path: Path, monkeypatch):
    partial = begin(tree, tmp_path / "pyramid", monkeypatch)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with open(partial / NOTES / "lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(write, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    try:
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(str(tree), tmp_path / "pyramid", SMALL, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_killed_in_its_last_step_it_is_whole(tree: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_tool.shutil, "rmtree", lambda _: None)
    prepare(str(tree), tmp_path / "pyramid", SMALL, 0)
    assert (tmp_path / "pyramid" / NOTES).exists()
    monkeypatch.undo()
    prepare(str(tree), tmp_path / "pyramid", SMALL, 0)
    assert "is whole" in capsys.readouterr().err
    assert not (tmp_path / "pyramid" / NOTES).exists()


def test_a_file_that_cannot_grow_ends_with_one_sentence(tree: Path, tmp_path: Path, capfd):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        try:
            main(
                [
                    "--data_dir",
                    str(tree),
                    "--out",
                    str(tmp_path / "pyramid"),
                    "--levels",
                    "32",
                    "--workers",
                    "0",
                ]
            )
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "error: cannot write" in last
    assert "File too large" in last
    assert not (tmp_path / "pyramid").exists()
    assert not list((tmp_path / "pyramid.partial" / "data").iterdir())


def test_a_full_disk_ends_with_one_sentence_and_goes_on_with_room(
    tree: Path, tmp_path: Path, monkeypatch, capsys
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        out = disk / "pyramid"
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40)
        )  # others fill it meanwhile
        with pytest.raises(SystemExit) as stop:
            main(["--data_dir", str(tree), "--out", str(out), "--levels", "32", "16", "--shard_size", "10"])
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1
        assert "No space left on device; the same command goes on from here" in errors[0]
        assert not out.exists()
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        prepare(str(tree), out, SMALL, 0)
        prepare(str(tree), tmp_path / "undisturbed", SMALL, 0)
        assert files(out) == files(tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--levels", "32", "32"], "--levels"),
        (["--levels", "2"], "--levels"),
        (["--quality", "0"], "--quality"),
        (["--quality", "101"], "--quality"),
        (["--shard_size", "0"], "--shard_size"),
        (["--workers", "-1"], "--workers"),
        (["--data_dir", "nowhere"], "nowhere is not a folder"),
        (["--data_dir", ""], "--data_dir and --out are both needed"),
    ],
)
def test_refusals_are_one_sentence(tree: Path, tmp_path: Path, capsys, flags: list[str], words: str):
    with pytest.raises(SystemExit) as stop:
        main(["--data_dir", str(tree), "--out", str(tmp_path / "pyramid"), *flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not list(tmp_path.glob("pyramid*"))


def test_nothing_is_overwritten(tree: Path, tmp_path: Path):
    for name, words in (("pyramid", "exists already"), ("pyramid.partial", "is in the way")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match=words):
            prepare(str(tree), tmp_path / "pyramid", SMALL, 0)
        assert (tmp_path / name / "mine.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / name)
    with pytest.raises(UserError, match="lies inside"):
        prepare(str(tree), tree / "pyramid", SMALL, 0)


def test_a_pyramid_of_a_pyramid_is_refused(tree: Path, tmp_path: Path):
    prepare(str(tree), tmp_path / "pyramid", SMALL, 0)
    with pytest.raises(UserError, match="is a pyramid already"):
        prepare(str(tmp_path / "pyramid"), tmp_path / "again", SMALL, 0)


def test_the_command_line_as_a_user_gives_it(tree: Path, tmp_path: Path, cache: Path):
    done = tool(
        "prepare",
        "--data_dir",
        tree,
        "--out",
        tmp_path / "p",
        "--levels",
        16,
        32,
        "--workers",
        0,
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    assert "of the originals" in done.stderr
    assert min(opened(open_source(str(tmp_path / "p"), "train").read(0, 32).tobytes()).size) == 32
