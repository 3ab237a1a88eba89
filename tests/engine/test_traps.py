"""Where Accelerate surprises: each test fails when one of its traps is sprung. And ends of jobs that a process breaks."""

import csv
import inspect
import json
import re
import shutil
import time
from dataclasses import replace

import pytest
import torch
from accelerate.utils import launch as accelerate_launch
from torch.nn import functional as F

from common.config import TrainConfig
from common.engine import trainer
from common.engine.fit import train_epoch
from common.run import start_run
from common.run.processes import UNSUPPORTED
from common.scheduling import Stage
from tests.engine.trainers import Small, noise, rates_of, small_trainer
from tests.helpers import launch, make_images, progress, run_training, stop_after, torchrun, weights
from train_standard import StandardConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


def stage(**changes):
    return Stage(**{"epochs": 1, "img_size": 16, "batch_size": 4} | changes)


def steps_of(t, epoch, stream, **settings):
    """All optimizer steps of an epoch, at a constant rate."""
    t.enter_stage(epoch)
    t.begin_epoch(epoch)
    for _ in range(epoch.steps):
        t.train_step(epoch, settings.get("lr", 0.1), settings.get("momentum", 0.9), stream)
        t.state.progress.step += 1


# --- 1. accumulation counts micro-steps over the whole run ---------------------------------------------------------


def test_each_stage_begins_with_a_new_window():
    with small_trainer([stage(data_fraction=0.5), stage(batch_size=6)], images=72, accumulation=3) as t:
        consumed, stepped = [0], []
        t.state.optimizer.register_step_post_hook(lambda *_: stepped.append(consumed[0]))

        def counted(batches):
            for batch in batches:
                consumed[0] += 1
                yield batch

        first, second = t.plan.epochs()
        steps_of(t, first, counted(noise(t, first)))
        # As after an LR finder, or whatever else took micro-batches that fill no window.
        t.run.accelerator.step += 1
        steps_of(t, second, counted(noise(t, second)))
        assert stepped == list(range(3, 3 * (first.steps + second.steps) + 1, 3))


def ends_alike_if_stopped_after(steps, flags, data, tmp_path, monkeypatch):
    whole = run_training(StandardConfig, data, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(SystemExit):
            run_training(StandardConfig, data, tmp_path, "parts", *flags)
    assert 0 < progress(tmp_path / "parts")["step"] < progress(whole)["step"]
    run_training(StandardConfig, data, tmp_path, "parts", *flags)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name


def test_windows_are_whole_after_a_resume(data, tmp_path, monkeypatch):
    flags = ("--epochs", "2", "--batch_size", "4", "--accumulation", "3")
    ends_alike_if_stopped_after(2, flags, data, tmp_path, monkeypatch)


# --- 2. backward divides by the accumulation itself ----------------------------------------------------------------


def test_gradients_are_the_mean_over_the_window():
    with small_trainer([stage()], accumulation=4, label_smoothing=0.0) as t:
        epoch = next(t.plan.epochs())
        t.enter_stage(epoch)
        t.begin_epoch(epoch)
        model, batches = t.state.model, list(noise(t, epoch))[:4]
        twin = Small()
        twin.load_state_dict(model.state_dict())
        for batch in batches:
            images, targets = t.augment(batch.images, batch.labels, batch.item, mix=False)
            F.cross_entropy(twin(images), targets).backward()
        seen = []
        t.state.optimizer.register_step_pre_hook(
            lambda *_: seen.append([p.grad.clone() for p in model.parameters()])
        )
        t.train_step(epoch, 0.1, 0.9, iter(batches))
        (gradients,) = seen
        for mine, theirs in zip(gradients, twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.grad / 4)


# --- 3. autocast is on in every stage ------------------------------------------------------------------------------

FREEZING = [stage(), stage(frozen=("conv1", "bn1")), stage()]
AUTOCAST = """
import json, sys
sys.path.insert(0, "{root}")
from tests.engine.test_traps import FREEZING, precisions
from tests.engine.trainers import small_trainer

with small_trainer(FREEZING, mixed_precision="bf16") as t:
    seen = precisions(t)
    if t.run.is_main:
        print("SEEN", json.dumps(seen))
"""


def precisions(t):
    """For each stage: dtype inside and outside of the network, and how many wrappers lie around its forward."""
    seen = []
    for epoch in t.plan.epochs():
        t.enter_stage(epoch)
        inside = []
        hook = t.state.model.conv2.register_forward_hook(
            lambda _m, _i, out, to=inside: to.append(str(out.dtype))
        )
        images = torch.zeros(2, 3, 16, 16)
        outside = str(t.net(images).dtype)
        hook.remove()
        wrappers, forward = 0, t.state.model.forward
        while hasattr(forward, "__wrapped__"):
            wrappers, forward = wrappers + 1, forward.__wrapped__
        seen.append([*inside, outside, wrappers])
    return seen


def test_autocast_is_on_once_in_every_stage():
    with small_trainer(FREEZING, mixed_precision="bf16") as t:
        first, second, third = precisions(t)
    assert first[:2] == ["torch.bfloat16", "torch.float32"]
    assert first == second == third


def test_autocast_is_on_once_in_every_stage_on_two_processes(tmp_path):
    script = tmp_path / "autocast.py"
    script.write_text(AUTOCAST.format(root=tmp_path.cwd()))
    done = launch(2, str(script), timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = re.findall(r"SEEN (.*)", done.stdout)
    first, second, third = json.loads(line)
    assert first[:2] == ["torch.bfloat16", "torch.float32"]
    assert first == second == third


# --- 4. a fused optimizer skips steps in silence -------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_skipped_steps_are_counted_with_a_fused_optimizer(accumulation):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with small_trainer([stage()], images=40 * accumulation, scaler=scaler, accumulation=accumulation) as t:
        assert t.state.optimizer.param_groups[0]["fused"]
        epoch = next(t.plan.epochs())
        t.enter_stage(epoch)
        t.begin_epoch(epoch)
        stream, model = noise(t, epoch), t.state.model
        overflows = {0, 3, 4}
        for step in range(epoch.steps):
            before = [p.detach().clone() for p in model.parameters()]
            factor = torch.inf if step in overflows else 1.0
            hook = model.fc.weight.register_hook(lambda gradient, factor=factor: gradient * factor)
            t.train_step(epoch, 0.1, 0.9, stream)
            hook.remove()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (step not in overflows), step
            # The trap: Accelerate does not notice.
            assert not t.optimizer.step_was_skipped
        assert t.state.progress.skipped_steps == 0
        t.look()
        assert t.state.progress.skipped_steps == len(overflows)
        t.look()
        assert t.state.progress.skipped_steps == len(overflows)
        assert scaler.get_scale() == 2.0 ** (8 - len(overflows))


# --- 5. what the launcher says is honoured or refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "pass --accumulation 4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "pass --compile"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED is not supported"),
    ],
)
def test_a_launchers_settings_are_refused_in_one_sentence(variable, value, sentence, monkeypatch):
    monkeypatch.setenv(variable, value)
    with (
        pytest.raises(Exception, match=sentence) as error,
        start_run(TrainConfig(trackers="none", resume="none")),
    ):
        pass
    assert type(error.value).__name__ == "UserError"
    assert "\n" not in str(error.value)
    # Accelerate's launcher still speaks of it by this name.
    name = "ACCELERATE_DYNAMO_" if "DYNAMO" in variable else variable
    assert name in inspect.getsource(accelerate_launch)


def test_a_launchers_accumulation_is_taken_if_both_say_so(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with small_trainer([stage()], accumulation=4) as t:
        epoch = next(t.plan.epochs())
        t.enter_stage(epoch)
        assert t.run.accelerator.gradient_accumulation_steps == 4
    assert "ACCELERATE_USE_FSDP" in UNSUPPORTED


# --- what an optimizer step does besides ---------------------------------------------------------------------------


def test_gradients_are_clipped_at_the_end_of_a_window():
    """SGD without momentum at rate 1 moves the weights by the gradient, in its direction and as far as it may."""
    settings = {"weight_decay": 0.0, "accumulation": 2, "momentum": 0.0, "momentum_swing": 0.0}
    moves = []
    for limit in (None, 0.01):
        with small_trainer([stage()], clip_grad=limit, **settings) as t:
            epoch = next(t.plan.epochs())
            t.enter_stage(epoch)
            t.begin_epoch(epoch)
            before = [p.detach().clone() for p in t.state.model.parameters()]
            t.train_step(epoch, 1.0, 0.0, noise(t, epoch))
            after = t.state.model.parameters()
            moves.append(torch.cat([(b - a).flatten() for a, b in zip(after, before, strict=True)]))
    free, clipped = moves
    assert free.norm() > 0.1
    torch.testing.assert_close(clipped, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-6)


def test_momentum_is_forgotten_when_a_layer_freezes():
    stages = [stage(), stage(frozen=("conv1",)), stage()]
    with small_trainer(stages) as t:
        optimizer, model = t.state.optimizer, t.state.model
        kept = []
        for epoch in t.plan.epochs():
            stream = noise(t, epoch)
            t.enter_stage(epoch)
            kept.append(
                [
                    "momentum_buffer" in optimizer.state.get(p, {})
                    for p in (model.conv1.weight, model.fc.weight)
                ]
            )
            before = model.conv1.weight.detach().clone()
            steps_of(t, epoch, stream)
            assert torch.equal(before, model.conv1.weight) == bool(epoch.stage.frozen)
        assert kept == [[False, False], [False, True], [False, True]]


def test_the_average_is_told_the_number_of_the_step():
    """The decay of a short run's average rises with the steps: taken anew, it is the same to the bit."""
    with small_trainer([stage(epochs=2)], ema=True) as t:
        average = t.state.ema
        expected = {name: value.clone() for name, value in average.module.state_dict().items()}
        given, original = [], average.update

        def update(model, step):
            given.append(step)
            original(model, step)
            for name, value in model.state_dict().items():
                expected[name] = (
                    expected[name].lerp(value, 1 - min(t.run.cfg.ema_decay, 1 - len(given) ** -0.75))
                    if value.is_floating_point()
                    else value
                )

        average.update = update
        for epoch in t.plan.epochs():
            t.enter_stage(epoch)
            train_epoch(t, epoch, rates_of(t), noise(t, epoch))
        assert given == list(range(1, t.plan.total_steps + 1))
        for name, value in average.module.state_dict().items():
            torch.testing.assert_close(value, expected[name].to(value.dtype), msg=name)


def test_processes_evaluate_the_mean_of_their_statistics(monkeypatch):
    """Each has BatchNorm statistics of its own images; DDP's own way would be those of the first process."""
    with small_trainer([stage()], ema=True) as t:
        asked = []

        def reduce(buffer, how):
            asked.append(how)
            return buffer + 1

        monkeypatch.setattr("common.engine.trainer.evaluate", lambda *_: [])
        epoch = next(t.plan.epochs())
        t.enter_stage(epoch)
        before = [model.bn1.running_mean.clone() for model in t.state.models.values()]
        counted = t.state.model.bn1.num_batches_tracked.clone()
        with monkeypatch.context() as patch:
            patch.setattr(type(t.run.accelerator), "num_processes", 2)
            patch.setattr(t.run.accelerator, "reduce", reduce)
            t.evaluate(epoch, iter(()))
        # Two of BatchNorm's three buffers, of the weights and of their average.
        assert asked == ["mean"] * 4
        for model, mean in zip(t.state.models.values(), before, strict=True):
            assert torch.equal(model.bn1.running_mean, mean + 1)
        assert torch.equal(t.state.model.bn1.num_batches_tracked, counted)


# --- what a resumed run finds again --------------------------------------------------------------------------------


def test_random_numbers_go_on_where_they_stopped(data, tmp_path, monkeypatch):
    """Dropout draws from torch's generator, so a resumed run that began it anew would train otherwise."""
    monkeypatch.setattr("train_standard.create_model", lambda *_, drop_path: DroppingThree())
    ends_alike_if_stopped_after(3, ("--epochs", "2", "--batch_size", "8"), data, tmp_path, monkeypatch)


class DroppingThree(Small):
    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.fc = torch.nn.Linear(8, 3)


def test_rows_later_than_the_checkpoint_are_written_again(data, tmp_path):
    def epochs_and_losses(run):
        with open(run / "training_log.csv", newline="") as file:
            return [(row["epoch"], row["train_loss"]) for row in csv.DictReader(file)]

    flags = ("--epochs", "3", "--batch_size", "8", "--save_freq_last", "1")
    run = run_training(StandardConfig, data, tmp_path, "run", *flags)
    before = epochs_and_losses(run)
    assert [epoch for epoch, _ in before] == ["1", "2", "3"]
    newest = max((run / "checkpoints").glob("step_*"))
    shutil.rmtree(newest)
    run_training(StandardConfig, data, tmp_path, "run", *flags)
    assert epochs_and_losses(run) == before
    assert newest.exists()


def test_the_best_the_numbered_and_the_newest_checkpoints_are_kept(data, tmp_path, monkeypatch):
    original = trainer.evaluate

    def never_better(*args, **kwargs):
        return [replace(score, top1=50.0) for score in original(*args, **kwargs)]

    monkeypatch.setattr(trainer, "evaluate", never_better)
    flags = ("--epochs", "8", "--batch_size", "24", "--keep_every", "3", "--save_freq_last", "100")
    run = run_training(StandardConfig, data, tmp_path, "run", *flags)
    # The first epoch is the best; 3 and 6 are numbered; 8 is the last. Epochs have 3 steps.
    kept = sorted(
        int(folder.name.removeprefix("step_")) // 3 for folder in (run / "checkpoints").glob("step_*")
    )
    assert kept == [1, 3, 6, 8]


# --- a process that fails ------------------------------------------------------------------------------------------

BREAK = """
import importlib, os, pathlib, time
from common.config import run_script
from train_standard import StandardConfig, main

place = importlib.import_module("{module}"){where}
original, calls = place.{function}, []

def broken(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "{rank}" and len(calls) == {call}:
        pathlib.Path(__file__).with_name("failed_at").write_text(str(time.time()))
        raise {error}("the disk of rank {rank} is on fire")
    return original(*args, **kwargs)

place.{function} = broken
run_script(main, StandardConfig, "")
"""
PLACES = {
    "training": ("common.engine.trainer", ".Trainer", "train_step", 1, 3, "common.UserError"),
    "evaluation": ("common.augment", ".Augment", "normalise", 1, 2, "RuntimeError"),
    "writing a checkpoint": ("common.run.checkpoint", "", "write", 0, 1, "RuntimeError"),
}
FLAGS = """--model test_resnet --img_size 32 --batch_size 8 --epochs 2 --lr 0.1 --mixed_precision no --workers 0
    --trackers none --recipe listed --save_freq_last 1"""


@pytest.mark.parametrize("case", PLACES)
def test_a_process_that_fails_ends_the_job_soon_with_its_own_sentence_first(case, data, tmp_path):
    names = ("module", "where", "function", "rank", "call", "error")
    fields = dict(zip(names, PLACES[case], strict=True))
    script = tmp_path / "broken.py"
    script.write_text("import common\n" + BREAK.format(**fields))
    flags = ["--data_dir", str(data), "--output", str(tmp_path), "--run_name", "run", *FLAGS.split()]
    # One of them under torchrun itself, whose workers are new processes.
    start = torchrun if case == "training" else launch
    done = start(2, str(script), *flags, timeout=120)
    assert done.returncode != 0
    assert time.time() - float((tmp_path / "failed_at").read_text()) < 30
    complaints = [line for line in done.stderr.splitlines() if re.search("error|Error|ends because", line)]
    assert f"the disk of rank {fields['rank']} is on fire" in complaints[0], done.stderr[-3000:]
