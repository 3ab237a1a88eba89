import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common.data.sources.folder import FolderSource
from common.tools import evaluate as tool
from common.tools.evaluate import (
    Answers,
    answer,
    calibrate,
    confused_pairs,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    per_class,
    predictions,
    wilson,
)
from common.tools.evaluation_plots import TILE, draw_confusion, draw_mistakes, draw_reliability, tile
from common.tools.model_folder import TrainedModel
from tests.helpers import make_images, run_training
from train_rect import RectConfig
from train_standard import StandardConfig

NAMES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Also with a test split of two of the three classes."""
    folder = make_images(tmp_path_factory.mktemp("data"))
    for name in NAMES[1:]:
        shutil.copytree(folder / "val" / name, folder / "test" / name)
    return folder


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["--epochs", "2", "--batch_size", "8", "--crop_pct", "0.7"]
    return run_training(StandardConfig, images, tmp_path_factory.mktemp("runs"), "a", *flags)


def best_top1(run: Path) -> float:
    return pd.read_csv(run / "training_log.csv")[["val_top1", "ema_top1"]].max(axis=None)


def evaluated(out: Path, *arguments: object) -> pd.DataFrame:
    """The predictions of an evaluation, paths shortened to class and name."""
    tool.main([*map(str, arguments), "--to", str(out), "--workers", "0"])
    table = pd.read_csv(out / "predictions.csv")
    return table.assign(path=["/".join(path.split("/")[-2:]) for path in table["path"]])


def fake(classes: int, per_class: int, sharp: float = 3.0) -> Answers:
    """Random answers, right more often than by chance."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), per_class)
    logits = torch.from_numpy(rng.normal(0, 1, (len(labels), classes)).astype(np.float32))
    logits[torch.arange(len(labels)), labels] += sharp
    return Answers(labels, logits, logits.topk(min(5, classes), 1).indices.numpy())


def test_top1_is_the_logs_and_the_tables_agree(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = evaluated(tmp_path, run)
    hits = int((table["label_1"] == table["class"]).sum())
    assert len(table) == 21
    # The network of two epochs is wrong about some, so that wrong pixels would be seen.
    assert 0 < hits < 21
    assert 100 * hits / 21 == pytest.approx(best_top1(run), rel=1e-5)
    assert all(path.split("/")[0] == name for path, name in zip(table["path"], table["class"], strict=True))
    printed = capsys.readouterr().out
    assert f"{hits} of 21; 95 % interval" in printed
    assert "the same, to the last image" in printed
    assert (tmp_path / "report.txt").read_text() in printed
    classes = pd.read_csv(tmp_path / "per_class.csv", index_col="class")
    for name in NAMES:
        answered, true = table["label_1"] == name, table["class"] == name
        assert classes["recall"][name] == pytest.approx((answered & true).sum() / true.sum())
        assert classes["support"][name] == 7
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "confusion.png",
        "mistakes.png",
        "reliability.png",
    }


def test_a_run_in_rectangles_with_averaged_weights_is_repeated(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--epochs", "2", "--batch_size", "8", "--ema", "--ema_decay", "0.8", "--rect_area", "constant"]
    run = run_training(RectConfig, images, tmp_path, "rect", *flags)
    table = evaluated(tmp_path / "out", run)
    assert 100 * table["right"].mean() == pytest.approx(best_top1(run), rel=1e-5)
    assert "the same, to the last image" in capsys.readouterr().out


def test_images_of_one_aspect_are_seen_in_their_rectangle(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = TrainedModel(run), []
    # As `choose_shapes` gives it where all images are alike.
    model.settings["rect_val"], model.shapes = True, np.array([[32, 48]])
    logits = model.logits

    def watch(pixels: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(tuple(pixels.shape[2:]))
        return logits(pixels, *rest)

    monkeypatch.setattr(model, "logits", watch)
    answer(model, FolderSource(images / "val"), 8, 0, tta=False)
    assert set(seen) == {(32, 48)}


def test_an_image_that_cannot_be_read_is_refused_or_replaced_and_leaves_no_folder(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = shutil.copytree(images, tmp_path / "images")
    (data / "val" / "class1" / "0.jpg").write_bytes(b"no picture")
    words = [str(run), "--data_dir", str(data), "--to", str(tmp_path / "to"), "--workers", "0"]
    with pytest.raises(SystemExit):
        tool.main(words)
    assert "or pass --skip_unreadable" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
    tool.main([*words, "--skip_unreadable"])
    assert (tmp_path / "to" / "report.txt").is_file()


def test_a_difference_to_the_log_is_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    log = pd.read_csv(other / "training_log.csv")
    log["val_top1"] = 100.0
    log.to_csv(other / "training_log.csv", index=False)
    wrong = (evaluated(tmp_path / "out", other)["right"] == 0).sum()
    assert f"{wrong} images more" in capsys.readouterr().out


def test_classes_are_found_by_name(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    of_val = evaluated(tmp_path / "val", run).set_index("path")
    capsys.readouterr()
    flags = ["--data_dir", images, "--split", "test"]
    of_test = evaluated(tmp_path / "test", run / "model", *flags).set_index("path")
    assert len(of_test) == 14
    columns = ["class", "right", "label_1", "label_2", "label_3"]
    assert of_test[columns].equals(of_val.loc[of_test.index, columns])
    printed = capsys.readouterr().out
    assert "mean recall of the 2 classes that have images" in printed
    assert "the log" not in printed
    # Neither are two views what the log tells of.
    evaluated(tmp_path / "flipped", run, "--tta")
    assert "the log" not in capsys.readouterr().out
    classes = pd.read_csv(tmp_path / "test" / "per_class.csv", index_col="class")
    assert classes["support"].to_dict() == {"class0": 0, "class1": 7, "class2": 7}
    assert np.isnan(classes["recall"]["class0"])


def test_two_views_are_the_mean_of_an_image_and_its_mirror_image(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        # Of a size whose middle is the mirror image's too.
        pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
        for way, image in (("as it is", pixels), ("mirrored", pixels[:, ::-1])):
            folder = tmp_path / way / NAMES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    model = TrainedModel(run)
    source, mirrored = (FolderSource(tmp_path / way) for way in ("as it is", "mirrored"))
    one, other = (answer(model, images, 4, 0, tta=False).logits for images in (source, mirrored))
    assert (one - other).abs().max() > 0.01
    both = answer(model, source, 4, 0, tta=True).logits
    torch.testing.assert_close(both, (one + other) / 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{run}/model"], "a model's folder does not know its images; pass --data_dir"),
        (["{empty}"], "is neither a run's folder nor a model's"),
        (["{run}", "--split", "test", "--data_dir", "{empty}"], "--split test: "),
        (["{run}", "--data_dir", "{empty}/strange"], "the model does not know 1 of the classes in "),
        (["{run}", "--data_dir", "{empty}/few"], "holds 1 images; an evaluation takes two or more"),
        (["{run}", "--to", "{empty}/file"], "cannot be written"),
        (["{run}", "--to", "{run}"], "is the folder of a run or a model; choose another"),
        (["{run}", "--to", "{run}/model"], "is the folder of a run or a model; choose another"),
        (["{run}", "--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["{run}", "--workers", "-1"], "--workers must be at least 0, not -1"),
        (["{run}", "--mixed_precision", "fp16"], "fp16 needs a GPU"),
    ],
)
def test_refusals_are_one_sentence(
    arguments: list[str],
    sentence: str,
    run: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").touch()
    for place in ("strange/val/class1", "strange/val/unheard of", "few/val/class1"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(images / "val" / "class1" / "0.jpg", tmp_path / place)
    with pytest.raises(SystemExit) as ended:
        tool.main([argument.format(run=run, empty=tmp_path) for argument in arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


# --- figures --------------------------------------------------------------------------------------


def test_wilsons_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_names_with_dollars_are_drawn(images: Path, tmp_path: Path) -> None:
    draw(tmp_path, FolderSource(images / "val"), fake(3, 7), ["x$#1", "y$%2", "5$"])
    assert (tmp_path / "confusion.png").stat().st_size > 5_000


def test_figures_of_a_matrix() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    said = np.array([0, 1, 1, 1, 0, 1])
    matrix = confusion_matrix(Answers(labels, torch.zeros(6, 4), said[:, None]))
    assert matrix.tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    table = per_class(matrix, ["ant", "bee", "cat", "dog"])
    assert table.loc["ant"].tolist() == pytest.approx([1 / 2, 1 / 3, 2 / 5, 3])
    assert table.loc["bee"].tolist() == pytest.approx([1 / 4, 1 / 2, 2 / 6, 2])
    assert table.loc["cat"].tolist() == pytest.approx([np.nan, 0, 0, 1], nan_ok=True)
    assert table.loc["dog"].tolist() == pytest.approx([np.nan, np.nan, np.nan, 0], nan_ok=True)
    assert confused_pairs(matrix, ["ant", "bee", "cat", "dog"]).to_numpy().tolist() == [
        ["ant", "bee", 2, pytest.approx(2 / 3)],
        ["cat", "bee", 1, 1.0],
        ["bee", "ant", 1, 0.5],
    ]


def test_calibration_error_of_a_few_answers() -> None:
    confidence, right = np.array([0.9, 0.91, 0.5, 1.0]), np.array([True, False, True, True])
    # Three bins: two images, one, and the last with its upper edge.
    expected = (abs(1 - 1.81) + abs(1 - 0.5) + 0) / 4
    assert expected_calibration_error(confidence, right) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_spoiled_probabilities_is_found(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(true * temperature, labels) == pytest.approx(temperature, rel=0.04)
    spoilt = true * temperature
    c = calibrate(Answers(labels.numpy(), spoilt, spoilt.topk(4, 1).indices.numpy()))
    assert c.temperature == pytest.approx(temperature, rel=0.06)
    assert c.after < 0.015
    assert c.before > 0.05 or temperature == 1
    assert [len(confidence) for confidence, _ in c.curves.values()] == [10_000, 10_000]


def draw(out: Path, source: FolderSource, answers: Answers, names: list[str]) -> None:
    matrix = confusion_matrix(answers)
    draw_confusion(out / "confusion.png", matrix, names, confused_pairs(matrix, names), "a note")
    draw_reliability(out / "reliability.png", calibrate(answers).curves, tool.BINS, "a note")
    draw_mistakes(out / "mistakes.png", source, predictions(source, answers, names), "a note")


@pytest.mark.parametrize(("classes", "per_class_"), [(2, 5), (10, 20), (101, 8), (1000, 3)])
def test_plots_of_few_and_many_classes(images: Path, tmp_path: Path, classes: int, per_class_: int) -> None:
    answers = fake(classes, per_class_)
    names = [f"a class with quite a long name, {number}" for number in range(classes)]

    class Repeated(FolderSource):
        def __len__(self) -> int:
            return len(answers.labels)

        def read(self, index: int, short_side: int) -> np.ndarray:
            return super().read(index % 21, short_side)

        def describe(self, index: int) -> str:
            return super().describe(index % 21)

    draw(tmp_path, Repeated(images / "val"), answers, names)
    for name in ("confusion.png", "reliability.png", "mistakes.png"):
        with Image.open(tmp_path / name) as plot:
            assert plot.width < 2600
            assert plot.height < 2600
            assert len(plot.convert("RGB").getcolors(plot.width * plot.height)) > 50


def test_a_mistake_that_cannot_be_read_is_grey(images: Path, tmp_path: Path) -> None:
    """As one of a run with --skip_unreadable, for which another image stood in."""
    folder = shutil.copytree(images / "val", tmp_path / "val")
    (folder / "class0" / "0.jpg").write_bytes(b"no image")
    (folder / "class0" / "1.jpg").unlink()
    (folder / "class0" / "1.jpg").symlink_to("nowhere")
    source = FolderSource(folder)
    for index in (0, 1):
        assert (tile(source, index) == np.full((TILE, TILE, 3), 128)).all()
    labels = np.repeat(np.arange(3), 7)
    logits = torch.zeros(21, 3)
    draw(tmp_path, source, Answers(labels, logits, np.tile([2, 1, 0], (21, 1))), NAMES)
    assert (tmp_path / "mistakes.png").stat().st_size > 1000


def test_no_mistake_is_no_trouble(images: Path, tmp_path: Path) -> None:
    answers = fake(3, 7, sharp=50.0)
    assert answers.right.all()
    matrix, calibration = confusion_matrix(answers), calibrate(answers)
    pairs, table = confused_pairs(matrix, NAMES), per_class(matrix, NAMES)
    draw(tmp_path, FolderSource(images / "val"), answers, NAMES)
    assert "no mistake" in tool.report("", table, pairs, calibration)
