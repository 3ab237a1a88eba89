"""Shards of datasets in object storage and on the hub: listed, read with patience, or downloaded once."""

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import quote

from pyarrow import fs
from tqdm import tqdm

from common import UserError, first_line
from common.data.sources.cache import cache_folder, fingerprint_of, locked

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 8


class Storage:
    """Files below a URL: s3://, hf:// or a folder. Each process has its own connections, after a fork too.

    Credentials, region and AWS_ENDPOINT_URL are read by Arrow, from where other programs read them.
    """

    def __init__(self, url: str):
        self.url = url
        self._process = 0
        self.root: str
        self._system: fs.FileSystem

    def system(self) -> fs.FileSystem:
        if self._process != os.getpid():
            url = quote(self.url, ":/") if "://" in self.url else str(Path(self.url).expanduser().resolve())
            self._system, self.root = fs.FileSystem.from_uri(url)
            self._process = os.getpid()
        return self._system

    def files(self) -> list[fs.FileInfo]:
        """List Parquet and Arrow files, sorted by name. UserError: there are none, or the storage cannot be reached."""
        try:
            system = self.system()
            found = system.get_file_info(fs.FileSelector(self.root, recursive=True))
        except OSError as error:
            raise UserError(f"--data_dir {self.url} cannot be read: {first_line(error)}") from error
        shards = [info for info in found if info.is_file and info.extension in ("parquet", "arrow")]
        if not shards:
            raise UserError(f"--data_dir {self.url} holds no Parquet or Arrow files")
        return sorted(shards, key=lambda info: info.path)

    def fingerprint(self, files: list[fs.FileInfo]) -> str:
        """Hash the names, sizes and times of files: it changes when one of them does."""
        return fingerprint_of([(info.path[len(self.root) :], info.size, info.mtime_ns) for info in files])

    def retry(self, what: str, fetch: Callable[[], Any], pause_s: int = 1) -> Any:
        """Call `fetch()`, again after longer and longer pauses if the network fails. UserError: the last pause did not help."""
        try:
            return fetch()
        except OSError as error:
            if pause_s > LONGEST_PAUSE_S or isinstance(error, FileNotFoundError):
                raise UserError(f"cannot read {what}: {first_line(error)}") from error
            log.warning("cannot read %s, trying again: %s", what, first_line(error))
        self._process = 0  # with a new connection
        sleep(pause_s)
        return self.retry(what, fetch, 2 * pause_s)


def download(data_dir: str) -> Path:
    """Copy the shards below a URL that are not there yet to the user's cache folder. UserError: it cannot be done."""
    storage = Storage(data_dir)
    files = storage.files()
    folder = cache_folder() / "downloads" / storage.fingerprint(files)
    # One process of the machine downloads, the others wait.
    with locked(folder / ".lock"):
        targets = {folder / info.path[len(storage.root) :].lstrip("/"): info for info in files}
        missing = {target: info for target, info in targets.items() if not target.exists()}
        needed, free = sum(info.size for info in missing.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"--data_dir {data_dir} takes {needed / 1e9:.1f} GB and the disk of {folder} has "
                f"{free / 1e9:.1f} GB free; pass --streaming"
            )
        with ThreadPoolExecutor(8) as pool:
            copies = pool.map(lambda target: _copy(storage, missing[target].path, target), missing)
            list(tqdm(copies, "download", len(missing), unit="file", disable=not missing))
    return folder


def _copy(storage: Storage, path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    here = fs.LocalFileSystem()
    storage.retry(path, lambda: fs.copy_files(path, str(temporary), storage.system(), here))
    temporary.rename(target)
