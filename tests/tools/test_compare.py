"""Comparing runs: the numbers of the table, the notes, the plots, and a sentence for what is no run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UserError
from common.run import plots
from common.tools.compare import NoRunYet, as_text, compare, load_run, load_runs, main, make_table
from tests.run.test_plots import make_run


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """Reaches 50 % after 2 of its 3 epochs of half a minute."""
    run = make_run(tmp_path / "runs" / "fast", [30, 50, 60.25], epoch_s=30)
    (run / "summary.json").write_text(json.dumps({"strategy": "progressive", "model": "resnet18"}))
    return run


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Reaches 50 % after 3 of its 4 epochs of a minute, and is going on."""
    return make_run(tmp_path / "runs" / "slow", [20, 40, 55.55, 52])


def cells(runs: list[Path], targets: list[float], usd_per_hour: float | None = None) -> list[dict[str, str]]:
    return make_table(load_runs(runs)[0], targets, usd_per_hour).to_dict("records")


def test_table(fast: Path, slow: Path) -> None:
    assert cells([fast, slow], [50, 60]) == [
        {
            "run": "fast",
            "strategy": "progressive",
            "model": "resnet18",
            "best %": "60.25",
            "last %": "60.25",
            "epochs": "3",
            "minutes": "1.5",
            "images seen": "3,000",
            "images/s": "33",
            "min to 50 %": "1.0",
            "min to 60 %": "1.5",
        },
        {
            "run": "slow",
            "strategy": "–",
            "model": "–",
            "best %": "55.55",
            "last %": "52.00",
            "epochs": "4",
            "minutes": "4.0",
            "images seen": "4,000",
            "images/s": "17",
            "min to 50 %": "3.0",
            "min to 60 %": "–",
        },
    ]


def test_costs(tmp_path: Path, slow: Path) -> None:
    long = make_run(tmp_path / "long", [10, 40, 60], epoch_s=3600)
    first, second = cells([long, slow], [40, 60], usd_per_hour=5.5)
    assert (first["$ to 40 %"], first["$ to 60 %"], first["$ in all"]) == ("11.00", "16.50", "16.50")
    assert (second["$ to 40 %"], second["$ to 60 %"], second["$ in all"]) == ("0.18", "–", "0.37")
    assert not [name for name in cells([long], [40])[0] if "$" in name]


def test_the_better_of_raw_and_ema_weights_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [30, 40, 50], ema_top1=["", 45, 48])
    assert list(load_run(run).log["accuracy"]) == [30, 45, 50]
    assert cells([run], [44])[0]["min to 44 %"] == "2.0"


def test_epochs_without_evaluation_are_no_results(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [30, 40, 50], val_top1=["", 40, ""])
    assert (cells([run], [])[0]["best %"], cells([run], [])[0]["last %"]) == ("40.00", "–")
    never = make_run(tmp_path / "never", [30], val_top1=["nan"])
    assert cells([never], [10])[0]["best %"] == "–"
    compare([never], out=tmp_path / "out")


def test_default_target_is_the_lowest_best_and_is_said(fast: Path, slow: Path, tmp_path: Path) -> None:
    text = compare([fast, slow], out=tmp_path / "out")
    assert "min to 55.5 %" in text.splitlines()[0]
    assert "Target 55.5 %: the lowest best top-1" in text
    assert "lowest best" not in compare([fast, slow], [50], out=tmp_path / "out")


def test_columns_are_aligned(fast: Path, slow: Path) -> None:
    header, first, second = as_text(make_table(load_runs([fast, slow])[0], [50], None), markdown=False).split(
        "\n"
    )
    assert len(header) == len(first) == len(second)
    assert header.index("best %") + len("best %") == first.index("60.25") + len("60.25")


def test_markdown(fast: Path) -> None:
    header, rule, row = as_text(make_table(load_runs([fast])[0], [50], None), markdown=True).split("\n")
    assert [cell.strip() for cell in header.strip("|").split("|")][:2] == ["run", "strategy"]
    assert [cell.strip("- ") for cell in rule.strip("|").split("|")] == ["", "", "", *":" * 7]
    assert header.count("|") == rule.count("|") == row.count("|") == 11
    assert "| fast " in row


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / place / "run", [10]) for place in ("here", "there")]
    other = make_run(tmp_path / "here" / "other", [10])
    assert [run.name for run in load_runs([*folders, other])[0]] == [*map(str, folders), "other"]


def test_plots_are_pictures_in_out(fast: Path, slow: Path, tmp_path: Path) -> None:
    text = compare([fast, slow], [50, 60], out=tmp_path / "new" / "out")
    names = {"accuracy_time.png", "accuracy_images.png", "lr.png"}
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == names
    for name in names:
        assert str(tmp_path / "new" / "out" / name) in text
        with Image.open(tmp_path / "new" / "out" / name) as image:
            assert len(image.getcolors(1 << 20)) > 20


def test_curves(fast: Path, slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slow / "schedule.csv").write_text("step,epoch,lr,momentum\n0,1,0.3,0.9\n1,1,0.2,0.9\n")
    seen = {}

    def look(axes, path: Path) -> None:
        seen[path.name] = (axes.get_xlabel(), {line.get_label(): line.get_xydata() for line in axes.lines})

    monkeypatch.setattr(plots, "save", look)
    compare([fast, slow], [50], out=tmp_path / "out")
    label, curves = seen["accuracy_time.png"]
    assert label == "minutes since the run began"
    np.testing.assert_allclose(curves["fast"], [(0.5, 30), (1, 50), (1.5, 60.25)])
    dots = [points.tolist() for points in curves.values() if len(points) == 1]
    # Where they reached 50 %.
    assert dots == [[[1, 50]], [[3, 55.55]]]
    label, curves = seen["accuracy_images.png"]
    assert label == "training images seen (thousands)"
    np.testing.assert_allclose(curves["slow"], [(1, 20), (2, 40), (3, 55.55), (4, 52)])
    _, curves = seen["lr.png"]
    np.testing.assert_allclose(curves["fast"][:, 1], [0.1, 0.05, 0.1 / 3])  # the log's
    np.testing.assert_allclose(curves["slow"], [(0.5, 0.3), (1, 0.2)])  # the plan's


def test_legends_name_every_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legends = []
    monkeypatch.setattr(plots, "save", lambda axes, _: legends.append(axes.get_legend().get_texts()))
    compare([make_run(tmp_path / name, [10, 20]) for name in ("_first", "a$^$")], [15], out=tmp_path / "out")
    for texts in legends:
        assert [text.get_text() for text in texts] == ["_first", r"a\$^\$"]
        assert not any(text._preprocess_math(text.get_text())[1] for text in texts)


def test_ten_runs_look_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look(axes, path: Path) -> None:
        looks.append({(line.get_color(), line.get_linestyle()) for line in axes.lines})

    monkeypatch.setattr(plots, "save", look)
    compare([make_run(tmp_path / f"run{i}", [10, 20 + i]) for i in range(10)], [90], out=tmp_path / "out")
    assert all(len(look - {(plots.GREY, ":")}) == 10 for look in looks)


def test_what_is_no_run_is_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    header_only = make_run(tmp_path / "fresh", [])
    words = make_run(tmp_path / "words", [10], lr=["high"])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "training_log.csv").write_text("epoch,accuracy\n1,0.5\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "training_log.csv").write_text("step,loss\n1,0.5\n")
    torn = make_run(tmp_path / "torn", [10])
    (torn / "summary.json").write_text('{"strategy": ')
    for folder, words_of_it in [
        (tmp_path / "empty", "is not a run: it has no training_log.csv"),
        (tmp_path / "file", "is not a run: it has no training_log.csv"),
        (tmp_path / "nowhere", "is not a run: it has no training_log.csv"),
        (words, "cannot be read as a training log: .*high"),
        (foreign, "is not a training log: it lacks images_seen, lr, total_s, val_top1"),
        (bare, "is not a training log: it lacks epoch, images_seen"),
        (torn, "summary.json cannot be read"),
    ]:
        with pytest.raises(UserError, match=words_of_it) as error:
            load_run(folder)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)
    (header_only / "training_log.csv").write_text("epoch,lr,val_top1,total_s,images_seen\n")
    with pytest.raises(NoRunYet, match="fresh cannot be compared yet: no epoch of it has ended"):
        load_run(header_only)


def test_what_is_no_run_yet_is_left_out_and_named(fast: Path, slow: Path, tmp_path: Path) -> None:
    fresh = make_run(tmp_path / "runs" / "fresh", [])
    (tmp_path / "runs" / "notes.txt").write_text("not a folder")
    text = compare(sorted((tmp_path / "runs").iterdir()), out=tmp_path / "out")
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["run", "fast", "slow"]
    assert f"Left out: {fresh} cannot be compared yet: no epoch of it has ended." in text
    assert f"Left out: {tmp_path / 'runs' / 'notes.txt'} is not a run: it has no training_log.csv." in text
    with pytest.raises(UserError, match=f"no run to compare. Left out: {fresh} cannot be compared yet"):
        compare([fresh], out=tmp_path / "out")
    # A damaged log is no reason to look away.
    make_run(tmp_path / "runs" / "words", [10], lr=["high"])
    with pytest.raises(UserError, match=r"words.* cannot be read as a training log"):
        compare(sorted((tmp_path / "runs").iterdir()), out=tmp_path / "out")


def test_numbers_that_make_no_sense_and_a_folder_that_cannot_be_written(fast: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--target must be a percentage"):
        compare([fast], [101], out=tmp_path / "out")
    with pytest.raises(UserError, match="--target must be a percentage"):
        compare([fast], [0], out=tmp_path / "out")
    with pytest.raises(UserError, match="--usd_per_hour must be above 0"):
        compare([fast], [50], -1, out=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        compare([fast], [50], out=tmp_path / "file")


def test_command_line(
    fast: Path, slow: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main([str(fast), str(slow), "--target", "50", "60", "--usd_per_hour", "6", "--markdown"])
    printed = capsys.readouterr().out
    assert printed.startswith("| run ")
    assert "| $ to 60 % |" in printed
    assert (tmp_path / "comparison" / "lr.png").exists()

    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2
    captured = capsys.readouterr()
    left_out = f"{tmp_path} is not a run: it has no training_log.csv"
    assert captured.err == f"error: no run to compare. Left out: {left_out}.\n"
    assert captured.out == ""
