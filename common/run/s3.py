"""A run's folder on S3: mirrored in the background while it trains, restored on a fresh machine.

The remote layout is the local one, file for file, under `s3://bucket/prefix/<run>/`. Only temporary files
(`*.tmp`), symbolic links and unfinished checkpoints stay behind.

S3 replaces an object as a whole but knows no transactions, so the order of writing keeps a run restorable
wherever the machine dies: first the plain files (a CSV is never older than the checkpoint it belongs to),
then a checkpoint's files and its manifest, and only then are checkpoints deleted that the folder no longer
has, manifest first. What a restored checkpoint holds is compared with its manifest when it is read.

A request that timed out may yet be carried out, after those that followed it. That does no harm to a
checkpoint, whose files never change; what has not the size that was sent is sent again by the next pass.

What the mirror asks of the modules that write into the folder: a plain file is either replaced by a rename
(from a `*.tmp` name) or appended to in whole lines; `checkpoint.prune` keeps what `uploading` names.
What it asks of the bucket: s3:ListBucket, GetObject, PutObject and DeleteObject.
Another server than Amazon's is named by AWS_ENDPOINT_URL, which boto3 reads.
"""

import contextlib
import logging
import os
import re
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
)

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

    Raises UserError if the address, the bucket or the credentials are wrong, or if the address already holds
    checkpoints while `run_dir` has none. A server out of reach is a warning: it is retried for ever.
    """

    def __init__(self, run_dir: Path, url: str) -> None:
        self.run_dir = Path(run_dir)
        self._bucket, prefix = _parse_url(url, "--s3")
        self._prefix = f"{prefix}/{self.run_dir.name}/".lstrip("/")
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        # One attempt: retries are ours, for close() to hurry.
        self._client = _client("--s3", attempts=1)
        self._starts_afresh = not any(self.run_dir.glob(f"checkpoints/*/{MANIFEST}"))
        self._changed, self._closing, self._stopped = (threading.Event() for _ in range(3))
        self._sent: dict[str, Version] = {}
        self._uploads = 0
        # Units that the last pass did not get to S3, and why.
        self._failed: dict[str, str] = {}
        self._uploading: set[str] = set()
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

    def uploading(self) -> set[str]:
        """Names of the checkpoints that must stay in the folder, else slow uploads might never get to an end."""
        return self._uploading

    def close(self, timeout_s: float = 300) -> dict[str, str]:
        """Upload what is left, for at most `timeout_s` seconds or `CLOSING_TRIES`; log and return what is not on S3, and why."""
        log.info("S3: uploading what is left to %s, for at most %.0f s", self.url, timeout_s)
        self._closing.set()
        self._changed.set()
        self._thread.join(timeout_s)
        self._stopped.set()
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
        """The files of each unit as they are now, in the order of sending: plain files, then checkpoints, the newest first.

        Without symbolic links, as they may point to what is not the run's.
        """
        # Looked for before plain files are, so that no checkpoint is newer than its row in the CSV.
        whole = {f"checkpoints/{path.parent.name}" for path in self.run_dir.glob(f"checkpoints/*/{MANIFEST}")}
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

        def place(unit: str) -> tuple[bool, bool]:
            # One that was begun is finished first, else many short outages might let none get to its end.
            return unit.startswith("checkpoints/"), Path(unit).name not in self._uploading

        return {unit: units[unit] for unit in sorted(sorted(units, reverse=True), key=place)}

    def _lacking(self) -> list[str]:
        """Units that S3 does not have as they are."""
        return [unit for unit, files in self._units().items() if not files.items() <= self._sent.items()]

    # --- S3 --------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        in_vain = complete = 0
        while not self._stopped.is_set():
            self._changed.wait()
            self._changed.clear()
            closing, before = self._closing.is_set(), self._uploads
            self._try()
            # The last pass sees that what the one before sent is there.
            complete = complete + 1 if closing and not self._failed else 0
            in_vain = in_vain + 1 if closing and self._uploads == before else 0
            if complete == 2 or in_vain == CLOSING_TRIES:
                return
            if self._failed:
                # close() cuts a long wait short.
                (self._stopped if closing else self._closing).wait(RETRY_S)
            if self._failed or closing:
                self._changed.set()

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

        Raises ClientError or BotoCoreError where it is pointless to go on with the next unit.
        """
        stored, units = self._list(), self._units()
        self._sent = {name: version for name, version in self._sent.items() if stored.get(name) == version[0]}
        failed = {}
        for unit, files in units.items():
            try:
                self._send(unit, files, stored)
            # Before OSError, which some of botocore's timeouts are as well.
            except BotoCoreError:
                raise
            # Deleted since the scan.
            except FileNotFoundError:
                continue
            except (OSError, ClientError) as error:
                if _is_transient(error):
                    raise
                failed[unit] = _reason(error)
        self._uploading = set()
        checkpoints = [unit for unit in units if unit.startswith("checkpoints/")]
        if checkpoints and units[max(checkpoints)].items() <= self._sent.items():
            # What the folder no longer has, and what a dead machine left half sent.
            old = [name for name in stored if name.startswith("checkpoints/") and _unit(name) not in units]
            for name in sorted(old, key=_is_manifest, reverse=True):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
        return failed

    def _list(self) -> dict[str, int]:
        stored = _list(self._client, self._bucket, self._prefix)
        if self._starts_afresh and any(map(_is_manifest, stored)):
            raise UserError(
                f"--s3 {self.url} already holds checkpoints and {self.run_dir} had none, so pass"
                f" --resume {self.url} to go on from them, or another --run_name"
            )
        self._starts_afresh = False
        return stored

    def _send(self, unit: str, files: dict[str, Version], stored: dict[str, int]) -> None:
        """Upload what of a unit is new, the manifest last."""
        manifest = f"{unit}/{MANIFEST}"
        if manifest in files:
            self._uploading = {Path(unit).name}
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
            raise UserError(_refusal(error, f"--s3 {url}", bucket)) from None
        return _reason(error)
    return ""


def restore(url: str, run_dir: Path, flag: str = "--resume") -> Path:
    """Download the run at `url` (`s3://bucket/prefix/<run>`) into `run_dir`, which must be absent or empty.

    The folder gets its name when everything is there, so an interrupted restore leaves nothing that looks like a
    run. Left out are checkpoints without their manifest, and keys that would leave the folder, which are not ours.

    Raises NothingStored, or another UserError: refused, out of reach, a full disk.
    """
    bucket, prefix = _parse_url(url, flag)
    run_dir, what = Path(run_dir), f"{flag} {url}"
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{what}: {run_dir} is not empty, so resume from that folder or move it away")
    partial = run_dir.with_name(f"{run_dir.name}.restore{TEMPORARY}")
    client = _client(flag, attempts=RESTORE_ATTEMPTS)
    try:
        stored = _list(client, bucket, f"{prefix}/")
        whole = {_unit(name) for name in stored if _is_manifest(name)}
        if not whole and MARKER not in stored:
            raise NothingStored(f"{what}: there is no run at this address")
        ours = {name: size for name, size in stored.items() if _is_safe(name)}
        files = {n: size for n, size in ours.items() if not n.startswith("checkpoints/") or _unit(n) in whole}
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free, needed = shutil.disk_usage(partial).free, sum(files.values())
        if needed > free:
            raise UserError(f"{what} needs {needed} bytes of disk and {run_dir.parent} has {free}")
        for name in files:
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, f"{prefix}/{name}", str(path), Config=DOWN)
        partial.rename(run_dir)
    except BOTO_ERRORS as error:
        raise UserError(_refusal(error, what, bucket)) from None
    except OSError as error:
        raise UserError(f"{what}: cannot write {error.filename}: {error.strerror}") from error
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


def _refusal(error: Exception, what: str, bucket: str) -> str:
    """The sentence for a user whose S3 does not work at all."""
    if isinstance(error, NoCredentialsError):
        return f"{what}: boto3 finds no credentials (environment, ~/.aws, instance role)"
    if isinstance(error, ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        code = error.response["Error"].get("Code")
        if code == "NoSuchBucket":
            return f"{what}: there is no bucket {bucket}"
        if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
            return f"{what}: the credentials that boto3 found are refused ({_reason(error)})"
    return f"{what}: S3 cannot be used ({_reason(error)})"
