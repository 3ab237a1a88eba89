"""A run's folder on S3: mirrored in the background while it trains, restored on a fresh machine.

The remote layout, under `s3://bucket/prefix/<run>/`:

    config.yaml, training_log.csv, plots/...  every file under its own path
    checkpoints/<id>/*                        one checkpoint; id: 16 hex digits of its manifest.json's SHA-256
    checkpoints/index-<number>.json           {"layout": 1, "checkpoints": {"last": id, "previous": id, ...}}

S3 replaces an object as a whole but knows no transactions, so the order of writing keeps a run restorable
wherever the machine dies: first the plain files (a CSV is never older than the checkpoint it belongs to),
then a checkpoint's files, its manifest, the index, and only then are checkpoints deleted that the index no
longer names. Names live in the index alone, so renaming `last` to `previous` sends a few bytes.

A request that timed out may yet be carried out, after those that followed it. So an index is never
overwritten and the highest number counts, and plain files are compared with S3's listing after each new set
of checkpoints.

What the mirror asks of the modules that write into the folder: a file is either replaced by a rename (from a
`*.tmp` name) or appended to in whole lines; a checkpoint is a flat folder that gets its name when complete.
What it asks of the bucket: s3:ListBucket, GetObject, PutObject and, to clear old checkpoints, DeleteObject.
"""

import base64
import hashlib
import json
import logging
import os
import random
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common import UserError

log = logging.getLogger(__name__)

PART_BYTES = 8 << 20  # files from this size on go up in parts of it, one of which is in memory at a time
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0
FIRST_RETRY_S, LONGEST_RETRY_S, CLOSING_RETRY_S = 1.0, 60.0, 5.0
CLOSING_TRIES = (
    15  # in vain and one after the other, about a minute of them: then training's end waits no longer
)
RESTORE_ATTEMPTS = 6

_SPOOL = ".s3-spool"
_INDEX = re.compile(r"checkpoints/index-(\d{8})\.json")
_LAYOUT = 1
_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Report:
    """What a mirror did. Names are relative to the run's folder, and a checkpoint is one name."""

    url: str
    uploaded: list[str]
    pending: list[tuple[str, str]]  # (name, why it is not on S3)
    bytes: int  # sent, repeated versions of a file included

    def __str__(self) -> str:
        done = f"S3: {len(self.uploaded)} files and checkpoints, {self.bytes / 1e6:.1f} MB, are at {self.url}"
        if not self.pending:
            return f"{done}; nothing is left to upload."
        rest = ", ".join(f"{name} ({why})" for name, why in self.pending[:10])
        more = f" and {len(self.pending) - 10} more" if len(self.pending) > 10 else ""
        return f"{done}; {len(self.pending)} NOT uploaded, only on this machine: {rest}{more}."


class Stored(NamedTuple):
    """An object on S3; `etag` changes with its content."""

    key: str
    bytes: int
    etag: str


class NothingStored(UserError):
    """S3 answers, and there is no run at the address."""


class UploadError(Exception):
    """The object that S3 holds is not the file that was sent."""


class S3Mirror:
    """Copies what changes in `run_dir` to `<url>/<name of run_dir>` from one daemon thread.

    There is no queue to overflow: the thread compares the folder with what it has sent, so ten changes of a
    file during an outage cost one upload. Only checkpoints are held at once, as hard links in `.s3-spool`,
    because the next save moves them: no byte is copied, and the disk holds at most the set being sent beside
    the current one.

    Raises UserError if the address, the bucket or the credentials are wrong, or if the address already holds
    checkpoints while `run_dir` has none. A server out of reach is a warning: it is retried for ever.
    """

    def __init__(self, run_dir: Path, url: str, endpoint: str | None = None) -> None:
        self.run_dir = Path(run_dir)
        self._bucket, prefix = _parse_url(url, "--s3")
        self._prefix = f"{prefix}/{self.run_dir.name}".lstrip("/")
        self.url = f"s3://{self._bucket}/{self._prefix}"
        self._client = _client(endpoint, "--s3", attempts=1)  # retries are ours, for close() to hurry
        self._starts_afresh = not any(self.run_dir.glob("checkpoints/*/manifest.json"))

        self._lock = threading.Condition()  # guards what submit() and close() share with the thread:
        self._asked = self._done = 0  # submissions made; the latest of them that S3 has in full
        self._wanted: dict[str, str] = {}  # checkpoint name -> id, as the folder has them
        self._sending: dict[str, str] = {}  # the same, as it was when the pass under way began
        self._complete: set[str] = set()  # ids of which S3 has every file
        self._unlinked: dict[str, str] = {}  # checkpoint name -> why it could not be linked
        self._closing = self._stopped = self._ended = False
        self._failures = 0  # passes that sent nothing, one after the other

        self._index: dict[str, str] | None = None  # the remote index; None until S3 has answered
        self._index_number = 0
        self._index_is_certain = True  # False after a failed attempt to write the next one
        self._tidied_for: dict[str, str] | None = None  # what was wanted when _tidy last looked
        self._sent: dict[str, tuple[int, int, int]] = {}  # plain file -> the version that S3 has, see _scan
        self._etags: dict[str, str] = {}  # and what S3 calls it
        self._reasons: dict[str, str] = {}  # name -> why its last upload failed
        self._refused: str | None = None  # the last of those that S3 is to blame for
        self._trouble: str | None = None  # why the last pass was not complete
        self._uploaded: dict[str, None] = {}  # an ordered set
        self._bytes = 0
        self._report: Report | None = None

        self._make_spool()
        self._check_at_start()
        threading.Thread(target=self._work, name="s3-mirror", daemon=True).start()

    def submit(self) -> None:
        """Say that the folder has changed; returns at once, whatever the network does.

        To be called from the thread that saves checkpoints, when a save is complete.
        """
        with self._lock:
            wanted: dict[str, str] = {}
            self._unlinked = {}
            for folder in sorted((self.run_dir / "checkpoints").glob("*/")):
                if _is_temporary(folder.name):
                    continue
                try:
                    wanted[folder.name] = self._hold(folder)
                except FileNotFoundError:
                    continue  # without a manifest it is not a checkpoint
                except OSError as error:
                    log.warning("S3: cannot hold %s for uploading: %s", folder, error.strerror)
                    self._unlinked[folder.name] = error.strerror or str(error)
                    if folder.name in self._wanted:  # S3 keeps what it has under that name
                        wanted[folder.name] = self._wanted[folder.name]
            self._wanted = wanted
            self._drop_superseded()
            self._asked += 1
            self._lock.notify_all()

    def close(self, timeout_s: float = 300) -> Report:
        """Upload what is left, for at most `timeout_s` seconds or `CLOSING_TRIES`; say what is and is not on S3."""
        if self._report is not None:
            return self._report
        log.info("S3: uploading what is left to %s, for at most %.0f s", self.url, timeout_s)
        with self._lock:
            self._closing, self._failures = True, 0
            self.submit()
            self._lock.wait_for(self._nothing_more_to_expect, timeout_s)
            self._stopped = True
            self._lock.notify_all()
            pending = self._pending()
        if not pending:
            shutil.rmtree(self._spool, ignore_errors=True)  # else the next mirror of this folder does it
        self._report = Report(self.url, list(self._uploaded), pending, self._bytes)
        return self._report

    # In the thread that trains

    def _nothing_more_to_expect(self) -> bool:
        return self._done == self._asked or self._ended or self._failures >= CLOSING_TRIES

    def _make_spool(self) -> None:
        shutil.rmtree(self._spool, ignore_errors=True)  # the links of a process that was killed
        self._spool.mkdir(parents=True)
        probe = self._spool / "probe"
        probe.touch()
        try:
            os.link(probe, self._spool / "link")
        except OSError as error:
            message = f"--s3 needs hard links, which {self.run_dir}'s file system lacks ({error.strerror})"
            raise UserError(message) from error

    @property
    def _spool(self) -> Path:
        return self.run_dir / _SPOOL

    def _check_at_start(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._attach()
        except (BotoCoreError, ClientError) as error:
            if not _is_transient(error):
                raise UserError(_refusal(error, f"--s3 {self.url}", self._bucket)) from None
            self._trouble = _reason(error)
            log.warning("S3: %s is out of reach (%s); training goes on", self.url, self._trouble)

    def _hold(self, folder: Path) -> str:
        """Link a checkpoint's files into the spool, unless S3 has them; returns the checkpoint's id."""
        inode = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # remains this folder even if it is renamed now
        try:
            with open(os.open("manifest.json", os.O_RDONLY, dir_fd=inode), "rb") as manifest:
                checkpoint = hashlib.sha256(manifest.read()).hexdigest()[:16]
            held = self._spool / checkpoint
            if checkpoint not in self._complete and not held.exists():
                partial = held.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                for name in os.listdir(inode):
                    os.link(name, partial / name, src_dir_fd=inode)
                partial.rename(held)
            return checkpoint
        finally:
            os.close(inode)

    def _drop_superseded(self) -> None:
        """Empty the spool, with the lock held, of checkpoints that were replaced before their turn came."""
        keep = {*self._wanted.values(), *self._sending.values()}
        for path in self._spool.glob("*/"):
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def _pending(self) -> list[tuple[str, str]]:
        """What of the last submission S3 does not have, and why."""
        pending = dict(self._reasons)
        if self._done != self._asked:  # compare with the folder, so that nothing can be forgotten
            why = "the upload thread died" if self._ended else self._trouble or "not reached in time"
            index = self._index or {}
            names = [f"checkpoints/{name}" for name, id_ in self._wanted.items() if index.get(name) != id_]
            names += [name for name, version in self._scan().items() if self._sent.get(name) != version]
            pending = {name: self._reasons.get(name, why) for name in names}
        pending |= {f"checkpoints/{name}": reason for name, reason in self._unlinked.items()}
        return list(pending.items())

    def _scan(self) -> dict[str, tuple[int, int, int]]:
        """The run's plain files, name -> version as far as stat can tell: inode, size, modification time.

        Symbolic links are left out, as they may point to what is not the run's.
        """
        found = {}
        for folder, subfolders, names in os.walk(self.run_dir):
            hidden = (_SPOOL, "checkpoints") if Path(folder) == self.run_dir else ()
            subfolders[:] = [name for name in subfolders if name not in hidden and not _is_temporary(name)]
            for name in names:
                path = Path(folder, name)
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode) and not _is_temporary(name):
                    version = (status.st_ino, status.st_size, status.st_mtime_ns)
                    found[path.relative_to(self.run_dir).as_posix()] = version
        return dict(sorted(found.items()))

    # In the thread that uploads

    def _work(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._asked != self._done or self._closing)
                    if self._stopped or self._asked == self._done:
                        return
                    asked, self._sending = self._asked, self._wanted
                    self._drop_superseded()
                sent = self._bytes
                try:
                    trouble = self._sync(self._sending)
                except (BotoCoreError, ClientError) as error:
                    trouble = _reason(error)
                except (UserError, OSError) as error:  # S3 answers, but refuses us; or our disk is full
                    trouble = str(error)
                self._tell(trouble)
                with self._lock:
                    if trouble is None:
                        self._failures, self._done = 0, asked
                    else:
                        self._failures = 1 if self._bytes > sent else self._failures + 1
                    self._lock.notify_all()
                    if trouble is not None:
                        self._back_off()
        finally:
            with self._lock:
                self._ended = self._asked != self._done
                self._lock.notify_all()

    def _tell(self, trouble: str | None) -> None:
        """Log when trouble begins, changes and ends, not at every attempt."""
        if trouble is not None and trouble != self._trouble:
            log.warning("S3: %s; training goes on, uploads are retried", trouble)
        elif trouble is None and self._trouble is not None:
            log.info("S3: uploads work again")
        self._trouble = trouble

    def _back_off(self) -> None:
        """Wait, with the lock held; close() cuts a long wait short, once."""
        if self._closing:
            self._lock.wait_for(lambda: self._stopped, _retry_s(self._failures, CLOSING_RETRY_S))
        else:
            self._lock.wait_for(lambda: self._closing, _retry_s(self._failures, LONGEST_RETRY_S))

    def _sync(self, wanted: dict[str, str]) -> str | None:
        """One pass over what S3 lacks, in the order the module promises; returns what S3 refused, if any.

        Raises ClientError or BotoCoreError where it is pointless to go on with the next file.
        """
        self._reasons, self._refused = {}, None
        if self._index is None:
            self._attach()
        for name, version in self._scan().items():
            if self._sent.get(name) != version and (stored := self._send(name, self.run_dir / name, name)):
                self._sent[name], self._etags[name] = version, stored.etag
                self._uploaded[name] = None
        for name in sorted(wanted, key=lambda name: name != "last"):  # what a resume needs comes first
            checkpoint = wanted[name]
            if self._index.get(name) != checkpoint and self._send_checkpoint(name, checkpoint):
                self._write_index({**self._index, name: checkpoint})
                self._uploaded[f"checkpoints/{name}"] = None
        if wanted and self._complete.issuperset(wanted.values()):
            self._write_index(wanted)  # without the names that are gone
        if wanted != self._tidied_for or self._closing:
            self._tidy()
            self._tidied_for = wanted
        return self._refused

    def _send_checkpoint(self, name: str, checkpoint: str) -> bool:
        if checkpoint in self._complete:
            return True
        folder = self._spool / checkpoint
        for link in sorted(folder.iterdir(), key=lambda link: (link.name == "manifest.json", link.name)):
            if not self._send(f"checkpoints/{name}", link, f"checkpoints/{checkpoint}/{link.name}"):
                return False
            link.unlink()  # so that a retry goes on here
        folder.rmdir()
        with self._lock:
            self._complete.add(checkpoint)
        return True

    def _send(self, name: str, path: Path, relative_key: str) -> Stored | None:
        """Upload one file; None if it is unreadable or S3 refuses it alone, which spares the others."""
        from botocore.exceptions import BotoCoreError, ClientError

        if self._stopped:
            return None
        if not _is_safe(relative_key):
            self._reasons[name] = "restoring refuses such a name"
            return None
        key = f"{self._prefix}/{relative_key}"
        try:
            stored = upload_file_to_s3(self._client, path, self._bucket, key)
        except FileNotFoundError:
            return None  # deleted since the scan
        except BotoCoreError:  # before OSError, which some of botocore's timeouts are as well
            raise
        except OSError as error:
            self._reasons[name] = error.strerror or str(error)
            return None
        except (ClientError, UploadError) as error:
            if _is_transient(error):
                raise
            self._reasons[name] = _reason(error)
            self._refused = f"{name}: {_reason(error)}"
            return None
        self._bytes += stored.bytes
        return stored

    def _attach(self) -> None:
        """Read the remote index, or write an empty one, which also shows that we may write."""
        number, index = _read_index(self._client, self._bucket, self._prefix) or (0, None)
        if index and self._starts_afresh:
            raise UserError(
                f"--s3 {self.url} already holds checkpoints and {self.run_dir} had none, so pass"
                f" --resume {self.url} to go on from them, or another --run_name"
            )
        self._index_number = number
        if index is None:
            self._write_index({})
        else:
            with self._lock:
                self._index, self._complete = index, set(index.values())

    def _write_index(self, index: dict[str, str]) -> None:
        if index != self._index or not self._index_is_certain:
            self._index_number, self._index_is_certain = self._index_number + 1, False
            key = f"{self._prefix}/checkpoints/index-{self._index_number:08}.json"
            body = json.dumps({"layout": _LAYOUT, "checkpoints": index}, indent=1, sort_keys=True).encode()
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body, ChecksumAlgorithm="SHA256")
            self._index, self._index_is_certain = index, True

    def _tidy(self) -> None:
        """Look at what S3 holds: have plain files sent again that differ, and delete what no name leads to.

        Nameless are the checkpoints and indices that were replaced, and what a dead machine left half sent.
        """
        from botocore.exceptions import ClientError

        with self._lock:
            keep = {*self._index.values(), *self._wanted.values(), *self._sending.values()}
            self._complete &= keep
        objects = _list(self._client, self._bucket, f"{self._prefix}/")
        stored = {item.key.removeprefix(f"{self._prefix}/"): item for item in objects}
        for name, etag in list(self._etags.items()):
            if name not in stored or stored[name].etag != etag:
                del self._sent[name], self._etags[name]
                self._refused = f"{name}: S3 holds another version"
        if not self._index_is_certain:
            return  # the one that counts may name what ours does not
        nameless = []
        for name in stored:
            index, checkpoint = _INDEX.fullmatch(name), re.match(r"checkpoints/([0-9a-f]{16})/", name)
            if (index and int(index[1]) < self._index_number) or (checkpoint and checkpoint[1] not in keep):
                nameless.append(name)
        nameless.sort(key=lambda name: not name.endswith("/manifest.json"))  # what was sent last goes first
        try:
            for name in nameless:
                self._client.delete_object(Bucket=self._bucket, Key=stored[name].key)
        except ClientError as error:
            if _is_transient(error):
                raise
            log.warning("S3: old checkpoints stay in %s (%s)", self.url, _reason(error))


def upload_file_to_s3(client: Any, path: Path, bucket: str, key: str) -> Stored:
    """Upload a file and compare what S3 then holds.

    The file may grow meanwhile: the object is the file as it was when the call began. Its SHA-256 travels in
    the object's metadata (`sha256`), which `restore` checks.

    Raises UploadError if size or checksum differ afterwards, OSError if the file cannot be read, and
    botocore's ClientError and BotoCoreError.
    """
    from boto3.s3.transfer import TransferConfig

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        whole, parts = hashlib.sha256(), []
        for start in range(0, size, PART_BYTES):
            part = file.read(min(PART_BYTES, size - start))
            whole.update(part)
            parts.append(hashlib.sha256(part).digest())
        file.seek(0)
        config = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            use_threads=False,  # s3transfer's threads would hold up the interpreter's exit while S3 is away
            preferred_transfer_client="classic",
        )
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": whole.hexdigest()}}
        client.upload_fileobj(_FirstBytes(file, size), bucket, key, Config=config, ExtraArgs=extra)

    head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    if head["ContentLength"] != size or head["Metadata"].get("sha256") != whole.hexdigest():
        raise UploadError("S3 holds another version")
    if size < PART_BYTES:
        checksum = base64.b64encode(whole.digest()).decode()
    else:  # S3 gives the checksum of the parts' checksums, and their number
        checksum = f"{base64.b64encode(hashlib.sha256(b''.join(parts)).digest()).decode()}-{len(parts)}"
    if head.get("ChecksumSHA256", checksum) != checksum:  # some compatible servers do not report it
        raise UploadError("the checksum differs after uploading")
    return Stored(key, size, head["ETag"].strip('"'))


def restore(url: str, run_dir: Path, endpoint: str | None = None, flag: str = "--resume") -> Path:
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
    partial = run_dir.with_name(f"{run_dir.name}.restore.tmp")
    client = _client(endpoint, flag, attempts=RESTORE_ATTEMPTS)
    try:
        found = _read_index(client, bucket, prefix)
        if found is None:
            raise NothingStored(f"{flag} {url}: there is no run at this address")
        _number, index = found
        files = list(_plan_restore(_list(client, bucket, f"{prefix}/"), prefix, index))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free, needed = shutil.disk_usage(partial).free, sum(size for _key, _name, size in files)
        if needed > free:
            raise UserError(f"{flag} {url} needs {needed} bytes of disk and {run_dir.parent} has {free}")
        for key, name, size in files:
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not _download(client, bucket, key, path, size):
                path.unlink()
                log.warning("S3: s3://%s/%s does not match its checksum and is left out", bucket, key)
        partial.rename(run_dir)
    except (BotoCoreError, ClientError) as error:
        raise UserError(_refusal(error, f"{flag} {url}", bucket)) from None
    except OSError as error:
        raise UserError(f"{flag} {url}: cannot write {error.filename}: {error.strerror}") from error
    return run_dir


def _plan_restore(
    objects: Iterable[Stored], prefix: str, index: dict[str, str]
) -> Iterator[tuple[str, str, int]]:
    """What to download: (key, path in the run's folder, size). A key that would leave it is a UserError."""
    for key, size, _etag in objects:
        name = key.removeprefix(f"{prefix}/")
        if _INDEX.fullmatch(name) or (name.endswith("/") and size == 0):  # consoles mark a folder so
            continue
        if not _is_safe(name):
            raise UserError(f"--resume: the key {key!r} would leave the run's folder")
        match = re.fullmatch(r"checkpoints/([^/]*)/?(.*)", name)
        if match is None:
            yield key, name, size
            continue
        for checkpoint, id_ in index.items():
            if id_ == match[1]:
                yield key, f"checkpoints/{checkpoint}/{match[2]}", size


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


class _FirstBytes:
    """The first `size` bytes of an open file: hides what is appended during the upload."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, amount: int | None = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if amount is None or amount < 0 else min(amount, left))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            return self._file.seek(self._size + offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _client(endpoint: str | None, flag: str, attempts: int) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    if endpoint is not None and not re.fullmatch(r"https?://[^\s/@]+/?", endpoint):
        # Not echoed, as it may hold a password.
        raise UserError("--s3_endpoint takes http(s)://host[:port], without a user, a password or a path")
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logging.INFO, logger.level))  # at DEBUG they log the session token, in headers
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        s3={"addressing_style": "path"} if endpoint else {},  # bucket.host is a name only at Amazon
    )
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except BotoCoreError as error:
        raise UserError(f"{flag}: boto3 refuses its own configuration ({type(error).__name__})") from None


def _parse_url(url: str, flag: str) -> tuple[str, str]:
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*?)/*)?", url)
    if match is None or (match[2] and not _is_safe(match[2])):
        raise UserError(f"{flag} takes s3://bucket/prefix")  # not echoed either
    return match[1], match[2] or ""


def _read_index(client: Any, bucket: str, prefix: str) -> tuple[int, dict[str, str]] | None:
    """The index that counts: its number, checkpoint name -> id; None if no run was mirrored there.

    Raises UserError for an index that is not ours.
    """
    keys = [item.key for item in _list(client, bucket, f"{prefix}/checkpoints/index-")]
    matches = [match for key in keys if (match := _INDEX.fullmatch(key.removeprefix(f"{prefix}/")))]
    if not matches:
        return None
    newest = max(matches, key=lambda match: int(match[1]))
    body = client.get_object(Bucket=bucket, Key=f"{prefix}/{newest[0]}")["Body"].read(1 << 20)
    try:
        content = json.loads(body)
        index = content["checkpoints"]
        names_are_safe = all(_is_safe(name) and "/" not in name for name in index)
        is_ours = content["layout"] == _LAYOUT and names_are_safe and all(map(_ID.fullmatch, index.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"s3://{bucket}/{prefix}/{newest[0]} is not an index that this version can read")
    return int(newest[1]), index


def _list(client: Any, bucket: str, prefix: str) -> Iterator[Stored]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            yield Stored(item["Key"], item["Size"], item["ETag"].strip('"'))  # not all servers quote it here


def _is_safe(name: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _is_temporary(name: str) -> bool:
    return name.endswith(".tmp")


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
