"""The world-size contract: what several processes do together is what one does alone. Real processes, over gloo."""

import csv
import json

import pytest
import torch

from tests.helpers import FAST, assert_same, launch, make_images, progress, weights

PROBE = """
import importlib, json, os, sys
import common.run.run as run_module
from common.engine.trainer import Trainer
from common.config import parse_args
from train_standard import StandardConfig, main

run_module.LOOK_S = 0.0
seen = []
original = Trainer.train_step
def train_step(t, epoch, lr, momentum, stream):
    before = t.meter.sums.clone()
    original(t, epoch, lr, momentum, stream)
    micro = t.plan.accumulation(epoch.stage_index)
    ids = [i for _, batch in list(t.recent)[-micro:] for i in batch.tolist()]
    seen.append((epoch.index, lr, ids, (t.meter.sums - before).tolist()))
Trainer.train_step = train_step
if "--bn_eval" in sys.argv:
    sys.argv.remove("--bn_eval")
    importlib.import_module("common.engine.trainer").train_mode = lambda model, frozen: model.eval()
cfg = parse_args(StandardConfig, "")
try:
    main(cfg)
finally:
    with open(f"{cfg.output}/{cfg.run_name}-seen-{os.environ.get('RANK', '0')}.json", "w") as file:
        json.dump(seen, file)
"""
# Breaks one optimizer step of process 1.
BREAK = """
import os, signal
import common.run.run as run_module
from common.engine.trainer import Trainer
from common.config import run_script
from train_standard import StandardConfig, main

run_module.LOOK_S = 0.0
original = Trainer.train_step
def train_step(t, *args):
    if os.environ["RANK"] == "1" and t.state.progress.step == 2:
        {what}
    return original(t, *args)
Trainer.train_step = train_step
run_script(main, StandardConfig, "")
"""
FLAGS = [*FAST, "--img_size", "32", "--epochs", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(
        tmp_path_factory.mktemp("data") / "images", train=22, val=7
    )  # 66 and 21: uneven shards


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The same training on 1, 2 and 4 processes, at the same global batch."""
    output = tmp_path_factory.mktemp("runs")
    script = output / "probe.py"
    script.write_text(PROBE)
    flags = ["--data_dir", str(data), "--output", str(output), *FLAGS, "--bn_eval"]
    flags += ["--mixup_alpha", "0", "--cutmix_alpha", "0"]
    for world in (1, 2, 4):
        done = launch(world, str(script), *flags, "--run_name", f"w{world}", "--batch_size", str(16 // world))
        assert done.returncode == 0, done.stderr[-2000:]
    return output


def seen(runs, world):
    return [json.loads((runs / f"w{world}-seen-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4])
def test_same_lr_curve_and_same_samples_at_each_step(runs, world):
    alone, together = seen(runs, 1)[0], seen(runs, world)
    for step, (epoch, lr, ids, _) in enumerate(alone):
        parts = [process[step] for process in together]
        assert all(part[:2] == [epoch, lr] for part in parts)
        union = [i for part in parts for i in part[2]]
        assert sorted(union) == sorted(ids)
        assert len(set(union)) == len(union)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_weights_agree_within_rounding(runs, world):
    alone, together = seen(runs, 1)[0], seen(runs, world)
    for step, (*_, sums) in enumerate(alone):
        loss = sum(process[step][3][0] for process in together)
        assert loss == pytest.approx(sums[0], rel=1e-4)
    for (name, a), b in zip(weights(runs / "w1").items(), weights(runs / f"w{world}").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("world", [2, 4])
def test_same_evaluation(runs, world):
    def scores(world):
        with open(runs / f"w{world}" / "training_log.csv") as file:
            return [(row["val_loss"], row["val_top1"]) for row in csv.DictReader(file)]

    for (loss_a, top_a), (loss_b, top_b) in zip(scores(1), scores(world), strict=True):
        assert float(loss_a) == pytest.approx(float(loss_b), rel=1e-3)
        assert abs(float(top_a) - float(top_b)) <= 100 / 21 + 1e-6  # one image on the fence


def test_moves_to_another_number_of_processes_in_mid_epoch(data, tmp_path):
    """Two processes stop in mid-epoch by SIGTERM; one goes on with the same global batch, and no sample is lost."""
    flags = ["--data_dir", str(data), "--output", str(tmp_path), *FLAGS]
    flags += ["--batch_size", "8", "--run_name", "run"]
    script = tmp_path / "probe.py"
    kill = "if len(seen) == 2 and os.environ.get('RANK') == '1': os.kill(os.getpid(), 15)\n    seen.append("
    script.write_text(PROBE.replace("seen.append(", kill))
    stopped = launch(2, str(script), *flags)
    assert stopped.returncode != 0
    before = [json.loads((tmp_path / f"run-seen-{rank}.json").read_text()) for rank in (0, 1)]
    # Only one was told, both stopped after the same step.
    assert [len(process) for process in before] == [3, 3]
    assert progress(tmp_path / "run")["step"] == 3

    resumed = launch(1, str(script), *flags)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    after = json.loads((tmp_path / "run-seen-0.json").read_text())
    first_epoch = [i for process in before for _, _, ids, _ in process for i in ids]
    first_epoch += [i for epoch, _, ids, _ in after for i in ids if epoch == 0]
    assert len(first_epoch) == len(set(first_epoch)) == 64
    assert len(after) == 2 * 4 - 3


TIMES = {"images_per_s", "data_wait", "memory_mb", "epoch_s", "total_s"}


def without_times(run):
    with open(run / "training_log.csv") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_interrupted_equals_uninterrupted_on_two_processes(data, tmp_path):
    flags = ["--data_dir", str(data), "--output", str(tmp_path), *FLAGS, "--batch_size", "8", "--ema"]
    script = tmp_path / "stop.py"
    script.write_text(BREAK.format(what="os.kill(os.getpid(), signal.SIGTERM)"))
    for arguments in (
        ["train_standard.py", *flags, "--run_name", "whole"],
        [str(script), *flags, "--run_name", "parts"],
        ["train_standard.py", *flags, "--run_name", "parts"],
    ):
        done = launch(2, *arguments)
        assert (done.returncode == 0) == (arguments[0] != str(script)), done.stderr[-2000:]
    for file in ("model", "optimizer", "ema", "ranks"):
        assert_same(weights(tmp_path / "whole", file=file), weights(tmp_path / "parts", file=file))
    # A resumed epoch's sums are those of all processes, once.
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")
    # Each process has statistics of its own images while it trains, and the mean of all where they are evaluated.
    statistics = weights(tmp_path / "whole", file="ranks")
    for whose in ("model.", "ema."):
        name = next(name for name in statistics if name.startswith(whose) and "running_mean" in name)
        assert torch.equal(statistics[name][0], statistics[name][1])
        assert statistics[name][0].any()


@pytest.mark.parametrize(
    ("script", "small", "sizes"),
    [
        # 1.15 and 1.3 times 32 px are the same in steps of 8.
        ("train_rect.py", ["--epochs", "1", "--target_size", "32", "--batch_size", "8"], 2),
        ("train_hybrid.py", ["--debug"], 3),
    ],
)
def test_processes_with_unequal_numbers_of_evaluation_batches(script, small, sizes, data, tmp_path):
    """Rectangular evaluation deals shapes out unequally, and nobody may wait for a batch that others do not have."""
    flags = [
        "--data_dir",
        str(data),
        "--output",
        str(tmp_path),
        "--model",
        "test_resnet",
        "--trackers",
        "none",
        *small,
    ]
    flags += ["--workers", "0", "--lr", "0.1", "--rect_val", "--run_name", "run", "--final_eval", "--ema"]
    done = launch(2, script, *flags, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads((tmp_path / "run" / "final_eval.json").read_text())["rows"]) == 12 * sizes


def test_a_launcher_that_starts_strangers_is_refused(data, tmp_path, monkeypatch, capsys):
    """WORLD_SIZE of 2 without rendezvous: Accelerate would train alone."""
    from tests.helpers import run_training
    from train_standard import StandardConfig

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "common.run.processes.PartialState", lambda **kwargs: type("Alone", (), {"num_processes": 1})()
    )
    with pytest.raises(ValueError, match="2 processes were launched"):
        run_training(StandardConfig, data, tmp_path, "run")


def test_same_weights_helper_can_fail():
    with pytest.raises(AssertionError):
        assert_same({"a": torch.zeros(1)}, {"a": torch.ones(1)})
