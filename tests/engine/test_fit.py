import csv
import importlib
import json
import math
import resource
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import train_standard
from common import UserError
from common.config import parse_args
from common.engine import recording
from common.engine.trainer import Trainer
from common.model.loss import LOSSES
from common.model.pretrained_cfg import read_pretrained_cfg
from common.run import checkpoint
from common.run.checkpoint import name_of, newest_whole
from common.run.processes import Interrupted, Votes
from common.run.run import Run
from common.tools import receipt
from tests.helpers import assert_same, make_images, progress, run_training, stop_after, weights
from train_finetune import FinetuneConfig
from train_hybrid import HybridConfig
from train_progressive import ProgressiveConfig
from train_rect import RectConfig
from train_standard import StandardConfig

fit_module = importlib.import_module("common.engine.fit")

STANDARD = ("--epochs", "3", "--batch_size", "16")  # 72 images: 4 steps an epoch
HYBRID_STAGES = json.dumps(
    [
        {"epochs": 1, "img_size": 24, "batch_size": 12, "data_fraction": 0.5, "lr_scale": 1.0},
        {"epochs": 1, "img_size": 32, "batch_size": 16, "lr_scale": 0.6, "frozen": ["conv1", "bn1"]},
        {
            "epochs": 1,
            "img_size": 32,
            "batch_size": 16,
            "lr_scale": 0.3,
            "mixup": False,
            "frozen": ["conv1", "bn1", "layer1"],
        },
    ]
)
STRATEGIES = {
    "standard": (StandardConfig, STANDARD),
    "progressive": (ProgressiveConfig, ("--stages", '[{"epochs": 1, "img_size": 24, "batch_size": 24}, {"epochs": 2, "img_size": 32, "batch_size": 16}]')),
    "hybrid": (HybridConfig, ("--stages", HYBRID_STAGES, "--ema")),
    "rect": (RectConfig, ("--epochs", "2", "--batch_size", "12")),
    "finetune": (FinetuneConfig, ("--epochs", "3", "--head_epochs", "1", "--batch_size", "16", "--weights", "BASE")),
    "ingredients": (StandardConfig, (*STANDARD, "--auto_augment", "rand", "--loss", "bce", "--drop_path", "0.5", "--optimizer", "lamb")),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    return run_training(StandardConfig, data, tmp_path_factory.mktemp("base"), "base", *STANDARD)


def rows(run):
    if not (run / "training_log.csv").exists():
        return []
    with open(run / "training_log.csv") as file:
        return list(csv.DictReader(file))


TIMES = {"images_per_s", "data_wait", "memory_mb", "epoch_s", "total_s"}


def without_times(run):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]


def train_strategy(name, data, output, run_name, *more, base=""):
    config, flags = STRATEGIES[name]
    flags = (str(base) if flag == "BASE" else flag for flag in flags)
    return run_training(config, data, output, run_name, *flags, *more)


@pytest.mark.parametrize("name", STRATEGIES)
def test_interrupted_equals_uninterrupted(name, data, base, tmp_path, monkeypatch):
    whole = train_strategy(name, data, tmp_path, "whole", base=base)
    for steps in (
        1,
        3,
        6,
        8,
    ):  # inside epochs, at their ends, with frozen layers; counted anew after each restart
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with suppress(SystemExit):
                train_strategy(name, data, tmp_path, "parts", base=base)
    parts = train_strategy(name, data, tmp_path, "parts", base=base)
    for file in ("model", "optimizer", "ranks") + (("ema",) if name == "hybrid" else ()):
        assert_same(weights(whole, file=file), weights(parts, file=file))
    assert without_times(whole) == without_times(parts)


def test_stops_during_evaluation_and_goes_on_with_it(data, tmp_path, monkeypatch):
    whole = run_training(StandardConfig, data, tmp_path, "whole", *STANDARD)
    calls = []

    def stop_in_second_batch(self):
        calls.append(1)
        if len(calls) == 2:
            self.signals.number = 15
        return original(self)

    original = Run.stop_if_asked
    monkeypatch.setattr("common.engine.evaluate.ROUNDS_BETWEEN", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_if_asked", stop_in_second_batch)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "parts", *STANDARD)
    assert not rows(tmp_path / "parts")
    parts = run_training(StandardConfig, data, tmp_path, "parts", *STANDARD)
    assert_same(weights(whole), weights(parts))
    assert without_times(whole) == without_times(parts)


def test_stopped_in_the_last_evaluation_it_is_complete_after_the_next_start(data, tmp_path, monkeypatch):
    def stop_in_the_last(self):
        if len(rows(tmp_path / "run")) == 1:
            self.signals.number = 15
        return original(self)

    original, flags = Run.stop_if_asked, (*STANDARD, "--epochs", "2")
    monkeypatch.setattr("common.engine.evaluate.ROUNDS_BETWEEN", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_if_asked", stop_in_the_last)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "run", *flags)
    run = run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert len(rows(run)) == 2
    assert (run / "receipt.json").exists()
    assert "this run is complete" not in (run / "training_log.txt").read_text()
    # It has taken no step, so that there is no speed to tell.
    assert [bool(row["images_per_s"]) for row in rows(run)] == [True, False]
    run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert "this run is complete" in (run / "training_log.txt").read_text()


def test_stopped_in_the_final_evaluation_it_has_a_receipt_after_the_next_start(data, tmp_path, monkeypatch):
    def stop(*_):
        raise Interrupted

    flags = (*STANDARD, "--final_eval")
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "final_grid", stop)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert not (tmp_path / "run" / "receipt.json").exists()
    run = run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert json.loads((run / "receipt.json").read_text())["epochs"] == 3


def test_stopped_between_model_and_checkpoint_the_model_is_the_best(data, tmp_path, monkeypatch):
    def no_last_one(checkpoints, files):
        if files["state.json"]["progress"]["step"] == 12:
            raise UserError("cannot write the checkpoint")
        return original(checkpoints, files)

    original, whole = checkpoint.write, run_training(StandardConfig, data, tmp_path, "whole", *STANDARD)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", no_last_one)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "parts", *STANDARD)
    parts = run_training(StandardConfig, data, tmp_path, "parts", *STANDARD)
    assert progress(parts)["best_step"] == progress(whole)["best_step"] == 12
    assert_same(*(load_file(run / "model" / "model.safetensors") for run in (whole, parts)))


def test_lr_finder_leaves_no_trace(data, tmp_path):
    found = run_training(
        StandardConfig, data, tmp_path, "found", *STANDARD, "--lr", "auto", "--lr_finder_iterations", "15"
    )
    peak = json.loads((found / "summary.json").read_text())["peak_lr"]
    given = run_training(
        StandardConfig, data, tmp_path, "given", *STANDARD, "--lr", repr(peak), "--lr_scaling", "none"
    )
    assert_same(weights(found), weights(given))
    assert_same(weights(found, file="optimizer"), weights(given, file="optimizer"))


def test_accumulation_equals_a_large_batch(data, tmp_path, monkeypatch):
    """BatchNorm in eval, since its statistics depend on the micro-batch; no mixing, since partners do too."""
    monkeypatch.setattr("common.engine.trainer.train_mode", lambda model, frozen: model.eval())
    flags = ("--epochs", "1", "--mixup_alpha", "0", "--cutmix_alpha", "0", "--mixed_precision", "no")
    large = run_training(StandardConfig, data, tmp_path, "large", *flags, "--batch_size", "64")
    small = run_training(
        StandardConfig, data, tmp_path, "small", *flags, "--batch_size", "16", "--accumulation", "4"
    )
    for (name, a), b in zip(weights(large).items(), weights(small).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_records(data, tmp_path):
    run = run_training(StandardConfig, data, tmp_path, "run", *STANDARD, "--keep_every", "2")
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3"]
    best = progress(run)["best_step"]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {name_of(step) for step in {8, 12, best}}
    assert {p.name for p in (run / "model").iterdir()} == {"model.safetensors", "config.json"}
    assert {p.stem for p in (run / "plots").iterdir()} >= {
        "accuracy_live",
        "loss_live",
        "lr_live",
        "momentum_live",
    }
    assert "best top-1" in (run / "training_log.txt").read_text()
    assert (run / "logs" / "rank0.log").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images_seen"] == 3 * 64
    assert summary["best_top1"] > 60


def test_a_finished_run_says_so_and_does_nothing(data, tmp_path, capsys):
    run = run_training(StandardConfig, data, tmp_path, "run", *STANDARD)
    before = (run / "training_log.csv").read_bytes()
    run_training(StandardConfig, data, tmp_path, "run", *STANDARD)
    assert "complete" in capsys.readouterr().out
    assert (run / "training_log.csv").read_bytes() == before


def test_a_finished_run_without_its_checkpoints_is_not_overwritten(data, tmp_path):
    run = run_training(StandardConfig, data, tmp_path, "run", *STANDARD)
    shutil.rmtree(run / "checkpoints")
    before = (run / "training_log.csv").read_bytes()
    for more in ((), ("--resume", "none"), ("--seed", "7")):
        with pytest.raises(UserError, match="a finished run whose checkpoints are gone; choose another"):
            run_training(StandardConfig, data, tmp_path, "run", *STANDARD, *more)
    assert (run / "training_log.csv").read_bytes() == before


def test_a_finished_run_can_be_evaluated_later(data, tmp_path):
    run_training(RectConfig, data, tmp_path, "run", *STANDARD)
    run = run_training(RectConfig, data, tmp_path, "run", *STANDARD, "--final_eval")
    grid = json.loads((run / "final_eval.json").read_text())["rows"]
    assert {(row["img_size"], row["crop"]) for row in grid} == {
        (size, crop) for size in (32, 40) for crop in (0.875, 1.0, "whole")
    }
    as_trained = [
        row for row in grid if row["img_size"] == 32 and row["crop"] == "whole" and row["flip"] == "no"
    ]
    assert as_trained[0]["top1"] == pytest.approx(float(rows(run)[-1]["val_top1"]), abs=1e-4)
    best = json.loads((run / "final_eval.json").read_text())["best"]
    assert best in grid
    assert best["top1"] == max(row["top1"] for row in grid)


def test_shapes_that_one_process_cannot_evaluate_are_left_out_by_all(data, tmp_path, monkeypatch):
    """Rare shapes are not met by every process: one that went on alone would wait for ever."""
    asked = []

    def another_cannot(votes, *numbers):
        if sys._getframe(1).f_code.co_name != "final_grid":
            return original(votes, *numbers)
        asked.append(numbers)
        return [int(len(asked) > 1)]

    original = Votes.largest
    monkeypatch.setattr(Votes, "largest", another_cannot)
    run = run_training(StandardConfig, data, tmp_path, "run", *STANDARD, "--final_eval")
    grid = json.loads((run / "final_eval.json").read_text())["rows"]
    assert {(row["img_size"], row["crop"]) for row in grid} == {(32, 0.875)}


def test_a_name_that_holds_another_run_is_refused(data, tmp_path):
    run_training(StandardConfig, data, tmp_path, "run", *STANDARD)
    with pytest.raises(UserError, match="--weight_decay"):
        run_training(StandardConfig, data, tmp_path, "run", *STANDARD, "--weight_decay", "0.01")
    with pytest.raises(UserError, match="already holds a run"):
        run_training(StandardConfig, data, tmp_path, "run", *STANDARD, "--resume", "none")


def test_nan_loss_stops_with_advice_and_keeps_the_good_checkpoint(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.engine.trainer.NAN_PATIENCE", 2)
    monkeypatch.setattr("common.run.run.LOOK_S", 0.0)
    flags = ("--epochs", "8", "--batch_size", "16")
    step = Trainer.train_step

    def spoiled(t, epoch, *args):
        if epoch.index == 1:
            with torch.no_grad():
                next(t.state.model.parameters()).fill_(math.nan)
        step(t, epoch, *args)

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    with pytest.raises(SystemExit) as stop:
        run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert stop.value.code == 2
    assert "lower --lr" in capsys.readouterr().err
    assert list((tmp_path / "run").glob("not_finite_rank0.json"))
    (saved,) = (tmp_path / "run" / "checkpoints").glob("*/model.safetensors")
    assert all(t.isfinite().all() for t in load_file(saved).values())


@pytest.mark.parametrize("area", ["short", "constant"])
def test_shapes_nobody_expects_train_all_the_same(area, tmp_path, monkeypatch):
    """Aspect ratios of 1:30 and 30:1, single pixels, an image alone in its bucket, a folder that cannot be written."""
    sizes = [(300, 10), (10, 300), (1, 1), (1, 1), (90, 40), *[(40, 41)] * 6]  # 90:40 is alone
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "odd" / split / label).mkdir(parents=True)
            for number, size in enumerate(sizes):
                Image.new("RGB", size, (number * 20, 99, 99)).save(
                    tmp_path / "odd" / split / label / f"{number}.png"
                )
    before = sorted((tmp_path / "odd").rglob("*"))
    for folder in [tmp_path / "odd", *(tmp_path / "odd").glob("**/")]:
        folder.chmod(0o555)
    flags = ("--epochs", "2", "--batch_size", "4", "--rect_area", area, "--final_eval")
    run = run_training(RectConfig, tmp_path / "odd", tmp_path, "run", *flags)
    assert all(torch.isfinite(value.float()).all() for value in weights(run).values())
    assert len(rows(run)) == 2
    assert sorted((tmp_path / "odd").rglob("*")) == before  # root may write all the same


def test_a_disk_that_fills_up_ends_the_run_with_a_sentence_and_a_whole_checkpoint(
    data, tmp_path, monkeypatch, capsys
):
    """A limit on the size of files stands for a full disk: both fail in the middle of writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def record(trainer, epoch, *results):
        if epoch.index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        recording.record(trainer, epoch, *results)

    monkeypatch.setattr(fit_module, "record", record)
    try:
        with pytest.raises(SystemExit) as exit_:
            train_strategy("standard", data, tmp_path, "run", "--save_freq_last", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    monkeypatch.undo()
    assert exit_.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "cannot write" in sentence
    assert "--output" in sentence
    newest, damaged = newest_whole(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert not damaged
    resumed = train_strategy("standard", data, tmp_path, "run", "--save_freq_last", "1")
    assert_same(weights(train_strategy("standard", data, tmp_path, "whole")), weights(resumed))


def test_out_of_memory_names_the_flag(data, tmp_path, monkeypatch, capsys):
    def explode(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", explode)
    with pytest.raises(SystemExit):
        run_training(StandardConfig, data, tmp_path, "run", *STANDARD)
    assert "out of memory in stage 1 at 32 px with 16 images per process: lower" in capsys.readouterr().err


def test_auto_batch_halves_and_accumulates(data, tmp_path, monkeypatch):
    def needs_memory(run, model, batch_size, height, width):
        if batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("common.engine.memory.blank_step", needs_memory)
    run = run_training(StandardConfig, data, tmp_path, "run", *STANDARD, "--auto_batch")
    assert {row["batch_size"] for row in rows(run)} == {"8"}
    assert json.loads((run / "summary.json").read_text())["images_seen"] == 3 * 64


def test_a_resumed_run_keeps_its_batches_whatever_fits(data, tmp_path, monkeypatch, capsys):
    """13 images do not halve: a new run gives one up, but a resumed one has counted its steps in them."""
    flags = ("--epochs", "3", "--batch_size", "13")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "run", *flags)
    monkeypatch.setattr("common.engine.memory._fits", lambda run, model, stage, size, *_: size <= 6)
    with pytest.raises(SystemExit):
        run_training(StandardConfig, data, tmp_path, "run", *flags, "--auto_batch")
    assert "global batches of [13] images do not come in equal parts" in capsys.readouterr().err
    new = run_training(StandardConfig, data, tmp_path, "new", *flags, "--auto_batch")
    assert progress(new)["global_batches"] == [12]


def test_a_network_of_one_size_trains_on_smaller_images(data, tmp_path):
    """It was built for the size that was asked for, or listed, whatever the images' own."""
    args = [
        "--data_dir",
        str(data),
        "--model",
        "test_vit_relpos",
        "--epochs",
        "1",
        "--batch_size",
        "16",
        "--workers",
        "0",
    ]
    args += ["--trackers", "none", "--output", str(tmp_path), "--run_name", "run", "--optimizer", "adamw"]
    train_standard.main(parse_args(StandardConfig, "", args))
    assert {row["img_size"] for row in rows(tmp_path / "run")} == {"224"}


def test_a_resumed_run_needs_its_weights_no_more(data, base, tmp_path, monkeypatch):
    """Nor what they say of their images, which others may say otherwise."""
    flags = ("--epochs", "2", "--batch_size", "16", "--weights")
    moved = shutil.copytree(base, tmp_path / "moved")
    config = moved / "model" / "config.json"
    config.write_text(config.read_text().replace("0.485", "0.25"))
    whole = run_training(FinetuneConfig, data, tmp_path, "whole", *flags, str(moved))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            run_training(FinetuneConfig, data, tmp_path, "parts", *flags, str(moved))
    shutil.rmtree(moved)
    parts = run_training(FinetuneConfig, data, tmp_path, "parts", *flags, str(moved))
    assert_same(weights(whole), weights(parts))
    assert read_pretrained_cfg(parts / "model").mean == (0.25, 0.456, 0.406)


def test_finetuning_trains_the_head_alone_first(data, base, tmp_path):
    tuned = train_strategy("finetune", data, tmp_path, "tuned", "--keep_every", "1", base=base)
    start, after_head, end = (
        load_file(base / "model" / "model.safetensors"),
        weights(tuned, step=4),
        weights(tuned),
    )
    moved = {name for name in start if not torch.equal(start[name], after_head[name])}
    assert moved == {name for name in start if name.startswith("fc.")}
    assert not torch.equal(end["conv1.0.weight"], start["conv1.0.weight"])


def test_frozen_layers_stay_bit_for_bit(data, tmp_path):
    run = train_strategy("hybrid", data, tmp_path, "run", "--keep_every", "1")
    first, second = weights(run, step=3), weights(run, step=7)
    frozen = [name for name in first if name.startswith(("conv1", "bn1"))]
    assert frozen
    assert all(torch.equal(first[name], second[name]) for name in frozen)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_peak_that_is_printed_is_the_one_in_force(data, tmp_path):
    stages = '[{"epochs": 1, "img_size": 32, "batch_size": 16}]'
    flags = ("--stages", stages, "--lr", "8", "--max_lr", "0.3")
    run = run_training(ProgressiveConfig, data, tmp_path, "run", *flags)
    assert "peak learning rate 0.3 " in (run / "training_log.txt").read_text()


def test_timms_corrected_optimizers_decay_by_the_peak_in_force(data, tmp_path):
    """By rate^2 / peak, where what timm takes for the peak is the rate that the optimizer was made with."""
    flags = ("--epochs", "1", "--batch_size", "32", "--optimizer", "adamc", "--lr", "0.008")
    run = run_training(StandardConfig, data, tmp_path, "run", *flags, "--layer_decay", "0.5")
    groups = newest_whole(run / "checkpoints")[0][checkpoint.STATE]["optimizer"]["param_groups"]
    assert len({group["lr_scale"] for group in groups}) > 1
    for group in groups:
        assert group["max_lr_snapshot"] == pytest.approx(0.001 * group["lr_scale"])


def test_a_loss_that_is_never_finite_is_noticed_in_epochs_shorter_than_the_patience(
    data, tmp_path, capsys, monkeypatch
):
    """The weights are lost before the first evaluation; four steps an epoch never make ten in a row."""
    monkeypatch.setitem(LOSSES, "ce", lambda *a: F.cross_entropy(*a) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        run_training(StandardConfig, data, tmp_path, "run", "--epochs", "8", "--batch_size", "16")
    assert stop.value.code == 2
    assert "lower --lr" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["progressive", "finetune"])
def test_the_runs_own_config_repeats_what_was_adapted(strategy, data, base, tmp_path):
    config_class, flags = STRATEGIES[strategy]
    flags = [str(base) if flag == "BASE" else flag for flag in flags] + ["--recipe", "auto"]
    if strategy == "progressive":
        flags = ["--epochs", "3", "--batch_size", "16", "--recipe", "auto"]
    first = run_training(config_class, data, tmp_path, "first", *flags)
    config = ["--config", str(first / "config.yaml"), "--run_name", "again"]
    sys.modules[config_class.__module__].main(parse_args(config_class, "", config))
    assert_same(weights(first), weights(tmp_path / "again"))
    assert (tmp_path / "again" / "config.yaml").read_text() == (first / "config.yaml").read_text()


def test_patience_ends_a_run_whole_and_more_of_it_lets_the_run_go_on(data, tmp_path, capsys, monkeypatch):
    evaluate = Trainer.evaluate
    # The first epoch stays the best.
    monkeypatch.setattr(Trainer, "evaluate", lambda *args: [replace(evaluate(*args)[0], top1=50.0)])
    flags = ("--epochs", "4", "--batch_size", "16", "--save_freq_last", "5")
    run = run_training(StandardConfig, data, tmp_path, "run", *flags, "--patience", "2")
    assert "stopped after epoch 3: no new best in 2 epochs" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["epochs"] == 3
    assert progress(run)["epochs_done"] == 3
    assert (run / "model" / "model.safetensors").exists()
    run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert len(rows(run)) == 3
    with monkeypatch.context() as patch:
        # Killed between its last checkpoint and what tells of the end.
        patch.setattr(fit_module, "finish", lambda *_, **__: None)
        run_training(StandardConfig, data, tmp_path, "run", *flags, "--patience", "0")
    run_training(StandardConfig, data, tmp_path, "run", *flags, "--patience", "0")
    for file in ("summary.json", "receipt.json"):
        assert json.loads((run / file).read_text())["epochs"] == 4
    whole = run_training(StandardConfig, data, tmp_path, "whole", *flags)
    assert without_times(run) == without_times(whole)
    assert_same(weights(run), weights(whole))


def test_what_comes_after_patience_is_of_the_stage_that_was_reached(data, tmp_path, monkeypatch):
    evaluate = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda *args: [replace(evaluate(*args)[0], top1=50.0)])
    stages = json.dumps([{"epochs": 3, "img_size": 32, "batch_size": 16}, {"epochs": 1, "img_size": 64}])
    flags = ("--stages", stages, "--patience", "1", "--final_eval")
    run = run_training(ProgressiveConfig, data, tmp_path, "run", *flags)
    assert {row["img_size"] for row in rows(run)} == {"16"}
    grid = json.loads((run / "final_eval.json").read_text())["rows"]
    # Each once, though 1 and 1.15 times 16 px are the same in steps of 8.
    assert [row["img_size"] for row in grid] == [16] * 6 + [24] * 6


def test_an_older_checkpoint_takes_its_best_model_along(data, tmp_path, monkeypatch):
    """The course that is left had found a better one, which summary and log would no longer know."""
    scores, evaluate = iter([40.0, 50.0, 60.0]), Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda *args: [replace(evaluate(*args)[0], top1=next(scores))])
    flags = ("--epochs", "3", "--batch_size", "16", "--keep_every", "1")
    run = run_training(StandardConfig, data, tmp_path, "run", *flags)
    model = run / "model" / "model.safetensors"
    assert_same(load_file(model), weights(run, step=12))
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        run_training(StandardConfig, data, tmp_path, "", "--resume", str(run / "checkpoints" / name_of(8)))
    assert progress(run)["best_step"] == 8
    assert_same(load_file(model), weights(run, step=8))
    assert not (run / "per_class.csv").exists()


def test_other_classes_than_the_checkpoints_are_refused(data, tmp_path, capsys):
    flags = ("--epochs", "2", "--batch_size", "16")
    run_training(StandardConfig, data, tmp_path, "run", *flags)
    other = shutil.copytree(data, tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "class0").rename(other / split / "renamed")
    with pytest.raises(SystemExit):
        run_training(StandardConfig, other, tmp_path, "run", *flags)
    assert "has other classes" in capsys.readouterr().err


def test_other_validation_images_than_the_checkpoints_are_refused(data, tmp_path, capsys):
    flags = ("--epochs", "2", "--batch_size", "16")
    run_training(StandardConfig, data, tmp_path, "run", *flags)
    other = shutil.copytree(data, tmp_path / "other")
    next((other / "val" / "class0").iterdir()).unlink()
    with pytest.raises(SystemExit):
        run_training(StandardConfig, other, tmp_path, "run", *flags)
    assert "has other validation images" in capsys.readouterr().err


def test_a_complete_run_keeps_the_machine_it_was_trained_on(data, tmp_path, monkeypatch):
    flags = ("--epochs", "1", "--batch_size", "16")
    run = run_training(StandardConfig, data, tmp_path, "run", *flags)
    before = (run / "summary.json").read_text()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert (run / "summary.json").read_text() == before


def test_patience_ends_no_epoch_that_has_begun(data, tmp_path, monkeypatch):
    evaluate = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda *args: [replace(evaluate(*args)[0], top1=50.0)])
    flags = ("--epochs", "4", "--batch_size", "16")
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert progress(tmp_path / "run")["step"] == 10
    run = run_training(StandardConfig, data, tmp_path, "run", *flags, "--patience", "1")
    assert progress(run)["step"] == 12
    assert len(rows(run)) == progress(run)["epochs_done"] == 3


def test_patience_waits_for_an_evaluation(data, tmp_path, monkeypatch):
    evaluate = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda *args: [replace(evaluate(*args)[0], top1=50.0)])
    flags = ("--epochs", "6", "--batch_size", "16", "--eval_every", "2", "--patience", "1")
    run = run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert json.loads((run / "summary.json").read_text())["epochs"] == 4
    assert [bool(row["val_top1"]) for row in rows(run)] == [False, True, False, True]


def test_epochs_without_an_evaluation_train_alike_and_leave_its_columns_blank(data, tmp_path):
    flags = ("--epochs", "3", "--batch_size", "16", "--ema", "true")
    every = run_training(StandardConfig, data, tmp_path, "every", *flags)
    second = run_training(StandardConfig, data, tmp_path, "second", *flags, "--eval_every", "2")
    assert_same(weights(every), weights(second))
    scores = ("val_loss", "val_top1", "val_top5", "val_balanced", "ema_top1")
    for number, (row, whole) in enumerate(zip(rows(second), rows(every), strict=True), 1):
        expected = {name: whole[name] if number in (2, 3) else "" for name in scores}
        assert {name: row[name] for name in scores} == expected
        assert row["train_loss"] == whole["train_loss"]
    assert progress(second)["best_epoch"] in (2, 3)
    assert (second / "plots" / "accuracy_live.png").exists()
    receipt.main([str(second)])


def test_every_class_of_the_best_epoch_is_in_a_file(tmp_path):
    data = make_images(tmp_path / "images")
    for place in sorted((data / "train" / "class2").iterdir())[5:]:
        place.unlink()
    run = run_training(StandardConfig, data, tmp_path, "run", *STANDARD, "--sampler", "balanced")
    with open(run / "per_class.csv") as file:
        table = list(csv.DictReader(file))
    assert [(row["class"], row["images"]) for row in table] == [(f"class{n}", "7") for n in range(3)]
    best = rows(run)[progress(run)["best_epoch"] - 1]
    assert sum(float(row["top1"]) for row in table) / 3 == pytest.approx(
        float(best["val_balanced"]), abs=1e-3
    )
    assert sum(int(row["hits"]) for row in table) / 21 == pytest.approx(
        float(best["val_top1"]) / 100, abs=1e-5
    )
