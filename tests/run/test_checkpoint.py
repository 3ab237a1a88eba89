import errno
import json
import os
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import UserError
from common.run import checkpoint
from common.run.checkpoint import DamagedCheckpoint, Progress, TrainState

ALONE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))


def name(step):
    return f"step_{step:08d}"


def saved(folder, *steps, content=0.0):
    for step in steps:
        weights = {"w": torch.arange(6.0).reshape(2, 3) + content}
        checkpoint.write(
            folder,
            {"model.safetensors": weights, "state.json": {"progress": {"step": step, "epochs_done": 0}}},
        )
    return folder


def newest(folder):
    """Step of the newest checkpoint that is whole, and a sentence for each that is not."""
    files, damaged = checkpoint.newest_whole(folder)
    return files and files["state.json"]["progress"]["step"], damaged


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Files


def test_round_trip(tmp_path):
    files = {
        "model.safetensors": {"w": torch.arange(6.0).reshape(2, 3), "channels_last": torch.rand(2, 3, 4, 5)},
        "optimizer.safetensors": {},
        "state.json": {"progress": {"step": 1, "epochs_done": 0}},
    }
    folder = checkpoint.write(tmp_path / "checkpoints", files)
    assert folder == tmp_path / "checkpoints" / name(1)
    again = checkpoint.read(folder)
    assert again.keys() == files.keys()
    for key, tensor in files["model.safetensors"].items():
        assert torch.equal(again["model.safetensors"][key], tensor)
    assert again["state.json"] == files["state.json"]
    assert names(tmp_path / "checkpoints") == [name(1)]


def test_the_highest_step_is_the_newest(tmp_path):
    saved(tmp_path, 9, 10, 1200)
    assert newest(tmp_path) == (1200, [])
    assert newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "zero", "flip", "remove"])
def test_damage_is_noticed_named_and_the_one_before_used(tmp_path, file, damage):
    path = saved(tmp_path, 1, 2) / name(2) / file
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(data) // 2
        if file == "manifest.json":
            middle = data.index(b"sha256") + 12  # a flipped space between tokens would be no damage
        changed = {
            "truncate": data[:middle],
            "zero": bytes(len(data)),
            "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        }
        path.write_bytes(changed[damage])
    with pytest.raises(DamagedCheckpoint):
        checkpoint.read(tmp_path / name(2))
    found, damaged = newest(tmp_path)
    assert found == 1
    named = file if not (file == "manifest.json" and damage == "flip") else name(2)
    assert len(damaged) == 1
    assert named in damaged[0]


def test_the_same_step_twice(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    inode = (tmp_path / name(2) / "manifest.json").stat().st_ino
    saved(tmp_path, 2)
    assert (tmp_path / name(2) / "manifest.json").stat().st_ino == inode
    # After `--resume` of an older one: another course.
    saved(tmp_path, 2, content=2.0)
    assert checkpoint.read(tmp_path / name(2))["model.safetensors"]["w"][0, 0] == 2
    (tmp_path / name(2) / "model.safetensors").write_bytes(b"damaged")
    saved(tmp_path, 2, content=1.0)
    assert checkpoint.read(tmp_path / name(2))["model.safetensors"]["w"][0, 0] == 1
    assert newest(tmp_path) == (2, [])

    # Its epoch was not over: it is now. Where that cannot be written, the old one is still there.
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            checkpoint.write(tmp_path, {"state.json": {"progress": {"step": 2, "epochs_done": 1}}})
    assert newest(tmp_path) == (2, [])
    checkpoint.write(tmp_path, {"state.json": {"progress": {"step": 2, "epochs_done": 1}}})
    assert checkpoint.read(tmp_path / name(2))["state.json"]["progress"]["epochs_done"] == 1


def test_another_course_from_an_older_checkpoint_deletes_the_later_ones(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    (tmp_path / name(4) / "state.json").unlink()
    checkpoint.write(tmp_path, {"state.json": {"progress": {"step": 2, "epochs_done": 0}}})
    assert names(tmp_path) == [name(1), name(2)]


def test_a_kill_in_mid_save_or_mid_deletion_leaves_no_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed_after(2))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 2)
    assert names(tmp_path) == [name(1), f"{name(2)}.tmp"]
    assert newest(tmp_path) == (1, [])
    saved(tmp_path, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_after(0))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path)
    with pytest.raises(DamagedCheckpoint):
        checkpoint.read(tmp_path / name(1))
    checkpoint.prune(tmp_path)
    assert names(tmp_path) == [name(2), name(3)]


def killed_after(calls):
    left = [calls]

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return call


def test_prune(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / name(5) / "manifest.json").unlink()
    (tmp_path / f"{name(6)}.tmp").mkdir()
    mine = ["mine", f"{name(2)}_good", "the_best"]
    for copy in mine:
        (tmp_path / copy).mkdir()
    checkpoint.prune(tmp_path, keep=2, also={name(1), name(99)})
    assert names(tmp_path) == sorted([*mine, name(1), name(3), name(4)])
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == sorted([*mine, name(4)])
    saved(tmp_path, 3)
    assert names(tmp_path) == sorted([*mine, name(3)])
    assert checkpoint.newest_whole(tmp_path)[0]["state.json"]["progress"]["step"] == 3


def test_an_older_format_is_refused_in_one_sentence(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / name(1) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(UserError, match="format 1 and this version reads 2"):
        checkpoint.read(tmp_path / name(1))
    (tmp_path / name(1)).rename(tmp_path / "last")  # as that version called it
    with pytest.raises(UserError, match=r"last has checkpoint format 1 .* choose another --run_name"):
        checkpoint.newest_whole(tmp_path)


def test_a_full_disk_is_one_sentence_and_leaves_the_one_before_whole(tmp_path):
    saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(UserError, match="File too large; the one before it is whole, set --output"):
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == [name(1)]
    checkpoint.read(tmp_path / name(1))


def test_a_disk_that_is_not_writable_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(errno.EROFS))
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*: Read-only file system"):
        saved(tmp_path, 1)
    assert names(tmp_path) == []


def refusing(code):
    def call(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return call


# State


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Parameter(torch.ones(()))
        self.register_buffer("grid", torch.zeros(3), persistent=False)

    def forward(self, images):
        return self.scale * self.norm(self.conv(images)).mean((2, 3))


def make_state(optimizer="adamw"):
    model = Net().to(memory_format=torch.channels_last)
    groups = [{"params": list(model.parameters()), "lr_scale": 0.5}]
    make = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.99)),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    }
    ema = SimpleNamespace(module=Net())
    return TrainState(
        model, make[optimizer](), ema, None, Progress(step=7, best_step=5, epoch_sums=[1.5, 2.0])
    )


def train(state):
    state.model(torch.rand(2, 3, 8, 8)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    with torch.no_grad():
        for mean, value in zip(state.ema.module.parameters(), state.model.parameters(), strict=True):
            mean.lerp_(value, 0.1)
    state.progress.step += 1


def everything(state):
    """All tensors of a state, by name."""
    optimizer, _ = checkpoint._pack_optimizer(state.optimizer)
    return {
        **state.model.state_dict(prefix="model."),
        **state.ema.module.state_dict(prefix="ema."),
        **optimizer,
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, optimizer):
    torch.manual_seed(1)
    one = make_state(optimizer)
    train(one)
    folder = checkpoint.write(tmp_path, checkpoint.capture(one, ALONE, {"lr": 0.1}))
    train(one)
    torch.manual_seed(2)
    other = make_state(optimizer)
    other.progress = Progress()
    other.optimizer.param_groups[0]["lr_scale"] = 1.0
    files = checkpoint.read(folder)
    assert files["state.json"]["config"] == {"lr": 0.1}
    checkpoint.apply(files, other, ALONE)
    assert other.optimizer.param_groups[0]["lr_scale"] == 0.5
    train(other)
    assert other.progress == one.progress
    expected = everything(one)
    for key, tensor in everything(other).items():
        assert torch.equal(tensor, expected[key]), key
        assert tensor.stride() == expected[key].stride(), key


def test_what_was_captured_does_not_change_while_a_thread_writes_it():
    state = make_state()
    train(state)
    files = checkpoint.capture(state, ALONE, {})
    del files["ranks.safetensors"]
    before = {file: content_of(content) for file, content in files.items()}
    train(state)
    state.progress.epoch_sums[0] = -1.0
    assert {file: content_of(content) for file, content in files.items()} == before


def content_of(content):
    """As `write` would write it."""
    is_tensors = all(isinstance(value, torch.Tensor) for value in content.values())
    return checkpoint.to_safetensors(content) if is_tensors else json.dumps(content)


def test_another_model_is_refused_in_one_sentence():
    files = checkpoint.capture(make_state(), ALONE, {})
    files["model.safetensors"].pop("norm.weight")
    with pytest.raises(UserError, match="another model or optimizer than --model and --optimizer say"):
        checkpoint.apply(files, make_state(), ALONE)


def test_any_processs_row_of_the_random_states_can_be_set():
    states = torch.stack([checkpoint.rng_state()["torch"]] * 3)
    expected = torch.rand(4)
    checkpoint.set_rng_state({"torch": states[2]})
    assert torch.equal(torch.rand(4), expected)


# Processes


def process(rank, world):
    """An accelerator whose `gather` finds in the other processes what this one has, plus the distance of the ranks."""

    def gather(tensor):
        rows = tensor.repeat(world, *[1] * (tensor.dim() - 1))
        distance = torch.arange(world).reshape(-1, *[1] * (tensor.dim() - 1)) - rank
        return rows + distance if tensor.is_floating_point() else rows

    is_main = rank == 0
    device = torch.device("cpu")
    return SimpleNamespace(
        num_processes=world, process_index=rank, is_main_process=is_main, device=device, gather=gather
    )


def test_what_differs_between_processes_has_a_row_for_each(tmp_path):
    state = make_state()
    assert set(checkpoint.capture(state, ALONE, {})["ranks.safetensors"]) == {"rng.torch"}
    assert checkpoint.capture(state, process(1, 3), {}) == {}
    files = checkpoint.capture(state, process(0, 3), {})
    rows = files["ranks.safetensors"]
    buffers = {f"{of}.norm.running_{what}" for of in ("model", "ema") for what in ("mean", "var")}
    assert set(rows) == {"rng.torch", *buffers}
    assert torch.equal(rows["model.norm.running_mean"][:, 0], torch.tensor([0.0, 1.0, 2.0]))

    files = checkpoint.read(checkpoint.write(tmp_path, files))
    for rank in range(3):
        other = make_state()
        checkpoint.apply(files, other, process(rank, 3))
        assert torch.equal(other.model.norm.running_mean, torch.full((4,), float(rank)))
        assert torch.equal(other.ema.module.norm.running_var, torch.full((4,), 1.0 + rank))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_another_number_of_processes_takes_the_mean_of_the_buffers(world):
    files = checkpoint.capture(make_state(), process(0, 3), {})
    for rank in range(world):
        other = make_state()
        torch.manual_seed(5)
        seeded = torch.get_rng_state()
        checkpoint.apply(files, other, process(rank, world))
        assert torch.equal(other.model.norm.running_mean, torch.ones(4))
        assert torch.equal(other.ema.module.norm.running_var, torch.full((4,), 2.0))
        assert torch.equal(torch.get_rng_state(), seeded) == (rank >= 3)


def test_an_optimizers_steps_stay_on_the_cpu_of_a_gpu_run():
    """`AdamW` reads its step counters on the host: from the GPU that would be a wait for each parameter and step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    state = make_state()
    train(state)
    files = checkpoint.capture(state, ALONE, {})
    with FakeTensorMode(allow_non_fake_inputs=True):  # knows of devices that are not there
        parameters = [nn.Parameter(torch.empty(p.shape, device="cuda")) for p in state.model.parameters()]
        optimizer = torch.optim.AdamW(parameters, foreach=False, fused=False)
        meta = files["state.json"]["optimizer"]
        checkpoint._unpack_optimizer(optimizer, files["optimizer.safetensors"], meta)
        for parameter in parameters:
            entries = optimizer.state[parameter]
            assert {key: value.device.type for key, value in entries.items()} == {
                "step": "cpu",
                "exp_avg": "cuda",
                "exp_avg_sq": "cuda",
            }


def test_sharing_gives_every_process_what_the_main_one_read(monkeypatch):
    state = make_state("adamw")
    train(state)
    files = checkpoint.capture(state, ALONE, {"lr": 0.1})
    expected, outlines, tensors = {name: content_of(content) for name, content in files.items()}, [], []

    def broadcast_outline(objects):
        outlines.extend(objects)
        objects[:] = outlines[:1]

    def broadcast(tensor):
        if rank == 0:
            tensors.append(tensor)
            return tensor
        return tensor.copy_(tensors.pop(0))

    monkeypatch.setattr(checkpoint, "broadcast_object_list", broadcast_outline)
    monkeypatch.setattr(checkpoint, "broadcast", broadcast)
    for rank in (0, 1):
        shared = checkpoint.share(None if rank else files, process(rank, 2))
        assert {name: content_of(content) for name, content in shared.items()} == expected
    outlines.clear()
    assert checkpoint.share(None, process(0, 2)) is None
