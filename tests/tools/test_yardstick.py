import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from common.tools import yardstick
from tests.helpers import ROOT, as_if_measured, make_images

# Stands in for timm's train.py: an accuracy that follows from the rate, and work that takes CPU time.
PEER = """
import pathlib, sys
given = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = pathlib.Path(given["--output"]) / given["--experiment"]
folder.mkdir(exist_ok=True)
sum(range(1_000_000))
best = 500 * float(given["--lr"]) - 20 * ("--scale" in given)
rows = [f"{epoch},{best * (epoch + 1) / int(given['--epochs'])}" for epoch in range(int(given["--epochs"]))]
with (folder / "summary.csv").open("a") as file:
    file.write("\\n".join(["epoch,eval_top1", *rows]) + "\\n")
if given["--seed"] == "3":
    sys.exit(1)
"""


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(yardstick, "SCRIPTS", ())
    (tmp_path / "train.py").write_text(PEER)
    data = make_images(tmp_path / "images")
    paths = [
        "--data_dir",
        str(data),
        "--peers",
        str(tmp_path / "train.py"),
        "--output",
        str(tmp_path / "out"),
    ]
    return [*paths, "--epochs", "4"]


def test_a_table_and_a_plot_of_trainings_that_run_once(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    yardstick.main([*flags, "--lanes", "2"])
    said = capsys.readouterr().out
    assert said.count("seed 0") == said.count("seed 1") == 4
    rows = [re.split(r"  +", line.strip()) for line in said.splitlines() if line.startswith("timm")]
    assert [row[:4] for row in rows] == [
        ["timm 0.05", "25.0 ± 0.0", "25.0", "2"],
        ["timm 0.1", "50.0 ± 0.0", "50.0", "2"],
        ["timm 0.2", "100.0 ± 0.0", "100.0", "2"],
        ["timm 0.2, our crops", "80.0 ± 0.0", "80.0", "2"],
    ]
    assert (tmp_path / "out" / "yardstick.png").stat().st_size > 10_000
    receipt = json.loads((tmp_path / "out" / "timm_0.1_s0.json").read_text())
    assert receipt["attempts"] == 1
    assert receipt["cpu_s"] > 0
    yardstick.main(flags)
    again = capsys.readouterr().out
    assert "seed 0" not in again
    # A training that was cut off tells nothing about its time.
    (tmp_path / "out" / "timm_0.1_s0.json").write_text(json.dumps(receipt | {"attempts": 2}))
    yardstick.main(flags)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("timm 0.1 ")]
    assert row.rstrip().endswith("–")
    with pytest.raises(SystemExit):
        yardstick.main([*flags, "--img_size", "96"])
    assert "of another command" in capsys.readouterr().err


def test_a_training_that_fails_is_named_and_starts_anew(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        yardstick.main([*flags, "--seeds", "3"])
    assert ended.value.code == 2
    assert "timm 0.05 ended with exit code 1: see " in capsys.readouterr().err
    (tmp_path / "train.py").write_text(PEER.replace("sys.exit(1)", "pass"))
    yardstick.main([*flags, "--seeds", "3"])
    assert "timm 0.05            25.0 ± 0.0" in capsys.readouterr().out


def test_a_refused_command_is_quoted_and_a_corrected_one_goes_on(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refusing = "import sys; print('error: --model is wrong', file=sys.stderr); sys.exit(2)"
    (tmp_path / "train.py").write_text(refusing)
    with pytest.raises(SystemExit):
        yardstick.main([*flags, "--seeds", "0", "--model", "wrong"])
    assert "ended with exit code 2: see " in (said := capsys.readouterr().err)
    assert said.endswith("(--model is wrong)\n")
    (tmp_path / "train.py").write_text(PEER)
    yardstick.main([*flags, "--seeds", "0"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--data_dir", "nowhere"), ("--peers", "nowhere.py"), ("--lanes", "0"), ("--epochs", "0")],
)
def test_a_path_that_is_not_there_is_refused(
    flag: str, value: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        yardstick.main([*flags, flag, value])
    assert ended.value.code == 2
    assert re.search(f"{flag}.* {value}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_our_scripts_know_their_commands(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yardstick, "SCRIPTS", ("standard", "progressive", "hybrid", "rect"))
    commands = []
    monkeypatch.setattr(yardstick, "run", lambda job: commands.append(job.command))
    monkeypatch.setattr(yardstick, "draw", lambda *_: None)
    monkeypatch.setattr(
        yardstick, "make_table", lambda jobs: (_ for _ in ()).throw(yardstick.UserError("enough"))
    )
    with pytest.raises(SystemExit):
        yardstick.main([*flags, "--seeds", "0"])
    ours = [command for command in commands if Path(command[1]).parent == ROOT]
    assert len(ours) == 4
    monkeypatch.setattr("common.engine.measure.measure_stage", as_if_measured(0.1))
    for command in ours:
        monkeypatch.setattr(sys, "argv", [*command[1:], "--dry_run"])
        runpy.run_path(command[1], run_name="__main__")
