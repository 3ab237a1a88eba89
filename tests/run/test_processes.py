from types import SimpleNamespace

import pytest
import torch

from common import UserError
from common.run import processes
from common.run.processes import (
    Votes,
    idle_accelerator,
    rank0_errors,
    resolve_precision,
    start_processes,
    tracker_names,
)
from common.run.run import Run
from tests.helpers import make_images, progress, run_training, stop_after
from train_standard import StandardConfig


@pytest.mark.parametrize(
    ("asked", "told", "fast", "wanted", "said"),
    [
        (None, "no", True, "bf16", "fast at"),
        (None, "no", False, "no", "no fast bf16"),
        (None, "bf16", True, "bf16", ""),
        (None, "bf16", False, "bf16", "slow at bf16"),
        ("bf16", "no", False, "bf16", "times as long as in fp32"),
        ("no", "bf16", True, "no", ""),
    ],
)
def test_precision_follows_the_cpu_unless_somebody_says(asked, told, fast, wanted, said, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    monkeypatch.setattr(processes, "has_fast_bf16", lambda: fast)
    precision, note = resolve_precision(asked, cpu=True)
    assert precision == wanted
    assert said in note
    assert bool(note) == bool(said)


def test_precision_on_a_gpu_is_the_flags_or_the_launchers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert resolve_precision(None, cpu=False) == ("fp16", "")
    assert resolve_precision("bf16", cpu=False) == ("bf16", "")
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a GPU"):
        resolve_precision(None, cpu=True)


def test_a_resumed_run_keeps_its_precision_on_another_cpu(tmp_path, monkeypatch):
    data = make_images(tmp_path / "images", train=8, val=2)
    flags = ("--epochs", "2", "--batch_size", "8", "--mixed_precision", "null")
    monkeypatch.setattr(processes, "has_fast_bf16", lambda: False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "run", *flags)
    processes.PartialState._reset_state()
    monkeypatch.setattr(processes, "has_fast_bf16", lambda: True)
    run = run_training(StandardConfig, data, tmp_path, "run", "--epochs", "2", "--batch_size", "8")
    assert "mixed_precision: 'no'" in (run / "config.yaml").read_text()
    assert progress(run)["epochs_done"] == 2


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"]
)
def test_what_accelerate_would_do_and_we_would_not_is_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match="is not supported"):
        start_processes()


def test_one_process_votes_alone():
    assert Votes(1).largest(0, 3, -5) == [0, 3, -5]


def test_an_error_of_the_main_process_is_its_own():
    with pytest.raises(OSError, match="full"), rank0_errors():
        raise OSError("the disk is full")


def test_looks_come_about_once_a_second_however_long_a_step_takes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("common.run.run.time.monotonic", lambda: clock[0])
    for seconds, wanted in ((2.0, 1), (0.1, 10), (0.001, 50)):
        run = object.__new__(Run)
        run.cfg, run.is_main, run.votes = StandardConfig(), True, Votes(1)
        run.signals = SimpleNamespace(number=0)
        run._save_due, run.next_look, run._looked_at = 1e9, 0, (0, 0.0)
        looks = []
        for step in range(1, 400):
            clock[0] += seconds
            if step >= run.next_look:
                run.look(step, 0)
                looks.append(step)
        # The first step of all, whose pace is not known, is looked at.
        assert looks[0] == 1
        assert looks[-1] - looks[-2] == pytest.approx(wanted, abs=1)


def test_a_resumed_run_does_not_take_the_steps_before_it_for_its_pace(tmp_path, monkeypatch):
    """Else a machine that was started a minute ago would not see a signal for 50 steps."""
    data = make_images(tmp_path / "images", train=8, val=2)
    flags = ("--epochs", "2", "--batch_size", "8")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "run", *flags)
    begun = []
    begin = Run.begin

    def note(self, progress):
        begin(self, progress)
        begun.append((progress.step, self._looked_at[0]))

    monkeypatch.setattr(Run, "begin", note)
    run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert begun == [(2, 2)]


def test_trackers_are_those_that_are_known_and_installed(monkeypatch):
    assert tracker_names("none") == []
    monkeypatch.setattr(processes, "find_spec", lambda name: None if name == "tensorboard" else name)
    assert tracker_names("wandb,trackio") == ["wandb", "trackio"]
    with pytest.raises(UserError, match="--trackers tensorboard needs its package: pip install tensorboard"):
        tracker_names("wandb,tensorboard")
    for wrong, shown in (("on", "on"), ("wandb,", "nothing"), ("", "nothing")):
        with pytest.raises(UserError, match=f"wandb,tensorboard,trackio, not {shown}"):
            tracker_names(wrong)


def test_an_accelerator_that_stays_idle_is_named(monkeypatch):
    for found, said in ((None, ""), (torch.device("cuda"), ""), (torch.device("mps"), "(mps) stays idle")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda found=found, **_: found)
        assert said in idle_accelerator()
        assert bool(idle_accelerator()) == bool(said)
