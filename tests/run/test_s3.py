"""The mirror against a real S3 server: what arrives, what outages and deaths leave, what comes back."""

import errno
import functools
import hashlib
import json
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

from common import UserError
from common.run import s3 as storage
from common.run.s3 import S3Mirror, Stored, restore
from tests.conftest import S3Server

OUTAGE_S = float(os.environ.get("S3_OUTAGE_S", "3"))  # plus 3 s for the restart; try S3_OUTAGE_S=30, too
FILES = 4  # of a checkpoint
Handler = Callable[[str, dict[str, Any]], None]


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(storage, "LONGEST_RETRY_S", 0.2)
    monkeypatch.setattr(storage, "CLOSING_RETRY_S", 0.2)
    monkeypatch.setattr(storage, "CLOSING_TRIES", 10_000)


@pytest.fixture
def address(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own."""
    return f"s3://{s3.bucket}/{re.sub('[^a-z0-9]+', '-', request.node.name.lower())}"


@pytest.fixture
def intercept(monkeypatch: pytest.MonkeyPatch) -> Callable[[Handler], None]:
    """Have a function called with (operation, request) before every request of storage; it may raise."""
    real, handlers = functools.cache(storage._client), []  # a client takes boto3 a tenth of a second

    def hooked(*args: Any, **kwargs: Any) -> Any:
        client = real(*args, **kwargs)

        def before_call(model: Any, params: dict[str, Any], **_: Any) -> None:
            for handler in handlers:
                handler(model.name, params)

        client.meta.events.register("before-call.s3", before_call, unique_id="intercept")
        return client

    monkeypatch.setattr(storage, "_client", hooked)
    return handlers.append


def make_run(folder: Path) -> Path:
    """A run with a file of each kind, one checkpoint under two names, and what must not be mirrored."""
    files = {
        "config.yaml": b"model: resnet50\n",
        "training_log.csv": b"epoch,val_top1\n1,10.0\n",
        "training_log.txt": b"",
        "logs/process_0.log": b"hello\n" * 1000,
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
    save_checkpoint(folder, step=1)
    shutil.copytree(folder / "checkpoints/last", folder / "checkpoints/best")
    (folder / "checkpoints/last.tmp").mkdir()
    (folder / "checkpoints/last.tmp/model.safetensors").write_bytes(b"half a checkpoint")
    return folder


def save_checkpoint(folder: Path, step: int, size: int = 50_000) -> None:
    """What a training loop does: a CSV row, a new folder under a temporary name, then two renames."""
    folder.mkdir(exist_ok=True)
    with (folder / "training_log.csv").open("a") as file:
        file.write(f"{step},{step}.5\n")
    new, last, previous = (folder / "checkpoints" / name for name in ("new.tmp", "last", "previous"))
    new.mkdir(parents=True)
    (new / "model.safetensors").write_bytes(step.to_bytes(4, "big") * (size // 4))
    (new / "ema.safetensors").write_bytes(bytes([step]) * 1000)
    (new / "state.json").write_text(json.dumps({"step": step}))
    (new / "manifest.json").write_text(json.dumps({file.name: sha256(file) for file in new.iterdir()}))
    shutil.rmtree(previous, ignore_errors=True)
    if last.exists():
        last.rename(previous)
    new.rename(last)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_whole(checkpoint: Path) -> bool:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {file.name: sha256(file) for file in checkpoint.iterdir() if file.name != "manifest.json"}
    return files == manifest


def step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "state.json").read_text())["step"]


def tree(folder: Path) -> dict[str, bytes]:
    """Path -> content of what belongs to a run, i.e. is neither temporary nor the mirror's own."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    ours = re.compile(r"(^|/)[^/]*\.tmp(/|$)|^\.s3-spool/")
    return {name: path.read_bytes() for name, path in files.items() if not ours.search(name)}


def remote(s3: S3Server, url: str) -> dict[str, bytes]:
    """Name -> content of every object of a run, each checked against the SHA-256 in its metadata."""
    bucket, prefix = url.removeprefix("s3://").split("/", 1)
    client, found = s3.client, {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        for item in page.get("Contents", []):
            answer = client.get_object(Bucket=bucket, Key=item["Key"])
            content, name = answer["Body"].read(), item["Key"].removeprefix(f"{prefix}/")
            assert len(content) == item["Size"]
            if not is_index(name):
                assert answer["Metadata"]["sha256"] == hashlib.sha256(content).hexdigest(), name
            found[name] = content
    return found


def is_index(name: str) -> bool:
    return name.startswith("checkpoints/index-")


def index_of(objects: dict[str, bytes]) -> dict[str, str]:
    return json.loads(objects[max(filter(is_index, objects))])["checkpoints"]


def is_plain(name: str) -> bool:
    return not name.startswith("checkpoints/")


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# What arrives


def test_everything_arrives_and_comes_back_byte_identical(s3: S3Server, address: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run-1")
    mirror = S3Mirror(run, address, s3.endpoint)
    mirror.submit()
    save_checkpoint(run, step=2)
    mirror.submit()
    report = mirror.close(timeout_s=30)

    assert report.pending == []
    assert {"training_log.csv", "checkpoints/last", "checkpoints/best"} <= set(report.uploaded)
    assert "nothing is left" in str(report)
    assert not (run / ".s3-spool").exists()
    objects = remote(s3, f"{address}/run-1")
    index = index_of(objects)
    assert index["best"] == index["previous"] != index["last"]  # one copy serves both names
    local = tree(run)
    assert report.bytes >= sum(len(content) for name, content in local.items() if "previous" not in name)
    assert set(filter(is_plain, objects)) == set(filter(is_plain, local))
    assert len(objects) == sum(map(is_plain, local)) + 2 * FILES + 1

    fresh = restore(f"{address}/run-1", tmp_path / "elsewhere" / "run-1", s3.endpoint)
    assert tree(fresh) == local
    assert [path.name for path in fresh.parent.iterdir()] == ["run-1"]
    assert is_whole(fresh / "checkpoints/last")


def test_a_restored_run_sends_only_what_is_new(s3: S3Server, address: str, tmp_path: Path) -> None:
    first = make_run(tmp_path / "a" / "run-1")
    S3Mirror(first, address, s3.endpoint).close(timeout_s=30)
    second = restore(f"{address}/run-1", tmp_path / "b" / "run-1", s3.endpoint)
    mirror = S3Mirror(second, address, s3.endpoint)
    save_checkpoint(second, step=2)
    save_checkpoint(second, step=3)
    report = mirror.close(timeout_s=30)
    assert "checkpoints/best" not in report.uploaded  # S3 had it
    third = restore(f"{address}/run-1", tmp_path / "c" / "run-1", s3.endpoint)
    assert tree(third) == tree(second)


def test_a_large_file_goes_up_in_parts(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 << 20)
    run = tmp_path / "run-1"
    run.mkdir()
    sizes = {"below": (5 << 20) - 1, "one_part": 5 << 20, "three_parts": (10 << 20) + 1, "empty": 0}
    for name, size in sizes.items():
        (run / name).write_bytes(os.urandom(size))
    assert S3Mirror(run, address, s3.endpoint).close(timeout_s=30).pending == []
    objects = remote(s3, f"{address}/run-1")
    assert {name: objects[name] for name in sizes} == tree(run)
    key = f"{address}/run-1/three_parts".removeprefix(f"s3://{s3.bucket}/")
    assert s3.client.head_object(Bucket=s3.bucket, Key=key)["ETag"].endswith('-3"')


def test_replaced_checkpoints_are_deleted_from_s3(s3: S3Server, address: str, tmp_path: Path) -> None:
    run = tmp_path / "run-1"
    mirror = S3Mirror(run, address, s3.endpoint)
    for step in range(1, 6):
        save_checkpoint(run, step)
        mirror.submit()
        wait_until(lambda: mirror._done == mirror._asked)
    mirror.close(timeout_s=30)
    objects = remote(s3, f"{address}/run-1")
    assert len({name.split("/")[1] for name in objects if name.endswith("manifest.json")}) == 2
    fresh = restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)
    assert [step_of(fresh / "checkpoints" / name) for name in ("previous", "last")] == [4, 5]


# Nothing torn


def test_a_checkpoint_replaced_in_mid_upload_arrives_as_it_was(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    run = tmp_path / "run-1"
    uploading, go_on = threading.Event(), threading.Event()

    def hold(operation: str, request: dict[str, Any]) -> None:
        if operation == "PutObject" and "model.safetensors" in request["url"]:
            uploading.set()
            assert go_on.wait(20)

    intercept(hold)
    mirror = S3Mirror(run, address, s3.endpoint)
    save_checkpoint(run, step=1)
    mirror.submit()
    assert uploading.wait(10)
    for step in (2, 3, 4):  # step 1 is gone from the folder while it is being sent
        save_checkpoint(run, step)
        mirror.submit()
    links = [link.stat().st_nlink for link in (run / ".s3-spool").rglob("model.safetensors")]
    assert sorted(links) == [1, 2, 2]  # 1 costs disk space, 3 and 4 are in the folder as well, 2 is dropped
    assert is_whole(run / "checkpoints/last")
    go_on.set()
    assert mirror.close(timeout_s=30).pending == []
    for name, content in remote(s3, f"{address}/run-1").items():
        assert "model" not in name or len(content) == 50_000
    fresh = restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)
    assert tree(fresh) == tree(run)


@pytest.mark.parametrize("size", [4, 6 << 20], ids=["at_once", "in_parts"])
def test_a_log_that_grows_in_mid_upload_arrives_as_it_was(
    s3: S3Server,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    intercept: Callable[[Handler], None],
    size: int,
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 << 20)
    run = tmp_path / "run-1"
    run.mkdir()
    first = b"1,1\n" * (size // 4)
    (run / "training_log.csv").write_bytes(first)

    def append(operation: str, request: dict[str, Any]) -> None:
        if operation in ("PutObject", "CreateMultipartUpload") and "training_log.csv" in request["url"]:
            with (run / "training_log.csv").open("a") as file:
                file.write("2,2\n")

    intercept(append)
    mirror = S3Mirror(run, address, s3.endpoint)
    mirror.submit()
    wait_until(lambda: mirror._done == mirror._asked)
    assert remote(s3, f"{address}/run-1")["training_log.csv"] == first
    assert mirror.close(timeout_s=30).pending == []  # what came after close() is not its business
    assert remote(s3, f"{address}/run-1")["training_log.csv"] == first + b"2,2\n"


def test_death_between_any_two_requests_leaves_a_whole_checkpoint_and_its_log(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    from botocore.exceptions import EndpointConnectionError

    requests_left = [0]

    def cut(operation: str, request: dict[str, Any]) -> None:
        requests_left[0] -= 1
        if requests_left[0] < 0:
            raise EndpointConnectionError(endpoint_url="cut")

    intercept(cut)
    run, url = tmp_path / "run-1", f"{address}/run-1"
    save_checkpoint(run, step=1)
    save_checkpoint(run, step=2)
    requests_left[0] = 10_000
    assert S3Mirror(run, address, s3.endpoint).close(timeout_s=10).pending == []
    arrived = []
    for requests in range(2, 100):  # two open the mirror
        step = requests + 1
        requests_left[0] = requests
        mirror = S3Mirror(run, address, s3.endpoint)
        save_checkpoint(run, step)
        mirror.submit()
        wait_until(lambda mirror=mirror: requests_left[0] < 0 or mirror._done == mirror._asked)
        report = mirror.close(timeout_s=0)
        was_cut, requests_left[0] = requests_left[0] < 0, 10_000

        fresh = restore(url, tmp_path / f"fresh-{requests}", s3.endpoint)
        checkpoints = list((fresh / "checkpoints").iterdir())
        assert len(checkpoints) == 2
        assert all(is_whole(checkpoint) for checkpoint in checkpoints)
        newest = step_of(fresh / "checkpoints/last")
        assert newest == max(step_of(checkpoint) for checkpoint in checkpoints)
        assert newest in (step - 1, step)
        arrived.append(newest == step)
        assert report.pending or newest == step  # the report promises no more than what is there
        assert f"\n{newest}," in (fresh / "training_log.csv").read_text()
        objects = remote(s3, url)
        for manifest in (name for name in objects if name.endswith("manifest.json")):
            others = [name for name in objects if Path(name).parent == Path(manifest).parent]
            assert len(others) == FILES  # nor does a manifest

        S3Mirror(run, address, s3.endpoint).close(timeout_s=10)  # the next process brings it all
        objects = remote(s3, url)
        assert len(objects) == 1 + 2 * FILES + 1  # CSV, checkpoints, index: the leftovers are gone
        assert objects["training_log.csv"] == (run / "training_log.csv").read_bytes()
        manifests = (run / "checkpoints").glob("*/manifest.json")
        assert index_of(objects) == {file.parent.name: sha256(file)[:16] for file in manifests}
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
    monkeypatch.setattr(storage, "PART_BYTES", 5 << 20)
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
    mirror = S3Mirror(run, address, s3.endpoint)
    save_checkpoint(run, step=2, size=20 << 20)
    mirror.submit()
    wait_until(lambda: not s3.is_running)
    save_checkpoint(run, step=3, size=20 << 20)  # training goes on meanwhile
    mirror.submit()
    report = mirror.close(timeout_s=OUTAGE_S + 30)
    restart.join()
    assert report.pending == []
    assert len(parts) > 8  # the file was begun anew
    assert tree(restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)) == tree(run)
    messages = [record.getMessage() for record in caplog.records if record.name == storage.__name__]
    assert sum("uploads are retried" in message for message in messages) <= 3  # not one for each attempt
    assert "S3: uploads work again" in messages


def test_without_a_server_training_ends_well_and_hears_what_is_missing(
    s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run-1")
    mirror = S3Mirror(run, f"s3://{s3.bucket}/absent", "http://127.0.0.1:9")  # nobody listens there
    assert "training goes on" in caplog.text
    mirror.submit()
    start = time.monotonic()
    report = mirror.close(timeout_s=1)
    assert 0.9 < time.monotonic() - start < 2
    assert report.uploaded == []
    assert {name for name, _why in report.pending} == {
        *filter(is_plain, tree(run)),
        "checkpoints/last",
        "checkpoints/best",
    }
    assert f"{len(report.pending)} NOT uploaded" in str(report)
    assert "config.yaml (EndpointConnectionError)" in str(report)
    assert mirror.close() is report


def test_the_end_of_training_does_not_wait_long_for_a_server_that_is_away(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CLOSING_TRIES", 3)
    mirror = S3Mirror(make_run(tmp_path / "run-1"), f"s3://{s3.bucket}/absent", "http://127.0.0.1:9")
    start = time.monotonic()
    assert mirror.close(timeout_s=60).pending
    assert time.monotonic() - start < 10


def test_a_server_that_comes_late_is_found(s3: S3Server, address: str, tmp_path: Path) -> None:
    s3.stop()
    run = make_run(tmp_path / "run-1")
    mirror = S3Mirror(run, address, s3.endpoint)
    mirror.submit()
    s3.start()
    assert mirror.close(timeout_s=30).pending == []
    assert tree(restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)) == tree(run)


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
    mirror = S3Mirror(run, address, s3.endpoint)
    times = []
    with s3.paused():
        for step in range(1, 31):
            save_checkpoint(run, step)
            start = time.perf_counter()
            mirror.submit()
            times.append(time.perf_counter() - start)
            time.sleep(0.05)
        assert max(times) < 0.1
        held = len(list((run / ".s3-spool").glob("*/model.safetensors")))
        assert 2 <= held <= 4  # what was replaced during the outage is dropped
        threading.Timer(1.5, s3.resume).start()  # after timeouts, to be told from files that cannot be read
        assert mirror.close(timeout_s=60).pending == []
    assert len(manifests) <= 5  # of 30
    fresh = restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)
    assert tree(fresh) == tree(run)
    assert step_of(fresh / "checkpoints/last") == 30


def test_requests_that_are_carried_out_late_do_no_harm(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    run = tmp_path / "run-1"
    prefix = f"{address}/run-1".removeprefix(f"s3://{s3.bucket}/")
    late = {  # what timed out an hour ago
        "training_log.csv": b"old",
        "checkpoints/index-00000001.json": b'{"layout": 1, "checkpoints": {"last": "0000000000000000"}}',
        "checkpoints/0000000000000000/manifest.json": b"{}",
    }

    def carry_out(operation: str, request: dict[str, Any]) -> None:
        while operation == "ListObjectsV2" and "index-" not in request["url"] and late:
            name, body = late.popitem()
            s3.client.put_object(Bucket=s3.bucket, Key=f"{prefix}/{name}", Body=body)

    mirror = S3Mirror(run, address, s3.endpoint)
    intercept(carry_out)
    save_checkpoint(run, step=1)
    assert mirror.close(timeout_s=30).pending == []
    assert not late
    assert len(remote(s3, f"{address}/run-1")) == 1 + FILES + 1
    assert tree(restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)) == tree(run)


def test_a_process_that_forgets_to_close_still_exits(s3: S3Server, address: str, tmp_path: Path) -> None:
    code = """
import pathlib, sys, time
from common.run.s3 import S3Mirror
mirror = S3Mirror(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3])
print("started", flush=True)
sys.stdin.readline()
mirror.submit()
time.sleep(0.5)
"""
    run = make_run(tmp_path / "run-1")
    command = [sys.executable, "-c", code, str(run), address, s3.endpoint]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout.readline() == "started\n"
        with s3.paused():  # the thread hangs in a request that nobody answers
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.wait(timeout=5) == 0


# What is wrong is said in one sentence


GOOD = "s3://training-runs/x"


@pytest.mark.parametrize(
    ("change", "url", "says"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKIAWRONG"}, GOOD, "refused (ListObjectsV2 answered InvalidAccessKeyId)"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, GOOD, "(ListObjectsV2 answered SignatureDoesNotMatch)"),
        ({"AWS_SESSION_TOKEN": "token-that-expired"}, GOOD, "(ListObjectsV2 answered InvalidAccessKeyId)"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, GOOD, "boto3 finds no credentials"),
        ({"AWS_PROFILE": "nobody"}, GOOD, "ProfileNotFound"),
        ({}, "s3://no-such-bucket/x", "there is no bucket no-such-bucket"),
        ({}, "training-runs/x", "--s3 takes s3://bucket/prefix"),
        ({}, "s3://Key:secret-that@training-runs/x", "--s3 takes s3://bucket/prefix"),
        ({}, "s3://training-runs/../x", "--s3 takes s3://bucket/prefix"),
    ],
)
def test_a_wrong_start_is_one_sentence_without_a_secret(
    s3: S3Server,
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
    with pytest.raises(UserError) as caught:
        S3Mirror(tmp_path / "run-1", url, s3.endpoint)
    sentence = str(caught.value)
    assert says in sentence
    assert sentence.startswith("--s3 ") or sentence.startswith("--s3:")
    assert "\n" not in sentence
    for secret in (s3.secret_key, "wrong-secret", "secret-that", "AKIA", "token-that"):
        assert secret not in sentence + caplog.text


def test_a_compatible_server_is_not_asked_for_a_host_per_bucket(s3: S3Server) -> None:
    client = storage._client("http://minio.example:9000", "--s3", attempts=1)
    url = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
    assert url.startswith("http://minio.example:9000/bucket/key?")


def test_an_endpoint_with_a_password_is_refused_and_not_repeated(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--s3_endpoint") as caught:
        S3Mirror(tmp_path / "run-1", "s3://training-runs/x", "http://user:hunter2@127.0.0.1")
    assert "hunter2" not in str(caught.value)


def test_another_runs_checkpoints_are_not_overwritten(s3: S3Server, address: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a" / "run-1")
    S3Mirror(run, address, s3.endpoint).close(timeout_s=30)
    before = remote(s3, f"{address}/run-1")
    with pytest.raises(UserError, match=f"already holds checkpoints .* pass --resume {address}/run-1"):
        S3Mirror(tmp_path / "b" / "run-1", address, s3.endpoint)
    # The same run's own folder may go on, of course.
    S3Mirror(run, address, s3.endpoint).close(timeout_s=30)
    assert remote(s3, f"{address}/run-1") == before


def test_one_file_that_cannot_be_sent_does_not_hold_up_the_others(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    from botocore.exceptions import ClientError

    def refuse(operation: str, request: dict[str, Any]) -> None:
        if "refused.txt" in request["url"]:
            answer = {"Error": {"Code": "EntityTooLarge"}, "ResponseMetadata": {"HTTPStatusCode": 400}}
            raise ClientError(answer, operation)

    intercept(refuse)
    run = make_run(tmp_path / "run-1")
    (run / "refused.txt").write_text("x")
    (run / "back\\slash.txt").write_text("x")
    (run / "outside.txt").symlink_to("/etc/hostname")
    report = S3Mirror(run, address, s3.endpoint).close(timeout_s=1)
    reasons = dict(report.pending)
    assert reasons == {
        "refused.txt": "PutObject answered EntityTooLarge",
        "back\\slash.txt": "restoring refuses such a name",
    }
    objects = remote(s3, f"{address}/run-1")
    assert set(objects) & {"refused.txt", "back\\slash.txt", "outside.txt"} == set()
    assert "config.yaml" in objects
    assert set(index_of(objects)) == {"last", "best"}


def test_a_checkpoint_that_cannot_be_linked_is_reported_and_training_goes_on(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run-1"
    save_checkpoint(run, step=1)
    mirror = S3Mirror(run, address, s3.endpoint)
    mirror.submit()
    wait_until(lambda: mirror._done == mirror._asked)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_link)
        save_checkpoint(run, step=2)
        report = mirror.close(timeout_s=30)
    assert report.pending == [("checkpoints/last", "No space left on device")]
    fresh = restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)
    assert step_of(fresh / "checkpoints/last") == 1  # S3 keeps what it has
    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(UserError, match="--s3 needs hard links"):
        S3Mirror(run, address, s3.endpoint)


def test_an_object_that_arrives_different_is_sent_again(
    s3: S3Server,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    intercept: Callable[[Handler], None],
) -> None:
    real, operations = storage._FirstBytes.read, []
    intercept(lambda operation, request: operations.append(operation))

    def read(self: Any, amount: int | None = -1) -> bytes:  # wrong until S3 is asked what it has got
        data = real(self, amount)
        return data if "HeadObject" in operations else data.replace(b"important", b"imported!")

    monkeypatch.setattr(storage._FirstBytes, "read", read)
    run = tmp_path / "run-1"
    run.mkdir()
    (run / "file").write_bytes(b"important")
    assert S3Mirror(run, address, s3.endpoint).close(timeout_s=10).pending == []
    assert operations.count("HeadObject") == 2
    assert remote(s3, f"{address}/run-1")["file"] == b"important"


def test_a_timeout_is_not_taken_for_a_file_that_cannot_be_read(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None]
) -> None:
    from botocore.exceptions import ConnectTimeoutError, ReadTimeoutError, SSLError

    # All three are OSErrors, too.
    errors = [cls(endpoint_url="", error="") for cls in (ConnectTimeoutError, ReadTimeoutError, SSLError)]

    def fail(operation: str, request: dict[str, Any]) -> None:
        if "config.yaml" in request["url"] and errors:
            raise errors.pop()

    intercept(fail)
    run = make_run(tmp_path / "run-1")
    assert S3Mirror(run, address, s3.endpoint).close(timeout_s=10).pending == []
    assert errors == []


@pytest.mark.parametrize("then", ["forward", "back"])
def test_an_index_of_unknown_fate_is_not_relied_on(
    s3: S3Server, address: str, tmp_path: Path, intercept: Callable[[Handler], None], then: str
) -> None:
    from botocore.exceptions import ClientError, ReadTimeoutError

    run, checkpoints = tmp_path / "run-1", tmp_path / "run-1" / "checkpoints"
    failures: list[str] = []
    named: set[str] = set()

    def fail(operation: str, request: dict[str, Any]) -> None:
        """Write the third index but lose the answer, move on, and refuse three files."""
        if operation != "PutObject":
            return
        if "index-00000003" in request["url"] and not failures:
            key = request["url_path"].removeprefix(f"/{s3.bucket}/")
            s3.client.put_object(Bucket=s3.bucket, Key=key, Body=request["body"])
            failures.append(key)
            if then == "forward":
                save_checkpoint(run, step=3)
                save_checkpoint(run, step=4)
            else:
                shutil.rmtree(checkpoints / "last")
                (checkpoints / "previous").rename(checkpoints / "last")
            mirror.submit()
            raise ReadTimeoutError(endpoint_url="", error="")
        if 1 <= len(failures) < 4 and then == "forward":
            failures.append(request["url"])
            answer = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
            raise ClientError(answer, operation)
        if failures and not named:
            objects = remote(s3, f"{address}/run-1")
            named.update(f"checkpoints/{id_}/manifest.json" for id_ in index_of(objects).values())
            assert named <= set(objects)

    intercept(fail)
    mirror = S3Mirror(run, address, s3.endpoint)
    for step in (1, 2):
        save_checkpoint(run, step)
        mirror.submit()
        wait_until(lambda: mirror._done == mirror._asked)
    assert mirror.close(timeout_s=30).pending == []
    assert failures
    assert named
    assert tree(restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)) == tree(run)


# What restoring refuses


def test_a_key_that_would_leave_the_folder_is_refused(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run-1")
    S3Mirror(tmp_path / "run-1", address, s3.endpoint).close(timeout_s=30)
    prefix = f"{address}/run-1".removeprefix(f"s3://{s3.bucket}/")
    real = storage._list  # the test's server refuses to store such keys, others do not
    for name in ("../x", "/etc/x", "a/../../x", "a//x", "./x", "..", "a\\..\\x", "a\0x", "checkpoints/../x"):
        key = f"{prefix}/{name}"
        monkeypatch.setattr(storage, "_list", lambda *args, key=key: [*real(*args), Stored(key, 1, "")])
        with pytest.raises(UserError, match="would leave the run's folder"):
            restore(f"{address}/run-1", tmp_path / "b" / "run-1", s3.endpoint)
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "index",
    [
        {"layout": 1, "checkpoints": {"../../evil": "0" * 16}},
        {"layout": 1, "checkpoints": {"a/b": "0" * 16}},
        {"layout": 1, "checkpoints": {"last": "../../../../evil"}},
        {"layout": 1, "checkpoints": {"last": 7}},
        {"layout": 1, "checkpoints": ["last"]},
        {"layout": 2, "checkpoints": {}},
        {},
        [],
    ],
)
def test_an_index_that_is_not_ours_is_refused(s3: S3Server, address: str, tmp_path: Path, index: Any) -> None:
    prefix = address.removeprefix(f"s3://{s3.bucket}/")
    key = f"{prefix}/run-1/checkpoints/index-00000001.json"
    s3.client.put_object(Bucket=s3.bucket, Key=key, Body=json.dumps(index))
    with pytest.raises(UserError, match="is not an index that this version can read"):
        restore(f"{address}/run-1", tmp_path / "run-1", s3.endpoint)


def test_what_is_damaged_on_s3_is_left_out_and_named(
    s3: S3Server, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run-1"
    save_checkpoint(run, step=1)
    save_checkpoint(run, step=2)
    (run / "plot.png").write_bytes(b"plot")
    S3Mirror(run, address, s3.endpoint).close(timeout_s=30)
    prefix = f"{address}/run-1".removeprefix(f"s3://{s3.bucket}/")
    last = index_of(remote(s3, f"{address}/run-1"))["last"]
    client = s3.client
    for name in ("plot.png", f"checkpoints/{last}/model.safetensors"):
        head = client.head_object(Bucket=s3.bucket, Key=f"{prefix}/{name}")
        body = b"#" * head["ContentLength"]
        client.put_object(Bucket=s3.bucket, Key=f"{prefix}/{name}", Body=body, Metadata=head["Metadata"])
    client.put_object(Bucket=s3.bucket, Key=f"{prefix}/notes.txt", Body=b"not the mirror's")
    client.put_object(Bucket=s3.bucket, Key=f"{prefix}/folder/", Body=b"")

    fresh = restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)
    assert set(tree(run)) - set(tree(fresh)) == {"plot.png", "checkpoints/last/model.safetensors"}
    assert is_whole(fresh / "checkpoints/previous")
    for name in ("plot.png", f"{last}/model.safetensors", "notes.txt"):
        assert re.search(rf"{name} does not match its checksum", caplog.text)


def test_a_download_that_breaks_off_is_begun_again(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import IncompleteReadError
    from botocore.response import StreamingBody

    run = make_run(tmp_path / "run-1")
    S3Mirror(run, address, s3.endpoint).close(timeout_s=30)
    real, breaks = StreamingBody.iter_chunks, [1, 2, 3]

    def break_off(self: Any, size: int) -> Iterator[bytes]:
        if breaks:
            breaks.pop()
            yield self.read(10)
            raise IncompleteReadError(actual_bytes=10, expected_bytes=1000)
        yield from real(self, size)

    monkeypatch.setattr(StreamingBody, "iter_chunks", break_off)
    assert tree(restore(f"{address}/run-1", tmp_path / "b", s3.endpoint)) == tree(run)


def test_restoring_says_what_is_wrong_and_leaves_no_half_folder(
    s3: S3Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run-1")
    S3Mirror(run, address, s3.endpoint).close(timeout_s=30)
    url = f"{address}/run-1"
    with pytest.raises(UserError, match="there is no run at this address"):
        restore(f"{address}/run-2", tmp_path / "b", s3.endpoint)
    with pytest.raises(UserError, match="run-1 is not empty"):
        restore(url, run, s3.endpoint)
    with pytest.raises(UserError, match="there is no bucket"):
        restore("s3://no-such-bucket/run-1", tmp_path / "b", s3.endpoint)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "RESTORE_ATTEMPTS", 2)
        with pytest.raises(UserError, match=r"S3 cannot be used \(EndpointConnectionError\)"):
            restore(url, tmp_path / "b", "http://127.0.0.1:9")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
        with pytest.raises(UserError, match="bytes of disk"):
            restore(url, tmp_path / "b", s3.endpoint)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            restore(url, tmp_path / "b", s3.endpoint)
    assert not (tmp_path / "b").exists()
    (tmp_path / "b").mkdir()  # an empty folder is as good as none
    assert tree(restore(url, tmp_path / "b", s3.endpoint)) == tree(run)


def interrupted(client: Any, bucket: str, key: str, path: Path, size: int) -> bool:
    path.write_bytes(b"half")
    raise KeyboardInterrupt
