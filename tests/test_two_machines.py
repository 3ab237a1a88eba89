"""Two machines, each a network namespace with a cable between them: one dies, comes back, and in the end one is left."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT, launch, make_images, progress

ADDRESSES = ("10.203.77.1", "10.203.77.2")
TIMEOUT_S = 120
CONFIG = "accelerate_configs/multi_node.yaml"


def ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout


class Machine:
    """A network namespace with its own host name; `kill` is the power cord."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.number = f"machine{number}-{os.getpid()}", number
        self.log = folder / f"machine{number}.log"
        self.address = ADDRESSES[number]
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "set", "lo", "up")
        self.hosts = Path("/etc/netns") / self.name / "hosts"  # which `ip netns exec` shows as /etc/hosts
        self.hosts.parent.mkdir(parents=True)
        self.hosts.write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} machine{n}\n" for n, address in enumerate(ADDRESSES))
        )
        self.launcher: subprocess.Popen[str] | None = None

    def launch(self, *args: str) -> None:
        inside = ["sh", "-c", f'hostname machine{self.number} && exec "$@"', "sh", sys.executable]
        command = ["ip", "netns", "exec", self.name, "unshare", "--uts", *inside]
        command += ["-m", "accelerate.commands.launch", "--config_file", CONFIG, "--mixed_precision", "no"]
        command += ["--machine_rank", str(self.number), "--main_process_ip", ADDRESSES[0]]
        command += ["--main_process_port", "29500", "--num_processes", "2", "--max_restarts", "3"]
        command += ["--rdzv_backend", "c10d"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        env |= {
            "GLOO_SOCKET_IFNAME": "cable",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # docs/multi-node.md
        with open(self.log, "a") as log:
            self.launcher = subprocess.Popen(
                [*command, *args], env=env, cwd=ROOT, stdout=log, stderr=log, text=True
            )

    def kill(self) -> None:
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)
        if self.launcher is not None:
            self.launcher.wait()

    def remove(self) -> None:
        self.kill()
        ip("netns", "del", self.name)
        self.hosts.unlink()
        self.hosts.parent.rmdir()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    try:
        both = [Machine(0, tmp_path), Machine(1, tmp_path)]
    except (subprocess.CalledProcessError, OSError):
        pytest.skip("network namespaces need root and the program `ip`")
    ends = [f"end{machine.number}-{os.getpid()}" for machine in both]
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for machine, end in zip(both, ends, strict=True):
        ip("link", "set", end, "netns", machine.name)
        ip("-n", machine.name, "link", "set", end, "name", "cable")
        ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "cable")
        ip("-n", machine.name, "link", "set", "cable", "up")
    yield both
    for machine in both:
        machine.remove()


def rows(run: Path) -> list[dict[str, str]]:
    path = run / "training_log.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happens any more"
        time.sleep(0.05)


def test_a_machine_dies_and_returns_and_then_one_is_left(machines, tmp_path):
    data = make_images(tmp_path / "images", train=64)
    flags = ["--data_dir", str(data), "--model", "test_resnet", "--trackers", "none", "--workers", "0"]
    flags += [
        "--lr",
        "0.1",
        "--img_size",
        "32",
        "--epochs",
        "16",
        "--save_freq_last",
        "1",
        "--recipe",
        "listed",
        "--output",
    ]
    run, args = tmp_path / "run", [*flags, str(tmp_path), "--run_name", "run", "--batch_size", "8"]
    for machine in machines:
        machine.launch("train_standard.py", *args)
    wait_until(lambda: len(rows(run)) >= 2)

    machines[1].kill()
    lost_at = len(rows(run))
    assert lost_at < 12
    machines[1].launch("train_standard.py", *args)
    wait_until(lambda: len(rows(run)) >= lost_at + 2)

    for machine in machines:  # now nobody comes back
        machine.kill()
    left_at = len(rows(run))
    assert left_at < 16
    alone = launch(1, "train_standard.py", *args)
    assert alone.returncode == 0, alone.stderr[-2000:]

    log = (run / "training_log.txt").read_text()
    assert log.count("resumed") == 2
    assert [int(row["epoch"]) for row in rows(run)] == list(range(1, 17))
    assert progress(run)["global_batches"] == [16]
    undisturbed = launch(1, "train_standard.py", *args, "--run_name", "whole", "--accumulation", "2")
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    for ours, theirs in zip(rows(run), rows(tmp_path / "whole"), strict=True):
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=0.02)
