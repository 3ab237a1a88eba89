"""The strategy in CONTRIBUTING.md runs as it stands there: the block is written to a file and started as a user would."""

import csv
import json
import re
from pathlib import Path

import pytest

from tests.helpers import FAST, ROOT, launch, make_images


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return block


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train_gentle.py"
    path.write_text(example())
    return path


def test_the_example_trains_its_three_stages(script: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    flags = ["--data_dir", str(images), "--output", str(tmp_path), "--run_name", "gentle", *FAST]
    done = launch(1, str(script), *flags, "--epochs", "3", "--img_size", "48", "--batch_size", "24")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "gentle"
    assert json.loads((run / "summary.json").read_text())["strategy"] == "gentle"
    rows = list(csv.DictReader((run / "training_log.csv").open()))
    assert [(row["stage"], row["img_size"]) for row in rows] == [("1", "16"), ("2", "32"), ("3", "48")]


def test_its_refusal_is_one_sentence_that_names_the_flag(script: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    flags = ["--data_dir", str(images), "--output", str(tmp_path / "runs"), *FAST]
    done = launch(1, str(script), *flags, "--epochs", "2")
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert said.count("--epochs must be at least 3") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()
