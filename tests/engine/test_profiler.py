import gzip
import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from common.engine import profiler
from common.engine.profiler import TRACE_FILE, WARM_STEPS, traced

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
    # The costliest operations, the most expensive first.
    text = caplog.messages[0]
    assert str(tmp_path / TRACE_FILE) in text.splitlines()[0]
    shares = [float(share) for share in re.findall(r"^ *\S.*?  +([\d.]+)% ", text, re.MULTILINE)]
    assert len(shares) == profiler.ROWS
    assert shares == sorted(shares, reverse=True)
    assert re.search(r"^ +aten::addmm .* 4 *$", text, re.MULTILINE)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_table_is_of_its_time(tmp_path, caplog):
    run = run_in(tmp_path, 4)
    run.accelerator.device = torch.device("cuda")
    values = torch.ones(2048, 2048, device="cuda")
    with caplog.at_level(logging.INFO, "traced"):
        for _ in traced(run, STEPS):
            values = (values @ values).clamp(0, 1)
    rows = [line.split()[0] for line in caplog.messages[0].splitlines() if line.strip()]
    assert rows.index("aten::mm") < rows.index("aten::clamp")
