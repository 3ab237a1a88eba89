"""Networks of timm from end to end: transformers, convolutions, and one that fits a single image size (docs/models.md)."""

import json

import pytest

from tests.helpers import make_images, run_training
from train_standard import StandardConfig


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_coatnet"])
def test_a_network_trains_at_a_size_that_is_not_its_own(name, tmp_path):
    data = make_images(tmp_path / "data", train=6, val=2)
    flags = ["--model", name, "--epochs", "1", "--batch_size", "9", "--final_eval"]
    run = run_training(StandardConfig, data, tmp_path / "runs", name, *flags)
    assert json.loads((run / "model" / "config.json").read_text())["architecture"] == name
    # A size that is no multiple of a transformer's patch is left out of the final evaluation.
    sizes = {row["img_size"] for row in json.loads((run / "final_eval.json").read_text())["rows"]}
    assert sizes == ({32} if name == "test_vit" else {32, 40})
