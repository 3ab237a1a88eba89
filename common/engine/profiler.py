"""`--profile`: a trace of a few warm steps, and what took their time."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from common.run.run import Run

# Steps before the trace, in which memory is claimed and kernels are chosen.
WARM_STEPS = 5
TRACE_FILE = "trace.json.gz"
ROWS = 10


def traced(run: Run, steps: Iterable[int]) -> Iterator[int]:
    """The steps unchanged; with `--profile N`, N of this process's first epoch are traced while they are taken.

    The main process writes the trace, which https://ui.perfetto.dev opens, and logs what cost most. That epoch's
    images/s suffer, no result does.
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
        run.log.info("traced into %s\n%s", run.folder / TRACE_FILE, costliest(trace, on_cuda))
    yield from steps


def costliest(trace: profile, on_cuda: bool) -> str:
    """A table of the operations with the most time of their own: the device's where there is one, else the CPU's."""
    own_time = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    # Kernels have rows of their own, which say again what those of the operations that launched them say.
    operations = [row for row in trace.key_averages() if row.device_type == DeviceType.CPU]
    total = sum(getattr(row, own_time) for row in operations)
    lines = [f"{'operation':<50}{'calls':>8}{'ms':>10}{'share':>8}"]
    for row in sorted(operations, key=lambda row: getattr(row, own_time), reverse=True)[:ROWS]:
        own = getattr(row, own_time)
        lines.append(f"{row.key[:49]:<50}{row.count:>8}{own / 1000:>10.1f}{own / max(total, 1):>8.1%}")
    if on_cuda:
        # A range such as the optimizer's is shown on the device too, and would hide the gaps in it.
        kernels = [
            (event.time_range.start, event.time_range.end)
            for event in trace.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        lines.append(f"the device was idle for {idle_share(kernels):.1%} of the traced time")
    return "\n".join(lines)


def idle_share(intervals: Iterable[tuple[float, float]]) -> float:
    """Share of the time from the first begin to the last end that no interval (begin, end) covers; they may overlap."""
    intervals = sorted(intervals)
    if not intervals:
        return 1.0
    begin, until = intervals[0]
    idle = 0.0
    for start, end in intervals:
        idle += max(0.0, start - until)
        until = max(until, end)
    return idle / max(until - begin, 1e-9)
