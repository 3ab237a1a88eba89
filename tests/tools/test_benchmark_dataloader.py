"""The benchmark measures all loaders, and its advice follows from the figures."""

import json
import types

import pandas as pd
import pytest
from PIL import Image

from common.tools import benchmark_dataloader as tool
from common.tools.benchmark_dataloader import measure, recommend_workers, run_pass, verdict, worker_counts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    for name in ("cat", "dog"):
        folder = tmp_path / "tree" / "train" / name
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (60, 50), (number, 9, 9)).save(folder / f"{number}.jpg")
    return tmp_path / "tree"


def test_rows_of_all_loaders(tree, tmp_path, capsys):
    pytest.importorskip("timm")
    out = tmp_path / "rows.json"
    flags = ["--sizes", "24", "--workers", "1", "--batch_size", "4", "--passes", "1", "--seconds", "0.05"]
    tool.main(["--data_dir", str(tree), "--json", str(out), "--device_rate", "1e9", *flags])
    rows = json.loads(out.read_text())
    assert [row["loader"] for row in rows] == ["ours", "torchvision", "timm"]
    for row in rows:
        assert row["files"] == "originals"
        assert (row["size"], row["workers"]) == (24, 1)
        assert row["images/s"] > 0
        assert row["CPU us/image"] > 0
        assert row["MB"] > 0
    text = capsys.readouterr().out
    assert "recommended: --workers 1" in text
    assert "bound by the loader; prepare a pyramid" in text


def test_recommended_workers():
    rates = [(224, 1, 400), (224, 2, 800), (224, 4, 820), (56, 1, 1000), (56, 2, 1990), (56, 4, 3900)]
    rows = pd.DataFrame(rates, columns=["size", "workers", "images/s"])
    # The small size still gains.
    assert recommend_workers(rows, {}) == 4
    # 2.5 % more are not worth two processes.
    assert recommend_workers(rows[:3], {}) == 2
    assert recommend_workers(rows, {224: 300, 56: 900}) == 1
    assert recommend_workers(rows, {224: 300, 56: 1500}) == 2
    assert recommend_workers(rows, {224: 10_000, 56: 900}) == 2


def test_verdicts():
    assert verdict(128, 4000, 4100, 4, False, 8).endswith("bound by the device")
    assert "bound by the loader; prepare a pyramid" in verdict(128, 5200, 4100, 4, False, 8)
    assert verdict(128, 5200, 4100, 4, False, 8).endswith("or take 6 workers")
    assert verdict(128, 5200, 4100, 4, True, 8).endswith("loader; take 6 workers")
    assert verdict(128, 8400, 4100, 8, True, 8).endswith("about 17 CPUs are needed and there are 8")


def test_medians_of_passes_that_take_turns(monkeypatch):
    turns = []

    def start(name: str):
        def batches(*_):
            turns.append(name)
            yield 1

        return batches

    rates = iter([10, 1, 90, 2, 20, 7])
    monkeypatch.setattr(tool, "run_pass", lambda batches, *_: next(batches) and {"images/s": next(rates)})
    rows = measure({("a", "x"): start("a"), ("b", "x"): start("b")}, 24, 1, passes=3, seconds=1)
    assert turns == ["a", "b"] * 3
    assert rows[["loader", "images/s"]].values.tolist() == [["a", 20], ["b", 2]]


def test_warm_up_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tool, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def batches():
        for number in range(100):
            now[0] += 50 if number < 3 else 0.5
            yield 10

    assert run_pass(batches(), warm_up=3, seconds=5)["images/s"] == pytest.approx(20)


def test_worker_counts():
    assert worker_counts(1) == [1]
    assert worker_counts(6) == [1, 2, 4, 6]
    assert worker_counts(16) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "2", "0"], "error: --workers takes counts of at least 1, not 0"),
        (["--auto_augment", "bogus"], "invalid choice: 'bogus'"),
        (["--batch_size", "0"], "error: --batch_size must be at least 1, not 0"),
        (["--passes", "0"], "error: --passes must be at least 1, not 0"),
        (["--sizes", "32", "0"], "error: --seconds and all of --sizes must be numbers above 0"),
        (["--seconds", "nan"], "error: --seconds and all of --sizes must be numbers above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(tree, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--data_dir", str(tree), "--sizes", "24", "--passes", "1", "--seconds", "0.05", *flags])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_what_is_refused(tree, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--data_dir", str(tree), "--device_rate", "1"])
    assert stop.value.code == 2
    assert "--device_rate needs one number for each of --sizes" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        tool.main(["--data_dir", "/nowhere"])
    assert stop.value.code == 2
