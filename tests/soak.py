"""Soak test: runs that are killed again and again must end like a run that was left alone.

    python -m tests.soak [--kills 20] [--terms 5] [--strategies train_standard train_hybrid]
    python -m tests.soak --kills 5 --budget 60s

Each strategy's curriculum runs in miniature on made-up images, undisturbed and disturbed: SIGKILL at random moments on one
process, SIGTERM at random moments on two. Compared are the final weights and optimizer (bit for bit on one process),
the CSV but for its times, and the samples of every step. `make soak`; some minutes, bounded. With `--budget`, the disturbed
run plans itself, and the undisturbed one repeats its `config.yaml`.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.helpers import ROOT, make_images, progress, weights

PROBE = """
import json, os, sys
import common.run.run as run_module
from common.engine.trainer import Trainer
from common.config import run_script
run_module.LOOK_S = 0.0
original = Trainer.train_step
def train_step(t, epoch, lr, momentum, stream):
    original(t, epoch, lr, momentum, stream)
    if t.state.progress.peak_lr:  # not while the LR finder sweeps
        micro = t.plan.accumulation(epoch.stage_index)
        ids = [int(i) for _, batch in list(t.recent)[-micro:] for i in batch]
        line = json.dumps([epoch.index, t.state.progress.step, ids])
        with open(f"{t.run.folder}.samples-{os.environ.get('RANK', '0')}", "a") as file:
            file.write(line + chr(10))
Trainer.train_step = train_step
script = __import__(sys.argv.pop(1))
config = next(c for n, c in vars(script).items() if n.endswith("Config") and c.__module__ == script.__name__)
run_script(script.main, config, "")
"""

STRATEGIES = {
    "train_standard": [],
    "train_progressive": ["--stages", '[{"epochs": 6, "img_size": 32, "batch_size": 32}, {"epochs": 6, "img_size": 64, "batch_size": 16}]'],
    "train_hybrid": ["--progressive_freezing"],
    "train_finetune": ["--head_epochs", "5"],
    "train_rect": [],
}  # fmt: skip
TIMES = {"images_per_s", "data_wait", "memory_mb", "epoch_s", "total_s"}
TIMEOUT_S = 900  # of a run that is left alone


def command(script: str, processes: int, work: Path, name: str) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = ["--debug", "--model", "test_resnet", "--trackers", "none", "--workers", "1", "--seed", "3"]
    flags += ["--data_dir", str(work / "images"), "--output", str(work), "--run_name", name]
    flags += [
        "--checkpoint_minutes",
        "0.02",
        "--save_freq_last",
        "1",
        "--lr_finder_iterations",
        "15",
        "--recipe",
        "listed",
    ]
    if script == "train_finetune":
        flags += ["--weights", str(work / "base")]
    return [*launcher, str(work / "probe.py"), script, *flags, *STRATEGIES[script]]


def start(args: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(args: list[str]) -> None:
    process = start(args)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{errors[-3000:]}")


def disturb(args: list[str], kills: int, number: int, rng: random.Random, run: Path) -> int:
    """Start, interrupt at a random moment, start again, until the run is complete. Returns the interruptions.

    One in five comes while the process starts; the others are spread over the first seconds of training, since
    a run that is killed late is soon complete.
    """
    hits = 0
    while hits < kills and not (run / "summary.json").exists():
        process = start(args)
        if rng.random() < 0.8:
            before = len(samples(run, 0))
            while len(samples(run, 0)) == before and process.poll() is None:
                time.sleep(0.05)
        wait_s = rng.uniform(0.0, 3.0)
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            hits += 1
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        try:
            process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(f"{run.name} did not end within 120 s of signal {number}") from None
        checkpoints = list(run.glob("checkpoints/step_*"))
        if "--budget" in args and not checkpoints:
            # It plans anew, and other steps.
            run.with_name(f"{run.name}.samples-0").unlink(missing_ok=True)
        if number == signal.SIGTERM and checkpoints:
            saved = progress(run)["step"]
            done = max((step for _, step, _ in samples(run, 0)), default=-1) + 1
            assert saved >= done, f"{run.name}: saved {saved}, trained {done}"
    finish(args)
    return hits


def samples(run: Path, rank: int) -> list:
    path = run.with_name(f"{run.name}.samples-{rank}")
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("]]")]


def check(whole: Path, parts: Path, processes: int, exact: bool) -> None:
    for rank in range(processes):
        once = {(e, s): ids for e, s, ids in samples(whole, rank)}
        for epoch, step, ids in samples(parts, rank):
            assert once[(epoch, step)] == ids, f"{parts.name}: other samples at step {step}"
        assert {(e, s) for e, s, _ in samples(parts, rank)} == set(once), f"{parts.name}: steps are missing"
    epochs: dict[int, list[int]] = {}
    for rank in range(processes):
        for (epoch, _), ids in {(e, s): ids for e, s, ids in samples(parts, rank)}.items():
            epochs.setdefault(epoch, []).extend(ids)
    assert all(len(ids) == len(set(ids)) for ids in epochs.values()), f"{parts.name}: a sample was seen twice"

    def rows(run: Path) -> list[dict[str, str]]:
        with open(run / "training_log.csv") as file:
            return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]

    if exact:
        assert rows(whole) == rows(parts), f"{parts.name}: another CSV"
        for file in ("model", "optimizer"):
            a, b = weights(whole, file=file), weights(parts, file=file)
            assert all(torch.equal(a[key], b[key]) for key in a), f"{parts.name}: other weights"
    else:
        assert [row["epoch"] for row in rows(whole)] == [row["epoch"] for row in rows(parts)]


def check_budgeted(script: str, budget: str, kills: int, rng: random.Random, work: Path) -> None:
    """A run that planned itself, killed again and again, against one that is given its plan and left alone."""
    parts, whole = work / f"{script}-planned", work / f"{script}-given"
    began = time.monotonic()
    hits = disturb(
        [*command(script, 1, work, parts.name), "--budget", budget], kills, signal.SIGKILL, rng, parts
    )
    finish(
        [
            sys.executable,
            str(work / "probe.py"),
            script,
            "--run_name",
            whole.name,
            "--config",
            str(parts / "config.yaml"),
        ]
    )
    check(whole, parts, 1, exact=True)
    print(
        f"{script} in {budget}: {hits} x SIGKILL, {progress(parts)['step']} steps, identical, {time.monotonic() - began:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs per strategy, one process")
    parser.add_argument("--terms", type=int, default=5, help="SIGTERMs per strategy, two processes")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--budget", help="of runs that plan themselves; then no others are tried")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    make_images(work / "images", train=120, val=12)
    (work / "probe.py").write_text(PROBE)
    if "train_finetune" in options.strategies:
        finish(command("train_standard", 1, work, "base"))
    for script in options.strategies:
        if options.budget:
            check_budgeted(script, options.budget, options.kills, rng, work)
            continue
        for processes, number, wanted in (
            (1, signal.SIGKILL, options.kills),
            (2, signal.SIGTERM, options.terms),
        ):
            began = time.monotonic()
            whole = work / f"{script}-whole{processes}"
            finish(command(script, processes, work, whole.name))
            hits = runs = 0
            while hits < wanted:  # a run is complete after some interruptions, then another one is disturbed
                runs += 1
                parts = work / f"{script}-parts{processes}-{runs}"
                hits += disturb(
                    command(script, processes, work, parts.name), wanted - hits, number, rng, parts
                )
                check(whole, parts, processes, exact=processes == 1)
            print(
                f"{script}, {processes} process(es): {hits} x {signal.Signals(number).name} in {runs} run(s), "
                f"{'identical' if processes == 1 else 'no step lost'}, {time.monotonic() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
