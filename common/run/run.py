"""One training run from its first line to its last: its processes, its folder, its records, and what may end it early."""

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from common import UserError
from common.config import TrainConfig
from common.run.checkpoint import Progress
from common.run.energy import EnergyMeter
from common.run.folder import claim_folder, create_folder
from common.run.processes import (
    Interrupted,
    Signals,
    Votes,
    make_accelerator,
    program_age_s,
    rank0_errors,
    start_processes,
)
from common.run.records import Background, Records, start_trackers

# EX_TEMPFAIL: stopped by a signal with everything saved; run the same command again.
EXIT_INTERRUPTED = 75
# Launchers kill what is still there 30 s after they passed a signal on.
LAUNCHER_GRACE_S = 25.0
# What a process reads when another one has gone.
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
# Seconds between two looks at signals, at the device and at the clock.
LOOK_S = 1.0
MOST_STEPS_UNSEEN = 50


class Run:
    """What the engine needs besides model and data.

    Attributes:
        cfg: settings in force.
        accelerator: device, precision and processes.
        folder: `runs/<run_name>`; written to only after `begin`.
        stages: the curriculum in force; a resumed run brings it along, a new one settles it before the first step.
        checkpoint: on the main process, the files of the checkpoint that is resumed, or None.
        started: when the program was started, on the monotonic clock.
        next_look: the step after which all processes look up together; the same on each.
        log: console, `training_log.txt` (main process) and `logs/rank<n>.log` (each process).
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg
        self.started = time.monotonic() - program_age_s()
        self.log = logging.getLogger("common")
        state = start_processes()
        self.is_main = state.is_main_process
        self._handlers: list[logging.Handler] = []
        self.stages, self.checkpoint, self._names = claim_folder(cfg, state)
        self.folder = Path(cfg.output) / cfg.run_name
        self.accelerator, note = make_accelerator(cfg)
        self._log_to(_Console(sys.stdout) if self.is_main else logging.NullHandler(), "%(message)s")
        # What is said before the folder may be written to.
        self._early = MemoryHandler(1000, flushLevel=logging.CRITICAL)
        self._log_to(self._early, "%(message)s")
        if note:
            self.log.info("%s", note)
        # What models may draw from; data and augmentation have their own, stateless numbers.
        set_seed(cfg.seed)
        self.votes = Votes(state.num_processes)
        self.signals = Signals()
        self.energy = EnergyMeter(gpus=self.accelerator.device.type == "cuda")
        self.background = Background()
        self.records = Records(self.folder)
        self.mirror: Any = None
        self._lock: int | None = None
        self._save_due = time.monotonic() + 60 * cfg.checkpoint_minutes
        self.next_look, self._looked_at = 0, (0, time.monotonic())

    # --- its folder ------------------------------------------------------------------------------------------------

    def begin(self, progress: Progress) -> None:
        """Write to the disk from now on, all checks being passed; `progress` gets the W&B run's id. A collective."""
        # The steps of a resumed run were another process's: they tell nothing about the pace of this one.
        self._looked_at = (progress.step, time.monotonic())
        with rank0_errors():
            if self.is_main:
                if self.cfg.s3:
                    from common.run.s3 import S3Mirror

                    # It may refuse, which leaves nothing behind.
                    self.mirror = S3Mirror(self.folder, self.cfg.s3)
                self._lock = create_folder(self.folder, self.cfg, self.stages, self._names)
                self.records.keep_epochs(progress.epochs_done)
                self._log_to_file(self.folder / "training_log.txt")
                start_trackers(self.cfg, self.accelerator, self.folder, progress)
        # The folder may be another machine's disk.
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self._log_to_file(self.folder / "logs" / f"rank{self.accelerator.process_index}.log")
        self._early.buffer.clear()

    def _log_to_file(self, path: Path) -> None:
        handler = logging.FileHandler(path)
        self._log_to(handler, "%(asctime)s %(message)s")
        for record in self._early.buffer:
            handler.handle(record)

    def _log_to(self, handler: logging.Handler, form: str) -> None:
        handler.setFormatter(logging.Formatter(form))
        self.log.addHandler(handler)
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self._handlers.append(handler)

    def sync(self) -> None:
        """Hand what has changed to the S3 mirror, if there is one, once it is written."""
        if self.mirror is not None:
            self.background.submit(self.mirror.submit)

    # --- looking up now and then -----------------------------------------------------------------------------------

    def look(self, step: int, problem: int) -> tuple[bool, int]:
        """Agree on what to do after a step, about once a second; a collective.

        Returns whether a checkpoint is due, and the largest `problem` of all processes, a number that is bad news.
        Raises Interrupted if a process has been told to stop.
        """
        now = time.monotonic()
        steps, seconds = step - self._looked_at[0], now - self._looked_at[1]
        # Steps of a second, as the last ones went; at LOOK_S = 0, after every step.
        pace = int(LOOK_S * steps / max(seconds, 1e-9))
        save = self.is_main and self.cfg.checkpoint_minutes > 0 and now > self._save_due
        stop, save, problem, fewest = self.votes.largest(
            self.signals.number, int(save), problem, -min(max(pace, 1), MOST_STEPS_UNSEEN)
        )
        self._looked_at, self.next_look = (step, now), step - fewest
        if stop:
            raise Interrupted
        return bool(save), problem

    def stop_if_asked(self) -> None:
        """Raise on all processes if any has been told to stop; a collective."""
        if self.votes.largest(self.signals.number)[0]:
            raise Interrupted

    def saved(self) -> None:
        self._save_due = time.monotonic() + 60 * self.cfg.checkpoint_minutes

    # --- its end ---------------------------------------------------------------------------------------------------

    def end(self, error: BaseException | None) -> int | None:
        """Say how it ended and take everything down; returns the exit code, or None for an unforeseen error."""
        code = None if error is not None else 0
        several = self.accelerator.num_processes > 1
        if isinstance(error, Interrupted):
            code = EXIT_INTERRUPTED
            self.log.info(
                "stopped by a signal; the same command with --run_name %s goes on from here",
                self.cfg.run_name,
            )
        elif isinstance(error, UserError):
            code = 2
            self.log.error("error: %s", error)
            # Whose console is silent otherwise.
            if not self.is_main:
                print(f"error in process {self.accelerator.process_index}: {error}", file=sys.stderr)
        elif isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        elif several and any(sign in str(error) for sign in PEER_GONE):
            # What follows from the error of another one is a line, not a traceback.
            print(f"process {self.accelerator.process_index} ends because another one did", file=sys.stderr)
        elif several and error is not None:
            traceback.print_exception(error)
        failed = error is not None and not isinstance(error, Interrupted)
        self._close(failed)
        if failed and several:
            # At once and without a collective, since the others may wait for this process for ever; the launcher sees
            # it go and ends them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1 if code is None else code)
        return code

    def _close(self, failed: bool) -> None:
        """Finish records, trackers and uploads; after a failure without waiting for another process."""
        self.background.close()
        self.signals.ignore()
        if self.mirror is not None:
            self.mirror.close(LAUNCHER_GRACE_S if self.signals.number else 300.0)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if not failed and self.accelerator.num_processes > 1:
            # The main process may still have been uploading. Not `wait_for_everyone`, which names the local rank: no device
            # where a scheduler shows each process one GPU.
            self.votes.largest(0)
            torch.distributed.destroy_process_group()
        self.signals.restore()
        if self._lock is not None:
            os.close(self._lock)
        for handler in self._handlers:
            self.log.removeHandler(handler)
            handler.close()
        self.log.setLevel(logging.NOTSET)
        self.log.propagate = True


@contextmanager
def start_run(cfg: TrainConfig) -> Iterator[Run]:
    """Set up a run and, whatever happens, take it down: records closed, mirror drained, signals restored.

    Ends the program with `EXIT_INTERRUPTED` after a signal, and with 2 after a UserError.
    """
    run = Run(cfg)
    try:
        yield run
        run.background.drain()
    except Interrupted:
        # What cannot be written is said, wherever the signal came.
        run.background.drain()
        raise
    finally:
        code = run.end(sys.exc_info()[1])
        if code:
            raise SystemExit(code) from None


class _Console(logging.StreamHandler):
    """Writes above tqdm's bar instead of through it; what ends the run goes to stderr, where it is looked for."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        self.flush()
        tqdm.write(self.format(record), file=sys.stderr if record.levelno >= logging.ERROR else self.stream)
        self.flush()
