"""From batch items to batches: what a worker hands over, and what becomes of an image it cannot read."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from common import UserError
from common.data import loader as loader_module
from common.data.loader import available_workers
from tests.data.examples import CENTRED, children, item, items, make_loader, opened


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_are_what_the_items_say(tree, workers):
    train, val = opened(tree)
    wanted = [
        item(3, 1, 17),
        item(8, size=(48, 64), split=1, view=CENTRED),
        *items(20),
        item(0, 1, size=(40, 24)),
    ]
    loader = make_loader(train, val, seed=0, workers=workers)
    batches = list(loader.stream(wanted))
    loader.close()
    assert len(batches) == len(wanted)
    for batch, want in zip(batches, wanted, strict=True):
        source = (train, val)[want.split]
        np.testing.assert_array_equal(batch.item.indices, want.indices)
        assert batch.images.shape == (len(want.indices), 3, want.height, want.width)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.tolist() == source.labels[want.indices].tolist()
        numbers = want.indices + (18 if want.split else 0)  # the colour is the picture's number
        assert abs(batch.images[:, 0].float().mean((1, 2)).numpy() - numbers * 8 % 256).max() < 4
        assert batch.wait_s >= 0


def test_pixels_do_not_depend_on_workers_or_what_was_loaded_before(tree):
    train, val = opened(tree)
    wanted = items(12)
    streams = []
    for workers in (0, 1, 2):
        loader = make_loader(train, val, seed=4, workers=workers)
        list(loader.stream(items(workers, epoch=9)))
        streams.append(torch.stack([batch.images for batch in loader.stream(wanted)]))
        loader.close()
    assert torch.equal(streams[0], streams[1])
    assert torch.equal(streams[0], streams[2])


@pytest.mark.parametrize("taken", [0, 1, 5, 19])
def test_a_stream_that_is_left_does_not_disturb_the_next(tree, taken):
    others = children()  # that earlier tests left
    train, val = opened(tree)
    loader = make_loader(train, val, seed=0, workers=2)
    first = loader.stream(items(20, epoch=1))
    for _ in range(taken):
        next(first)
    processes = children() - others
    wanted = items(15, epoch=2)
    for _ in range(3):
        batches = list(loader.stream(wanted))
        assert [b.item.indices.tolist() for b in batches] == [w.indices.tolist() for w in wanted]
    if taken:
        assert children() - others == processes  # the same workers
        with pytest.raises(AssertionError, match="ended when another one was begun"):
            next(first)
    del batches, first
    assert len(loader._slots._free) == len(loader._slots.slots)
    loader.close()
    assert not children() & processes


def test_slots_are_used_again_and_never_while_somebody_looks(tree):
    train, val = opened(tree)
    loader = make_loader(train, val, seed=0, workers=1)
    wanted = items(40)
    kept = list(loader.stream(wanted))  # far more than there are slots
    alone = [
        next(make_loader(train, val, seed=0, workers=0).stream([want])).images for want in wanted[:40:13]
    ]
    list(loader.stream(items(30, epoch=5)))
    for batch, image in zip(kept[::13], alone, strict=True):
        assert torch.equal(batch.images, image)
    del kept, batch
    places = {batch.images.data_ptr() for batch in loader.stream(items(60, epoch=6))}
    assert len(places) <= len(loader._slots.slots)
    loader.close()


def test_a_larger_batch_than_before_fits(tree):
    train, val = opened(tree)
    loader = make_loader(train, val, seed=0, workers=1)
    for size in (16, 96, 32, 200):
        [*_, last] = loader.stream(items(8, size=(size, size)))
        [want] = make_loader(train, val, seed=0, workers=0).stream([last.item])
        assert torch.equal(last.images, want.images)
    loader.close()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_layout(tree, workers, channels_last):
    loader = make_loader(*opened(tree), workers=workers, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch in loader.stream(items(3)):
        assert batch.images.is_contiguous(memory_format=layout)
    loader.close()


class Device:
    """Stands for CUDA: streams whose work is done when somebody waits for it, and a log of what happens."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies under way: (host, device)
        self.pinned: list[torch.Tensor] = []
        cuda, tensor = torch.cuda, torch.Tensor
        monkeypatch.setattr(cuda, "Stream", lambda device: SimpleNamespace(record_event=lambda: "event"))
        monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(cuda, "current_stream", lambda device: SimpleNamespace(wait_event=self.wait))
        monkeypatch.setattr(cuda, "cudart", None)
        monkeypatch.setattr(tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(tensor, "to", lambda *args, **options: self.copy(*args, **options))
        monkeypatch.setattr(tensor, "record_stream", lambda tensor, stream: self.log.append("record"))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def copy(self, tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        assert device.type == "cuda"
        assert non_blocking
        assert any(tensor is each for each in self.pinned), "a copy from memory that is not pinned waits"
        self.log.append("copy")
        self.waiting.append((tensor, torch.empty_like(tensor)))
        return self.waiting[-1][1]

    def wait(self, event: str) -> None:
        self.log.append("wait")
        for host, copy in self.waiting:
            copy.copy_(host)
        self.waiting.clear()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_copied_to_the_device_one_ahead(tree, workers, monkeypatch):
    wanted = items(6)
    expected = [batch.images.clone() for batch in make_loader(*opened(tree)).stream(wanted)]
    device = Device(monkeypatch)
    loader = make_loader(*opened(tree), workers=workers, device="cuda")
    for number, (batch, images) in enumerate(zip(loader.stream(wanted), expected, strict=True)):
        copies = min(number + 2, len(wanted))  # this batch and the next, images and labels
        assert device.log.count("copy") == 2 * copies
        assert device.log[-3:] == ["wait", "record", "record"]
        assert torch.equal(batch.images, images)
        assert batch.labels.tolist() == loader._sources[0].labels[batch.item.indices].tolist()
    loader.close()


def test_a_slot_is_free_when_its_bytes_are_pinned(tree, monkeypatch):
    Device(monkeypatch)
    loader = make_loader(*opened(tree), workers=1, device="cuda")
    kept = []  # nobody runs out of slots by keeping batches on the device
    for batch in loader.stream(items(40)):
        kept.append(batch)
        assert len(loader._slots._free) + len(loader._slots._sent) == len(loader._slots.slots)
    assert len(kept) == 40
    assert not loader._slots._sent
    loader.close()


BAD = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "truncated"),
    "text": (lambda path: path.write_text("<html>"), "not an image"),
    "empty": (lambda path: path.write_bytes(b""), "not an image"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_image_is_named(tree, kind, workers):
    train, val = opened(tree)
    bad = tree / "train" / "dog" / "2.jpg"
    damage, why = BAD[kind]
    damage(bad)
    loader = make_loader(train, val, seed=0, workers=workers)
    stream = loader.stream([item(0, 1), item(2, 8, 3), item(4)])
    next(stream)
    with pytest.raises(UserError) as caught:
        next(stream)
    assert str(bad) in str(caught.value)
    assert why in str(caught.value)
    assert "--skip_unreadable" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(list(loader.stream([item(0), item(1)]))) == 2  # the loader lives on
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BAD)
def test_another_image_of_the_class_stands_in(tree, kind, workers, caplog):
    train, val = opened(tree)
    for name in ("2.jpg", "3.jpg", "5.jpg"):
        BAD[kind][0](tree / "train" / "dog" / name)
    loader = make_loader(train, val, seed=0, workers=workers, skip_unreadable=True)
    for epoch in range(2):
        [batch] = loader.stream([item(0, 8, 11, epoch=epoch)])
        assert batch.labels.tolist() == [0, 1, 1]
        assert batch.item.indices.tolist() == [0, 8, 11]
        shown = batch.images[:, 0].float().mean((1, 2))
        assert (shown - torch.tensor([0, 10, 6]) * 8).abs().max() < 4  # 8 and 9 are bad: 10; 11 is: 6
    loader.close()
    assert sorted(Path(path).name for path in loader.unreadable) == ["2.jpg", "3.jpg", "5.jpg"]
    assert len(caplog.records) == 3


def test_a_class_without_any_readable_image(tree):
    train, val = opened(tree)
    for path in (tree / "train" / "dog").iterdir():
        path.write_text("no image")
    loader = make_loader(train, val, seed=0, workers=0, skip_unreadable=True)
    with pytest.raises(UserError, match="nor any other image of its class"):
        next(loader.stream([item(0, 8)]))


def test_workers_come_from_the_cpus_this_process_may_use(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(loader_module, "CPU_MAX", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert available_workers() == 12
    quota.write_text("max 100000\n")
    assert available_workers() == 12
    quota.write_text("350000 100000\n")
    assert available_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_workers() == 1
    quota.write_text("max 100000\n")
    assert available_workers() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert available_workers() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(256)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert available_workers() == loader_module.MAX_WORKERS


ORPHANS = """
import json, sys, time
from pathlib import Path
from tests.data.examples import children, items, make_loader, opened

loader = make_loader(*opened(Path(sys.argv[1])), seed=0, workers=2)
stream = loader.stream(items(20, batch=4000, size=(8, 8)))  # answers that fill a pipe, when nobody reads it
next(stream)
print(json.dumps(sorted(children())), flush=True)
time.sleep(60)
"""


def test_workers_end_when_the_trainer_is_killed(tree):
    root = Path(__file__).parents[2]
    trainer = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tree)], cwd=root, stdout=subprocess.PIPE)
    workers = json.loads(trainer.stdout.readline())
    assert len(workers) == 2
    time.sleep(3)  # for the pipe to fill
    trainer.kill()
    deadline = time.monotonic() + 20
    while (left := list(filter(psutil.pid_exists, workers))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    trainer.communicate()
    assert not left


MEMORY = """
import json, os, sys
from pathlib import Path
import psutil
from tests.data.examples import children, items, make_loader, opened

train, val = opened(Path(sys.argv[1]))
others = children()
loader = make_loader(train, val, seed=0, workers=2)

def memory():
    for _ in loader.stream(items(150, batch=16, size=(96, 96))):
        pass
    processes = map(psutil.Process, [os.getpid(), *sorted(children() - others)])
    return [process.memory_full_info().uss / 1e6 for process in processes]

print(json.dumps([memory() for _ in range(6)]))
loader.close()
"""


def test_memory_is_flat_over_many_epochs(tree):
    """In a process of its own: a worker slowly copies what it inherits, which here would be all earlier tests' memory."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tree)], cwd=root, capture_output=True, check=True
    )
    epochs = json.loads(done.stdout)
    assert len(epochs[0]) == 3
    assert max(now - then for now, then in zip(epochs[-1], epochs[1], strict=True)) < 4


def test_a_copy_is_the_same_image_at_another_crop(tree):
    train, val = opened(tree)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tree / "train" / "dog" / "1.jpg")
    loader = make_loader(train, val)
    [random] = loader.stream([item(7, 7 + 18, 7 + 36, 7)])
    assert random.labels.tolist() == [1, 1, 1, 1]
    assert torch.equal(random.images[0], random.images[3])
    assert not torch.equal(random.images[0], random.images[1])
    assert not torch.equal(random.images[1], random.images[2])
    [centred] = loader.stream([item(7, 7 + 18, view=CENTRED)])
    assert torch.equal(*centred.images)
    loader.close()
