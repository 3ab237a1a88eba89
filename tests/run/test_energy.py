import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from common.run import energy
from common.run.energy import EnergyMeter
from tests.helpers import make_images, progress, run_training, stop_after
from train_standard import StandardConfig


def set_counters(folder, *joules, wraps_at=100):
    for number, value in enumerate(joules):
        zone = folder / f"intel-rapl:{number}"
        zone.mkdir(exist_ok=True)
        (zone / "name").write_text(f"package-{number}\n")
        (zone / "energy_uj").write_text(f"{value * 1_000_000}\n")
        (zone / "max_energy_range_uj").write_text(f"{wraps_at * 1_000_000}\n")


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    (tmp_path / "powercap").mkdir()
    return tmp_path / "powercap"


def test_packages_are_summed_over_their_wraps_and_without_their_parts(powercap):
    set_counters(powercap, 90, 10)
    for zone, name in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys")):
        (powercap / zone).mkdir()
        (powercap / zone / "name").write_text(name)
        (powercap / zone / "energy_uj").write_text("5")
    meter = EnergyMeter(gpus=False)
    assert meter.joules() == {"cpu": 0}
    set_counters(powercap, 5, 30)
    assert meter.joules() == {"cpu": pytest.approx(15 + 20)}
    set_counters(powercap, 6, 30)
    assert meter.joules() == {"cpu": pytest.approx(36)}


@pytest.mark.parametrize("when", ["never", "later"])
def test_a_counter_that_cannot_be_read_leaves_the_sum_unknown(powercap, when):
    if when == "later":
        set_counters(powercap, 1)
    meter = EnergyMeter(gpus=False)
    for file in powercap.rglob("energy_uj"):
        file.unlink()
    assert meter.joules()["cpu"] != meter.joules()["cpu"]
    set_counters(powercap, 2)
    assert meter.joules()["cpu"] != meter.joules()["cpu"]


def test_gpus_are_asked_by_their_names(powercap, monkeypatch):
    drawn = {"GPU-a": 1000, "GPU-b": 5000}
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=drawn.get,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="ab"[i]))
    meter = EnergyMeter(gpus=True)
    drawn.update({"GPU-a": 3000, "GPU-b": 5500})
    assert meter.joules()["gpu"] == pytest.approx(2.5)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meter.joules()["gpu"] != meter.joules()["gpu"]


def test_the_receipt_has_what_all_starts_of_a_run_have_drawn(tmp_path, monkeypatch):
    # An hour of one watt passes between two readings.
    readings = itertools.count(0.0, 3600.0)
    monkeypatch.setattr(energy, "read_packages", lambda: {"intel-rapl:0": (next(readings), float("inf"))})
    data, flags = make_images(tmp_path / "images"), ("--batch_size", "16", "--epochs", "2")
    stop_after(monkeypatch, 6)
    with pytest.raises(SystemExit):
        run_training(StandardConfig, data, tmp_path, "a", *flags)
    first = progress(tmp_path / "a")["energy_j"]["cpu"] / 3600
    before = next(readings) / 3600
    run = run_training(StandardConfig, data, tmp_path, "a", *flags)
    # The second start reads once to begin with, and once in each lap.
    second = next(readings) / 3600 - before - 2
    assert first > 1
    assert json.loads((run / "receipt.json").read_text())["energy_wh"] == {"cpu": first + second}
