import json
import resource
import shutil

import pytest
import torch

from common import UserError
from common.run import checkpoint
from common.run.checkpoint import DamagedCheckpoint

FILES = {
    "model.safetensors": {"w": torch.arange(6.0).reshape(2, 3)},
    "state.json": {"progress": {"step": 1}},
}


def saved(folder, *steps):
    for step in steps:
        files = {**FILES, "state.json": {"progress": {"step": step}}}
        checkpoint.write(folder / "last", files)
    return folder


def step_of(folder):
    return json.loads((folder / "state.json").read_text())["progress"]["step"]


def test_round_trip(tmp_path):
    saved(tmp_path, 1)
    checkpoint.verify(tmp_path / "last")
    files = checkpoint.read(tmp_path / "last")
    assert torch.equal(files["model.safetensors"]["w"], FILES["model.safetensors"]["w"])
    assert files["state.json"] == FILES["state.json"]


def test_the_last_two_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert step_of(tmp_path / "last") == 3
    assert step_of(tmp_path / "previous") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"last", "previous"}


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "zero", "flip", "remove"])
def test_damage_is_noticed_named_and_the_previous_used(tmp_path, file, damage):
    path = saved(tmp_path, 1, 2) / "last" / file
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
        checkpoint.verify(tmp_path / "last")
    found, damaged = checkpoint.newest_whole(tmp_path)
    assert found == tmp_path / "previous"
    named = file if not (file == "manifest.json" and damage == "flip") else "last"
    assert len(damaged) == 1
    assert named in damaged[0]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "last").rename(tmp_path / "last.tmp")
    assert checkpoint.newest_whole(tmp_path)[0] == tmp_path / "last.tmp"
    saved(tmp_path, 3)
    assert step_of(tmp_path / "last") == 3


def test_a_half_written_checkpoint_is_not_taken(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "last", tmp_path / "last.tmp")
    (tmp_path / "last.tmp" / "manifest.json").unlink()
    (tmp_path / "last").rename(tmp_path / "previous")
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / "previous", [])


def test_another_format_version_is_refused(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / "last" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.verify(tmp_path / "last")


def test_a_full_disk_is_one_sentence_and_leaves_the_previous_whole(tmp_path):
    saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(UserError, match="disk is full"):
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert {p.name for p in tmp_path.iterdir()} == {"last"}
    checkpoint.verify(tmp_path / "last")
    assert step_of(tmp_path / "last") == 1


def test_links_cost_nothing_and_outlive_the_original(tmp_path):
    saved(tmp_path, 1)
    checkpoint.link(tmp_path / "last", tmp_path / "best")
    assert (tmp_path / "best" / "state.json").stat().st_nlink == 2
    saved(tmp_path, 2, 3)
    assert step_of(tmp_path / "best") == 1
    checkpoint.verify(tmp_path / "best")


def test_optimizer_state_survives_without_pickle():
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.99)),
    ):
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        one = make([{"params": [layer.weight], "lr_scale": 0.5}, {"params": [layer.bias], "lr_scale": 1.0}])
        layer(torch.rand(1, 3, 8, 8)).sum().backward()
        one.step()
        tensors, rest = checkpoint._pack_optimizer(one)
        rest = json.loads(json.dumps(rest))
        other = make([{"params": [layer.weight], "lr_scale": 1.0}, {"params": [layer.bias], "lr_scale": 1.0}])
        checkpoint._unpack_optimizer(other, {k: v.contiguous() for k, v in tensors.items()}, rest)
        assert other.param_groups[0]["lr_scale"] == 0.5
        for parameter in (layer.weight, layer.bias):
            for key, value in one.state[parameter].items():
                torch.testing.assert_close(other.state[parameter][key], value)
        for key, value in one.state[layer.weight].items():
            assert other.state[layer.weight][key].stride() == value.stride()


def test_any_processs_row_of_the_random_states_can_be_set():
    states = torch.stack([checkpoint.rng_state()["torch"]] * 3)
    expected = torch.rand(4)
    checkpoint.set_rng_state({"torch": states[2]})
    assert torch.equal(torch.rand(4), expected)
