import inspect
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.scheduling import budget
from common.tools import race, yardstick
from tests.helpers import ROOT, as_if_measured, make_images

# Stands in for our scripts: an accuracy that follows from the strategy and the budget; the last is refused below two minutes.
SCRIPT = """
import json, os, pathlib, signal, sys, time
given = dict(zip(sys.argv[1:], sys.argv[2:]))
name = pathlib.Path(sys.argv[0]).stem
seconds = float(given["--budget"].rstrip("s"))
if name == "train_rect" and seconds < 120:
    print("error: --budget 90s is too small for an epoch of each stage: it takes 120s or more", file=sys.stderr)
    print("said before, and printed late")
    sys.exit(2)
if given["--model"] == "unheard_of" or given.get("--workers") == "99":
    print("error: --model or --workers is wrong", file=sys.stderr)
    sys.exit(2)
if pathlib.Path("wait").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
    pathlib.Path("pid.new").write_text(str(os.getpid()))
    pathlib.Path("pid.new").rename("pid")
    time.sleep(20)
stop = pathlib.Path("stop")
if stop.exists() and "hybrid" in given["--run_name"]:
    sys.exit(int(stop.read_text()))
top1 = {"train_standard": 50, "train_progressive": 60, "train_hybrid": 40, "train_rect": 70}[name] + seconds / 100
folder = pathlib.Path(given["--output"]) / given["--run_name"]
folder.mkdir()
price = float(given["--usd_per_hour"]) if "--usd_per_hour" in given else None
(folder / "receipt.json").write_text(json.dumps({
    "last_top1": top1, "interval_95": [top1 - 5, top1 + 5], "total_minutes": seconds / 60, "epochs": 3,
    "usd_per_hour": price, "price_usd": price and seconds / 3600 * price, "data": given["--data_dir"],
}))
"""


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in yardstick.SCRIPTS:
        (tmp_path / f"train_{name}.py").write_text(SCRIPT)
    monkeypatch.setattr(race, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    data = make_images(tmp_path / "images", train=5, val=2)
    return ["--data_dir", str(data), "--output", str(tmp_path / "out"), "--model", "resnet18"]


def folders(place: Path) -> list[str]:
    return sorted(path.parent.name for path in place.glob("*/receipt.json"))


def test_the_best_is_chosen_and_the_rest_of_the_budget_trains_it(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    race.main([*flags, "--budget", "12min", "--usd_per_hour", "6", "--lanes", "2"])
    said = capsys.readouterr().out
    # Three minutes for four runs in two lanes: 90 s for each.
    assert folders(tmp_path / "out") == [
        "rung1_hybrid_resnet18",
        "rung1_progressive_resnet18",
        "rung1_standard_resnet18",
    ]
    assert "rect_resnet18 was refused: 90s is too small for an epoch of each stage: it takes 120s" in said
    assert (
        "winner: progressive_resnet18, 10.0 points before standard_resnet18, outside its 95 % interval"
        in said
    )
    assert "train_progressive.py --data_dir" in said
    assert (tmp_path / "out" / "race.png").stat().st_size > 10_000
    receipt = json.loads((tmp_path / "out" / "rung1_standard_resnet18" / "receipt.json").read_text())
    assert receipt["total_minutes"] == 1.5
    assert receipt["data"] == str(tmp_path / "out" / "inner")
    # All of a rung saw the same images, and none of those that report.
    assert len(list((tmp_path / "out" / "inner").rglob("*.jpg"))) == 15
    # As if they had taken their time, as ledgers tell; or receipts, where a race was killed beside its training.
    for script, seconds in (("standard", 150.0), ("progressive", 90.0), ("rect", 60.0)):
        ledger = tmp_path / "out" / f"rung1_{script}_resnet18.json"
        ledger.write_text(json.dumps({**json.loads(ledger.read_text()), "seconds": seconds}))
    (tmp_path / "out" / "rung1_hybrid_resnet18.json").unlink()
    race.main([*flags, "--budget", "12min", "--usd_per_hour", "6", "--lanes", "2", "--go"])
    said = capsys.readouterr().out
    assert "rung1" not in said
    winner = json.loads((tmp_path / "out" / "winner_progressive_resnet18" / "receipt.json").read_text())
    assert winner["data"] == flags[1]
    # 60 and 150 s in one lane, 90 and 90 in the other: 8.5 of 12 minutes are left.
    assert winner["total_minutes"] == pytest.approx(8.5, abs=0.02)
    assert "validation top-1 65.1" in said


def test_of_a_large_field_the_better_half_goes_on(flags: list[str], tmp_path: Path) -> None:
    race.main([*flags, "--budget", "96min", "--model", "a,b", "--lanes", "2"])
    # 24 minutes for three rungs: four turns of two minutes, two of four, one of eight.
    minutes = {
        path.parent.name: json.loads(path.read_text())["total_minutes"]
        for path in (tmp_path / "out").glob("*/receipt.json")
    }
    scripts = ("standard", "progressive", "hybrid", "rect")
    assert minutes == {
        **{f"rung1_{script}_{model}": 2.0 for script in scripts for model in "ab"},
        **{f"rung2_{script}_{model}": 4.0 for script in ("progressive", "rect") for model in "ab"},
        **{f"rung3_rect_{model}": 8.0 for model in "ab"},
    }


@pytest.mark.parametrize(
    ("candidates", "lanes", "sizes"),
    [
        (1, 1, [1]),
        (4, 1, [4]),
        (5, 1, [5]),
        (6, 1, [6]),
        (7, 1, [7, 4, 2]),
        (10, 1, [10, 5, 3, 2]),
        (8, 4, [8]),
        (16, 4, [16, 8, 4]),
    ],
)
def test_the_last_rungs_runs_are_as_long_as_can_be(candidates: int, lanes: int, sizes: list[int]) -> None:
    assert race.rung_sizes(candidates, lanes) == sizes


@pytest.mark.parametrize(
    ("code", "says"), [("75", "the same command goes on"), ("1", "ended with exit code 1")]
)
def test_a_race_that_was_stopped_goes_on(
    code: str, says: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "stop").write_text(code)
    with pytest.raises(SystemExit) as end:
        race.main([*flags, "--budget", "30min"])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    (tmp_path / "stop").unlink()
    race.main([*flags, "--budget", "30min"])
    said = capsys.readouterr().out
    assert "  rung1_standard" not in said
    assert "winner: progressive_resnet18" in said
    with pytest.raises(SystemExit):
        race.main([*flags, "--budget", "40min"])
    assert "holds a race with --budget 30min; choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--budget soon", "--budget takes"),
        ("--budget 2usd", "--usd_per_hour"),
        ("--budget 1h --data_dir nowhere", "--data_dir nowhere"),
        ("--budget 1h --lanes 0", "--lanes"),
        ("--budget 1h --seed -1", "--seed must be at least 0, not -1"),
        ("--budget 1h --val_fraction 0", "--val_fraction must lie between 0 and 1, not 0.0"),
        ("--budget 1h --val_fraction 1.5", "--val_fraction must lie between 0 and 1, not 1.5"),
    ],
)
def test_wrong_calls(
    wrong: str, says: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        race.main([*flags, *wrong.split()])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        race.main([*words])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_planners_sentence_is_known() -> None:
    source = inspect.getsource(budget.plan_budget)
    assert race.TOO_SMALL in source
    assert re.search(race.NEEDED, source.replace("{needed}", "7"))


def test_each_lane_has_a_gpu_of_its_own(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [race.environment(lane, 2)["CUDA_VISIBLE_DEVICES"] for lane in range(2)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [race.environment(lane, 2)["CUDA_VISIBLE_DEVICES"] for lane in range(2)] == ["5", "3"]
    assert "--lanes 3 are more than the GPUs here; 2 can" in refused(
        capsys, *flags, "--budget", "1h", "--lanes", "3"
    )


def test_what_is_wrong_is_said_and_the_corrected_command_goes_on(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    said = refused(capsys, *flags, "--budget", "30min", "--model", "unheard_of", "--val_fraction", "0.4")
    assert said.startswith("error: rung1_standard_unheard_of was refused: --model or --workers is wrong (")
    assert not list(out.glob("rung*.json"))
    # The first refusal ends the race.
    assert [path.name for path in out.glob("rung*.log")] == ["rung1_standard_unheard_of.log"]
    # In the same folder of logs.
    said = refused(capsys, *flags, "--budget", "30min", "--workers", "99")
    assert "rung1_standard_resnet18 was refused: --model or --workers is wrong (" in said
    race.main([*flags, "--budget", "30min"])
    assert "winner: progressive_resnet18" in capsys.readouterr().out
    # The split is the last command's, too.
    assert len(list((out / "inner" / "val").rglob("*.jpg"))) == 3
    said = refused(capsys, *flags, "--budget", "30min", "--workers", "99")
    assert "holds a race with --workers None; choose another" in said


def test_a_larger_budget_goes_on_where_none_was_trained(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "scripts", lambda _: ["rect"])
    said = refused(capsys, *flags, "--budget", "1min")
    assert (
        "--budget 1min is too small for a race: each run would have 15 s, and takes 120 s or more; with 8min all"
        in said
    )
    # Nor was anything by a child that a signal met in its first second.
    (tmp_path / "out" / "rung1_hybrid_resnet18.json").write_text(
        '{"seconds": 1, "exit_code": -15, "why": ""}'
    )
    race.main([*flags, "--budget", "30min"])
    assert "winner: rect_resnet18" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "lanes", "taken"), [([6] * 5, 2, 18), ([6] * 4, 2, 12), ([10], 4, 10), ([5, 1, 1], 1, 7)]
)
def test_lanes_that_stand_idle_count(seconds: list[float], lanes: int, taken: float) -> None:
    assert race.seconds_in_lanes(seconds, lanes) == taken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_race_and_its_trainings(
    number: signal.Signals, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wait, pid = tmp_path / "wait", tmp_path / "pid"
    wait.touch()

    def not_handled(*_: object) -> None:
        raise AssertionError("the race did not take the signal")

    def send() -> None:
        while not pid.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.signal(number, not_handled)
    try:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        began = time.monotonic()
        said = refused(capsys, *flags, "--budget", "30min")
        assert signal.getsignal(number) is not_handled
    finally:
        signal.signal(number, before)
    assert said == "error: the race was stopped; the same command goes on from here"
    # The training did not sleep to its end, and no other one began after it.
    assert time.monotonic() - began < 15
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert [path.name for path in (tmp_path / "out").glob("rung*.log")] == ["rung1_standard_resnet18.log"]
    wait.unlink()
    race.main([*flags, "--budget", "30min"])
    assert "winner: progressive_resnet18" in capsys.readouterr().out


def test_our_scripts_know_their_commands(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "ROOT", ROOT)
    commands = []

    def collect(job: race.Job, args, data_dir: Path, *_: Any) -> None:
        commands.append(race.command(job, args, data_dir))
        job.beside("json").write_text(
            json.dumps({"seconds": 1.0, "exit_code": 2, "why": "it takes 9s or more"})
        )

    monkeypatch.setattr(race, "run", collect)
    more = "--budget 40h --img_size 32 --mixed_precision no --workers 0 --usd_per_hour 1"
    with pytest.raises(SystemExit):
        race.main([*flags, *more.split()])
    assert len(commands) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("common.engine.measure.measure_stage", as_if_measured(0.1))
    for words in commands:
        monkeypatch.setattr(sys, "argv", [*words[1:], "--dry_run", "--recipe", "listed"])
        runpy.run_path(words[1], run_name="__main__")
