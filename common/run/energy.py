"""What a run draws, by the machine's own counters: RAPL's of the CPU packages, NVML's of the GPUs."""

import math
from pathlib import Path

import torch

# Intel's driver, which serves AMD's processors too; most systems let root alone read its counters.
POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made, of this process's machine: all of its CPU packages, and the GPUs that can be seen."""

    def __init__(self, *, gpus: bool) -> None:
        self._kinds = {"cpu": read_packages, "gpu": read_gpus} if gpus else {"cpu": read_packages}
        self._last = {kind: read() for kind, read in self._kinds.items()}
        self._sums = dict.fromkeys(self._kinds, 0.0)

    def joules(self) -> dict[str, float]:
        """By "cpu" and "gpu"; NaN where a counter is missing or may not be read. Ask every quarter of an hour: counters wrap."""
        for kind, read in self._kinds.items():
            last, self._last[kind] = self._last[kind], read()
            known = last and last.keys() == self._last[kind].keys()
            drawn = [(now - last[name][0]) % wrap for name, (now, wrap) in self._last[kind].items() if known]
            self._sums[kind] += sum(drawn) if known else math.nan
        return dict(self._sums)


def read_packages() -> dict[str, tuple[float, float]]:
    """Joules of each CPU package, and where its counter begins anew; empty if they cannot all be read."""
    zones = POWERCAP.glob("intel-rapl:*")
    try:
        return {
            zone.name: (
                int((zone / "energy_uj").read_text()) / 1e6,
                int((zone / "max_energy_range_uj").read_text()) / 1e6,
            )
            for zone in zones
            # Not their parts (core, dram), nor the platform, which contains them (psys).
            if (zone / "name").read_text().startswith("package")
        }
    except OSError:
        return {}


def read_gpus() -> dict[str, tuple[float, float]]:
    """The same of each GPU that this process sees; they count from the driver's start (Volta and later)."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        counters = {}
        for index in range(torch.cuda.device_count()):
            uuid = torch.cuda.get_device_properties(index).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            counters[str(uuid)] = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, math.inf)
        return counters
    except pynvml.NVMLError:
        return {}
