"""Which folder a run lives in, and what a run that is there already brings along."""

import errno
import fcntl
import os
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from common import UserError
from common.config import TrainConfig, adopt, differences, read_stages, repeatable
from common.run import checkpoint
from common.run.processes import rank0_errors
from common.scheduling import Stage


def claim_folder(
    cfg: TrainConfig, state: PartialState
) -> tuple[list[Stage], dict[str, Any] | None, list[str]]:
    """Settle `cfg.output` and `cfg.run_name`, the same on all processes, and take over a recorded run's settings.

    Nothing is written, but for a run that is fetched from S3. What is resumed, in this order:

    1. `--resume none`: nothing.
    2. `--resume PATH` of one checkpoint: that one.
    3. the newest undamaged one of the run's folder, also after `--resume PATH` or `s3://...` of a whole run.

    Returns:
        The stages of the run that is resumed, [] for a new one, and on the main process its checkpoint's files, and the names
        of all that were there.

    Raises:
        UserError: the folder holds something else, or a run with other settings.
    """
    files: dict[str, Any] | None = None
    names: list[str] = []
    place: list[Any] = [None]
    with rank0_errors():
        if state.is_main_process:
            output, name, asked = _place(cfg)
            _fetch(cfg, output / name)
            names = checkpoint.names(output / name / "checkpoints")
            files = _find(cfg, output / name, asked)
            recorded = files[checkpoint.STATE]["config"] if files else None
            if recorded:
                _must_match(cfg, recorded, output / name)
            place = [(str(output), name, recorded)]
    if state.num_processes > 1:
        broadcast_object_list(place)
    cfg.output, cfg.run_name, recorded = place[0]
    if recorded is None:
        return [], None, names
    adopt(cfg, recorded)
    return read_stages(recorded["stages_in_force"]), files, names


def _place(cfg: TrainConfig) -> tuple[Path, str, Path | None]:
    """Folder of the runs, name of this run, and the path that `--resume` asks for, if it is one."""
    if cfg.run_name == ".." or Path(cfg.run_name).name != cfg.run_name:
        raise UserError(
            f"--run_name {cfg.run_name} is a path; --output takes the folders, --run_name the name"
        )
    if cfg.resume in ("auto", "none"):
        name = cfg.run_name or f"{cfg.strategy}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        return Path(cfg.output), name, None
    if cfg.run_name:
        raise UserError("--resume PATH goes on in that run's own folder; leave out --run_name")
    if cfg.resume.startswith("s3://"):
        return Path(cfg.output), cfg.resume.rstrip("/").rsplit("/", 1)[-1], None
    path = Path(cfg.resume).resolve()
    if not path.is_dir():
        raise UserError(f"--resume {cfg.resume} is not a run folder or a checkpoint")
    is_checkpoint = path.parent.name == "checkpoints" and not (path / "checkpoints").is_dir()
    folder = path.parent.parent if is_checkpoint else path
    return folder.parent, folder.name, path


def _fetch(cfg: TrainConfig, folder: Path) -> None:
    """Restore a run that this machine does not have: the one that was asked for, or one that a lost machine left on S3."""
    by_address = cfg.resume.startswith("s3://")
    if not by_address and (folder.exists() or not (cfg.resume == "auto" and cfg.s3 and cfg.run_name)):
        return
    from common.run.s3 import NothingStored, restore

    if by_address:
        restore(cfg.resume, folder)
        return
    try:
        restore(f"{cfg.s3.rstrip('/')}/{cfg.run_name}", folder, flag="--s3")
    except NothingStored:
        pass
    except UserError as error:
        raise UserError(
            f"{error}; to start anew without asking S3 for this run, pass --resume none"
        ) from error


def _find(cfg: TrainConfig, folder: Path, asked: Path | None) -> dict[str, Any] | None:
    """Read the checkpoint to go on from; None where the folder holds no trained step."""
    if asked is not None and asked != folder:
        return checkpoint.read(asked)
    files, damaged = checkpoint.newest_whole(folder / "checkpoints")
    if asked is not None and files is None and not damaged:
        raise UserError(f"--resume {cfg.resume} holds no checkpoint to go on from")
    for sentence in damaged:
        print(f"damaged checkpoint passed over: {sentence}", flush=True)
    if damaged and files is None:
        raise UserError(
            f"no whole checkpoint is left in {folder / 'checkpoints'}; start anew with another --run_name"
        )
    if files is None and folder.exists() and any(folder.iterdir()) and not (folder / "config.yaml").exists():
        raise UserError(f"{folder} exists and is not a run; choose another --run_name or --output")
    if files is None and (folder / "summary.json").exists():
        raise UserError(
            f"{folder} holds a finished run whose checkpoints are gone; choose another --run_name"
        )
    return files


def _must_match(cfg: TrainConfig, recorded: dict[str, Any], folder: Path) -> None:
    if cfg.resume == "none":
        raise UserError(
            f"{folder} already holds a run; choose another --run_name, or --resume auto to go on with it"
        )
    if recorded["strategy"] != cfg.strategy:
        raise UserError(
            f"{folder} holds a run of train_{recorded['strategy']}.py; go on with that script, or choose another --run_name"
        )
    if changed := differences(cfg, recorded):
        raise UserError(
            f"{folder} holds a run with other settings: {', '.join(changed)}; leave them out to go on with it, take "
            f"--config {folder}/config.yaml and another --run_name to start anew, or --weights {folder} to train on from its weights"
        )


def create_folder(folder: Path, cfg: TrainConfig, stages: list[Stage], names: list[str]) -> int:
    """Make the run's folder and write the settings and stages in force, as `--config` reads them.

    Returns the open file that keeps other programs out of the folder, until it is closed or this process has gone.
    UserError: another program trains this run, or has since `claim_folder` saw checkpoints of these names, as when a job was
    queued again too early; or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        if checkpoint.names(folder / "checkpoints") != names:
            os.close(lock)
            raise UserError(
                f"another program has trained in {folder} since this one looked; start it again to go on from there"
            )
        text = yaml.safe_dump(repeatable(cfg, stages), sort_keys=False)
        checkpoint.write_durably(folder / "config.yaml", text.encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    return lock


def _lock(folder: Path) -> int:
    """Lock the folder against other processes; where the file system has no locks there is none.

    POSIX' lock, which a forked child does not inherit: a loader's worker that outlives a killed run does not hold it.
    """
    file = os.open(folder / f"lock{checkpoint.TEMPORARY}", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(file)
        raise UserError(
            f"another program is training in {folder}; let it end, or choose another --run_name"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
    return file
