"""Every file loads through Accelerate and promises what its name says."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parent.parent / "accelerate_configs"
PROMISES = {  # processes, machines, precision
    "cpu": (1, 1, "no"),
    "cpu_2proc": (2, 1, "no"),
    "single_gpu": (1, 1, "fp16"),
    "g5_4gpu": (4, 1, "fp16"),
    "p4d_8gpu": (8, 1, "fp16"),
    "multi_node": (16, 2, "fp16"),
}


def test_all_files_are_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_promises(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines, config.mixed_precision) == PROMISES[name]
    assert str(config.distributed_type).endswith("MULTI_GPU" if config.num_processes > 1 else "NO")
