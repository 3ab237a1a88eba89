"""One training run: its accelerator, its folder, its records, and the signals that may end it early."""

import csv
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, broadcast_object_list

from common.config import TrainConfig, UserError, as_plain, differences
from common.run import checkpoint
from common.run.plots import write_plots
from common.scheduling import Plan

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal with everything saved; run the same command again
CSV_COLUMNS = [
    "epoch",
    "stage",
    "img_size",
    "batch_size",
    "lr",
    "momentum",
    "train_loss",
    "train_top1",
    "val_loss",
    "val_top1",
    "val_top5",
    "ema_top1",
    "images_per_s",
    "data_wait",
    "memory_mb",
    "epoch_s",
    "total_s",
    "images_seen",
    "skipped_steps",
]
REPEAT_S = 2.0  # a launcher forwards what its whole process group was sent: that is one signal, not two
LAUNCHER_GRACE_S = 25.0  # launchers kill what is still there 30 s after they passed a signal on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(Exception):
    """All processes have agreed to stop here."""


class Run:
    """What the engine needs besides model and data.

    Attributes:
        cfg: settings in force.
        accelerator: device, precision and processes.
        folder: `runs/<run_name>`.
        log: console, `training_log.txt` (main process) and `logs/rank<n>.log` (each process).
    """

    def __init__(self, cfg: TrainConfig, accelerator: Accelerator, folder: Path) -> None:
        self.cfg, self.accelerator, self.folder = cfg, accelerator, folder
        self.is_main = accelerator.is_main_process
        self.log = logging.getLogger("common")
        self.mirror: Any = None
        self._signal, self._signalled = 0, 0.0
        self._save_due = time.monotonic() + 60 * cfg.checkpoint_minutes
        self._cpu_group = (
            torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        )

    # --- stopping --------------------------------------------------------------------------------------------------

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal and now > self._signalled + REPEAT_S:
            os._exit(128 + number)  # a second signal means now
        if self._signal:
            return
        self._signal, self._signalled = number, now
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")

    def agreed(self, *wishes: bool) -> list[bool]:
        """For each wish, whether any process has it; a collective, on the CPU so that no GPU has to be waited for."""
        if self._cpu_group is None:
            return list(wishes)
        flags = torch.tensor(wishes, dtype=torch.uint8)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._cpu_group)
        return flags.bool().tolist()

    def agreed_minimum(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self._cpu_group is None:
            return value
        number = torch.tensor(value)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MIN, group=self._cpu_group)
        return int(number)

    def stop_if_asked(self) -> None:
        """Raise on all processes if any has been told to stop."""
        if self.agreed(self._signal != 0)[0]:
            raise Interrupted

    def step_done(self) -> bool:
        """Between two optimizer steps: raise if any process was told to stop; return whether to save now."""
        due = self.cfg.checkpoint_minutes > 0 and time.monotonic() > self._save_due
        stop, save = self.agreed(self._signal != 0, due and self.is_main)
        if stop:
            raise Interrupted
        return save

    def saved(self) -> None:
        self._save_due = time.monotonic() + 60 * self.cfg.checkpoint_minutes

    # --- records ---------------------------------------------------------------------------------------------------

    @property
    def csv_path(self) -> Path:
        return self.folder / "training_log.csv"

    def rows(self) -> list[dict[str, str]]:
        if not self.csv_path.exists():
            return []
        with open(self.csv_path, newline="") as file:
            return list(csv.DictReader(file))

    def keep_epochs(self, count: int) -> None:
        """Drop rows that are later than the checkpoint the run goes on from; they will be written again."""
        if self.is_main:
            rows = [row for row in self.rows() if int(row["epoch"] or 0) <= count][:count]
            temporary = self.csv_path.with_suffix(".tmp")
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, CSV_COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, self.csv_path)

    def record(self, row: dict[str, Any], step: int) -> None:
        """Append an epoch to the CSV, the plots and W&B."""
        if not self.is_main:
            return
        rounded = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        with open(self.csv_path, "a", newline="") as file:
            csv.DictWriter(file, CSV_COLUMNS).writerow(rounded)
        write_plots(self.folder)
        self.accelerator.log({**row, "optimizer_step": step})

    def write_schedule(self, plan: Plan) -> None:
        """The whole run's learning rate and momentum by step, which the plots draw before they are reached."""
        with open(self.folder / "schedule.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "epoch", "lr", "momentum"))
            for epoch in plan.epochs():
                for step in range(epoch.first_step, epoch.first_step + epoch.steps):
                    writer.writerow(
                        (step, epoch.index + 1, f"{plan.lr(step):.6g}", f"{plan.momentum(step):.6g}")
                    )

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        if self.is_main:
            checkpoint.write_durably(self.folder / name, json.dumps(content, indent=1).encode())

    def sync(self) -> None:
        """Hand what has changed to the S3 mirror, if there is one."""
        if self.mirror is not None:
            self.mirror.submit()

    def start_mirror(self) -> None:
        if self.is_main:
            from common.run.s3 import S3Mirror

            self.mirror = S3Mirror(self.folder, self.cfg.s3, self.cfg.s3_endpoint)

    def close_mirror(self, timeout_s: float = 300.0) -> None:
        """Wait for the uploads that are under way, within limits, and say what is and is not on S3."""
        if self.mirror is not None:
            self.log.info("%s", self.mirror.close(timeout_s))
            self.mirror = None

    def start_tracker(self, wandb_id: str) -> str:
        """Start or continue the W&B run; returns its id, which belongs into the checkpoint."""
        if self.cfg.wandb == "off" or not self.is_main:
            return wandb_id
        import wandb

        wandb_id = wandb_id or secrets.token_hex(4)
        online = self.cfg.wandb == "auto" and bool(wandb.api.api_key)
        self.accelerator.init_trackers(
            self.cfg.wandb_project,
            config=as_plain(self.cfg),
            init_kwargs={
                "wandb": {
                    "id": wandb_id,
                    "name": self.cfg.run_name,
                    "resume": "allow",
                    "mode": "online" if online else "offline",
                    "dir": str(self.folder),
                    "settings": wandb.Settings(silent=True),  # the run's last lines are its own
                }
            },
        )
        tracker = self.accelerator.get_tracker("wandb", unwrap=True)
        tracker.define_metric("optimizer_step")
        tracker.define_metric("*", step_metric="optimizer_step")  # W&B's own step may not go back on resume
        if not online:
            self.log.info("W&B is offline; `wandb sync %s` uploads the run later", self.folder / "wandb")
        return wandb_id


@contextmanager
def start_run(cfg: TrainConfig) -> Iterator[Run]:
    """Set up a run and, whatever happens, take it down: records closed, mirror drained, signals restored.

    Ends the program with `EXIT_INTERRUPTED` after a signal.
    """
    accelerator = _make_accelerator(cfg)
    folder = _claim_folder(cfg, accelerator)
    run = Run(cfg, accelerator, folder)
    checkpoint.seed_everything(cfg.seed)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = cfg.tf32
        torch.backends.cudnn.benchmark = True
    handlers = _open_logs(run)
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, run.on_signal) for number in SIGNALS}
    try:
        if cfg.s3:
            with main_process_problems(accelerator):
                run.start_mirror()
        yield run
    except Interrupted:
        run.log.info(
            "stopped by a signal; the same command with --run_name %s goes on from here", cfg.run_name
        )
        for number in previous:
            signal.signal(
                number, signal.SIG_IGN
            )  # the first process to leave makes a launcher signal the others
        run.close_mirror(LAUNCHER_GRACE_S)
        accelerator.wait_for_everyone()  # the main process may still be uploading
        raise SystemExit(EXIT_INTERRUPTED) from None
    except UserError as error:
        run.log.error("error: %s", error)
        if not run.is_main:  # whose console is silent otherwise
            print(f"error in process {accelerator.process_index}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        run.close_mirror()
        accelerator.end_training()
        for number, handler in previous.items():
            signal.signal(number, handler)
        for handler in handlers:
            run.log.removeHandler(handler)
            handler.close()
        run.log.setLevel(logging.NOTSET)
        run.log.propagate = True


def _make_accelerator(cfg: TrainConfig) -> Accelerator:
    """Raises UserError where the launcher and Accelerate disagree, which would train N models side by side."""
    cpu = not torch.cuda.is_available()
    wanted = cfg.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    cfg.mixed_precision = wanted  # for the records, and for a resume under another launcher
    if cpu and wanted == "fp16":
        raise UserError("--mixed_precision fp16 needs a GPU; use bf16 or no on a CPU")
    hooks = {"fp16": DDPCommunicationHookType.FP16, "bf16": DDPCommunicationHookType.BF16}
    ddp = DistributedDataParallelKwargs(
        comm_hook=hooks.get(cfg.grad_compression, DDPCommunicationHookType.NO)
    )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=wanted,
        log_with=None if cfg.wandb == "off" else "wandb",
        kwargs_handlers=[ddp],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched but Accelerate sees {accelerator.num_processes}; "
            "use distributed_type: MULTI_GPU in the --config_file, also on CPUs"
        )
    return accelerator


@contextmanager
def main_process_problems(accelerator: Accelerator) -> Iterator[None]:
    """What only the main process does, and all depend on: after its UserError the others end too, without a word."""
    problem = [""]
    try:
        yield
    except UserError as error:
        problem = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0]) if accelerator.is_main_process else SystemExit(2)


def _claim_folder(cfg: TrainConfig, accelerator: Accelerator) -> Path:
    """The run's folder, the same on all processes; refuses one that holds another run."""
    named = bool(cfg.run_name)
    if cfg.resume not in ("auto", "none"):
        if named:
            raise UserError("--resume PATH goes on in that run's own folder; leave out --run_name")
        path = Path(cfg.resume)
        if cfg.resume.startswith("s3://"):
            path = Path(cfg.output) / cfg.resume.rstrip("/").rsplit("/", 1)[-1]
        elif path.parent.name == "checkpoints":
            path = path.parent.parent
        cfg.output, cfg.run_name = str(path.parent), path.resolve().name
    elif not named:
        name = [f"{cfg.strategy}-{datetime.now():%Y%m%d-%H%M%S}"]
        if accelerator.num_processes > 1:
            broadcast_object_list(name)
        cfg.run_name = name[0]
    folder = Path(cfg.output) / cfg.run_name
    with main_process_problems(accelerator):
        if accelerator.is_main_process:
            if cfg.resume.startswith("s3://") or (cfg.resume == "auto" and cfg.s3 and named):
                _fetch(cfg, folder)
            elif cfg.resume not in ("auto", "none") and not Path(cfg.resume).is_dir():
                raise UserError(f"--resume {cfg.resume} is not a run folder or a checkpoint")
            _prepare(folder, cfg)
    return folder


def _fetch(cfg: TrainConfig, folder: Path) -> None:
    """Restore a run that this machine does not have: the one that was asked for, or one that a lost machine left on S3."""
    from common.run.s3 import NothingStored, restore

    if (folder / "config.yaml").exists():
        return
    if cfg.resume != "auto":
        restore(cfg.resume, folder, cfg.s3_endpoint)
        return
    try:
        restore(f"{cfg.s3.rstrip('/')}/{cfg.run_name}", folder, cfg.s3_endpoint, flag="--s3")
    except NothingStored:
        pass
    except UserError as error:
        raise UserError(
            f"{error}; to start anew without asking S3 for this run, pass --resume none"
        ) from error


def _prepare(folder: Path, cfg: TrainConfig) -> None:
    """Write the resolved config. Raises UserError if a run cannot live in this folder."""
    config_file = folder / "config.yaml"
    if config_file.exists():
        if cfg.resume == "none":
            raise UserError(
                f"{folder} already holds a run; choose another --run_name, or --resume auto to go on with it"
            )
        changed = differences(as_plain(cfg), yaml.safe_load(config_file.read_text()))
        if changed:
            raise UserError(
                f"{folder} holds a run with other settings: {', '.join(changed)}; choose another --run_name"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not a run; choose another --run_name or --output")
    try:
        for name in ("logs", "plots", "checkpoints"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        config_file.write_text(yaml.safe_dump(as_plain(cfg), sort_keys=False))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error


def _open_logs(run: Run) -> list[logging.Handler]:
    (run.folder / "logs").mkdir(parents=True, exist_ok=True)  # another machine's disk
    handlers: list[logging.Handler] = [
        logging.FileHandler(run.folder / "logs" / f"rank{run.accelerator.process_index}.log")
    ]
    if run.is_main:
        handlers += [logging.FileHandler(run.folder / "training_log.txt"), _Console(sys.stdout)]
    for handler in handlers:
        plain = isinstance(handler, _Console)
        handler.setFormatter(logging.Formatter("%(message)s" if plain else "%(asctime)s %(message)s"))
        run.log.addHandler(handler)
    run.log.setLevel(logging.INFO)
    run.log.propagate = False
    return handlers


class _Console(logging.StreamHandler):
    """Writes above tqdm's bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=self.stream)
        self.flush()
