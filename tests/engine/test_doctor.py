"""The pre-flight: what it finds in data and surroundings, what it says of the measurements; and it writes nothing."""

import math
import re
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from common.engine import doctor
from common.engine.doctor import disk, duration, labels, pace
from common.run.records import wandb_mode
from common.scheduling import Stage, make_plan
from common.scheduling.budget import Costs, Measured
from tests.helpers import launch, make_images, run_training
from train_progressive import ProgressiveConfig
from train_standard import StandardConfig

MEASURED = Measured(32, "square", (), images=64, step_s=0.5, wait_s=0.5, evaluate_s=3.0, enter_s=1.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "STEPS_S", 0.02)
    monkeypatch.setattr("common.engine.measure.write_plots", lambda folder: None)


def lines(text: str) -> dict[str, str]:
    """The pre-flight's lines by subject: level and sentence."""
    found = re.findall(r"^(ok|warning|error) +([^:,]+)(.*)$", text, re.MULTILINE)
    return {subject: f"{level} {rest}" for level, subject, rest in found}


def test_a_run_that_can_begin(tmp_path, capsys):
    data = make_images(tmp_path / "data", train=24)
    flags = ["--batch_size", "8", "--dry_run", "--optimizer", "adamw", "--ema", "--epochs", "2"]
    run_training(StandardConfig, data, tmp_path / "runs", "dry", *flags)
    text = capsys.readouterr().out
    said = lines(text)
    assert said.keys() >= {
        "model",
        "normalisation",
        "classes",
        "images",
        "duplicates",
        "trackers",
        "first loss",
    }
    assert said.keys() >= {"stage 1", "memory", "disk", "time"}
    assert "72 training and 21 validation images, 3 classes, 1 process\n" in text
    assert said["steps"].startswith("warning")
    assert "9 or more per epoch" in said["steps"]
    assert "--batch_size" in said["steps"]
    assert "ln 3 = 1.1" in said["first loss"]
    assert text.endswith("pre-flight: 0 errors, 1 warning\n")
    assert not (tmp_path / "runs").exists()


def test_what_a_sample_of_the_images_shows(tmp_path, capsys):
    data = make_images(tmp_path / "data", train=9)
    (data / "val" / "class2" / "0.jpg").write_bytes((data / "train" / "class1" / "4.jpg").read_bytes())
    (data / "train" / "class0" / "3.jpg").write_bytes(b"no picture")
    flags = ["--batch_size", "4", "--dry_run", "--skip_unreadable"]
    run_training(ProgressiveConfig, data, tmp_path / "runs", "dry", *flags)
    said = lines(capsys.readouterr().out)
    assert said["images"].startswith("warning")
    assert "class0/3.jpg" in said["images"]
    assert said["duplicates"].startswith("warning : 1 in ")
    assert re.search(r"val/class2/0\.jpg is .*train/class1/4\.jpg; .*--data_dir", said["duplicates"])
    assert said["classes"].startswith("warning")
    assert "class0 can hardly be learnt" in said["classes"]
    assert {"stage 1", "stage 2", "stage 3"} <= said.keys()


def test_several_processes_print_once(tmp_path):
    data = make_images(tmp_path / "data")
    flags = [
        "--model",
        "test_resnet",
        "--img_size",
        "32",
        "--batch_size",
        "8",
        "--trackers",
        "none",
        "--workers",
        "0",
    ]
    done = launch(
        2,
        "train_standard.py",
        "--data_dir",
        str(data),
        "--output",
        str(tmp_path / "runs"),
        *flags,
        "--dry_run",
    )
    assert done.returncode == 0, done.stderr
    assert "3 classes, 2 processes\n" in done.stdout
    assert done.stdout.count("pre-flight:") == done.stdout.count("first loss") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("loss", "level", "words"),
    [
        (2.4, "ok", "ln 10 = 2.3"),
        (0.2, "ok", "the weights know the classes already"),
        (9.0, "warning", "check the classes"),
        (math.nan, "error", "--mixed_precision no"),
    ],
)
def test_the_first_loss(loss, level, words):
    finding = labels(loss, 10, pretrained=False)
    assert finding.level == level
    assert words in finding.sentence
    # A new head may begin with large weights.
    assert labels(9.0, 10, pretrained=True).level == "ok"


def at_rest(**cfg) -> SimpleNamespace:
    """What the verdicts read of a trainer: 2 stages of 3 and 1 epochs, 10 steps each, of 64 images of 640."""
    stages = [Stage(epochs=3, img_size=32, batch_size=64), Stage(epochs=1, img_size=64, batch_size=64)]
    settings = {"lr": 0.1, "lr_scaling": "linear", "optimizer": "sgd", "lr_finder_iterations": 100}
    settings |= {"keep_every": 0, "usd_per_hour": None, "pretrained": False} | cfg
    return SimpleNamespace(
        plan=make_plan(stages, 640, 1),
        run=SimpleNamespace(cfg=SimpleNamespace(final_eval=False, **settings)),
        state=SimpleNamespace(progress=SimpleNamespace(epochs_done=0, peak_lr=0.0, step=0)),
        batches=SimpleNamespace(train=SimpleNamespace(prepared=False), val=None),
    )


def test_the_loader_against_the_device():
    finding = pace(at_rest(), 1, MEASURED._replace(img_size=64))
    assert finding.level == "warning"
    assert "stage 2, 64 px: training takes 128 images/s, 0.5 s a step" in finding.sentence
    assert "the loader starves the device, 50% of the time is waiting for it; raise" in finding.sentence
    assert "--workers or prepare a pyramid" in finding.sentence
    finding = pace(at_rest(), 0, MEASURED._replace(wait_s=0.1))
    assert finding.level == "ok"
    assert "the loader keeps up, 17% of the time is waiting" in finding.sentence


def test_the_time_of_a_run(monkeypatch):
    """An epoch trains for 10 s, waits and evaluates for 3 s, and saves for 1 s."""
    costs = Costs((MEASURED, MEASURED._replace(img_size=64)), start_s=4.0, save_s=1.0)
    assert duration(at_rest(), costs) == (
        "time: about 1:03 with evaluation (start 0:04, compile 0:02, train 1 0:15, train 2 0:05, wait 0:20, "
        "evaluate 0:12, save 0:05)"
    )
    found = duration(at_rest(lr="auto", usd_per_hour=60.0), costs)
    assert "about 2:43, 2.72 USD with evaluation (start 0:04, finder 1:40, " in found
    assert "finder" not in duration(at_rest(lr="auto", optimizer="adamw"), costs)
    # A head that is fitted before the first step, which a resumed run is behind.
    monkeypatch.setattr(doctor, "head_to_fit", lambda _: True)
    monkeypatch.setattr(doctor, "fit_evaluations", lambda *_: 2.0)
    assert "evaluate 0:12, passes 0:06, save 0:05" in duration(at_rest(pretrained=True), costs)
    resumed = at_rest(pretrained=True)
    resumed.state.progress.epochs_done, resumed.state.progress.step = 2, 20
    assert "train 1 0:05, train 2 0:05, wait 0:10, evaluate 0:06, save" in duration(resumed, costs)


@pytest.mark.parametrize(("free_gb", "level"), [(10, "ok"), (1.5, "warning"), (0.5, "error")])
def test_the_disk(free_gb, level, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(free_gb * 1e9))
    t = at_rest(keep_every=1)
    t.run.folder = tmp_path / "runs" / "new"
    # 8 checkpoints, as 4 epochs are kept: of 0.05 GB of weights and as much momentum.
    model = torch.nn.Linear(5000, 2500, bias=False, device="meta")
    state = {model.weight: {"momentum_buffer": torch.empty_like(model.weight)}}
    t.state.model, t.state.ema, t.state.optimizer = model, None, SimpleNamespace(state=state)
    finding = disk(t)
    assert finding.level == level
    assert "8 checkpoints of 0.1 GB" in finding.sentence
    assert "--output" in finding.sentence


def test_an_output_that_is_a_file_is_an_error(tmp_path):
    t = at_rest()
    (tmp_path / "file").touch()
    t.run.folder = tmp_path / "file" / "new"
    t.state.model, t.state.ema = torch.nn.Linear(5, 5), None
    t.state.optimizer = SimpleNamespace(state={})
    assert disk(t).level == "error"


def test_where_wandb_keeps_a_run(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
    assert capfd.readouterr().err == ""
