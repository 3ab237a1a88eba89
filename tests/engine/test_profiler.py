import gzip
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from common.engine import profiler
from common.engine.profiler import TRACE_FILE, WARM_STEPS, idle_share, traced

STEPS = range(3, 3 + WARM_STEPS + 6)


def run_in(folder, profile, is_main=True):
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(
        cfg=SimpleNamespace(profile=profile),
        is_main=is_main,
        accelerator=accelerator,
        folder=folder,
        log=logging.getLogger("traced"),
    )


def weights_after(run, steps):
    """A few steps of SGD on a small layer; returns the steps that were taken, and its weights."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    taken = []
    for step in traced(run, steps):
        taken.append(step)
        with torch.profiler.record_function(f"step {step}"):
            layer(torch.full((4, 8), float(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return taken, layer.weight.detach().clone()


def test_steps_and_results_are_the_same_with_a_trace(tmp_path, caplog):
    plain = weights_after(run_in(tmp_path, 0), STEPS)
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.INFO, "traced"):
        watched = weights_after(run_in(tmp_path, 4), STEPS)
    assert watched[0] == plain[0] == list(STEPS)
    assert torch.equal(watched[1], plain[1])
    # The costliest operations, each with its share.
    table = caplog.messages[0].splitlines()
    assert str(tmp_path / TRACE_FILE) in table[0]
    assert len(table) == 2 + profiler.ROWS
    assert any(line.startswith("aten::addmm") and line.split()[1] == "4" for line in table)
    shares = [float(line.split()[-1].rstrip("%")) for line in table[2:]]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) < 101


def test_the_trace_holds_the_steps_after_the_warm_ones(tmp_path):
    weights_after(run_in(tmp_path, 4), STEPS)
    with gzip.open(tmp_path / TRACE_FILE, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    seen = [step for step in STEPS if f"step {step}" in names]
    assert seen == list(STEPS)[WARM_STEPS : WARM_STEPS + 4]


def test_only_the_first_epoch_of_the_main_process_is_traced(tmp_path):
    run = run_in(tmp_path, 2)
    weights_after(run, STEPS)
    (tmp_path / TRACE_FILE).unlink()
    weights_after(run, STEPS)
    weights_after(run_in(tmp_path, 2, is_main=False), STEPS)
    assert not list(tmp_path.iterdir())


def test_an_epoch_shorter_than_the_trace_is_traced_as_far_as_it_goes(tmp_path):
    assert weights_after(run_in(tmp_path, 99), STEPS)[0] == list(STEPS)
    assert weights_after(run_in(tmp_path, 99), range(2))[0] == [0, 1]


@pytest.mark.parametrize(
    ("intervals", "share"),
    [
        ([(10, 20), (30, 40)], 1 / 3),
        ([(30, 40), (10, 20)], 1 / 3),
        ([(0, 10), (2, 4), (5, 20)], 0.0),
        ([(0, 100), (10, 20), (150, 200)], 1 / 4),
        ([], 1.0),
    ],
)
def test_idle_share(intervals, share):
    assert idle_share(intervals) == pytest.approx(share)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_table_is_of_its_time_and_says_how_long_it_was_idle(tmp_path, caplog):
    run = run_in(tmp_path, 4)
    run.accelerator.device = torch.device("cuda")
    values = torch.ones(2048, 2048, device="cuda")
    with caplog.at_level(logging.INFO, "traced"):
        for _ in traced(run, STEPS):
            values = (values @ values).clamp(0, 1)
    table = caplog.messages[0].splitlines()
    assert table[2].startswith("aten::mm")
    assert 0 <= float(table[-1].split()[5].rstrip("%")) < 100
