"""The mirror against a real S3 server: what arrives, what outages and deaths leave, what comes back."""

import errno
import functools
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from boto3.s3.transfer import TransferConfig

from common import UserError
from common.run import checkpoint
from common.run import s3 as storage
from common.run.s3 import NothingStored, S3Mirror, probe, restore
from tests.conftest import S3Server

# Plus 3 s for the restart; try S3_OUTAGE_S=30, too.
OUTAGE_S = float(os.environ.get("S3_OUTAGE_S", "1"))
# Of a checkpoint.
FILES = 4
Handler = Callable[[str, dict[str, Any]], None]

_make_client = storage._client
_handlers: list[Handler] = []


@functools.cache
def _cached_client(flag: str, attempts: int, *settings: object) -> Any:
    """boto3 needs a tenth of a second to make a client."""
    client = _make_client(flag, attempts)

    def before_call(model: Any, params: dict[str, Any], **_: Any) -> None:
        for handler in _handlers:
            handler(model.name, params)

    client.meta.events.register("before-call.s3", before_call)
    return client


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def client(flag: str, attempts: int) -> Any:
        environment = [item for item in os.environ.items() if item[0].startswith("AWS_")]
        return _cached_client(flag, attempts, storage.READ_TIMEOUT_S, *sorted(environment))

    monkeypatch.setattr(storage, "_client", client)
    monkeypatch.setattr(storage, "RETRY_S", 0.1)
    monkeypatch.setattr(storage, "CLOSING_TRIES", 10_000)
    yield
    _handlers.clear()


@pytest.fixture
def address(s3: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of this test's own, on the server that boto3 finds in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    return f"s3://{s3.bucket}/{re.sub('[^a-z0-9]+', '-', request.node.name.lower())}"


@pytest.fixture
def intercept(address: str) -> Callable[[Handler], None]:
    """Have a function called with (operation, request) before every request of this test's; it may raise.

    The mirror of an earlier test may be in its last pass.
    """
    name = address.rpartition("/")[2]

    def add(handler: Handler) -> None:
        _handlers.append(lambda operation, request: name in request["url"] and handler(operation, request))

    return add


@pytest.fixture
def nobody(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address on a server that is not there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    return f"s3://{s3.bucket}/absent"


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from 5 MiB on, the least that S3 allows, go up in parts of it."""
    small = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, use_threads=False)
    monkeypatch.setattr(storage, "UP", small)


def make_run(folder: Path) -> Path:
    """A run with a file of each kind, two checkpoints, and what must not be mirrored."""
    files = {
        "config.yaml": b"model: resnet50\n",
        "training_log.csv": b"epoch,val_top1\n",
        "training_log.txt": b"",
        "logs/rank0.log": b"hello\n" * 1000,
        "plots/accuracy_live.png": os.urandom(20_000),
        "best_weights.safetensors": os.urandom(100_000),
        "name with späces+%&.txt": b"x",
        "summary.json.tmp": b"half a file",
        "half.tmp/file": b"half a folder",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    save_checkpoint(folder, 1)
    save_checkpoint(folder, 2)
    half = folder / "checkpoints/step_00000003.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a checkpoint")
    return folder


def save_checkpoint(folder: Path, step: int, size: int = 50_000, mirror: S3Mirror | None = None) -> None:
    """What a training loop does: a CSV row, a new checkpoint, the old ones deleted, and a word to the mirror."""
    folder.mkdir(exist_ok=True)
    with (folder / "training_log.csv").open("a") as file:
        file.write(f"{step},{step}.5\n")
    weights = {"w": torch.full((size,), step, dtype=torch.uint8)}
    files = {
        "model.safetensors": weights,
        "ema.safetensors": {"w": weights["w"][:1000]},
        "state.json": {"progress": {"step": step, "epochs_done": 0}},
    }
    checkpoint.write(folder / "checkpoints", files)
    also = mirror.uploading if mirror else ()
    checkpoint.prune(folder / "checkpoints", also=also)
    if mirror:
        mirror.submit()


def steps(folder: Path) -> list[int]:
    """The checkpoints of a run's folder, all of which must be whole."""
    found = sorted((folder / "checkpoints").glob("step_????????"))
    for path in found:
        checkpoint.read(path)
    return [int(path.name.removeprefix("step_")) for path in found]


def tree(folder: Path) -> dict[str, bytes]:
    """Path -> content of what belongs to a run, i.e. is not temporary."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if ".tmp" not in name}


def prefix_of(s3: S3Server, url: str) -> str:
    return url.removeprefix(f"s3://{s3.bucket}/")


def names(s3: S3Server, url: str) -> list[str]:
    """Of every object of a run."""
    prefix = f"{prefix_of(s3, url)}/"
    pages = s3.client.get_paginator("list_objects_v2").paginate(Bucket=s3.bucket, Prefix=prefix)
    return [item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])]


def remote(s3: S3Server, url: str) -> dict[str, bytes]:
    """Name -> content of every object of a run."""
    keys = {name: f"{prefix_of(s3, url)}/{name}" for name in names(s3, url)}
    return {
        name: s3.client.get_object(Bucket=s3.bucket, Key=key)["Body"].read() for name, key in keys.items()
    }


def remote_steps(s3: S3Server, url: str) -> list[int]:
    """The checkpoints that S3 has a manifest of."""
    manifests = re.findall(r"checkpoints/step_(\d+)/manifest.json", "\n".join(names(s3, url)))
    return sorted(map(int, manifests))


def put(s3: S3Server, url: str, name: str, body: bytes) -> None:
    s3.client.put_object(Bucket=s3.bucket, Key=f"{prefix_of(s3, url)}/{name}", Body=body)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_done(mirror: S3Mirror) -> bool:
    return mirror._lacking() == []


# What arrives


def test_everything_arrives_and_comes_back_byte_identical(
    s3: S3Server, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path / "run-1")
    mirror = S3Mirror(run, address)
    mirror.submit()
    save_checkpoint(run, 3, mirror=mirror)
    assert mirror.close(timeout_s=30) == {}

    assert "nothing is left" in caplog.text
    local = tree(run)
    assert remote(s3, f"{address}/run-1") == local
    fresh = restore(f"{address}/run-1", tmp_path / "elsewhere" / "run-1")
    assert tree(fresh) == local
    assert [path.name for path in fresh.parent.iterdir()] == ["run-1"]
    assert steps(fresh)[-2:] == [2, 3]


def test_a_restored_run_sends_only_what_is_new(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    sent: list[str] = []
    first = make_run(tmp_path / "a" / "run-1")
    S3Mirror(first, address).close(timeout_s=30)
    second = restore(f"{address}/run-1", tmp_path / "b" / "run-1")
    intercept(lambda operation, request: sent.append(request["url"]) if operation == "PutObject" else None)
    mirror = S3Mirror(second, address)
    save_checkpoint(second, 3)
    assert mirror.close(timeout_s=30) == {}
    assert set(re.findall(r"step_\d+", " ".join(sent))) == {"step_00000003"}
    assert remote(s3, f"{address}/run-1") == tree(second)
    assert tree(restore(f"{address}/run-1", tmp_path / "c" / "run-1")) == tree(second)


def test_two_runs_in_one_bucket_keep_apart(s3: S3Server, address: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("run-1", "run-10")]
    mirrors = [S3Mirror(run, address) for run in runs]
    save_checkpoint(runs[0], 3, mirror=mirrors[0])
    for mirror in mirrors:
        assert mirror.close(timeout_s=30) == {}
    for run in runs:
        assert remote(s3, f"{address}/{run.name}") == tree(run)
        assert tree(restore(f"{address}/{run.name}", tmp_path / "fresh" / run.name)) == tree(run)


def test_a_large_file_goes_up_in_parts(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch)
    run = tmp_path / "run-1"
    run.mkdir()
    sizes = {"below": (5 << 20) - 1, "one_part": 5 << 20, "three_parts": (10 << 20) + 1, "empty": 0}
    for name, size in sizes.items():
        (run / name).write_bytes(os.urandom(size))
    assert S3Mirror(run, address).close(timeout_s=30) == {}
    assert remote(s3, f"{address}/run-1") == tree(run)
    key = f"{prefix_of(s3, address)}/run-1/three_parts"
    assert s3.client.head_object(Bucket=s3.bucket, Key=key)["ETag"].endswith('-3"')


def test_checkpoints_that_the_folder_no_longer_has_are_deleted(
    s3: S3Server, address: str, tmp_path: Path
) -> None:
    run, url = tmp_path / "run-1", f"{address}/run-1"
    mirror = S3Mirror(run, address)
    for step in range(1, 6):
        save_checkpoint(run, step, mirror=mirror)
        wait_until(lambda: is_done(mirror))
    assert mirror.close(timeout_s=30) == {}
    assert remote(s3, url) == tree(run)
    assert remote_steps(s3, url) == [4, 5]


def test_nothing_is_deleted_before_the_folders_newest_is_on_s3(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    run, url = make_run(tmp_path / "run-1"), f"{address}/run-1"
    S3Mirror(run, address).close(timeout_s=30)
    intercept(functools.partial(refuse, "PutObject", "step_00000003/model", "EntityTooLarge", 400))
    mirror = S3Mirror(run, address)
    save_checkpoint(run, 3)
    assert mirror.close(timeout_s=1)
    assert remote_steps(s3, url) == [1, 2]
    shutil.rmtree(run / "checkpoints/step_00000003")
    S3Mirror(run, address).close(timeout_s=30)
    assert remote_steps(s3, url) == [2]
    mirror = S3Mirror(run, address)
    shutil.rmtree(run / "checkpoints/step_00000002")
    mirror.close(timeout_s=30)
    assert remote_steps(s3, url) == [2]


def test_another_course_from_an_older_checkpoint_takes_the_place_of_the_first(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    run, url = tmp_path / "run-1", f"{address}/run-1"
    for step in (1, 3, 5):
        save_checkpoint(run, step)
    S3Mirror(run, address).close(timeout_s=30)
    # After --resume of step 3, the save of step 4 deletes step 5.
    mirror = S3Mirror(run, address)
    save_checkpoint(run, 4)
    mirror.close(timeout_s=30)
    assert remote(s3, url) == tree(run)
    assert remote_steps(s3, url) == [3, 4]

    # The same step with other content: never both under one manifest.
    def check(operation: str, request: dict[str, Any]) -> None:
        if operation == "PutObject" and "step_00000004/" in request["url"]:
            assert remote_steps(s3, url) == [3]

    intercept(check)
    shutil.rmtree(run / "checkpoints/step_00000004")
    save_checkpoint(run, 4, size=60_000)
    assert S3Mirror(run, address).close(timeout_s=30) == {}
    assert remote(s3, url) == tree(run)


# Nothing torn


def test_a_checkpoint_is_not_sent_before_its_row_of_the_log(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    run, url = tmp_path / "run-1", f"{address}/run-1"
    checked: list[int] = []

    def save_in_mid_pass(operation: str, request: dict[str, Any]) -> None:
        if operation == "PutObject" and "training_log_sent" in request["url"]:
            save_checkpoint(run, 2)
        if operation == "PutObject" and (match := re.search(r"step_(\d+)/manifest", request["url"])):
            assert f"\n{int(match[1])}," in remote(s3, url)["training_log.csv"].decode()
            checked.append(int(match[1]))

    intercept(save_in_mid_pass)
    run.mkdir()
    (run / "training_log.csv").write_text("epoch,val_top1\n")
    (run / "training_log_sent").touch()
    save_checkpoint(run, 1)
    mirror = S3Mirror(run, address)
    mirror.submit()
    wait_until(lambda: checked == [1])
    assert mirror.close(timeout_s=30) == {}
    assert checked == [1, 2]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "pruned"])
def test_saves_during_a_slow_upload(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None], kept: bool
) -> None:
    from botocore.exceptions import ReadTimeoutError

    run, url = tmp_path / "run-1", f"{address}/run-1"
    uploading, go_on = threading.Event(), threading.Event()
    manifests: list[str] = []

    def hold(operation: str, request: dict[str, Any]) -> None:
        if operation == "PutObject" and "step_00000001/model" in request["url"] and not uploading.is_set():
            uploading.set()
            assert go_on.wait(20)
            if kept:
                raise ReadTimeoutError(endpoint_url="", error="")
        if operation == "PutObject" and "manifest.json" in request["url"]:
            manifests.append(request["url"])

    intercept(hold)
    mirror = S3Mirror(run, address)
    save_checkpoint(run, 1, mirror=mirror)
    assert uploading.wait(10)
    for step in (2, 3, 4):
        save_checkpoint(run, step, mirror=mirror if kept else None)
    mirror.submit()
    assert mirror.uploading == {"step_00000001"}
    assert steps(run) == ([1, 3, 4] if kept else [3, 4])
    go_on.set()
    wait_until(lambda: mirror.uploading == set())
    save_checkpoint(run, 5, mirror=mirror)
    assert mirror.close(timeout_s=30) == {}
    assert remote(s3, url) == tree(run)
    assert ("step_00000001" in manifests[0]) == kept
    assert steps(restore(url, tmp_path / "b"))[-1] == 5


@pytest.mark.parametrize("size", [4, 6 << 20], ids=["at_once", "in_parts"])
def test_a_log_that_grows_in_mid_upload_arrives_as_it_was(
    s3: S3Server,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    intercept: Callable[[Handler], None],
    size: int,
) -> None:
    in_parts(monkeypatch)
    run, url = tmp_path / "run-1", f"{address}/run-1"
    run.mkdir()
    first = b"1,1\n" * (size // 4)
    log = run / "training_log.csv"
    log.write_bytes(first)

    def append(operation: str, request: dict[str, Any]) -> None:
        begins = operation in ("PutObject", "CreateMultipartUpload") and log.name in request["url"]
        if begins and log.stat().st_size < len(first) + 8:
            with log.open("a") as file:
                file.write("2,2\n")

    intercept(append)
    mirror = S3Mirror(run, address)
    mirror.submit()
    wait_until(lambda: log.name in mirror._sent)
    # Whole lines, whether or not one came in mid upload.
    assert remote(s3, url)[log.name] in (first, first + b"2,2\n")
    assert mirror.close(timeout_s=30) == {}
    assert remote(s3, url)[log.name] == first + b"2,2\n2,2\n"


def test_death_between_any_two_requests_leaves_a_whole_checkpoint_and_its_log(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    from botocore.exceptions import EndpointConnectionError

    requests_left = [10_000]

    def cut(operation: str, request: dict[str, Any]) -> None:
        requests_left[0] -= 1
        if requests_left[0] < 0:
            raise EndpointConnectionError(endpoint_url="cut")

    intercept(cut)
    run, url = tmp_path / "run-1", f"{address}/run-1"
    save_checkpoint(run, 1)
    save_checkpoint(run, 2)
    assert S3Mirror(run, address).close(timeout_s=10) == {}
    arrived = []
    for requests in range(100):
        step = requests + 3
        requests_left[0] = requests
        mirror = S3Mirror(run, address)
        save_checkpoint(run, step, mirror=mirror)
        while requests_left[0] >= 0 and not (is_done(mirror) and remote_steps(s3, url)[0] == step - 1):
            time.sleep(0.01)
        pending = mirror.close(timeout_s=0)
        mirror._thread.join(5)
        was_cut, requests_left[0] = requests_left[0] < 0, 10_000

        stored = names(s3, url)
        for step_there in remote_steps(s3, url):
            assert sum(f"step_{step_there:08}/" in name for name in stored) == FILES
        fresh = restore(url, tmp_path / f"fresh-{requests}")
        newest = steps(fresh)[-1]
        assert newest in (step - 1, step)
        assert len(steps(fresh)) >= 2
        arrived.append(newest == step)
        assert pending or newest == step  # close() promises no more than what is there
        assert f"\n{newest}," in (fresh / "training_log.csv").read_text()

        S3Mirror(run, address).close(
            timeout_s=10
        )  # the next process brings it all, and the leftovers are gone
        assert remote(s3, url) == tree(run)
        if not was_cut:
            break
    else:
        pytest.fail("the upload never ended")
    assert arrived == sorted(arrived)
    assert set(arrived) == {False, True}
    assert len(arrived) > 12


# Outages


def test_a_server_that_dies_in_mid_upload_and_returns_loses_nothing(
    s3: S3Server,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    intercept: Callable[[Handler], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    in_parts(monkeypatch)
    parts: list[str] = []
    restart = threading.Timer(OUTAGE_S, s3.start)

    def die_at_the_third_part(operation: str, request: dict[str, Any]) -> None:
        if operation == "UploadPart":
            parts.append(request["url"])
            if len(parts) == 3:
                s3.stop()
                restart.start()

    intercept(die_at_the_third_part)
    run = make_run(tmp_path / "run-1")
    mirror = S3Mirror(run, address)
    save_checkpoint(run, 3, size=20 << 20, mirror=mirror)
    wait_until(lambda: not s3.is_running)
    save_checkpoint(run, 4, size=20 << 20, mirror=mirror)  # training goes on meanwhile
    pending = mirror.close(timeout_s=OUTAGE_S + 30)
    restart.join()
    assert pending == {}
    assert len(parts) > 8  # the file was begun anew
    assert tree(restore(f"{address}/run-1", tmp_path / "b")) == tree(run)
    messages = [record.getMessage() for record in caplog.records if record.name == storage.__name__]
    assert sum("uploads are retried" in message for message in messages) <= 3  # not one for each attempt
    assert "S3: uploads work again" in messages


def test_without_a_server_training_ends_well_and_hears_what_is_missing(
    nobody: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run-1")
    mirror = S3Mirror(run, nobody)
    assert "training goes on" in caplog.text
    mirror.submit()
    start = time.monotonic()
    pending = mirror.close(timeout_s=1)
    assert 0.9 < time.monotonic() - start < 2
    assert set(pending) == {
        *(name for name in tree(run) if not name.startswith("checkpoints/")),
        "checkpoints/step_00000001",
        "checkpoints/step_00000002",
    }
    assert f"{len(pending)} NOT uploaded" in caplog.text
    assert pending["config.yaml"] == "EndpointConnectionError"


def test_the_end_of_training_does_not_wait_long_for_a_server_that_is_away(
    nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CLOSING_TRIES", 3)
    mirror = S3Mirror(make_run(tmp_path / "run-1"), nobody)
    start = time.monotonic()
    assert mirror.close(timeout_s=60)
    assert time.monotonic() - start < 10


def test_a_server_that_comes_late_is_found(s3: S3Server, address: str, tmp_path: Path) -> None:
    s3.stop()
    run = make_run(tmp_path / "run-1")
    mirror = S3Mirror(run, address)
    mirror.submit()
    s3.start()
    assert mirror.close(timeout_s=30) == {}
    assert tree(restore(f"{address}/run-1", tmp_path / "b")) == tree(run)


def test_submit_never_waits_and_only_the_newest_goes_up(
    s3: S3Server,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    intercept: Callable[[Handler], None],
) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 0.5)
    manifests = set()

    def count(operation: str, request: dict[str, Any]) -> None:
        if operation == "PutObject" and request["url"].endswith("manifest.json"):
            manifests.add(request["url"])

    intercept(count)
    run = tmp_path / "run-1"
    mirror = S3Mirror(run, address)
    times = []
    with s3.paused():
        for step in range(1, 16):
            save_checkpoint(run, step, mirror=mirror)
            start = time.perf_counter()
            mirror.submit()
            times.append(time.perf_counter() - start)
            time.sleep(0.03)
        assert max(times) < 0.1
        assert len(steps(run)) <= 3  # what was replaced during the outage is not held
        threading.Timer(0.8, s3.resume).start()  # after timeouts, to be told from files that cannot be read
        assert mirror.close(timeout_s=60) == {}
    assert len(manifests) <= 4  # of 15
    fresh = restore(f"{address}/run-1", tmp_path / "b")
    assert tree(fresh) == tree(run)
    assert steps(fresh)[-1] == 15


def test_requests_that_are_carried_out_late_do_no_harm(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    run, url = tmp_path / "run-1", f"{address}/run-1"
    late = {  # what timed out an hour ago
        "training_log.csv": b"old",
        "checkpoints/step_00000001/manifest.json": b"{}",
        "checkpoints/step_00000001/ema.safetensors": b"?",
    }

    def carry_out(operation: str, request: dict[str, Any]) -> None:
        if operation == "ListObjectsV2" and late and mirror._uploads:
            for name, body in late.items():
                put(s3, url, name, body)
            late.clear()
            lost = f"{prefix_of(s3, url)}/checkpoints/step_00000003/model.safetensors"
            s3.client.delete_object(Bucket=s3.bucket, Key=lost)

    mirror = S3Mirror(run, address)
    intercept(carry_out)
    for step in (2, 3):
        save_checkpoint(run, step)
    assert mirror.close(timeout_s=30) == {}
    assert not late
    assert remote(s3, url) == tree(run)


def test_a_manifest_whose_answer_was_lost_is_sent_again(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    from botocore.exceptions import ReadTimeoutError

    run, url, lost = tmp_path / "run-1", f"{address}/run-1", []

    def lose(operation: str, request: dict[str, Any]) -> None:
        if operation == "PutObject" and "step_00000002/manifest" in request["url"] and not lost:
            lost.append(request["url"])
            body = request["body"].read()
            put(s3, url, "checkpoints/step_00000002/manifest.json", body)
            raise ReadTimeoutError(endpoint_url="", error="")

    intercept(lose)
    mirror = S3Mirror(run, address)
    for step in (1, 2):
        save_checkpoint(run, step, mirror=mirror)
    assert mirror.close(timeout_s=30) == {}
    assert lost
    assert remote(s3, url) == tree(run)


def test_a_process_that_forgets_to_close_still_exits(s3: S3Server, address: str, tmp_path: Path) -> None:
    code = """
import pathlib, sys, time
from common.run.s3 import S3Mirror
mirror = S3Mirror(pathlib.Path(sys.argv[1]), sys.argv[2])
print("started", flush=True)
sys.stdin.readline()
mirror.submit()
time.sleep(0.5)
"""
    run = make_run(tmp_path / "run-1")
    command = [sys.executable, "-c", code, str(run), address]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout.readline() == "started\n"
        with s3.paused():  # the thread hangs in a request that nobody answers
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.wait(timeout=15) == 0


# What is wrong is said in one sentence


GOOD = "s3://training-runs/x"


@pytest.mark.parametrize(
    ("change", "url", "says"),
    [
        (
            {"AWS_ACCESS_KEY_ID": "AKIAWRONG"},
            GOOD,
            "(ListObjectsV2 answered InvalidAccessKeyId)",
        ),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, GOOD, "(ListObjectsV2 answered SignatureDoesNotMatch)"),
        ({"AWS_SESSION_TOKEN": "token-that-expired"}, GOOD, "(ListObjectsV2 answered InvalidAccessKeyId)"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            GOOD,
            "(NoCredentialsError): check the bucket, its rights and boto3's credentials",
        ),
        ({"AWS_PROFILE": "nobody"}, GOOD, "ProfileNotFound"),
        ({}, "s3://no-such-bucket/x", "(ListObjectsV2 answered NoSuchBucket)"),
        ({}, "training-runs/x", "--s3 takes s3://bucket/prefix"),
        ({}, "s3://Key:secret-that@training-runs/x", "--s3 takes s3://bucket/prefix"),
        ({}, "s3://training-runs/../x", "--s3 takes s3://bucket/prefix"),
    ],
)
def test_a_wrong_start_is_one_sentence_without_a_secret(
    s3: S3Server,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, str | None],
    url: str,
    says: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
    for start in (lambda: S3Mirror(tmp_path / "run-1", url), lambda: probe(url)):
        with pytest.raises(UserError) as caught:
            start()
        sentence = str(caught.value)
        assert says in sentence
        assert sentence.startswith("--s3 ") or sentence.startswith("--s3:")
        assert "\n" not in sentence
        for secret in (s3.secret_key, "wrong-secret", "secret-that", "AKIA", "token-that"):
            assert secret not in sentence + caplog.text


def test_a_probe_leaves_nothing(s3: S3Server, address: str) -> None:
    put(s3, address, "notes.txt", b"not ours")
    for url in (address, f"s3://{s3.bucket}"):
        assert probe(url) == ""
    assert names(s3, address) == ["notes.txt"]
    assert ".probe" not in storage._list(s3.client, s3.bucket, "")
    s3.stop()
    assert probe(address) == "EndpointConnectionError"
    s3.start()


@pytest.mark.parametrize("operation", ["PutObject", "DeleteObject"])
def test_a_key_that_may_only_read_is_noticed_before_training(
    address: str, tmp_path: Path, intercept: Callable[[Handler], None], operation: str
) -> None:
    intercept(functools.partial(refuse, operation, "", "AccessDenied", 403))
    for start in (lambda: probe(address), lambda: S3Mirror(make_run(tmp_path / "run-1"), address)):
        with pytest.raises(
            UserError,
            match=rf"^--s3 .* cannot be used \({operation} answered AccessDenied\): check the bucket",
        ):
            start()


def test_a_server_that_is_overburdened_is_out_of_reach(
    address: str, intercept: Callable[[Handler], None]
) -> None:
    intercept(functools.partial(refuse, "PutObject", "", "SlowDown", 503))
    assert probe(address) == "PutObject answered SlowDown"


def test_a_compatible_server_is_not_asked_for_a_host_per_bucket(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.example:9000")
    client = storage._client("--s3", attempts=1)
    url = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
    assert url.startswith("http://minio.example:9000/bucket/key?")


@pytest.mark.parametrize(
    "endpoint", ["http://user:hunter2@127.0.0.1:9", "user:hunter2@127.0.0.1", "http://user:hunter2 @x"]
)
def test_an_endpoints_password_is_not_repeated(
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    endpoint: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    said = ""
    try:
        S3Mirror(tmp_path / "run-1", "s3://training-runs/x").close(timeout_s=0.3)
    except UserError as error:
        said = str(error)
        assert said.startswith("--s3: boto3 refuses its own configuration")
    assert said or "out of reach" in caplog.text
    assert "hunter2" not in said + caplog.text


def test_another_runs_checkpoints_are_not_overwritten(s3: S3Server, address: str, tmp_path: Path) -> None:
    run, url = make_run(tmp_path / "a" / "run-1"), f"{address}/run-1"
    S3Mirror(run, address).close(timeout_s=30)
    before = remote(s3, url)
    with pytest.raises(UserError, match=f"holds checkpoints/step_00000002, later than .* --resume {url}"):
        S3Mirror(tmp_path / "b" / "run-1", address)
    # The same run's own folder may go on, of course.
    S3Mirror(run, address).close(timeout_s=30)
    assert remote(s3, url) == before


def test_what_another_machine_has_trained_since_is_not_deleted(
    s3: S3Server, address: str, tmp_path: Path
) -> None:
    here, url = make_run(tmp_path / "a" / "run-1"), f"{address}/run-1"
    S3Mirror(here, address).close(timeout_s=30)
    there = restore(url, tmp_path / "b" / "run-1")
    save_checkpoint(there, 3)
    S3Mirror(there, address).close(timeout_s=30)
    before = remote(s3, url)
    with pytest.raises(UserError, match="holds checkpoints/step_00000003, later than"):
        S3Mirror(here, address)
    with pytest.raises(UserError, match="move that folder away"):
        restore(url, here)
    assert remote(s3, url) == before
    # It is as far, or farther: a machine that was stopped goes on in its own folder by the same command.
    assert restore(url, there) == there
    save_checkpoint(there, 4)
    assert restore(url, there) == there
    assert "step_00000004" in {path.name for path in (there / "checkpoints").iterdir()}


def refuse(what: str, where: str, code: str, status: int, operation: str, request: dict[str, Any]) -> None:
    from botocore.exceptions import ClientError

    if operation == what and where in request["url"]:
        answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(answer, operation)


def test_one_file_that_cannot_be_sent_does_not_hold_up_the_others(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    intercept(functools.partial(refuse, "PutObject", "refused.txt", "EntityTooLarge", 400))
    intercept(functools.partial(refuse, "PutObject", "step_00000002/model", "EntityTooLarge", 400))
    run = make_run(tmp_path / "run-1")
    (run / "refused.txt").write_text("x")
    (run / "outside.txt").symlink_to("/etc/hostname")
    assert S3Mirror(run, address).close(timeout_s=1) == {
        "refused.txt": "PutObject answered EntityTooLarge",
        "checkpoints/step_00000002": "PutObject answered EntityTooLarge",
    }
    objects = remote(s3, f"{address}/run-1")
    assert set(objects) & {"refused.txt", "outside.txt"} == set()
    assert "config.yaml" in objects
    assert remote_steps(s3, f"{address}/run-1") == [1]


def test_what_is_not_on_s3_as_it_was_sent_is_sent_again(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    run, url, sent = tmp_path / "run-1", f"{address}/run-1", []

    def alter(operation: str, request: dict[str, Any]) -> None:
        sent.extend([operation] if operation == "PutObject" and ".probe" not in request["url"] else [])
        if operation == "ListObjectsV2" and len(sent) == 2:
            put(s3, url, "file", b"half")
            s3.client.delete_object(Bucket=s3.bucket, Key=f"{prefix_of(s3, url)}/other")

    intercept(alter)
    run.mkdir()
    (run / "file").write_bytes(b"important")
    (run / "other").write_bytes(b"important too")
    assert S3Mirror(run, address).close(timeout_s=10) == {}
    assert len(sent) == 4
    assert remote(s3, url) == {"file": b"important", "other": b"important too"}


def test_s3_is_given_a_checksum_of_what_it_should_get(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    """It refuses a body that has another one."""
    run, given = tmp_path / "run-1", []

    def note(operation: str, request: dict[str, Any]) -> None:
        if operation == "PutObject" and request["url"].endswith("/file"):
            given.append(" ".join(f"{name} {value}" for name, value in request["headers"].items()).lower())

    intercept(note)
    run.mkdir()
    (run / "file").write_bytes(b"important")
    S3Mirror(run, address).close(timeout_s=10)
    assert len(given) == 1
    assert "x-amz-sdk-checksum-algorithm crc32" in given[0]


def test_a_timeout_is_not_taken_for_a_file_that_cannot_be_read(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    from botocore.exceptions import ConnectTimeoutError, ReadTimeoutError, SSLError

    # All three are OSErrors, too.
    errors = [cls(endpoint_url="", error="") for cls in (ConnectTimeoutError, ReadTimeoutError, SSLError)]

    def fail(operation: str, request: dict[str, Any]) -> None:
        if "training_log.csv" in request["url"] and errors:
            raise errors.pop()

    intercept(fail)
    run = make_run(tmp_path / "run-1")
    assert S3Mirror(run, address).close(timeout_s=10) == {}
    assert errors == []


# What restoring refuses


def test_a_key_that_would_leave_the_folder_is_left_out(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run-1")
    S3Mirror(run, address).close(timeout_s=30)
    real = storage._list  # the test's server refuses to store such keys, others do not
    unsafe = (
        "../x",
        "/etc/x",
        "a/../../x",
        "a//x",
        "./x",
        "..",
        "a\\..\\x",
        "a\0x",
        "checkpoints/../x",
        "x/",
    )
    monkeypatch.setattr(storage, "_list", lambda *args: {**real(*args), **dict.fromkeys(unsafe, 1)})
    assert tree(restore(f"{address}/run-1", tmp_path / "b" / "run-1")) == tree(run)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["run-1"]


def test_a_checkpoint_that_is_damaged_on_s3_is_passed_over(
    s3: S3Server, address: str, tmp_path: Path
) -> None:
    run, url = make_run(tmp_path / "run-1"), f"{address}/run-1"
    S3Mirror(run, address).close(timeout_s=30)
    damaged = "checkpoints/step_00000002/model.safetensors"
    put(s3, url, damaged, b"#" * (run / damaged).stat().st_size)
    put(s3, url, "folder/", b"")
    put(s3, url, "checkpoints/step_00000003/model.safetensors", b"unfinished")
    fresh = restore(url, tmp_path / "b")
    assert set(tree(fresh)) == set(tree(run))
    files, sentences = checkpoint.newest_whole(fresh / "checkpoints")
    assert files["state.json"]["progress"]["step"] == 1
    assert "model.safetensors is damaged" in sentences[0]


def test_a_download_that_breaks_off_is_begun_again(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import IncompleteReadError
    from botocore.response import StreamingBody

    run = make_run(tmp_path / "run-1")
    S3Mirror(run, address).close(timeout_s=30)
    real, breaks = StreamingBody.read, [1, 2, 3]

    def break_off(self: Any, amt: int | None = None) -> bytes:
        if breaks and real(self, 10):
            breaks.pop()
            raise IncompleteReadError(actual_bytes=10, expected_bytes=1000)
        return real(self, amt)

    monkeypatch.setattr(StreamingBody, "read", break_off)
    assert tree(restore(f"{address}/run-1", tmp_path / "b")) == tree(run)
    assert not breaks


def test_restoring_says_what_is_wrong_and_leaves_no_half_folder(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, url = make_run(tmp_path / "run-1"), f"{address}/run-1"
    S3Mirror(run, address).close(timeout_s=30)
    put(s3, f"{address}/run-3", "notes.txt", b"no run")
    for name in ("run-2", "run-3"):
        with pytest.raises(NothingStored, match="there is no run at this address"):
            restore(f"{address}/{name}", tmp_path / "b")
    with pytest.raises(UserError, match="answered NoSuchBucket"):
        restore("s3://no-such-bucket/run-1", tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "RESTORE_ATTEMPTS", 1)
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(UserError, match=r"S3 cannot be used \(EndpointConnectionError\)"):
            restore(url, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(UserError, match=r"--resume .* cannot write to .*: No space left on device"):
            restore(url, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            restore(url, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    (tmp_path / "b").mkdir()  # an empty folder is as good as none
    assert tree(restore(url, tmp_path / "b")) == tree(run)


def full(self: Path, **_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(self: Path, target: Path) -> None:
    raise KeyboardInterrupt
