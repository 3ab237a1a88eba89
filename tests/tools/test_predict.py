import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from common import UserError
from common.data.order import View
from common.tools import predict
from common.tools.model_folder import TrainedModel
from tests.helpers import make_images, run_training
from train_rect import RectConfig
from train_standard import StandardConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_training(
        StandardConfig, images, tmp_path_factory.mktemp("runs"), "a", "--epochs", "2", "--batch_size", "8"
    )


@pytest.mark.parametrize("batch_size", ["64", "4"])
def test_as_many_are_right_as_the_log_says(
    batch_size: str, run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json"), "--batch_size", batch_size]
    predict.main([str(run), str(images / "val"), "--topk", "2", *out])
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    hits = sum(Path(row["path"]).parent.name == row["label_1"] for row in rows)
    with (run / "training_log.csv").open() as file:
        logged = max(float(row["val_top1"]) for row in csv.DictReader(file))
    assert len(rows) == 21
    assert 100 * hits / 21 == pytest.approx(logged)
    # The network of two epochs is wrong about some, so that wrong pixels would be seen.
    assert 0 < hits < 21
    assert rows[0].keys() == {"path", "label_1", "probability_1", "label_2", "probability_2"}
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) > 0 for row in rows)
    listed = json.loads((tmp_path / "a.json").read_text())
    assert [entry["path"] for entry in listed] == [row["path"] for row in rows]
    assert [entry["predictions"][0]["label"] for entry in listed] == [row["label_1"] for row in rows]
    assert len(capsys.readouterr().out.splitlines()) == 21


def test_a_model_folder_serves_and_probabilities_are_the_softmax(run: Path, images: Path) -> None:
    path = images / "val" / "class0" / "0.jpg"
    model = TrainedModel(run / "model")
    (prediction,) = predict.predict(model, [path], 9, 8, [])
    expected = model.logits(predict.decode(model, path)).softmax(1)[0]
    assert sum(prediction.probabilities) == pytest.approx(1)
    assert prediction.probabilities == pytest.approx(sorted(expected.tolist(), reverse=True))
    assert prediction.names[0] == model.cfg.classes[int(torch.argmax(expected))]


def test_what_cannot_be_read_is_named_and_left_out(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    predict.main([str(run), str(tmp_path), str(images / "val" / "class0" / "0.jpg")])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert f"not readable: {tmp_path / 'broken.jpg'}: " in said.err
    with pytest.raises(SystemExit) as ended:
        predict.main([str(run), str(tmp_path)])
    assert ended.value.code == 1


def test_a_folder_is_listed_as_training_lists_it(images: Path, tmp_path: Path) -> None:
    image, below = images / "val" / "class0" / "0.jpg", tmp_path / "a"
    (tmp_path / "elsewhere").mkdir()
    (below / ".hidden").mkdir(parents=True)
    for place in (
        below / "1.jpg",
        below / ".2.jpg",
        below / ".hidden" / "3.jpg",
        tmp_path / "elsewhere" / "4.JPG",
    ):
        place.write_bytes(image.read_bytes())
    (below / "more").symlink_to(tmp_path / "elsewhere")
    assert predict.find_images([tmp_path / "a"]) == [below / "1.jpg", below / "more" / "4.JPG"]


def test_names_that_are_not_utf8_are_written(run: Path, images: Path, tmp_path: Path) -> None:
    """As from an archive of a system that wrote Latin-1."""
    (tmp_path / "in").mkdir()
    shutil.copy(images / "val" / "class0" / "0.jpg", os.fsencode(tmp_path / "in") + b"/caf\xe9.jpg")
    predict.main(
        [str(run), str(tmp_path / "in"), "--csv", str(tmp_path / "p.csv"), "--json", str(tmp_path / "p.json")]
    )
    for file in ("p.csv", "p.json"):
        assert "caf\\xe9" in (tmp_path / file).read_text().replace("\\\\", "\\")


def test_a_run_evaluated_in_rectangles_and_bf16_is_repeated(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--epochs", "2", "--batch_size", "8", "--mixed_precision", "bf16", "--rect_area", "constant"]
    run = run_training(RectConfig, images, tmp_path, "a", *flags)
    capsys.readouterr()
    model = TrainedModel(run)
    assert len(model.shapes) > 1
    assert model.view == View(None, crop_pct=1.0)
    assert model.precision == "bf16"
    assert len({predict.decode(model, path).shape for path in images.glob("val/*/*.jpg")}) > 1
    predictions = list(predict.predict(model, sorted(images.glob("val/*/*.jpg")), 1, 64, []))
    hits = sum(path.parent.name == names[0] for path, names, _ in predictions)
    with (run / "training_log.csv").open() as file:
        assert 100 * hits / 21 == pytest.approx(max(float(row["val_top1"]) for row in csv.DictReader(file)))
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace(str(images), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"whose shapes come from its training images: .*gone.* square crops"):
        TrainedModel(run)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{run}", "{empty}"], "no image below "),
        (["{run}", "{empty}/none.jpg"], "none.jpg does not exist"),
        (["{empty}", "{image}"], "is neither a run's folder nor a model's"),
        (["{empty}/none", "{image}"], "is neither a run's folder nor a model's"),
        (["{image}", "{image}"], "is neither a run's folder nor a model's"),
        (["{run}", "{image}", "--topk", "0"], "--topk must be at least 1, not 0"),
        (["{run}", "{image}", "--csv", "{empty}/none/a.csv"], "a.csv cannot be written"),
    ],
)
def test_refusals_are_one_sentence(
    arguments: list[str],
    sentence: str,
    run: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    places = {"run": run, "empty": tmp_path, "image": images / "val" / "class0" / "0.jpg"}
    with pytest.raises(SystemExit) as ended:
        predict.main([argument.format(**places) for argument in arguments])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in line
