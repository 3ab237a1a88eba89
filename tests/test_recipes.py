"""The recipes in docs/recipes: each header's command plans a run, and says whose figure it expects."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from common.model import create_model
from tests.helpers import ROOT, as_if_measured, make_images

RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_in_the_header_plans_a_run(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    text = path.read_text()
    assert re.search(r"^# Expected: .+ Ours: not measured\.$", text, re.MULTILINE)
    (command,) = re.findall(r"^#   accelerate launch --config_file (.+)", text, re.MULTILINE)
    accelerate_config, script, *flags = command.split()
    assert (ROOT / accelerate_config).exists()
    assert flags[:2] == ["--config", str(path.relative_to(ROOT))]
    flags[-1] = str(make_images(tmp_path / "images"))
    if "--weights" in flags:
        # Nothing is fetched in a test.
        flags[flags.index("--weights") + 1] = str(tmp_path / "weights.safetensors")
        save_file(create_model("resnet50", 3).state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(ROOT)
    # ResNet-50 at 224 px takes its time on a CPU.
    monkeypatch.setattr("common.engine.measure.measure_stage", as_if_measured(0.1))
    monkeypatch.setattr("common.engine.measure.measure_beside_images", lambda *_: 0.0)
    monkeypatch.setattr(sys, "argv", [script, *flags, "--dry_run", "--mixed_precision", "no"])
    runpy.run_path(script, run_name="__main__")
    settings = re.sub(r"^#.*", "", text, flags=re.MULTILINE)
    epochs = sum(map(int, re.findall(r"epochs: (\d+)", settings)))
    planned = capsys.readouterr().out
    assert f"\n{epochs} epochs, " in planned
    for size in re.findall(r"img_size: (\d+)", settings):
        assert f"  {size}  " in planned
