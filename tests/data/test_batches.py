from types import SimpleNamespace

import pytest

from common.data.batches import Batches
from common.scheduling import Schedule, Stage, make_plan
from train_standard import StandardConfig


@pytest.mark.parametrize("shape", ["square", "rect"])
def test_strength_says_how_small_random_crops_may_be(shape):
    cfg = StandardConfig(crop_scale=(0.09, 1.0), rect_scale=(0.09, 1.0))
    stages = [Stage(1, 32, shape=shape, strength=strength) for strength in (0.0, 0.5, 1.0, 2.0)]
    source = SimpleNamespace(group_rows=None)
    batches = Batches(cfg, make_plan(stages, 1000, 1, 1, Schedule(0.1)), source, source, 0, 1)
    scales = [batches.train_view(stage).scale for stage in stages]
    assert scales == [pytest.approx((low, 1.0)) for low in (1.0, 0.3, 0.09, 0.0081)]
