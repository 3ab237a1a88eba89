import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

from common import UserError
from common.config import parse_args
from common.data.decode import read_header
from common.engine.trainer import Trainer
from common.tools import benchmark_loop, gpu_report
from common.tools.gpu_report import REHEARSED, Pictures, Row, main, measure
from tests.helpers import ROOT, make_images

# What a machine with a GPU may lack.
REFUSED = "datasets wandb boto3 pyarrow pandas matplotlib"
HOOK = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in {REFUSED.split()!r}
        return None if missing else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
from common.tools.gpu_report import main
main()
"""
TIMM = """
import sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
images = sum(1 for _ in Path(flags["--data-dir"]).rglob("train/*/*.jpg"))
for epoch in (0, 1):
    for step in (10, 20, 60):
        rate = images + step + epoch
        print(f"Train: {epoch} [   0/8 (  0%)]  Loss: 4.87 (4.87)  Time: 0.054s,   {rate}.50/s  (0.096s,   99.50/s)  LR: 1.0")
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The whole report, on a machine that has nothing but what it says it needs."""
    out = tmp_path_factory.mktemp("rehearsal") / "report"
    command = [sys.executable, "-c", HOOK, "--rehearse", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_the_rehearsal_measures_every_row_but_those_that_need_more(rehearsed):
    content = json.loads((rehearsed / "gpu_report.json").read_text())
    missing = {row["what"]: row["reason"] for row in content["rows"] if not row["figures"]}
    assert [what.split()[0] for what in missing] == ["timm's", "CIFAR-10"], missing
    assert ["--peers" in missing[what] or "--cifar" in missing[what] for what in missing] == [True, True]
    assert len(content["rows"]) == 16
    figures = {row["what"]: row["figures"] for row in content["rows"]}
    assert all(value > 0 for row in figures.values() for value in row.values() if not isinstance(value, str))
    for name in ("torch", "torchvision", "timm", "accelerate", "commit", "date"):
        assert content["environment"][name]


def test_the_table_has_a_line_for_each_row(rehearsed):
    text = (rehearsed / "gpu_report.md").read_text()
    rows = json.loads((rehearsed / "gpu_report.json").read_text())["rows"]
    lines = [line for line in text.splitlines() if line.endswith(" s |")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [row["what"] for row in rows]
    assert sum("*not measured*" in line for line in lines) == 2


def test_nothing_is_begun_that_the_time_does_not_suffice_for(tmp_path, capsys):
    main(["--rehearse", "--minutes", "0", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu_report.json").read_text())["rows"]
    assert {row["reason"] for row in rows} == {"out of time"}
    assert capsys.readouterr().out.count("out of time") == len(rows) == 16


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fails():
        raise ZeroDivisionError("over | and\nout")

    def refused():
        # fp16 on a CPU, said by the run itself: a UserError that ends a script with code 2.
        with benchmark_loop.ready(gpu_report.config(REHEARSED), 2):
            raise UserError("set --img_size")

    def stopped():
        raise SystemExit(75)

    rows = [("a", 1, fails), ("b", 1, refused), ("c", 1, lambda: {"images/s": 3.0}), ("d", 1, stopped)]
    monkeypatch.setattr(gpu_report, "rows_of", lambda *_: rows)
    with pytest.raises(SystemExit) as end:
        main(["--rehearse", "--out", str(tmp_path)])
    assert end.value.code == 75
    written = json.loads((tmp_path / "gpu_report.json").read_text())["rows"]
    assert [row["reason"] for row in written] == ["ZeroDivisionError: over / and", "set --img_size", ""]
    assert "| c | images/s 3.000 | " in (tmp_path / "gpu_report.md").read_text()


def test_a_wait_for_the_device_is_found_and_its_place_told(monkeypatch):
    def waits(*_):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(Trainer, "train_step", waits)
    row = measure("waits", lambda: gpu_report.waits(REHEARSED))
    assert "20 waits in 20 steps, at {'test_gpu_report.py:" in row.reason


def test_timm_gets_pictures_and_the_median_of_its_second_epoch_is_taken(tmp_path):
    (tmp_path / "train.py").write_text(TIMM)
    images = REHEARSED.steps * REHEARSED.batch
    assert measure("timm", lambda: gpu_report.timm_train(REHEARSED, str(tmp_path), 60)).figures == {
        "images/s": images + 21.5
    }
    (tmp_path / "train.py").write_text("raise SystemExit('no such flag')")
    assert (
        "no such flag" in measure("timm", lambda: gpu_report.timm_train(REHEARSED, str(tmp_path), 60)).reason
    )


def test_cifar_is_trained_until_it_is_good_enough(tmp_path, monkeypatch):
    data = str(make_images(tmp_path / "data"))
    for goal, reached in ((100.5, "not reached"), (1.0, None)):
        monkeypatch.setattr(gpu_report, "CIFAR_GOAL", goal)
        row = measure("cifar", lambda: gpu_report.cifar(REHEARSED, data))
        assert row.figures[f"s to {goal:g} %"] == (reached or row.figures["s in all"]), row
    assert 0 < row.figures["best top-1 %"] <= 100


def test_pictures_are_a_pyramid_of_photographs_sizes():
    pictures = Pictures(70)
    for index in (0, 1, 69):
        height, width = pictures.sizes()[index]
        for wanted, short in ((64, 146), (146, 146), (147, 256), (300, 256)):
            header = read_header(pictures.read(index, wanted))
            assert min(header[:2]) == short
            assert header.height / header.width == pytest.approx(height / width, rel=0.02)
    assert 4_000 < np.mean([len(pictures.read(index, 256)) for index in range(8)]) < 60_000


def test_cells_of_a_row():
    assert Row("a", {"images/s": 12345.6, "ratio": 0.98765, "why": "so"}, seconds=2.4).cells() == (
        "| a | images/s 12,346, ratio 0.988, why so | 2 s |"
    )


def test_the_loop_beside_a_bare_one(tmp_path):
    flags = [
        "--model",
        "test_resnet",
        "--img_size",
        "32",
        "--batch_size",
        "8",
        "--steps",
        "3",
        "--repeats",
        "2",
    ]
    file = tmp_path / "loop.json"
    args = [*flags, "--mixed_precision", "no", "--json", str(file)]
    benchmark_loop.main(parse_args(benchmark_loop.LoopConfig, "", args))
    figures = json.loads(file.read_text())
    assert len(figures["seconds"]["bare"]) == len(figures["seconds"]["engine"]) == 2
    assert 0.1 < figures["ratio"] < 10
    assert min(figures["bare"], figures["engine"]) > 1


def test_loops_take_turns():
    order = []
    loops = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = benchmark_loop.in_turns(loops, 2, gpu_report.torch.device("cpu"))
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [len(times) for times in seconds.values()] == [2, 2]
