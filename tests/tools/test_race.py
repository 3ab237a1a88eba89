import json
import runpy
import sys
from pathlib import Path

import pytest

from common.tools import race, yardstick
from tests.helpers import ROOT, as_if_measured, make_images

# Stands in for our scripts: an accuracy that follows from the strategy and the budget; the last is refused below a minute.
SCRIPT = """
import json, pathlib, sys
given = dict(zip(sys.argv[1:], sys.argv[2:]))
name = pathlib.Path(sys.argv[0]).stem
seconds = float(given["--budget"].rstrip("s"))
if name == "train_rect" and seconds < 120:
    print("error: --budget is too small", file=sys.stderr)
    sys.exit(2)
stop = pathlib.Path("stop")
if stop.exists() and "rung2" in given["--run_name"]:
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


def test_the_better_half_goes_on_and_the_rest_of_the_budget_trains_the_winner(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    race.main([*flags, "--budget", "12min", "--usd_per_hour", "6", "--lanes", "2"])
    said = capsys.readouterr().out
    # Six minutes for two rungs of two lanes: 90 s for each of four, then 180 s for each of two.
    assert folders(tmp_path / "out") == [
        "rung1_hybrid_resnet18",
        "rung1_progressive_resnet18",
        "rung1_standard_resnet18",
        "rung2_progressive_resnet18",
        "rung2_standard_resnet18",
    ]
    assert "refused" in said
    assert (
        "winner: progressive_resnet18, 10.0 points before standard_resnet18, outside its 95 % interval"
        in said
    )
    assert "train_progressive.py --data_dir" in said
    assert (tmp_path / "out" / "race.png").stat().st_size > 10_000
    receipt = json.loads((tmp_path / "out" / "rung2_standard_resnet18" / "receipt.json").read_text())
    assert receipt["total_minutes"] == 3.0
    assert receipt["data"] == str(tmp_path / "out" / "inner")
    # All of a rung saw the same images, and none of those that report.
    assert len(list((tmp_path / "out" / "inner").rglob("*.jpg"))) == 15
    race.main([*flags, "--budget", "12min", "--usd_per_hour", "6", "--lanes", "2", "--go"])
    said = capsys.readouterr().out
    assert "rung1" not in said
    assert "validation top-1 67." in said
    winner = json.loads((tmp_path / "out" / "winner_progressive_resnet18" / "receipt.json").read_text())
    assert winner["data"] == flags[1]
    assert 11 < winner["total_minutes"] <= 12


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
    assert "  rung1" not in said
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


def test_our_scripts_know_their_commands(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "ROOT", ROOT)
    commands = []

    def collect(job: race.Job, args, data_dir: Path) -> None:
        commands.append(race.command(job, args, data_dir))
        job.beside("json").write_text(json.dumps({"seconds": 1.0, "exit_code": 2, "why": "enough"}))

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
