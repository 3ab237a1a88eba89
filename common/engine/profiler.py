"""`--profile`: a trace of a few warm steps, and what took their time."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile

from common.run.run import Run

# Steps before the trace, in which memory is claimed and kernels are chosen.
WARM_STEPS = 5
TRACE_FILE = "trace.json.gz"
ROWS = 10


def traced(run: Run, steps: Iterable[int]) -> Iterator[int]:
    """The steps unchanged; with `--profile N`, the main process traces N of its first epoch, and logs what cost most.

    That epoch's images/s suffer, no result does.
    """
    steps = iter(steps)
    # Once only: not in the next epoch, nor when the run is resumed without asking again.
    count, run.cfg.profile = run.cfg.profile, 0
    if count and run.is_main:
        on_cuda = run.accelerator.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
        yield from islice(steps, WARM_STEPS)
        with profile(activities=activities) as trace:
            yield from islice(steps, count)
            if on_cuda:
                torch.cuda.synchronize()
        trace.export_chrome_trace(str(run.folder / TRACE_FILE))
        own_time = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=own_time, row_limit=ROWS, max_name_column_width=40)
        run.log.info("traced into %s\n%s", run.folder / TRACE_FILE, table)
    yield from steps
