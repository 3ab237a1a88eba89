import csv
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.sources.open import open_source
from common.tools.inspect_data import inspect, main, report
from common.tools.prepare import Settings, prepare
from tests.tools.pictures import image_folder, picture, tool

PLOTS = {"classes.png", "sizes.png", "aspect_ratios.png"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """12 + 8 train and 5 + 4 val images; one is grey, one PNG, one CMYK, one broken, some are there twice."""
    root = tmp_path / "photos"
    train = image_folder(root / "train", {"ant": 10, "bee": 6}, width=60)
    val = image_folder(root / "val", {"ant": 3, "bee": 4}, width=90)
    picture(70, 80, 40, "L").save(train / "ant" / "grey.jpg")
    picture(71, 30, 40).save(train / "ant" / "tall.png")
    picture(72, 30, 40, "CMYK").save(train / "bee" / "print.jpg")
    (train / "bee" / "broken.jpg").write_bytes((train / "bee" / "000.jpg").read_bytes()[:300])
    shutil.copy(train / "ant" / "000.jpg", val / "ant" / "leaked.jpg")
    shutil.copy(train / "ant" / "001.jpg", val / "ant" / "leaked too.jpg")
    shutil.copy(train / "ant" / "001.jpg", val / "bee" / "called otherwise.jpg")
    return root


def run(tree: Path, out: Path, capsys, *flags: str) -> str:
    main(["--data_dir", str(tree), "--out", str(out), *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_everything_there_is_to_know_is_in_the_report(tree: Path, tmp_path: Path, capsys, workers: str):
    out = tmp_path / "out"
    printed = run(tree, out, capsys, "--workers", workers)
    lines = [line.split() for line in printed.splitlines()]
    assert ["train", "20", "2", "8", "10", "12", "1"] in [line[:7] for line in lines]
    assert ["JPEG", "RGB", "16", "10"] in lines
    assert ["JPEG", "L", "1", "0"] in lines
    assert ["JPEG", "CMYK", "1", "0"] in lines
    assert ["PNG", "RGB", "1", "0"] in lines
    assert ["unreadable", "1", "0"] in lines
    assert ["ant", "12", "5"] in lines
    assert ["bee", "8", "5"] in lines
    assert ["train", "short", "side", "(px)", "30", "30", "40", "40", "40"] in lines
    assert "unreadable images: 1 (unreadable.txt)" in printed
    assert "duplicates: 3 images with the content of another, in 2 groups (duplicates.txt)" in printed
    assert "across classes: 1 group\n" in printed
    assert "across train and val: 2 groups\n" in printed
    assert (out / "report.txt").read_text() in printed


def test_lists_name_the_files(tree: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    run(tree, out, capsys)
    broken = (out / "unreadable.txt").read_text()
    assert broken.startswith(f"{tree}/train/bee/broken.jpg: ")
    assert broken.count("\n") == 1
    groups = [set(group.split("\n")) for group in (out / "duplicates.txt").read_text().strip().split("\n\n")]
    first = {f"{tree}/train/ant/000.jpg", f"{tree}/val/ant/leaked.jpg"}
    second = {f"{tree}/train/ant/001.jpg", f"{tree}/val/ant/leaked too.jpg"}
    assert first in groups
    assert {*second, f"{tree}/val/bee/called otherwise.jpg"} in groups
    with open(out / "classes.csv", newline="") as file:
        assert list(csv.reader(file)) == [["class", "train", "val"], ["ant", "12", "5"], ["bee", "8", "5"]]


def test_plots_are_pictures_with_something_on_them(tree: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    run(tree, out, capsys)
    assert {path.name for path in out.glob("*.png")} == PLOTS
    for name in PLOTS:
        with Image.open(out / name) as plot:
            assert plot.width > 600
            assert len(np.unique(np.asarray(plot.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_a_second_inspection_removes_the_lists_that_no_longer_hold(tree: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    run(tree, out, capsys)
    (tree / "train" / "bee" / "broken.jpg").unlink()
    for path in [*tree.glob("val/*/leaked*"), *tree.glob("val/*/called*")]:
        path.unlink()
    printed = run(tree, out, capsys)
    assert "unreadable images: none" in printed
    assert "duplicates: none" in printed
    assert not (out / "unreadable.txt").exists()
    assert not (out / "duplicates.txt").exists()


def test_one_split_alone_and_a_pyramid_with_its_originals_sizes(tree: Path, tmp_path: Path, capsys):
    shutil.rmtree(tree / "val")
    (tree / "train" / "bee" / "broken.jpg").unlink()
    prepare(str(tree), tmp_path / "pyramid", Settings((32, 16)), workers=0)
    printed = run(tmp_path / "pyramid", tmp_path / "out", capsys)
    lines = [line.split() for line in printed.splitlines()]
    assert ["train", "short", "side", "(px)", "30", "30", "40", "40", "40"] in lines
    assert "duplicates: none" in printed


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({f"class{n:02}": 1 + n % 3 for n in range(40)}, "(all 40 classes: classes.csv)"),
        ({f"class{n:02}": 2 for n in range(4)}, "4 classes, all with the same number of images"),
        ({"only": 2}, "\n1 class\n"),
    ],
)
def test_many_classes_are_shortened_and_equal_ones_are_one_line(tmp_path: Path, classes: dict, words: str):
    image_folder(tmp_path / "train", classes, width=9, height=8)
    images = inspect({"train": open_source(str(tmp_path), "train")}, 0)
    text = report("photos", images)
    assert words in text
    assert text.count("\n") < 50


def test_one_folder_of_class_folders_is_enough(tmp_path: Path, capsys):
    image_folder(tmp_path / "photos", {"ant": 3, "bee": 2})
    printed = run(tmp_path / "photos", tmp_path / "out", capsys)
    lines = [line.split() for line in printed.splitlines()]
    assert ["all", "5", "2", "2", "2", "3", "0"] in [line[:7] for line in lines]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == PLOTS


def test_the_report_comes_last_and_whole_and_libraries_are_silent(tree: Path, tmp_path: Path):
    Image.new("1", (11_000, 9_000)).save(tree / "train" / "ant" / "warns.png")
    spoilt = bytearray((tree / "train" / "ant" / "002.jpg").read_bytes())
    spoilt[len(spoilt) // 2 :] = b"\x11" * 20 + spoilt[len(spoilt) // 2 + 20 :]
    (tree / "train" / "ant" / "libjpeg complains.jpg").write_bytes(spoilt)
    flags = ["--data_dir", tree, "--out", tmp_path / "out"]
    done = tool("inspect_data", *flags, cache=tmp_path / "cache", stderr=subprocess.STDOUT)
    report = (tmp_path / "out" / "report.txt").read_text()
    bar, _, rest = done.stdout.partition(str(tree))
    assert all(line.startswith("inspect:") for line in bar.split("\n") if line.strip())
    assert str(tree) + rest == f"{report}\nplots and lists are in {tmp_path / 'out'}\n"


def test_empty_files_are_unreadable_but_no_duplicates(tmp_path: Path, capsys):
    folder = image_folder(tmp_path / "photos" / "train", {"ant": 2}, width=9, height=8)
    for name in ("empty.jpg", "void.jpg"):
        (folder / "ant" / name).touch()
    printed = run(tmp_path / "photos", tmp_path / "out", capsys)
    assert "unreadable images: 2" in printed
    assert "duplicates: none" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_dir", "nowhere"], "nowhere is not a folder"),
        (["--workers", "-1"], "--workers"),
        (["--out", "FILE/out"], "cannot be written"),
    ],
)
def test_refusals_are_one_sentence(tree: Path, tmp_path: Path, capsys, flags: list[str], words: str):
    (tmp_path / "file").write_text("in the way")
    flags = [flag.replace("FILE", str(tmp_path / "file")) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        main(["--data_dir", str(tree), "--out", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
