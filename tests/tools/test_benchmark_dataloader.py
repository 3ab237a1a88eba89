"""The benchmark measures all loaders, and its advice follows from the figures."""

import json
import types

import pytest
from PIL import Image

from common.tools import benchmark_dataloader as tool
from common.tools.benchmark_dataloader import Row, recommend_workers, run_pass, verdict, worker_counts


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
        assert (row["img_size"], row["workers"]) == (24, 1)
        assert row["images_per_s"] > 0
        assert row["cpu_us_per_image"] > 0
        assert row["memory_mb"] > 0
    text = capsys.readouterr().out
    assert "recommended: --workers 1 --prefetch" in text
    assert "bound by the loader; prepare a pyramid" in text


def row(size: int, workers: int, rate: float, files: str = "originals") -> Row:
    return Row("ours", files, size, workers, images_per_s=rate)


def test_recommended_workers():
    rows = [
        row(224, 1, 400),
        row(224, 2, 800),
        row(224, 4, 820),
        row(56, 1, 1000),
        row(56, 2, 1990),
        row(56, 4, 3900),
    ]
    assert recommend_workers(rows, {}) == 4  # the small size still gains
    assert recommend_workers(rows[:3], {}) == 2  # 2.5 % more are not worth two processes
    assert recommend_workers(rows, {224: 300, 56: 900}) == 1
    assert recommend_workers(rows, {224: 300, 56: 1500}) == 2
    assert recommend_workers(rows, {224: 10_000, 56: 900}) == 2


def test_verdicts():
    assert verdict(128, 4000, row(128, 4, 4100), 8).endswith("bound by the device")
    assert "bound by the loader; prepare a pyramid" in verdict(128, 5200, row(128, 4, 4100), 8)
    assert verdict(128, 5200, row(128, 4, 4100), 8).endswith("or add 2 workers")
    assert verdict(128, 5200, row(128, 4, 4100, "pyramid"), 8).endswith("loader; add 2 workers")
    assert verdict(128, 8400, row(128, 8, 4100, "pyramid"), 8).endswith(
        "about 17 CPUs are needed and there are 8"
    )


def test_warm_up_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tool, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def batches():
        for number in range(100):
            now[0] += 50 if number < 3 else 0.5
            yield 10

    rate, _, _ = run_pass(batches(), warm_up=3, seconds=5)
    assert rate == pytest.approx(20)


def test_worker_counts():
    assert worker_counts(1) == [1]
    assert worker_counts(6) == [1, 2, 4, 6]
    assert worker_counts(16) == [1, 2, 4, 8, 16]


def test_what_is_refused(tree, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--data_dir", str(tree), "--device_rate", "1"])
    assert stop.value.code == 2
    assert "--device_rate needs one number for each of --sizes" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        tool.main(["--data_dir", "/nowhere"])
    assert stop.value.code == 2
