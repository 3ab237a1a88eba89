import errno
import os
import shutil
from pathlib import Path

import pytest

from common import UserError
from common.tools import split as split_tool
from common.tools.split import main, plan_split, split
from tests.tools.pictures import files, image_folder

CLASSES = {"ant": 10, "bee": 5, "cat": 2}


class Killed(Exception):
    """Stands for whatever ends a process in the middle of its work."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return image_folder(tmp_path / "photos", CLASSES, width=12, height=8)


def names(plan: dict, name: str) -> dict[str, int]:
    return {label: len(paths) for label, paths in plan[name].items()}


def test_the_plan_is_stratified_and_complete(folder: Path):
    plan = plan_split(folder, 0.2, seed=0)
    assert names(plan, "val") == {"ant": 2, "bee": 1, "cat": 1}
    assert names(plan, "train") == {"ant": 8, "bee": 4, "cat": 1}
    everything = [path for part in plan.values() for paths in part.values() for path in paths]
    assert sorted(everything) == sorted(files(folder))


def test_a_seed_is_a_choice_and_classes_do_not_touch_each_other(folder: Path):
    plan = plan_split(folder, 0.3, seed=1)
    assert plan == plan_split(folder, 0.3, seed=1)
    assert any(plan != plan_split(folder, 0.3, seed) for seed in (2, 3))
    shutil.copytree(folder / "bee", folder / "aardvark")
    assert plan_split(folder, 0.3, seed=1)["val"]["ant"] == plan["val"]["ant"]


@pytest.mark.parametrize("how", ["copy", "link", "move"])
def test_every_file_arrives_with_its_content(folder: Path, tmp_path: Path, how: str):
    before = files(folder)
    inodes = {path.stat().st_ino for path in folder.rglob("*.jpg")}
    out = tmp_path / "out"
    split(folder, out, 0.2, 0, how)
    arrived = files(out)
    assert {name.split("/", 1)[1]: content for name, content in arrived.items()} == before
    assert {name.split("/")[0] for name in arrived} == {"train", "val"}
    assert files(folder) == ({} if how == "move" else before)
    shared = inodes & {path.stat().st_ino for path in out.rglob("*.jpg")}
    assert len(shared) == (0 if how == "copy" else len(before))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("how", ["copy", "link", "move"])
@pytest.mark.parametrize("stop_at", [0, 1, 7, 16])
def test_an_interrupted_split_loses_nothing_and_goes_on(folder, tmp_path, monkeypatch, how, stop_at):
    before = files(folder)
    whole = tmp_path / "whole"
    split(folder, whole, 0.2, 0, "copy")
    place, calls = split_tool._place, []

    def stop(*args):
        calls.append(args)
        if len(calls) > stop_at:
            raise Killed
        place(*args)

    monkeypatch.setattr(split_tool, "_place", stop)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        split(folder, out, 0.2, 0, how)
    assert not out.exists()
    contents = set(files(folder).values()) | set(files(tmp_path / "out.partial").values())
    assert set(before.values()) <= contents
    with pytest.raises(UserError, match="unfinished split with other settings"):
        split(folder, out, 0.5, 0, how)
    monkeypatch.setattr(split_tool, "_place", place)
    split(folder, out, 0.2, 0, how)
    assert files(out) == files(whole)


def test_a_move_to_another_disk_copies_first(folder: Path, tmp_path: Path, monkeypatch):
    before = files(folder)
    rename = Path.rename

    def other_disk(source: Path, target: Path) -> Path:
        if source.is_relative_to(folder):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", other_disk)
    split(folder, tmp_path / "out", 0.2, 0, "move")
    assert {name.split("/", 1)[1]: content for name, content in files(tmp_path / "out").items()} == before
    assert not files(folder)


def test_a_file_that_took_the_place_of_a_moved_one_is_not_removed(folder: Path, tmp_path: Path, monkeypatch):
    place = split_tool._place
    moved = []

    def stop(source: Path, *rest) -> None:
        if moved:
            raise Killed
        place(source, *rest)
        moved.append(source)

    monkeypatch.setattr(split_tool, "_place", stop)
    with pytest.raises(Killed):
        split(folder, tmp_path / "out", 0.2, 0, "move")
    monkeypatch.setattr(split_tool, "_place", place)
    moved[0].write_bytes(b"something new")
    with pytest.raises(UserError, match="is not the image that was moved"):
        split(folder, tmp_path / "out", 0.2, 0, "move")
    assert moved[0].read_bytes() == b"something new"


def test_a_moved_symlink_still_leads_to_its_image(folder: Path, tmp_path: Path):
    image = folder / "ant" / "000.jpg"
    content = image.read_bytes()
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to("../../elsewhere.jpg")
    split(folder, tmp_path / "out", 0.2, 0, "move")
    assert next((tmp_path / "out").rglob("ant/000.jpg")).read_bytes() == content


def test_a_link_to_a_symlink_leads_to_its_image(folder: Path, tmp_path: Path, monkeypatch):
    image, elsewhere = folder / "ant" / "000.jpg", tmp_path / "elsewhere.jpg"
    content = image.read_bytes()
    image.rename(elsewhere)
    image.symlink_to("../../elsewhere.jpg")
    split(folder, tmp_path / "out", 0.2, 0, "link")
    (linked,) = (tmp_path / "out").rglob("ant/000.jpg")
    assert linked.read_bytes() == content
    assert not linked.is_symlink()

    link = os.link

    def other_disk(source: str, target: Path) -> None:
        if Path(source) == elsewhere:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", other_disk)
    split(folder, tmp_path / "other", 0.2, 0, "link")
    (linked,) = (tmp_path / "other").rglob("ant/000.jpg")
    assert linked.readlink() == elsewhere


def _single(folder: Path) -> None:
    (folder / "cat" / "000.jpg").unlink()


def _split_already(folder: Path) -> None:
    for name, new in (("ant", "train"), ("bee", "val")):
        (folder / name).rename(folder / new)


def _train_alone(folder: Path) -> None:
    for path in list(folder.iterdir()):
        (folder / "train").mkdir(exist_ok=True)
        path.rename(folder / "train" / path.name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (_single, "holds one image only"),
        (_split_already, "is split already"),
        (_train_alone, "/train, whose folders are the classes"),
        (lambda folder: (folder.parent / "out").mkdir(), "exists already"),
        (lambda folder: image_folder(folder.parent / "out.partial", {"x": 1}), "is in the way"),
    ],
)
def test_refusals_are_one_sentence_and_change_nothing(folder: Path, tmp_path: Path, capsys, spoil, words):
    spoil(folder)
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--data_dir", str(folder), "--out", str(tmp_path / "out"), "--how", "move"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    photos = {name: content for name, content in files(tmp_path).items() if not name.startswith("cache")}
    assert photos == {name: content for name, content in before.items() if not name.startswith("cache")}


@pytest.mark.parametrize("flag", [("--val_fraction", "0"), ("--val_fraction", "1"), ("--seed", "-1")])
def test_bad_numbers_name_their_flag(folder: Path, tmp_path: Path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        main(["--data_dir", str(folder), "--out", str(tmp_path / "out"), *flag])
    assert stop.value.code == 2
    assert flag[0] in capsys.readouterr().err


def test_out_inside_the_data_is_refused(folder: Path):
    with pytest.raises(UserError, match="lies inside"):
        split(folder, folder / "out", 0.2, 0, "copy")


def test_a_link_to_another_disk_says_so(folder: Path, tmp_path: Path, monkeypatch):
    def other_disk(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    with pytest.raises(UserError, match="take --how copy"):
        split(folder, tmp_path / "out", 0.2, 0, "link")


def test_a_full_disk_says_so(folder: Path, tmp_path: Path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(UserError, match="No space left on device; the same command goes on"):
        split(folder, tmp_path / "out", 0.2, 0, "copy")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_would_do_and_does_nothing(folder: Path, tmp_path: Path, capsys):
    main(["--data_dir", str(folder), "--out", str(tmp_path / "out"), "--dry_run"])
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()][1:5] == [
        ["ant", "8", "2"],
        ["bee", "4", "1"],
        ["cat", "1", "1"],
        ["all", "13", "4"],
    ]
    assert "nothing was done" in printed
    assert not list(tmp_path.glob("out*"))
