"""What a run writes down while it goes on: CSV, schedule, summary, plots, trackers; plots and checkpoints in a thread of their own."""

import csv
import io
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from common.config import TrainConfig, as_plain
from common.run import checkpoint
from common.run.checkpoint import Progress
from common.scheduling import Plan, Rates

log = logging.getLogger(__name__)
# Until a server that does not answer counts as out of reach.
WANDB_TIMEOUT_S = 30.0


class Background:
    """One thread for what training need not wait for; work is done in the order in which it was given."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._work: list[Future[None]] = []

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        self._work.append(self._pool.submit(work, *args))

    def drain(self) -> None:
        """Wait for all that was given; raises what the first failing work raised."""
        work, self._work = self._work, []
        for future in work:
            future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True)


def draw(plot: Callable[[Path], None], folder: Path) -> None:
    """Draw, or say why not: no night's training ends for a plot."""
    try:
        plot(folder)
    except (OSError, ValueError, RuntimeError) as error:
        log.warning("no plots this time: %s", error)


class Records:
    """The files of a run that people and tools read; only the main process writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.csv_path = folder / "training_log.csv"

    def rows(self) -> list[dict[str, str]]:
        if not self.csv_path.exists():
            return []
        with open(self.csv_path, newline="") as file:
            return list(csv.DictReader(file))

    def keep_epochs(self, count: int) -> None:
        """Drop rows that are later than the checkpoint the run goes on from; they will be written again."""
        self._write_log(self.rows()[:count])

    def add(self, row: dict[str, Any]) -> None:
        """Add an epoch to the CSV."""
        rounded = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        self._write_log([*self.rows(), rounded])

    def _write_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the whole CSV: rows that an older version wrote may have fewer columns than the new one's."""
        if not rows:
            self.csv_path.unlink(missing_ok=True)
            return
        names = list(dict.fromkeys(name for row in rows for name in row))
        write_rows(
            self.folder / self.csv_path.name, names, ([row.get(name, "") for name in names] for row in rows)
        )

    def write_classes(self, names: Sequence[str], images: Sequence[int], hits: Sequence[int]) -> None:
        """`per_class.csv`: the best weights' validation accuracy in percent, class by class."""
        shares = (f"{100 * h / n:.6g}" if n else "" for n, h in zip(images, hits, strict=True))
        rows = zip(names, images, hits, shares, strict=True)
        write_rows(self.folder / "per_class.csv", ("class", "images", "hits", "top1"), rows)

    def write_schedule(self, plan: Plan, rates: Rates) -> None:
        """The whole run's learning rate and momentum by step, which the plots draw before they are reached."""
        rows = (
            (step, epoch.index + 1, f"{rates.lr(step):.6g}", f"{rates.momentum(step):.6g}")
            for epoch in plan.epochs()
            for step in range(epoch.first_step, epoch.first_step + epoch.steps)
        )
        write_rows(self.folder / "schedule.csv", ("step", "epoch", "lr", "momentum"), rows)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        checkpoint.write_durably(self.folder / name, json.dumps(content, indent=1).encode())


def write_rows(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([head, *rows])
    checkpoint.write_durably(path, text.getvalue().encode())


def wandb_mode() -> str:
    """What WANDB_MODE says, or online where a login is found, offline elsewhere; starts no run and asks nobody."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    # The run's lines are its own.
    wandb.setup(wandb.Settings(silent=True))
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def start_trackers(cfg: TrainConfig, accelerator: Accelerator, folder: Path, progress: Progress) -> None:
    """Start or continue what --trackers names, on the main process; `progress` is to keep the W&B run's id."""
    # TensorBoard's parameters are numbers and texts alone.
    scalar = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in as_plain(cfg).items()}
    settings: dict[str, dict[str, Any]] = {
        # What was recorded after the checkpoint is recorded again.
        "tensorboard": {"purge_step": progress.step + 1},
        "trackio": {"name": cfg.run_name, "resume": "allow"},
    }

    def start() -> None:
        project = os.environ.get("WANDB_PROJECT", "image-classification")
        accelerator.init_trackers(project, config=scalar, init_kwargs=settings)

    if "wandb" not in cfg.trackers:
        start()
        return
    import wandb

    progress.wandb_id = progress.wandb_id or secrets.token_hex(4)
    settings["wandb"] = {
        "id": progress.wandb_id,
        "name": cfg.run_name,
        "resume": "allow",
        "mode": wandb_mode(),
        "dir": str(folder),
        # The run's last lines are its own.
        "settings": wandb.Settings(silent=True, init_timeout=WANDB_TIMEOUT_S),
    }
    try:
        start()
    except wandb.errors.Error as error:
        log.warning("W&B cannot be reached (%s); the run is kept offline", error)
        settings["wandb"]["mode"] = "offline"
        # Accelerate holds on to the tracker that did not start, and W&B's service to its id.
        accelerator.trackers.clear()
        wandb.teardown()
        start()
    if accelerator.get_tracker("wandb", unwrap=True).offline:
        log.info("W&B is offline; `wandb sync %s` uploads the run later", folder / "wandb")


def upload_model(accelerator: Accelerator, folder: Path) -> None:
    """Keep `model/` as an artifact of the W&B run, if that is online."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and not tracker.run.offline:
            tracker.run.log_model(folder / "model")
