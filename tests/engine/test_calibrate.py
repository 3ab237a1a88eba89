"""Runs with a budget, from the calibration to the receipt."""

import csv
import json
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest

from common.run import processes
from common.run.checkpoint import Progress
from common.run.plots import plot_receipt
from common.run.progress import outlook
from common.scheduling import Stage, make_plan
from common.scheduling.recipe import Recipe
from common.tools import receipt
from tests.helpers import (
    as_if_measured,
    assert_same,
    last_checkpoint,
    make_images,
    run_training,
    stop_after,
    weights,
)
from train_hybrid import HybridConfig
from train_standard import StandardConfig

FLAGS = ("--batch_size", "16", "--budget", "1h")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(autouse=True)
def young(monkeypatch, tmp_path):
    """Each run begins its own program, with a cache of its own, and draws no curves."""
    monkeypatch.setattr("common.engine.recording.write_plots", lambda folder: None)
    monkeypatch.setattr("common.engine.measure.write_plots", lambda folder: None)
    monkeypatch.setattr("common.run.run.program_age_s", lambda: 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan_as_if(monkeypatch, seconds: float) -> None:
    """Let every step be measured to take so many seconds."""
    monkeypatch.setattr("common.engine.measure.measure_stage", as_if_measured(seconds))


def state(run) -> dict:
    return json.loads((last_checkpoint(run) / "state.json").read_text())


def test_a_run_with_a_budget_ends_with_a_receipt_that_its_log_bears_out(data, tmp_path, monkeypatch, capsys):
    plan_as_if(monkeypatch, 170)
    run = run_training(StandardConfig, data, tmp_path, "a", *FLAGS, "--usd_per_hour", "3.6")
    said = capsys.readouterr().out
    assert "budget 1:00:00, 3.60 USD: 4 epochs [4], forecast 4" in said
    assert "twice of it" in said
    # Evaluations that were measured to take a fifth of the run.
    assert "adapted: an evaluation after every 4 epochs" in said
    paper = json.loads((run / "receipt.json").read_text())
    assert paper["epochs"] == 4
    assert paper["images_seen"] == 4 * 64
    assert paper["price_usd"] == pytest.approx(paper["total_minutes"] / 60 * 3.6)
    assert paper["forecast"]["budget_minutes"] == 60
    assert paper["forecast"]["total_minutes"] < paper["forecast"]["interval_90_minutes"][1] <= 60
    assert set(paper["minutes"]) == set(paper["forecast"]["minutes"])
    assert (run / "plots" / "receipt.png").exists()
    plot_receipt(run)
    assert (run / "plots" / "receipt.png").stat().st_size > 10_000
    receipt.main([str(run)])
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["epochs", "images_seen", "last_top1", "total_minutes", "price_usd"])
def test_a_figure_that_was_changed_is_found(name, tmp_path, capsys):
    rows = [
        {"epoch": 1, "val_top1": 50.0, "ema_top1": 60.0, "images_seen": 64, "epoch_s": 60.0, "total_s": 70}
    ]
    with open(tmp_path / "training_log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    paper = {
        "minutes": {"start": 0.5, "train 1": 0.4, "wait": 0.0, "evaluate": 0.1, "save": 0.5},
        "total_minutes": 1.5,
        "usd_per_hour": 4.0,
        "price_usd": 0.1,
        "epochs": 1,
        "images_seen": 64,
        "val_images": 100,
        "last_top1": 50.0,
        "best_top1": 60.0,
        # Wilson's interval of 50 of 100, as tables have it.
        "interval_95": [40.3832, 59.6168],
    }
    (tmp_path / "receipt.json").write_text(json.dumps(paper))
    receipt.main([str(tmp_path)])
    (tmp_path / "receipt.json").write_text(json.dumps(paper | {name: 1.01 * paper[name]}))
    with pytest.raises(SystemExit) as end:
        receipt.main([str(tmp_path)])
    assert end.value.code == 1
    assert "WRONG" in capsys.readouterr().out


def test_interrupted_equals_uninterrupted(data, tmp_path, monkeypatch, capsys):
    plan_as_if(monkeypatch, 200)
    stages = (
        '[{"epochs": 1, "img_size": 24, "batch_size": 24}, {"epochs": 2, "img_size": 32, "batch_size": 16}]'
    )
    flags = ("--stages", stages, "--budget", "1h")
    whole = run_training(HybridConfig, data, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with suppress(SystemExit):
            run_training(HybridConfig, data, tmp_path, "parts", *flags)
    planned = state(tmp_path / "parts")["progress"]["forecast"]["parts"]
    # Another machine: four times as slow, which is not asked again.
    plan_as_if(monkeypatch, 800)
    capsys.readouterr()
    parts = run_training(HybridConfig, data, tmp_path, "parts", *flags)
    said = capsys.readouterr().out
    assert "calibration" not in said
    assert "budget 1:00:00: " in said
    assert "to go" in said
    assert state(parts)["config"]["stages_in_force"] == state(whole)["config"]["stages_in_force"]
    assert_same(weights(whole), weights(parts))
    paper = json.loads((parts / "receipt.json").read_text())
    assert paper["forecast"]["minutes"] == {part: seconds / 60 for part, seconds in planned.items()}
    assert paper["minutes"].keys() == planned.keys()
    receipt.main([str(parts)])


def test_a_dry_run_plans_from_the_calibration_that_was_kept(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.engine.calibrate.SHARE", 0.0)
    monkeypatch.setattr("common.engine.doctor.STEPS_S", 0.0)

    def dry_run(*flags: str) -> tuple[str, str]:
        run_training(StandardConfig, data, tmp_path, "a", *FLAGS, "--dry_run", *flags)
        said = capsys.readouterr().out
        assert "pre-flight: 0 errors" in said
        (line,) = [line for line in said.splitlines() if line.startswith("budget 1:00:00: ")]
        return said, line

    first, plan = dry_run()
    assert "ago" not in first
    again, same_plan = dry_run()
    assert "calibrated 0:0" in again
    assert same_plan == plan
    assert "ago" not in dry_run("--weight_decay", "0.1")[0]
    assert not (tmp_path / "a").exists()


def test_the_smallest_and_the_largest_images_are_measured_and_batches_that_grow_with_the_run(
    data, tmp_path, monkeypatch
):
    looked = []
    as_if = as_if_measured(1.0)

    def measured(t, epoch, *rest):
        looked.append((epoch.stage.img_size, as_if(t, epoch).images))
        return as_if(t, epoch)

    monkeypatch.setattr("common.engine.measure.measure_stage", measured)
    sizes = [{"epochs": 1, "img_size": size, "batch_size": 16} for size in (24, 28, 32)]
    run_training(HybridConfig, data, tmp_path, "a", "--stages", json.dumps(sizes), "--budget", "60s")
    assert looked == [(24, 16), (32, 16)]
    looked.clear()
    # As if batches of 4 images had been guessed.
    monkeypatch.setattr(
        "common.engine.calibrate.adapt",
        lambda stages, *rest: Recipe([replace(stage, batch_size=4) for stage in stages], {}, []),
    )
    run_training(HybridConfig, data, tmp_path, "b", "--stages", json.dumps(sizes[2:]), "--budget", "60s")
    assert looked == [(32, 4), (32, 16)]


def test_the_same_weights_as_without_a_budget(data, tmp_path, monkeypatch):
    monkeypatch.setattr("common.engine.calibrate.SHARE", 0.0)
    monkeypatch.setattr(
        "common.scheduling.budget.Costs.step",
        lambda costs, stage, images: costs.measured[0]._replace(
            images=images, step_s=200.0, wait_s=0.0, evaluate_s=0.0, enter_s=0.0
        ),
    )
    planned = run_training(StandardConfig, data, tmp_path, "planned", *FLAGS)
    epochs = str(state(planned)["progress"]["epochs_done"])
    by_hand = run_training(StandardConfig, data, tmp_path, "hand", "--batch_size", "16", "--epochs", epochs)
    assert_same(weights(planned), weights(by_hand))
    assert json.loads((by_hand / "receipt.json").read_text())["forecast"] is None
    receipt.main([str(by_hand)])


def test_an_overrun_is_foreseen():
    plan = make_plan([Stage(2, 32, 16), Stage(2, 64, 16)], 64, 1)
    forecast = {
        "budget_s": 400.0,
        "parts": {"start": 10, "train 1": 80, "train 2": 160, "wait": 0, "evaluate": 0, "save": 0},
    }
    run = SimpleNamespace(cfg=SimpleNamespace(usd_per_hour=36.0))
    # The first stage is over, and took a third more than planned.
    progress = Progress(step=8, seconds={"start": 10, "train 1": 100, "save": 6.7}, forecast=forecast)
    assert outlook(run, plan, progress) == "budget 6:40: 1:57 spent, about 3:33 to go, 3.30 USD in all"
    progress.seconds["train 1"] = 140
    said = outlook(run, plan, progress)
    assert (
        "2:37 spent, about 4:53 to go, 4.50 USD in all\noverrun foreseen: 0:50 more than the budget" in said
    )


def test_the_age_of_this_program_is_known():
    assert 0 < processes.program_age_s() < 3600
