"""What stages take: no weight moves, the loader's pace is seen, and stages of a kind are measured once."""

import math
import time
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from common.engine import measure as measuring
from common.engine.measure import CPU_IMAGES, measure, measure_beside_images, measure_stage, timed_images
from common.scheduling import Stage, make_plan
from tests.engine.trainers import noise, small_trainer

STAGE = Stage(epochs=2, img_size=16, batch_size=8)


def of_noise(t, late_s=0.0, ready=0, workers=2):
    """A loader that is as slow as that after the first `ready` batches."""
    epoch = next(t.plan.epochs())

    def stream(items):
        for number, batch in enumerate(cycle(noise(t, epoch))):
            time.sleep(late_s if number >= ready else 0.0)
            yield batch

    return SimpleNamespace(stream=stream, workers=workers)


def test_no_weight_moves(monkeypatch):
    monkeypatch.setattr(measuring, "_evaluation_s", lambda *_: 1.0)
    with small_trainer([STAGE]) as t:
        t.loader = of_noise(t)
        # Of an epoch that is resumed.
        t.state.progress.epoch_sums = [1000.0, 0.0]
        before = [parameter.clone() for parameter in t.state.model.parameters()]
        measured = measure_stage(t, next(t.plan.epochs()), 0.0)
        for old, new in zip(before, t.state.model.parameters(), strict=True):
            torch.testing.assert_close(old, new, rtol=1e-6, atol=1e-6)
        assert measured[:4] == (16, "square", (), 8)
        assert measured.step_s > 0
        assert measured.evaluate_s == 1
        assert abs(measured.first_loss - math.log(4)) < 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slow_loader_shows_behind_the_batches_that_lie_ready(monkeypatch, workers):
    monkeypatch.setattr(measuring, "_evaluation_s", lambda *_: 1.0)
    with small_trainer([STAGE]) as t:
        t.loader = of_noise(
            t, 0.2, ready=1 + measuring.FEWEST + workers * measuring.PREFETCH, workers=workers
        )
        measured = measure_stage(t, next(t.plan.epochs()), 0.0)
        # With workers, it loads while the step computes.
        assert measured.wait_s + bool(workers) * measured.step_s == pytest.approx(0.2, rel=0.1)


def test_a_loader_that_keeps_up_costs_no_time(monkeypatch):
    monkeypatch.setattr(measuring, "_evaluation_s", lambda *_: 1.0)
    with small_trainer([STAGE]) as t:
        t.loader = of_noise(t)
        monkeypatch.setattr(measuring, "finished", lambda device: time.monotonic() + 1)
        measured = measure_stage(t, next(t.plan.epochs()), 0.0)
        assert measured.wait_s == 0
        assert measured.step_s == pytest.approx(1, abs=0.5)


def test_each_kind_of_stage_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr(measuring, "measure_stage", lambda t, epoch, *_: measured.append(epoch.stage))
    stages = [STAGE, Stage(1, 16, 8, mixup=False), Stage(1, 16, 8, frozen=("conv1",)), Stage(1, 24, 8)]
    with small_trainer(stages) as t:
        measure(t, 0.0, t.plan.epochs())
    assert measured == [stages[0], *stages[2:]]


def test_what_does_not_grow_with_the_images_is_found(monkeypatch):
    stage = Stage(epochs=1, img_size=16, batch_size=16)
    with small_trainer([stage]) as t:
        epoch = next(t.plan.epochs())
        sizes = []

        def stream(items):
            return (
                batch._replace(item=item) for batch, item in zip(cycle(noise(t, epoch)), items, strict=False)
            )

        def pace(t, stream, epoch, pixels):
            sizes.append(len(next(stream).item.indices))
            # A step of 0.3 s and 0.1 s for each image.
            return 0.3 / sizes[-1] + 0.1

        t.loader = SimpleNamespace(stream=stream, workers=0)
        monkeypatch.setattr(measuring, "_pace", pace)
        monkeypatch.setattr(measuring, "_evaluation_s", lambda *_: 1.0)
        whole = measure_stage(t, epoch, 0.0)
        assert whole.step_s == pytest.approx(1.9)
        assert measure_beside_images(t, epoch, whole) == pytest.approx(0.3)
        assert sizes[-1] == 8
        # A machine that was slower when it had more to do.
        assert measure_beside_images(t, epoch, whole._replace(step_s=9.0)) == 0
        assert measure_beside_images(t, epoch, whole._replace(images=3)) == 0


def test_a_cpu_is_timed_with_few_images_and_a_gpu_with_all():
    plan = make_plan([Stage(1, 48, 64), Stage(1, 224, 64), Stage(1, 224, 8)], 512, 1, accumulation=2)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    epochs = list(plan.epochs())
    assert [timed_images(plan, epoch, gpu) for epoch in epochs] == [128, 128, 16]
    assert [timed_images(plan, epoch, cpu) for epoch in epochs] == [2 * CPU_IMAGES, 2 * CPU_IMAGES, 16]
