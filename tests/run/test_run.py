import csv
import logging
import os
import re
import signal
import socket
import sys
import time
from subprocess import PIPE, Popen

import pytest
import torch
import yaml

from common import UserError
from common.run import s3 as storage
from common.run import start_run
from common.run.checkpoint import Progress
from common.run.processes import Interrupted
from tests import forked
from tests.helpers import assert_same, launch, make_images, progress, run_training, stop_after, weights
from train_standard import StandardConfig

SMALL = ("--epochs", "2", "--batch_size", "16")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", train=16, val=4)


def test_wandb_offline_without_an_account(data, tmp_path, monkeypatch):
    """A real offline run: no prompt, and the checkpoint knows its id."""
    import wandb

    # A key of another test's is remembered by the process.
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = run_training(StandardConfig, data, tmp_path, "run", *SMALL, "--trackers", "wandb")
    files = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    assert progress(run)["wandb_id"] in files[0].name


def test_wandb_out_of_reach_is_kept_offline(data, tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("common.run.records.WANDB_TIMEOUT_S", 1.0)
    run = run_training(StandardConfig, data, tmp_path, "run", *SMALL, "--trackers", "wandb")
    wandb.teardown()
    assert "the run is kept offline" in capsys.readouterr().out
    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert progress(run)["wandb_id"] in file.name


def test_tensorboard_has_a_point_for_each_epoch_also_after_a_resume(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--batch_size", "16", "--lr", "1e-12", "--trackers", "tensorboard")
    for patience in ("1", "0"):
        run = run_training(
            StandardConfig, data, tmp_path, "run", "--epochs", "3", *flags, "--patience", patience
        )
    events = EventAccumulator(str(run / "tensorboard" / "image-classification")).Reload()
    with open(run / "training_log.csv") as file:
        rows = list(csv.DictReader(file))
    points = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert points == [
        (3 * n, pytest.approx(float(row["val_loss"]), rel=1e-4)) for n, row in enumerate(rows, 1)
    ]
    assert not (run / "wandb").exists()


def test_the_resolved_config_is_saved_and_can_be_run_again(data, tmp_path):
    from common.config import parse_args

    run = run_training(StandardConfig, data, tmp_path, "run", *SMALL)
    cfg = parse_args(StandardConfig, "", ["--config", str(run / "config.yaml")])
    (stage,) = cfg.stages_in_force()
    assert (stage.epochs, stage.img_size, stage.batch_size, cfg.model) == (2, 32, 16, "test_resnet")
    # What the list was made from is not said twice.
    assert "epochs" not in yaml.safe_load((run / "config.yaml").read_text())
    # Nor which run it was, or how it went on: the file is for another one.
    run_training(StandardConfig, data, tmp_path, "", "--resume", str(run))
    assert not {"run_name", "resume", "dry_run"} & yaml.safe_load((run / "config.yaml").read_text()).keys()


def test_csv_has_the_promised_columns(data, tmp_path):
    run = run_training(StandardConfig, data, tmp_path, "run", *SMALL)
    promised = [
        "epoch",
        "stage",
        "img_size",
        "batch_size",
        "lr",
        "momentum",
        "train_loss",
        "train_top1",
        "val_loss",
        "val_top1",
        "val_top5",
        "images_per_s",
        "data_wait",
        "memory_mb",
        "epoch_s",
        "total_s",
    ]
    with open(run / "training_log.csv") as file:
        rows = list(csv.DictReader(file))
    assert set(promised) <= set(rows[0])
    assert all(0 <= float(row["data_wait"]) <= 1 and 0 <= float(row["val_top1"]) <= 100 for row in rows)


def test_logs_are_closed_after_a_run(data, tmp_path):
    run_training(StandardConfig, data, tmp_path, "run", *SMALL)
    logger = logging.getLogger("common")
    assert not [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    assert logger.propagate
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_signal_saves_and_exits_with_75(data, tmp_path, number):
    args = [
        "train_standard.py",
        "--data_dir",
        str(data),
        "--output",
        str(tmp_path),
        "--run_name",
        "run",
    ]
    args += [
        "--model",
        "test_resnet",
        "--trackers",
        "none",
        "--workers",
        "1",
        "--lr",
        "0.1",
        "--img_size",
        "32",
    ]
    args += ["--epochs", "5000", "--batch_size", "8", "--recipe", "listed", "--mixed_precision", "no"]
    process = forked.start(args, tmp_path, dict(os.environ))
    log = tmp_path / "run" / "training_log.csv"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 75
    with open(log) as file:
        assert (
            progress(tmp_path / "run")["epochs_done"] == sum(1 for _ in file) - 1
        )  # nothing older than the signal


def test_a_folder_that_another_program_trains_in_is_refused_and_left_alone(tmp_path, capsys):
    cfg = StandardConfig(output=str(tmp_path), run_name="run", trackers="none", mixed_precision="no")

    def begun() -> None:
        with start_run(cfg) as run:
            run.begin(Progress())

    begun()
    log, lock = tmp_path / "run" / "training_log.txt", tmp_path / "run" / "lock.tmp"
    before = log.read_bytes()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with Popen([sys.executable, "-c", hold, str(lock)], stdin=PIPE, stdout=PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit, match="2"):
            begun()
        other.communicate(b"\n")
    assert f"error: another program is training in {tmp_path / 'run'}" in capsys.readouterr().err
    assert log.read_bytes() == before
    begun()


def test_what_another_program_has_trained_since_is_not_undone(tmp_path, capsys):
    """Both were started before either had trained; this one gets the folder when the other has ended."""
    cfg = StandardConfig(output=str(tmp_path), run_name="run", trackers="none", mixed_precision="no")

    def begun_late() -> None:
        with start_run(cfg) as run:
            (tmp_path / "run" / "checkpoints" / "step_00000009").mkdir(parents=True)
            run.begin(Progress())

    with pytest.raises(SystemExit, match="2"):
        begun_late()
    assert "another program has trained in" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000009"]
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_could_not_be_written_is_said_though_a_signal_ends_the_run(tmp_path, capsys):
    def fail() -> None:
        raise UserError("cannot write the checkpoint")

    def stopped(cfg: StandardConfig) -> None:
        with start_run(cfg) as run:
            run.background.submit(fail)
            raise Interrupted

    with pytest.raises(SystemExit) as end:
        stopped(StandardConfig(output=str(tmp_path), trackers="none", mixed_precision="no"))
    assert end.value.code == 2
    assert "error: cannot write the checkpoint" in capsys.readouterr().err


def test_s3_mirror_and_restore_on_an_empty_machine(data, tmp_path, s3, monkeypatch):
    """Stop in mid-run with S3 on, lose the disk, resume from S3: bit for bit the run that was left alone."""
    url = f"s3://{s3.bucket}/engine-test"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    mirrored = ("--s3", url)
    whole = run_training(StandardConfig, data, tmp_path / "a", "run", *SMALL)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path / "b", "run", *SMALL, *mirrored)
    flags = ["--run_name", "", "--resume", f"{url}/run"]
    fresh = run_training(StandardConfig, data, tmp_path / "c", "run", *SMALL, *mirrored, *flags)
    assert_same(weights(whole), weights(fresh))
    assert_same(weights(whole, file="optimizer"), weights(fresh, file="optimizer"))
    again = run_training(
        StandardConfig, data, tmp_path / "d", "run", *SMALL, *mirrored
    )  # the folder is gone once more
    assert_same(weights(whole), weights(again))
    log = (again / "training_log.txt").read_text()
    assert "this run is complete" in log
    assert s3.secret_key not in log


def test_compiled_and_eager_checkpoints_interchange(data, tmp_path, monkeypatch):
    """Compiled through AOT autograd without a C++ compiler: what is tested is the state, not the kernels."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kwargs: compile_module(self, backend="aot_eager", **kwargs)
    )
    compiled = run_training(StandardConfig, data, tmp_path, "run", *SMALL, "--compile")
    names = weights(compiled).keys()
    assert not [name for name in names if "_orig_mod" in name or name.startswith("module.")]
    assert "graphs compiled" in (compiled / "training_log.txt").read_text()
    eager = run_training(StandardConfig, data, tmp_path, "eager", *SMALL)
    assert names == weights(eager).keys()
    for (name, a), b in zip(weights(compiled).items(), weights(eager).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)


@pytest.fixture
def nowhere(s3, monkeypatch):
    with socket.socket() as nobody:  # a port that is taken, and where nobody listens
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        yield ["--s3", f"s3://{s3.bucket}/absent"]


def test_a_server_that_is_never_there_costs_nothing_but_a_sentence(
    data, tmp_path, nowhere, monkeypatch, capsys
):
    monkeypatch.setattr(storage, "CLOSING_TRIES", 2)
    run = run_training(StandardConfig, data, tmp_path, "run", *SMALL, *nowhere, "--resume", "none")
    output = capsys.readouterr().out
    assert "NOT uploaded" in output.splitlines()[-1]
    assert "checkpoints/step_" in output.splitlines()[-1]
    assert (run / "summary.json").exists()


def test_a_run_that_may_be_stored_out_of_reach_is_not_begun_anew(data, tmp_path, nowhere, monkeypatch):
    monkeypatch.setattr(storage, "RESTORE_ATTEMPTS", 1)
    with pytest.raises(UserError, match="--resume none"):
        run_training(StandardConfig, data, tmp_path, "run", *SMALL, *nowhere)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_wrong_credentials_are_one_sentence_at_the_start(processes, data, tmp_path, s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    flags = ["--s3", f"s3://{s3.bucket}/refused"]
    began = time.monotonic()
    done = launch(processes, "train_standard.py", *in_miniature(data, tmp_path), *flags)
    assert done.returncode != 0
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "credentials" in errors[0]
    assert "--s3" in errors[0]
    assert not re.search(r"rank\d+\]: Traceback", done.stderr)
    assert "epoch 1" not in done.stdout
    assert time.monotonic() - began < 90


def in_miniature(data, output):
    flags = ["--data_dir", str(data), "--output", str(output), "--run_name", "run", "--model", "test_resnet"]
    flags += ["--trackers", "none", "--workers", "0", "--lr", "0.1", "--img_size", "32"]
    return [*flags, "--epochs", "1", "--batch_size", "16", "--recipe", "listed"]
