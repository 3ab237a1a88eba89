"""A run's folder on S3: mirrored in the background while it trains, restored on a fresh machine.

The remote layout is the local one, file for file, under `s3://bucket/prefix/<run>/`. Only temporary files
(`*.tmp`), symbolic links and unfinished checkpoints stay behind.

S3 replaces an object as a whole but knows no transactions, so the order of writing keeps a run restorable
wherever the machine dies: first the plain files (a CSV is never older than the checkpoint it belongs to),
then a checkpoint's files and its manifest, and only then are checkpoints deleted that the folder no longer
has, manifest first.

A request that timed out may yet be carried out, after those that followed it. That does no harm to a
checkpoint, whose files never change; plain files are compared with S3's listing after each pass.

What the mirror asks of the modules that write into the folder: a plain file is either replaced by a rename
(from a `*.tmp` name) or appended to in whole lines; `checkpoint.prune` keeps what `uploading` names.
What it asks of the bucket: s3:ListBucket, GetObject, PutObject and, to clear old checkpoints, DeleteObject.
Another server than Amazon's is named by AWS_ENDPOINT_URL, which boto3 reads.
"""

import base64
import contextlib
import hashlib
import io
import logging
import os
import random
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError
from common.run.checkpoint import MANIFEST, NAME, TEMPORARY

log = logging.getLogger(__name__)

# Files from this size on go up in parts of it.
PART_BYTES = 8 << 20
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0
FIRST_RETRY_S, LONGEST_RETRY_S, CLOSING_RETRY_S = 1.0, 60.0, 5.0
# In vain and one after the other, about a minute of them: then training's end waits no longer.
CLOSING_TRIES = 15
RESTORE_ATTEMPTS = 6
# A file that every run has from its first second; it tells a run's address from any other.
MARKER = "config.yaml"

# What stat tells of a file's content: inode, size, modification time.
Version = tuple[int, int, int]


@dataclass(frozen=True)
class Report:
    """What a mirror did. Names are relative to the run's folder, and a checkpoint is one name.

    Attributes:
        pending: (name, why it is not on S3).
        bytes: sent, repeated versions of a file included.
    """

    url: str
    uploaded: list[str]
    pending: list[tuple[str, str]]
    bytes: int

    def __str__(self) -> str:
        done = f"S3: {len(self.uploaded)} files and checkpoints, {self.bytes / 1e6:.1f} MB, are at {self.url}"
        if not self.pending:
            return f"{done}; nothing is left to upload."
        rest = ", ".join(f"{name} ({why})" for name, why in self.pending[:10])
        more = f" and {len(self.pending) - 10} more" if len(self.pending) > 10 else ""
        return f"{done}; {len(self.pending)} NOT uploaded, only on this machine: {rest}{more}."


class Stored(NamedTuple):
    """An object on S3; `etag` changes with its content."""

    bytes: int
    etag: str


class NothingStored(UserError):
    """S3 answers, and there is no run at the address."""


class UploadError(Exception):
    """The object that S3 holds is not the file that was sent."""


class S3Mirror:
    """Copies what changes in `run_dir` to `<url>/<name of run_dir>` from one daemon thread.

    There is no queue to overflow: the thread compares the folder with what it has sent, so ten changes of a
    file during an outage cost one upload.

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
        self._starts_afresh = not self._manifests()
        self._changed, self._closing, self._stopped = (threading.Event() for _ in range(3))

        # What follows is the thread's own, once it runs. S3's objects by name; None until it has answered.
        self._stored: dict[str, Stored] | None = None
        # By name: what has been sent and what S3 calls it. A checkpoint is sent when its manifest is.
        self._sent: dict[str, tuple[Version, str]] = {}
        self._uploading: set[str] = set()
        # Name -> why its last upload failed, and the last of those that S3 is to blame for.
        self._reasons: dict[str, str] = {}
        self._refused: str | None = None
        # Why the last pass was not complete.
        self._trouble: str | None = None
        self._all_sent = False
        self._may_delete = True
        # An ordered set.
        self._uploaded: dict[str, None] = {}
        self._bytes = 0
        self._report: Report | None = None

        self._check_at_start()
        self._thread = threading.Thread(target=self._work, name="s3-mirror", daemon=True)
        self._thread.start()

    def submit(self) -> None:
        """Say that the folder has changed; returns at once, whatever the network does."""
        self._changed.set()

    def uploading(self) -> set[str]:
        """Names of the checkpoints that must stay in the folder, else slow uploads might never get to an end."""
        return self._uploading

    def close(self, timeout_s: float = 300) -> Report:
        """Upload what is left, for at most `timeout_s` seconds or `CLOSING_TRIES`; say what is and is not on S3."""
        if self._report is None:
            log.info("S3: uploading what is left to %s, for at most %.0f s", self.url, timeout_s)
            self._closing.set()
            self._changed.set()
            self._thread.join(timeout_s)
            self._stopped.set()
            self._report = Report(self.url, list(self._uploaded), self._pending(), self._bytes)
        return self._report

    # In the thread that trains

    def _check_at_start(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        marker = self.run_dir / MARKER
        try:
            self._attach()
            if marker.exists():  # shows, too, that we may write
                _upload(self._client, marker, self._bucket, self._prefix + MARKER)
        except (BotoCoreError, ClientError, UploadError) as error:
            if not _is_transient(error):
                raise UserError(_refusal(error, f"--s3 {self.url}", self._bucket)) from None
            self._trouble = _reason(error)
            log.warning("S3: %s is out of reach (%s); training goes on", self.url, self._trouble)

    def _pending(self) -> list[tuple[str, str]]:
        """What of the folder S3 does not have, and why."""
        pending = dict(self._reasons)
        if not self._all_sent:  # compare with the folder, so that nothing can be forgotten
            for name, version in {**self._manifests(), **self._plain_files()}.items():
                if not self._has(name, version):
                    pending.setdefault(_label(name), self._trouble or "not reached in time")
        return list(pending.items())

    def _has(self, name: str, version: Version) -> bool:
        return name in self._sent and self._sent[name][0] == version

    def _manifests(self) -> dict[str, Version]:
        """The manifests of the folder's checkpoints, name -> version, the newest first."""
        paths = (self.run_dir / "checkpoints").glob(f"*/{MANIFEST}")
        return self._versions(sorted((p for p in paths if NAME.fullmatch(p.parent.name)), reverse=True))

    def _plain_files(self) -> dict[str, Version]:
        """The run's other files, name -> version."""
        paths: list[Path] = []
        for folder, subfolders, names in os.walk(self.run_dir):
            hidden = "checkpoints" if Path(folder) == self.run_dir else None
            subfolders[:] = [name for name in subfolders if name != hidden and not name.endswith(TEMPORARY)]
            paths += (Path(folder, name) for name in names if not name.endswith(TEMPORARY))
        return self._versions(sorted(paths))

    def _versions(self, paths: Iterable[Path]) -> dict[str, Version]:
        """By name; without symbolic links, as they may point to what is not the run's."""
        versions = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    version = (status.st_ino, status.st_size, status.st_mtime_ns)
                    versions[path.relative_to(self.run_dir).as_posix()] = version
        return versions

    # In the thread that uploads

    def _work(self) -> None:
        failures, was_closing = 0, False
        while not self._stopped.is_set():
            self._changed.wait()
            self._changed.clear()
            closing, sent_before = self._closing.is_set(), self._bytes
            trouble = self._try()
            self._tell(trouble)
            if trouble is None:
                failures = 0
                if closing and not self._changed.is_set():
                    self._all_sent = not self._stopped.is_set()
                    return
                continue
            failures = 1 if self._bytes > sent_before or closing != was_closing else failures + 1
            was_closing = closing
            if closing and failures >= CLOSING_TRIES:
                return
            # close() cuts a long wait short.
            until, longest_s = (
                (self._stopped, CLOSING_RETRY_S) if closing else (self._closing, LONGEST_RETRY_S)
            )
            until.wait(_retry_s(failures, longest_s))
            self._changed.set()

    def _try(self) -> str | None:
        """One pass; returns why it was not complete."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._sync()
        except (BotoCoreError, ClientError) as error:
            return _reason(error)
        except (UserError, OSError) as error:  # S3 answers, but refuses us; or our disk is in trouble
            return str(error)
        return self._refused

    def _tell(self, trouble: str | None) -> None:
        """Log when trouble begins, changes and ends, not at every attempt."""
        if trouble is not None and trouble != self._trouble:
            log.warning("S3: %s; training goes on, uploads are retried", trouble)
        elif trouble is None and self._trouble is not None:
            log.info("S3: uploads work again")
        self._trouble = trouble

    def _sync(self) -> None:
        """One pass over what S3 lacks, in the order the module promises.

        Raises ClientError or BotoCoreError where it is pointless to go on with the next file.
        """
        self._reasons, self._refused = {}, None
        if self._stored is None:
            self._attach()
        # Looked for before the plain files are, so that none is newer than its row in the CSV.
        manifests = self._manifests()
        for name, version in self._plain_files().items():
            self._send(name, version)
        lacking = [name for name, version in manifests.items() if not self._has(name, version)]
        # One that was begun is finished first, else many short outages might let none get to its end.
        for name in sorted(lacking, key=lambda name: _checkpoint(name) not in self._uploading):
            self._uploading = {_checkpoint(name)}
            self._send_checkpoint(name)
        self._uploading = set()
        self._compare()
        self._delete_old()

    def _attach(self) -> None:
        """See what S3 has. Checkpoints that are there already need not be sent again."""
        stored = _list(self._client, self._bucket, self._prefix)
        if self._starts_afresh and any(map(_is_manifest, stored)):
            raise UserError(
                f"--s3 {self.url} already holds checkpoints and {self.run_dir} had none, so pass"
                f" --resume {self.url} to go on from them, or another --run_name"
            )
        for name, version in self._manifests().items():
            if name in stored:
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
                digest = hashlib.sha256((self.run_dir / name).read_bytes()).hexdigest()
                if head["Metadata"].get("sha256") == digest:
                    self._sent[name] = (version, stored[name].etag)
        self._stored = stored

    def _send_checkpoint(self, manifest: str) -> None:
        """Upload a checkpoint's files, the manifest last and only if all others have arrived."""
        assert self._stored is not None
        # That of another course, which `--resume` of an older checkpoint has left.
        if manifest in self._stored:
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + manifest)
            del self._stored[manifest]
        files = self._versions((self.run_dir / manifest).parent.glob("*"))
        version = files.pop(manifest, None)
        if version is not None and all(self._send(name, files[name]) for name in sorted(files)):
            self._send(manifest, version)

    def _send(self, name: str, version: Version) -> bool:
        """Upload one file, unless S3 has it; False if it is unreadable or S3 refuses it alone, which spares the others."""
        from botocore.exceptions import BotoCoreError, ClientError

        if self._has(name, version):
            return True
        if self._stopped.is_set():
            return False
        if not _is_safe(name):
            self._reasons[_label(name)] = "restoring refuses such a name"
            return False
        try:
            stored = _upload(self._client, self.run_dir / name, self._bucket, self._prefix + name)
        except FileNotFoundError:
            return False  # deleted since the scan
        except BotoCoreError:  # before OSError, which some of botocore's timeouts are as well
            raise
        except OSError as error:
            self._reasons[_label(name)] = error.strerror or str(error)
            return False
        except (ClientError, UploadError) as error:
            if _is_transient(error):
                raise
            self._reasons[_label(name)] = _reason(error)
            self._refused = f"{name}: {_reason(error)}"
            return False
        self._bytes += stored.bytes
        self._sent[name] = (version, stored.etag)
        if not _checkpoint(name) or _is_manifest(name):
            self._uploaded[_label(name)] = None
        return True

    def _compare(self) -> None:
        """Have files sent again that S3 does not have as they were sent, a checkpoint's manifest after them."""
        self._stored = _list(self._client, self._bucket, self._prefix)
        for name, (_version, etag) in list(self._sent.items()):
            if name not in self._stored or self._stored[name].etag != etag:
                self._sent.pop(name, None)
                self._sent.pop(f"checkpoints/{_checkpoint(name)}/{MANIFEST}", None)
                self._refused = f"{name}: S3 holds another version"

    def _delete_old(self) -> None:
        """Delete the checkpoints that the folder no longer has, and what a dead machine left half sent.

        The newest stays: the highest step that this mirror has sent or, before it has sent any, that S3 has.
        """
        from botocore.exceptions import ClientError

        assert self._stored is not None
        whole = [_checkpoint(name) for name in self._stored if _is_manifest(name)]
        sent = [name for name in whole if f"checkpoints/{name}" in self._uploaded]
        keep = {max(sent or whole, default=""), *map(_checkpoint, self._manifests())}
        old = [name for name in self._stored if _checkpoint(name) not in {"", *keep}]
        try:
            for name in sorted(old, key=_is_manifest, reverse=True) if self._may_delete else ():
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
                self._sent.pop(name, None)
        except ClientError as error:
            if _is_transient(error):
                raise
            self._may_delete = False
            log.warning("S3: old checkpoints stay in %s (%s)", self.url, _reason(error))


def _upload(client: Any, path: Path, bucket: str, key: str) -> Stored:
    """Upload a file as it is when the call begins, and compare what S3 then holds.

    The whole file is in memory meanwhile, as it was when a checkpoint was written. Its SHA-256 travels in the
    object's metadata (`sha256`), which `restore` checks.

    Raises UploadError if size or checksum differ afterwards, OSError if the file cannot be read, and
    botocore's ClientError and BotoCoreError.
    """
    from boto3.s3.transfer import TransferConfig

    content = path.read_bytes()
    digest = hashlib.sha256(content)
    config = TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        use_threads=False,  # s3transfer's threads would hold up the interpreter's exit while S3 is away
        preferred_transfer_client="classic",
    )
    extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": digest.hexdigest()}}
    client.upload_fileobj(io.BytesIO(content), bucket, key, Config=config, ExtraArgs=extra)

    head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    if head["ContentLength"] != len(content) or head["Metadata"].get("sha256") != digest.hexdigest():
        raise UploadError("S3 holds another version")
    checksum = base64.b64encode(digest.digest()).decode()
    if len(content) >= PART_BYTES:  # S3 gives the checksum of the parts' checksums, and their number
        starts = range(0, len(content), PART_BYTES)
        parts = [hashlib.sha256(content[start : start + PART_BYTES]).digest() for start in starts]
        checksum = f"{base64.b64encode(hashlib.sha256(b''.join(parts)).digest()).decode()}-{len(parts)}"
    if head.get("ChecksumSHA256", checksum) != checksum:  # some compatible servers do not report it
        raise UploadError("the checksum differs after uploading")
    return Stored(len(content), head["ETag"].strip('"'))


def restore(url: str, run_dir: Path, flag: str = "--resume") -> Path:
    """Download the run at `url` (`s3://bucket/prefix/<run>`) into `run_dir`, which must be absent or empty.

    The folder gets its name when everything is there, so an interrupted restore leaves nothing that looks
    like a run. A file that does not match its checksum is left out and named in a warning: a damaged plot
    must not stop a resume, and a checkpoint that lacks a file fails its manifest, so the one before is used.

    Raises UserError: nothing there, refused, out of reach, a key that would leave the folder, a full disk.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _parse_url(url, flag)
    run_dir = Path(run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{flag} {url}: {run_dir} is not empty, so resume from that folder or move it away")
    partial = run_dir.with_name(f"{run_dir.name}.restore{TEMPORARY}")
    client = _client(flag, attempts=RESTORE_ATTEMPTS)
    try:
        files = _choose(_list(client, bucket, f"{prefix}/"), f"{flag} {url}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free, needed = shutil.disk_usage(partial).free, sum(item.bytes for item in files.values())
        if needed > free:
            raise UserError(f"{flag} {url} needs {needed} bytes of disk and {run_dir.parent} has {free}")
        for name, item in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not _download(client, bucket, f"{prefix}/{name}", path, item.bytes):
                path.unlink()
                log.warning("S3: %s/%s does not match its checksum and is left out", url.rstrip("/"), name)
        partial.rename(run_dir)
    except (BotoCoreError, ClientError) as error:
        raise UserError(_refusal(error, f"{flag} {url}", bucket)) from None
    except OSError as error:
        raise UserError(f"{flag} {url}: cannot write {error.filename}: {error.strerror}") from error
    return run_dir


def _choose(stored: dict[str, Stored], what: str) -> dict[str, Stored]:
    """What of a run to download: all but checkpoints that lack their manifest.

    Raises UserError: no run is there, it is of an older format, or a key would leave the folder.
    """
    whole = {_checkpoint(name) for name in stored if _is_manifest(name)}
    if not whole and MARKER not in stored:
        raise NothingStored(f"{what}: there is no run at this address")
    # Consoles mark a folder by an empty object.
    names = [name for name, item in stored.items() if item.bytes or not name.endswith("/")]
    for name in names:
        if not _is_safe(name):
            raise UserError(f"{what}: the key {name!r} would leave the run's folder")
    if not all(map(NAME.fullmatch, whole)):
        raise UserError(
            f"{what} holds checkpoints of an older format: go on with the version that wrote them, or choose"
            " another --run_name"
        )
    return {
        name: stored[name]
        for name in names
        if not name.startswith("checkpoints/") or _checkpoint(name) in whole
    }


def _download(client: Any, bucket: str, key: str, path: Path, size: int) -> bool:
    """Download an object; False if it has not the size listed or not the SHA-256 it was uploaded with."""
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError

    for attempt in range(1, RESTORE_ATTEMPTS + 1):
        try:
            answer = client.get_object(Bucket=bucket, Key=key)
            digest = hashlib.sha256()
            with path.open("wb") as file:
                for chunk in answer["Body"].iter_chunks(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                arrived = file.tell()
            return arrived == size and answer["Metadata"].get("sha256") == digest.hexdigest()
        except FlexibleChecksumError:
            return False
        except BotoCoreError:  # the connection broke in the middle, which botocore itself does not retry
            if attempt == RESTORE_ATTEMPTS:
                raise
            time.sleep(_retry_s(attempt, LONGEST_RETRY_S))
    raise AssertionError("the last attempt returns or raises")


def _client(flag: str, attempts: int) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logging.INFO, logger.level))  # at DEBUG they log the session token, in headers
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
        raise UserError(f"{flag} takes s3://bucket/prefix")  # not echoed either
    return match[1], match[2] or ""


def _list(client: Any, bucket: str, prefix: str) -> dict[str, Stored]:
    """The objects under a prefix, by their names without it."""
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            # Not all servers quote the ETag here.
            found[item["Key"].removeprefix(prefix)] = Stored(item["Size"], item["ETag"].strip('"'))
    return found


def _checkpoint(name: str) -> str:
    """The name of the checkpoint that a file belongs to; empty if there is none."""
    match = re.fullmatch(r"checkpoints/([^/]+)/.+", name)
    return match[1] if match else ""


def _is_manifest(name: str) -> bool:
    return _checkpoint(name) != "" and name == f"checkpoints/{_checkpoint(name)}/{MANIFEST}"


def _label(name: str) -> str:
    """What a report calls a file: itself, or its checkpoint."""
    return f"checkpoints/{_checkpoint(name)}" if _checkpoint(name) else name


def _is_safe(name: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _retry_s(failures: int, longest: float) -> float:
    """Exponential back-off; the jitter keeps many runs from coming back to a server in the same second."""
    return min(longest, FIRST_RETRY_S * 2 ** min(failures - 1, 16)) * random.uniform(0.5, 1.0)


def _is_transient(error: Exception) -> bool:
    """Whether S3 as a whole is in trouble and waiting may help."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    if isinstance(error, ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return status >= 500 or status == 429 or error.response["Error"].get("Code") == "RequestTimeout"
    return isinstance(error, ConnectionError | HTTPClientError)


def _reason(error: Exception) -> str:
    """Why a request failed, from codes alone: the text of an error may quote addresses and headers."""
    from botocore.exceptions import ClientError

    if isinstance(error, UploadError):
        return str(error)
    if isinstance(error, ClientError):
        return f"{error.operation_name} answered {error.response['Error'].get('Code')}"
    return type(error).__name__


def _refusal(error: Exception, what: str, bucket: str) -> str:
    """The sentence for a user whose S3 does not work at all."""
    from botocore.exceptions import ClientError, NoCredentialsError

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
