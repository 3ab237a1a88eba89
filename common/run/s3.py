"""A run's folder on S3: mirrored in the background while it trains, restored on a fresh machine.

The remote layout is the local one, file for file, under `s3://bucket/prefix/<run>/`. Only temporary files
(`*.tmp`), symbolic links and unfinished checkpoints stay behind.

S3 replaces an object as a whole but knows no transactions, so the order of writing keeps a run restorable
wherever the machine dies: first the plain files (a CSV is never older than the checkpoint it belongs to),
then each checkpoint, its manifest last, and only then are checkpoints deleted that the folder no longer has,
manifest first. What a restored checkpoint holds is compared with its manifest when it is read.

A request that timed out may yet be carried out, after those that followed it. That does no harm to a
checkpoint, whose files no process changes; what has not the size that was sent is sent again by the next pass.

What the mirror asks of the modules that write into the folder: a plain file is either replaced by a rename
(from a `*.tmp` name) or appended to in whole lines; `checkpoint.prune` keeps what is in `uploading`.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

from common import UserError
from common.run.checkpoint import MANIFEST, TEMPORARY

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S, READ_TIMEOUT_S, RETRY_S = 10.0, 30.0, 5.0
# In vain and one after the other, about a minute of them: then training's end waits no longer.
CLOSING_TRIES = 12
RESTORE_ATTEMPTS = 6
# Its threads would hold up the interpreter's exit while S3 is away.
UP = TransferConfig(use_threads=False, preferred_transfer_client="classic")
DOWN = TransferConfig(preferred_transfer_client="classic")
# A file that every run has from its first second; it tells a run's address from any other.
MARKER = "config.yaml"
BOTO_ERRORS = (BotoCoreError, ClientError, Boto3Error)

# What stat tells of a file's content: size, modification time, inode.
Version = tuple[int, int, int]


class NothingStored(UserError):
    """S3 answers, and there is no run at the address."""


class S3Mirror:
    """Copies what changes in `run_dir` to `<url>/<name of run_dir>` from one daemon thread.

    There is no queue to overflow: the thread compares the folder with what it has sent, so ten changes of a
    file during an outage cost one upload. What is sent together, a plain file or a checkpoint, is a unit.

    Attributes:
        uploading: the checkpoint that must stay in the folder, else slow uploads might never get to an end.

    Raises UserError if the address, the bucket or the credentials are wrong, or if the address holds a later
    checkpoint than `run_dir` when training begins. A server out of reach is a warning: it is retried for ever.
    """

    def __init__(self, run_dir: Path, url: str) -> None:
        self.run_dir = run_dir
        self._bucket, prefix = _parse_url(url, "--s3")
        self._prefix = f"{prefix}/{run_dir.name}/".lstrip("/")
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        # One attempt: retries are ours, for close() to hurry.
        self._client = _client("--s3", attempts=1)
        # What this run goes on from, until that is compared with what S3 has.
        self._begins_at: str | None = max(_whole_here(run_dir), default="")
        self._changed, self._deadline = threading.Event(), math.inf
        self._sent: dict[str, Version] = {}
        self._uploads = 0
        # Units that the last pass did not get to S3, and why.
        self._failed: dict[str, str] = {}
        self.uploading: set[str] = set()
        if trouble := probe(url):
            self._failed = {MARKER: trouble}
            log.warning("S3: %s is out of reach (%s); training goes on", self.url, trouble)
        else:
            # Should it be so a moment later, the passes will list again.
            with contextlib.suppress(*BOTO_ERRORS):
                self._list()
        self._thread = threading.Thread(target=self._work, name="s3-mirror", daemon=True)
        self._thread.start()

    def submit(self) -> None:
        """Say that the folder has changed; returns at once, whatever the network does."""
        self._changed.set()

    def close(self, timeout_s: float = 300) -> dict[str, str]:
        """Upload what is left, for at most `timeout_s` seconds or `CLOSING_TRIES`; log and return what is not on S3, and why."""
        log.info("S3: uploading what is left to %s, for at most %.0f s", self.url, timeout_s)
        self._deadline = time.monotonic() + timeout_s
        self._changed.set()
        self._thread.join(timeout_s)
        pending = {}
        if self._failed or self._thread.is_alive():
            pending = {name: self._failed.get(name, "not reached in time") for name in self._lacking()}
        if pending:
            rest = ", ".join(f"{name} ({why})" for name, why in pending.items())
            log.warning("S3: %d NOT uploaded to %s, only on this machine: %s", len(pending), self.url, rest)
        else:
            log.info("S3: all is at %s, after %d uploads; nothing is left to upload", self.url, self._uploads)
        return pending

    # --- the folder ------------------------------------------------------------------------------------------------

    def _units(self) -> dict[str, dict[str, Version]]:
        """The files of each unit as they are now, in the order of sending: plain files, then checkpoints by age.

        So one that was begun is finished first, else many short outages might let none get to its end. Without
        symbolic links, as they may point to what is not the run's.
        """
        # Looked for before plain files are, so that no checkpoint is newer than its row in the CSV.
        whole = _whole_here(self.run_dir)
        units: dict[str, dict[str, Version]] = {}
        for folder, _, names in os.walk(self.run_dir):
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.run_dir).as_posix()
                unit = _unit(name)
                unfinished = name.startswith("checkpoints/") and unit not in whole
                if f"{TEMPORARY}/" in f"{name}/" or unfinished:
                    continue
                # Deleted meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        version = (status.st_size, status.st_mtime_ns, status.st_ino)
                        units.setdefault(unit, {})[name] = version
        return {unit: units[unit] for unit in sorted(units.keys() - whole) + sorted(units.keys() & whole)}

    def _lacking(self) -> list[str]:
        """Units that S3 does not have as they are."""
        return [unit for unit, files in self._units().items() if not files.items() <= self._sent.items()]

    # --- S3 --------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        idle, pause = 0, None
        while time.monotonic() < self._deadline:
            self._changed.wait(pause)
            self._changed.clear()
            closing, before = self._deadline < math.inf, self._uploads
            self._try()
            idle = idle + 1 if closing and self._uploads == before else 0
            # A last pass sees that what the one before sent is there.
            if idle == CLOSING_TRIES or (idle and not self._failed):
                return
            pause = RETRY_S if self._failed else 0.0 if closing else None

    def _try(self) -> None:
        """One pass, and a word in the log when trouble begins, changes or ends."""
        before = set(self._failed.values())
        try:
            self._failed = self._sync()
        # UserError: S3 answers, but refuses us; OSError: our disk is in trouble.
        except (*BOTO_ERRORS, UserError, OSError) as error:
            self._failed = dict.fromkeys(self._lacking() or [self.url], _reason(error))
        for name, why in self._failed.items():
            if why not in before:
                log.warning("S3: %s: %s; training goes on, uploads are retried", name, why)
                before.add(why)
        if before and not self._failed:
            log.info("S3: uploads work again")

    def _sync(self) -> dict[str, str]:
        """Send what S3 lacks, in the order the module promises; returns what cannot be read or is refused alone, and why.

        Raises an error of boto3's where it is pointless to go on with the next unit.
        """
        stored, units = self._list(), self._units()
        self._sent = {name: version for name, version in self._sent.items() if stored.get(name) == version[0]}
        failed = {}
        for unit, files in units.items():
            try:
                self._send(unit, files, stored)
            # Deleted since the scan.
            except FileNotFoundError:
                continue
            except (*BOTO_ERRORS, OSError) as error:
                if _is_transient(error):
                    raise
                failed[unit] = _reason(error)
        self.uploading = set()
        newest = max((unit for unit in units if unit.startswith("checkpoints/")), default=None)
        if newest and units[newest].items() <= self._sent.items():
            # What the folder no longer has, and what a dead machine left half sent.
            old = [name for name in stored if name.startswith("checkpoints/") and _unit(name) not in units]
            for name in sorted(old, key=_is_manifest, reverse=True):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
        return failed

    def _list(self) -> dict[str, int]:
        stored = _list(self._client, self._bucket, self._prefix)
        newest = max(_whole(stored), default="")
        if self._begins_at is not None and newest > self._begins_at:
            # To go on would delete it: this machine's checkpoints are the run's.
            raise UserError(
                f"--s3 {self.url} holds {newest}, later than what {self.run_dir} has: move that folder away and pass"
                f" --resume {self.url} to go on from there, or another --run_name"
            )
        self._begins_at = None
        return stored

    def _send(self, unit: str, files: dict[str, Version], stored: dict[str, int]) -> None:
        """Upload what of a unit is new, the manifest last."""
        manifest = f"{unit}/{MANIFEST}"
        if manifest in files:
            self.uploading = {Path(unit).name}
        if manifest in stored and self._sent.get(manifest) != files.get(manifest):
            key = {"Bucket": self._bucket, "Key": self._prefix + manifest}
            if self._client.get_object(**key)["Body"].read() == (self.run_dir / manifest).read_bytes():
                # An earlier process has sent it.
                self._sent |= {
                    name: version for name, version in files.items() if stored.get(name) == version[0]
                }
            else:
                # That of another course, which `--resume` of an older checkpoint has left.
                self._client.delete_object(**key)
        lacking = [name for name, version in files.items() if self._sent.get(name) != version]
        for name in sorted(lacking, key=_is_manifest):
            # Opened once, so that a file that is replaced meanwhile goes up as it was.
            with open(self.run_dir / name, "rb") as file:
                self._client.upload_fileobj(file, self._bucket, self._prefix + name, Config=UP)
            self._sent[name] = files[name]
            self._uploads += 1


def probe(url: str) -> str:
    """List what is at `url`, write an empty object there and delete it; returns "", or why S3 is out of reach.

    Raises:
        UserError: the address, the bucket or the credentials are wrong, or lack a right.
    """
    bucket, prefix = _parse_url(url, "--s3")
    client = _client("--s3", attempts=1)
    key = {"Bucket": bucket, "Key": f"{prefix}/.probe".lstrip("/")}
    try:
        client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        client.put_object(**key, Body=b"")
        client.delete_object(**key)
    except BOTO_ERRORS as error:
        if not _is_transient(error):
            raise _refusal(f"--s3 {url}", error) from None
        return _reason(error)
    return ""


def restore(url: str, run_dir: Path, flag: str = "--resume") -> Path:
    """Download the run at `url` into `run_dir`; it gets its name when everything is there. One that is as far already stays.

    Left out are checkpoints without their manifest, and keys that would leave the folder, which are not ours.

    Raises NothingStored, or another UserError: refused, out of reach, a full disk, or an earlier state in `run_dir`.
    """
    bucket, prefix = _parse_url(url, flag)
    what = f"{flag} {url}"
    partial = run_dir.with_name(f"{run_dir.name}.restore{TEMPORARY}")
    client = _client(flag, attempts=RESTORE_ATTEMPTS)
    try:
        stored = _list(client, bucket, f"{prefix}/")
        whole = _whole(stored)
        if not whole and MARKER not in stored:
            raise NothingStored(f"{what}: there is no run at this address")
        if run_dir.exists() and any(run_dir.iterdir()):
            here = max(_whole_here(run_dir), default="")
            if here and here >= max(whole, default=""):
                return run_dir
            raise UserError(
                f"{what} is further than {run_dir}: move that folder away, or set another --output"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in filter(_is_safe, stored):
            if name.startswith("checkpoints/") and _unit(name) not in whole:
                continue
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, f"{prefix}/{name}", str(path), Config=DOWN)
        partial.rename(run_dir)
    except BOTO_ERRORS as error:
        raise _refusal(what, error) from None
    except OSError as error:
        raise UserError(f"{what}: cannot write to {run_dir.parent}: {error.strerror}") from error
    return run_dir


def _client(flag: str, attempts: int) -> Any:
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logger = logging.getLogger(name)
        # At DEBUG they log the session token, in headers.
        logger.setLevel(max(logging.INFO, logger.level))
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": attempts, "mode": "standard"},
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        # Its text is not repeated, as it may hold an endpoint's password.
        raise UserError(f"{flag}: boto3 refuses its own configuration ({type(error).__name__})") from None


def _parse_url(url: str, flag: str) -> tuple[str, str]:
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*?)/*)?", url)
    if match is None or (match[2] and not _is_safe(match[2])):
        # Not echoed either.
        raise UserError(f"{flag} takes s3://bucket/prefix")
    return match[1], match[2] or ""


def _list(client: Any, bucket: str, prefix: str) -> dict[str, int]:
    """Bytes of the objects under a prefix, by their names without it."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    items = (item for page in pages for item in page.get("Contents", []))
    return {item["Key"].removeprefix(prefix): item["Size"] for item in items}


def _unit(name: str) -> str:
    """What a file is sent with: its checkpoint's folder, or itself."""
    return name.rpartition("/")[0] if name.startswith("checkpoints/") else name


def _is_manifest(name: str) -> bool:
    return name == f"{_unit(name)}/{MANIFEST}"


def _whole(names: Iterable[str]) -> set[str]:
    """The checkpoints whose manifest is among a run's files."""
    return {_unit(name) for name in names if _is_manifest(name)}


def _whole_here(run_dir: Path) -> set[str]:
    return {f"checkpoints/{path.parent.name}" for path in run_dir.glob(f"checkpoints/*/{MANIFEST}")}


def _is_safe(name: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _is_transient(error: Exception) -> bool:
    """Whether S3 as a whole is in trouble and waiting may help."""
    if isinstance(error, ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return status >= 500 or status == 429 or error.response["Error"].get("Code") == "RequestTimeout"
    return isinstance(error, ConnectionError | HTTPClientError)


def _reason(error: Exception) -> str:
    """Why a request failed, from codes alone: the text of boto3's errors may quote addresses and headers."""
    if isinstance(error, ClientError):
        return f"{error.operation_name} answered {error.response['Error'].get('Code')}"
    return type(error).__name__ if isinstance(error, BOTO_ERRORS) else str(error)


def _refusal(what: str, error: Exception) -> UserError:
    return UserError(
        f"{what}: S3 cannot be used ({_reason(error)}): check the bucket, its rights and boto3's credentials"
    )
