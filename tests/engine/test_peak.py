import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.engine import peak
from common.engine.lr_finder import Sweep
from common.scheduling import Rates, Stage
from tests.engine.trainers import fill, small_trainer

SMALL_FIRST = [Stage(1, img_size=8, batch_size=4), Stage(1, img_size=16, batch_size=8), Stage(1, 8, 8)]


@pytest.mark.parametrize("lr_scale", [None, 0.5])
def test_the_sweep_sees_the_largest_images_and_gives_the_first_stages_peak(
    lr_scale: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [dataclasses.replace(stage, lr_scale=lr_scale) for stage in SMALL_FIRST]
    seen = []

    def train_step(t, epoch, lr, momentum, stream):
        seen.append((next(stream).images.shape[-1], epoch.stage_index, lr))

    def find_lr(state, step, iterations, **_):
        for _ in range(iterations):
            step(0.01)
        return Sweep([], [], [], [], 0.4, "")

    monkeypatch.setattr(peak, "find_lr", find_lr)
    monkeypatch.setattr(peak, "plot_lr_finder", lambda folder: None)
    with small_trainer(stages, output=str(tmp_path), lr_finder_iterations=10) as t:
        t.run.folder.mkdir()
        t.loader = SimpleNamespace(
            stream=lambda items: (fill(item, t.batches.train, t.run.accelerator.device) for item in items)
        )
        found = peak.find_peak(t, train_step)
        t.run.background.drain()
        # More steps than the stage's one epoch has: its images are passed over again.
        assert seen == [(16, 1, 0.01)] * 10
        assert Rates(t.plan, t.run.cfg, found).peak(1) == pytest.approx(0.4)
