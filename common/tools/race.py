"""Which strategy for this data, at equal cost: whole short runs of all, and of a large field longer ones of the better half, and so on.

    python -m common.tools.race --data_dir DATA --budget 60min
    python -m common.tools.race --data_dir DATA --budget 12usd --usd_per_hour 5.67 --model resnet18,resnet50 --go

Successive halving (Jamieson and Talwalkar, 2016), but no run is cut off: each has a --budget of its own, hence its whole cycle and the
default recipe of its length. A quarter of the budget is for the race, the rest for training the winner. An inner split of the training
images chooses; the validation images are left for the winner's report. The same command goes on where it was stopped.
"""

import argparse
import heapq
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, TextIO

import numpy as np
import pandas as pd
import torch

from common import UserError
from common.data.loader import end_with_parent
from common.run import plots
from common.run.processes import SIGNALS
from common.run.run import EXIT_INTERRUPTED
from common.scheduling.budget import BudgetSettings
from common.tools.command_line import check_least, make_folder, new_parser, one_sentence
from common.tools.compare import COLOURS, as_text
from common.tools.split import check_val_fraction, split
from common.tools.yardstick import ROOT, check_tree, reason, scripts

# Of the budget: for choosing. It comes off the winner's training: half would cost a halving of its time, which is more than strategies
# were seen to differ by (docs/budget.md), a quarter costs 0.4 of one.
RACE_SHARE = 0.25
# What another call for the same race may say.
MAY_CHANGE = {"go", "markdown", "output"}
# What the inner split follows from.
OF_THE_SPLIT = {"data_dir", "val_fraction", "seed"}
# In the sentence of a script whose planner finds that the budget buys no run: that candidate is out. All else that a script refuses
# is for the user to mend.
TOO_SMALL = "is too small for an epoch of each stage"
NEEDED = r"it takes (\d+)s"
STOPPED = "the race was stopped; the same command goes on from here"


@dataclass(frozen=True)
class Candidate:
    """A strategy with a model."""

    script: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.script}_{self.model}".replace("/", "_")


@dataclass(frozen=True)
class Job:
    """One training of a candidate within its share of the budget."""

    candidate: Candidate
    rung: int  # from 1; 0 = the winner's
    budget_s: float
    folder: Path

    def beside(self, ending: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    @property
    def ledger(self) -> dict[str, Any]:
        """The `seconds` it took, its `exit_code` and `why`: the error, or else the last line, of its log."""
        return read(self.beside("json"))

    @property
    def refused(self) -> bool:
        """Its budget is too small for it."""
        return self.ledger.get("exit_code") == 2 and TOO_SMALL in self.ledger["why"]

    @property
    def receipt(self) -> dict[str, Any]:
        return read(self.folder / "receipt.json")

    @property
    def seconds(self) -> float:
        """What it took; of a race that was killed beside it the receipt alone knows."""
        return max(self.ledger.get("seconds", 0.0), 60 * self.receipt.get("total_minutes", 0.0))

    @property
    def top1(self) -> float:
        """Of the last epoch, in percent."""
        return self.receipt["last_top1"]


class Lanes:
    """Where trainings run side by side; a signal to the race is passed on to them, and they save what they have."""

    def __init__(self, count: int) -> None:
        self.count, self.closed = count, False
        self._free = SimpleQueue[int]()
        for lane in range(count):
            self._free.put(lane)
        self._running: set[subprocess.Popen[bytes]] = set()
        # A second signal may come while the first is being passed on.
        self._lock = threading.RLock()

    def __enter__(self) -> "Lanes":
        self._previous = {number: signal.signal(number, self._stop) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        with self._lock:
            self.closed = True
            for process in self._running:
                # Ctrl-C has reached it already; a run takes two signals at once for one.
                process.send_signal(number)
        raise UserError(STOPPED)

    def call(self, words: Sequence[str], log: TextIO, environment: Mapping[str, str]) -> int:
        """Run a command to its end; returns its exit code. UserError: the race was stopped before."""
        with self._lock:
            if self.closed:
                raise UserError(STOPPED)
            # Left alone, it would train on beside what the next call starts.
            process = subprocess.Popen(
                words, stdout=log, stderr=log, env=environment, preexec_fn=end_with_parent
            )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.remove(process)

    def train(self, jobs: Sequence[Job], args: argparse.Namespace, data_dir: Path) -> None:
        """Run jobs. UserError: one was stopped, or failed; none begins after it, and those under way have ended."""

        def one(job: Job) -> None:
            if self.closed:
                return
            lane = self._free.get()
            try:
                run(job, args, data_dir, self, lane)
            except BaseException:
                self.closed = True
                raise
            finally:
                self._free.put(lane)

        with ThreadPoolExecutor(self.count) as pool:
            list(pool.map(one, jobs))


def read(path: Path) -> dict[str, Any]:
    """{} where there is nothing yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def command(job: Job, args: argparse.Namespace, data_dir: Path) -> list[str]:
    """The script's command line; nothing is given but data, model, budget and what the user asked for."""
    script = job.candidate.script
    words = [sys.executable, str(ROOT / f"train_{script}.py"), "--data_dir", str(data_dir)]
    words += ["--model", job.candidate.model, "--budget", f"{job.budget_s:.0f}s", "--seed", str(args.seed)]
    words += ["--output", str(args.output), "--run_name", job.folder.name, "--trackers", "none"]
    given = {
        "--target_size" if script == "rect" else "--img_size": args.img_size,
        "--usd_per_hour": args.usd_per_hour,
        "--mixed_precision": args.mixed_precision,
        "--workers": args.workers,
        "--weights": args.weights if script == "finetune" else None,
    }
    return words + [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


def environment(lane: int, lanes: int) -> dict[str, str]:
    """Of a training: lanes share the cores, unless the caller has, and each has a GPU of its own."""
    variables = dict(os.environ)
    if lanes > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // lanes)))
    if gpus := torch.cuda.device_count():
        visible = variables.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[lane]
    return variables


def run(job: Job, args: argparse.Namespace, data_dir: Path, lanes: Lanes, lane: int) -> None:
    """Train, unless that has ended before; a candidate that is refused, its budget being too small, is out.

    UserError: the training was stopped, failed, or was refused for another reason, of which nothing is kept.
    """
    if job.receipt or job.refused:
        return
    print(f"{time.strftime('%H:%M:%S')}  {job.folder.name}: {job.budget_s / 60:.1f} min", flush=True)
    log, before, began = job.beside("log"), job.ledger.get("seconds", 0.0), time.monotonic()
    with log.open("a") as file:
        # What an earlier attempt said does not count.
        start = file.tell()
        code = lanes.call(command(job, args, data_dir), file, environment(lane, args.lanes))
    why = reason(log.read_bytes()[start:].decode(errors="replace"))
    if code == 2 and TOO_SMALL not in why:
        raise UserError(f"{job.folder.name} was refused: {why} ({log})")
    ledger = {"seconds": before + time.monotonic() - began, "exit_code": code, "why": why}
    job.beside("json").write_text(json.dumps(ledger))
    # Or before it could save anything.
    if code == EXIT_INTERRUPTED or -code in SIGNALS:
        raise UserError(STOPPED)
    if code not in (0, 2):
        raise UserError(f"{job.folder.name} ended with exit code {code}: see {log}")


def rung_sizes(candidates: int, lanes: int) -> list[int]:
    """How many candidates each rung has: halved as often as makes the last rung's runs longest.

    Up to six in one lane are all run once: two runs after four, with the same time for both rungs, are no longer than four alone.
    """
    halved = [candidates]
    while halved[-1] > 2:
        halved.append(math.ceil(halved[-1] / 2))
    # The time is divided by the rungs and by the turns of the last one. min takes the first of equals: the fewest rungs.
    rungs = min(range(1, len(halved) + 1), key=lambda n: n * math.ceil(halved[n - 1] / lanes))
    return halved[:rungs]


def race(args: argparse.Namespace, budget_s: float, inner: Path, lanes: Lanes) -> list[Job]:
    """Rung by rung, all of a rung before the next; returns all jobs, those of the last rung last, its winner first of them.

    UserError: nobody was left.
    """
    field = [Candidate(script, model) for model in args.model.split(",") for script in scripts(args)]
    sizes = rung_sizes(len(field), args.lanes)
    jobs: list[Job] = []
    for rung, size in enumerate(sizes, start=1):
        field = field[:size]
        share = RACE_SHARE * budget_s / len(sizes) / math.ceil(len(field) / args.lanes)
        rung_jobs = [Job(c, rung, share, args.output / f"rung{rung}_{c.name}") for c in field]
        lanes.train(rung_jobs, args, inner)
        jobs += [job for job in rung_jobs if not job.receipt]
        ended = sorted((job for job in rung_jobs if job.receipt), key=attrgetter("top1"), reverse=True)
        if not ended:
            least = [int(re.findall(NEEDED, job.ledger["why"])[0]) for job in rung_jobs]
            enough = math.ceil(max(least) / share * budget_s / 60)
            raise UserError(
                f"--budget {args.budget} is too small for a race: each run would have {share:.0f} s, and takes {min(least)} s or "
                f"more; with {enough}min all could run"
            )
        jobs += ended
        if len(ended) == 1:
            # Nobody is left to race against.
            break
        field = [job.candidate for job in ended]
    return jobs


def seconds_in_lanes(seconds: Sequence[float], lanes: int) -> float:
    """How long jobs take that each begin where a lane is free first; lanes may stand idle at the end."""
    ends = [0.0] * lanes
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def make_table(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row for each run: what it took, and its accuracy on the images of the inner split."""
    rows = []
    for job in jobs:
        receipt = job.receipt
        cells = {"run": job.candidate.script, "model": job.candidate.model, "rung": str(job.rung)}
        if not receipt:
            rows.append({**cells, "top-1 %": "refused"})
            continue
        low, high = receipt["interval_95"]
        cells |= {"minutes": f"{receipt['total_minutes']:.1f}", "of": f"{job.budget_s / 60:.1f}"}
        if receipt["price_usd"] is not None:
            cells["USD"] = f"{receipt['price_usd']:.2f}"
        cells |= {"epochs": str(receipt["epochs"]), "top-1 %": f"{job.top1:.1f}"}
        rows.append(cells | {"95 % interval": f"{low:.1f} to {high:.1f}"})
    return pd.DataFrame(rows).fillna("–")


def draw(jobs: Sequence[Job], path: Path) -> None:
    """Accuracy over minutes, and dollars where there is a price: a point for each run, and the best for every length."""
    ended = [(job, job.receipt) for job in jobs if job.receipt]
    axes = plots.new_plot("Race", "minutes of a run", "top-1 of the inner split (%)", "bars: 95 % intervals")
    for number, name in enumerate(dict.fromkeys(job.candidate.name for job, _ in ended)):
        points = pd.DataFrame([receipt for job, receipt in ended if job.candidate.name == name])
        accuracy, interval = points["last_top1"], np.stack(points["interval_95"], axis=1)
        spread = np.abs(interval - accuracy.to_numpy())
        look = {"color": COLOURS[number % len(COLOURS)], "label": name, "marker": "o", "capsize": 3}
        axes.errorbar(points["total_minutes"], accuracy, spread, **look, linewidth=1)
    front: list[tuple[float, float]] = []
    for minutes, accuracy in sorted((r["total_minutes"], r["last_top1"]) for _, r in ended):
        if not front or accuracy > front[-1][1]:
            front.append((minutes, accuracy))
    axes.plot(*zip(*front, strict=True), color=plots.GREY, linestyle="--", linewidth=1, label="best so far")
    price = ended[0][1]["usd_per_hour"]
    if price:
        plots.label_above(axes, axes.get_xlim()[1], f"{price / 60:.3g} USD a minute", plots.GREY, "right")
    plots.add_legend(axes)
    plots.save(axes, path)


def check_same_race(args: argparse.Namespace) -> None:
    """Write down what this race is run with; UserError: the folder holds one that has begun with something else."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    path = args.output / "race.json"
    kept = read(path) or settings
    if other := [name for name in settings if kept[name] != settings[name]]:
        ledgers = sorted(args.output.glob("rung*.json"))
        begun = [*args.output.glob("rung*/checkpoints/*"), *args.output.glob("rung*/receipt.json")]
        if begun:
            flags = ", ".join(f"--{name} {kept[name]}" for name in other)
            raise UserError(f"--output {args.output} holds a race with {flags}; choose another folder")
        # Nothing was trained: the race begins anew, and refusals were of other budgets.
        for ledger in ledgers:
            ledger.unlink()
        if OF_THE_SPLIT & set(other):
            for name in ("inner", "inner.partial"):
                shutil.rmtree(args.output / name, ignore_errors=True)
    make_folder(args.output, "--output")
    path.write_text(json.dumps(settings, indent=1))


def whole_race(args: argparse.Namespace) -> str:
    """Run what has not ended yet, and return the report. UserError: a path is missing, the budget is too small, or a training failed."""
    budget_s = BudgetSettings(args.budget, args.usd_per_hour).budget_s()
    check_tree(args.data_dir)
    check_least(args, lanes=1, seed=0)
    if args.lanes > (gpus := torch.cuda.device_count()) > 0:
        raise UserError(f"--lanes {args.lanes} are more than the GPUs here; {gpus} can run side by side")
    check_val_fraction(args.val_fraction)
    with Lanes(args.lanes) as lanes:
        return in_lanes(args, budget_s, lanes)


def in_lanes(args: argparse.Namespace, budget_s: float, lanes: Lanes) -> str:
    """`whole_race`, once the command line is known to be right."""
    check_same_race(args)
    inner = args.output / "inner"
    if not inner.exists():
        same_disk = args.output.stat().st_dev == (args.data_dir / "train").stat().st_dev
        split(args.data_dir / "train", inner, args.val_fraction, args.seed, "link" if same_disk else "copy")
    jobs = race(args, budget_s, inner, lanes)
    draw(jobs, args.output / "race.png")
    last = [job for job in jobs if job.rung == jobs[-1].rung and job.receipt]
    winner = last[0]
    rest_s = budget_s - sum(
        seconds_in_lanes([job.seconds for job in rung], args.lanes)
        for _, rung in groupby(jobs, attrgetter("rung"))
    )
    final = Job(winner.candidate, 0, rest_s, args.output / f"winner_{winner.candidate.name}")
    refusals = [
        f"{job.candidate.name} was refused: {job.ledger['why'].removeprefix('--budget ')}"
        for job in jobs
        if not job.receipt
    ]
    lines = [as_text(make_table(jobs), args.markdown), "", *refusals, f"winner: {winner.candidate.name}"]
    if len(last) > 1:
        low, second = winner.receipt["interval_95"][0], last[1]
        sure = "outside" if second.top1 < low else "inside"
        lead = f"{winner.top1 - second.top1:.1f} points before {second.candidate.name}"
        lines[-1] += f", {lead}, {sure} its 95 % interval"
    lines.append(f"plot: {args.output / 'race.png'}")
    if not args.go:
        words = shlex.join(["python", *command(final, args, args.data_dir)[1:]])
        return "\n".join([*lines, f"{rest_s / 60:.1f} minutes are left; to train it on all images:", words])
    lanes.train([final], args, args.data_dir)
    if not final.receipt:
        raise UserError(
            f"{rest_s / 60:.1f} minutes were left, too few for {final.folder.name}: see its log; raise --budget"
        )
    low, high = final.receipt["interval_95"]
    lines.append(
        f"trained on all images in {final.receipt['total_minutes']:.1f} min: validation top-1 {final.top1:.2f} %, "
        f"95 % interval {low:.1f} to {high:.1f}; {final.folder}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser("race", __doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="ImageFolder tree with train/ and val/")
    add("--budget", required=True, help="for everything, the winner's training included: 45min, 2h, 12usd")
    add("--usd_per_hour", type=float, help="price of the machine")
    add("--model", default="resnet50", help="one or more networks, a,b (default: %(default)s)")
    add("--weights", help="start train_finetune.py from these; without them it is left out")
    add("--img_size", type=int, help="of the largest stage (default: as the recipes say)")
    add("--mixed_precision", choices=("no", "bf16", "fp16"), help="of all (default: the scripts')")
    add("--workers", type=int, help="loader processes of each run (default: the scripts')")
    add("--seed", type=int, default=0, help="of the split and of all runs (default: 0)")
    add("--val_fraction", type=float, default=0.2, help="of the training images that choose (default: 0.2)")
    add("--lanes", type=int, default=1, help="runs side by side (default: 1)")
    add("--go", action="store_true", help="train the winner on all images with the rest of the budget")
    add("--markdown", action="store_true", help="print the table as Markdown")
    folder = "folder of the runs (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/race"), help=folder)
    args = parser.parse_args(arguments)
    with one_sentence(parser):
        print(whole_race(args))


if __name__ == "__main__":
    main()
