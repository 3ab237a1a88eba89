import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.data.loader import Loader, LoaderSettings
from common.data.sources.open import open_dataset
from common.tools import average as tool
from common.tools import evaluate
from common.tools.average import Candidate, HeldOut, Setup, greedy, mean_of, soup_of, statistics_items
from common.tools.model_folder import TrainedModel
from tests.helpers import assert_same, make_images, run_training
from train_standard import StandardConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Also with a test split."""
    folder = make_images(tmp_path_factory.mktemp("data"))
    shutil.copytree(folder / "train", folder / "test")
    return folder


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run that keeps its checkpoints, and a model's folder with weights near the run's."""
    place = tmp_path_factory.mktemp("runs")
    flags = ["--epochs", "2", "--batch_size", "8", "--keep_every", "1"]
    run = run_training(StandardConfig, images, place, "a", *flags)
    near = shutil.copytree(run / "model", place / "b")
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        if name.endswith(("weight", "running_mean"))
        else tensor
        for name, tensor in load_file(near / "model.safetensors").items()
    }
    save_file(state, near / "model.safetensors")
    return [run, near]


@pytest.fixture
def setup(runs: list[Path]) -> Setup:
    model = TrainedModel(runs[0])
    return Setup(model, open_dataset(model.data_settings())[0], 8, 0)


def averaged(out: Path, *arguments: object) -> str:
    tool.main([*map(str, arguments), "--to", str(out), "--workers", "0", "--batch_size", "8"])
    return (out / "report.txt").read_text()


def test_the_mean_of_weights() -> None:
    states = [{"w": torch.tensor([value]), "n": torch.tensor(int(value))} for value in (1.0, 2.0, 6.0)]
    mean = mean_of(states)
    assert mean["w"].tolist() == [3.0]
    assert (mean["w"].dtype, int(mean["n"])) == (torch.float32, 1)


def test_statistics_are_taken_from_mixed_batches_of_training_images(setup: Setup) -> None:
    """As the first BatchNorm's definition has it: means over batches of its inputs' mean and variance."""
    net, items = setup.model.model, statistics_items(setup)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    assert all(torch.equal(soup_of(setup, [Candidate("a", state, 0, 0)])[key], state[key]) for key in state)
    moved = {key: tensor + 1 if key.endswith("running_mean") else tensor for key, tensor in state.items()}
    soup = soup_of(setup, [Candidate("a", state, 0, 0), Candidate("b", moved, 0, 0)])
    assert not any(module.training for module in net.modules())
    assert sorted(np.concatenate([item.indices for item in items])) == list(range(72))
    # Of one class, a batch's variance would be too small.
    assert all(len(np.unique(setup.train.labels[item.indices])) > 1 for item in items)
    name, norm = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d))
    inputs: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _module, args, _out: inputs.append(args[0].clone()))
    with closing(Loader(setup.train, setup.train, seed=0, settings=LoaderSettings(0))) as loader:
        for batch in loader.stream(items):
            setup.model.logits(batch.images)
    for statistic, of in (("mean", torch.mean), ("var", torch.var)):
        expected = torch.stack([of(x, dim=(0, 2, 3)) for x in inputs]).mean(0)
        torch.testing.assert_close(soup[f"{name}.running_{statistic}"], expected, rtol=1e-3, atol=1e-4)


def test_images_of_one_aspect_are_seen_in_their_rectangle(setup: Setup) -> None:
    # As `choose_shapes` gives it where all images are alike.
    setup.model.settings["rect_val"], setup.model.shapes = True, np.array([[32, 48]])
    assert {(item.height, item.width) for item in statistics_items(setup)} == {(32, 48)}


def test_the_greedy_soup_takes_what_makes_it_no_worse(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingredients are numbers, and a soup is good if their mean is near 10."""
    candidates = [
        Candidate(str(x), {"w": torch.tensor(x)}, round(1000 - 10 * abs(x - 10)), 0)
        for x in (30.0, 8.0, 11.5, 11.0)
    ]
    monkeypatch.setattr(tool, "soup_of", lambda _setup, some: mean_of([each.state for each in some]))
    tried = []

    def hits_of(_setup: Setup, state: dict, parts: list[HeldOut]) -> list[int]:
        tried.append(float(state["w"]))
        return [round(1000 - 10 * abs(tried[-1] - 10))]

    monkeypatch.setattr(tool, "hits_of", hits_of)
    taken, state = greedy(setup, candidates, HeldOut("val", setup.train, np.ones(72, bool)))
    # 11 is the best; 11.5 takes the mean away from 10, 8 brings it nearer, 30 does not.
    assert [each.name for each in taken] == ["11.0", "8.0"]
    assert float(state["w"]) == 9.5
    assert tried == pytest.approx([11.25, 9.5, 49 / 3])


def test_a_soup_is_written_and_evaluated_beside_its_ingredients(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "soup"
    text = averaged(out, *runs, "--split", "test", "--uniform")
    assert "val (21) chooses" in text
    assert "test (72) reports" in text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [str(runs[0]), str(runs[1]), "uniform", "greedy"]
    # The run's figure is its log's.
    best = pd.read_csv(runs[0] / "training_log.csv")["val_top1"].max()
    assert f"{best:.2f}%" in lines[1]
    # The weights are the mean; of BatchNorm, only what is learnt.
    soup, states = (
        load_file(out / "model.safetensors"),
        [load_file(r) for r in (runs[0] / "model/model.safetensors", runs[1] / "model.safetensors")],
    )
    learnt = [name for name, _ in timm.create_model("test_resnet").named_parameters()]
    mean = mean_of(states)
    assert_same({k: soup[k] for k in learnt}, {k: mean[k] for k in learnt})
    assert any(not torch.equal(soup[k], mean[k]) for k in soup.keys() - set(learnt))
    # And what the table says of it is what `evaluate` finds in the folder.
    evaluate.main(
        [
            str(out),
            "--data_dir",
            str(images_of(runs[0])),
            "--split",
            "test",
            "--to",
            str(tmp_path / "e"),
            "--workers",
            "0",
        ]
    )
    hits = pd.read_csv(tmp_path / "e" / "predictions.csv")["right"].mean()
    assert f"{hits:.2%}" in lines[3]
    assert timm.create_model(f"local-dir:{out}", pretrained=True).num_classes == 3


def images_of(run: Path) -> str:
    return TrainedModel(run).settings["data_dir"]


def test_half_of_the_validation_images_choose_and_the_others_report(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kept = sorted((runs[0] / "checkpoints").glob("step_*"))[0]
    text = averaged(tmp_path / "soup", runs[0], kept)
    assert "half of val (12) chooses" in text
    assert "the other half (9) reports" in text
    assert "written: the greedy soup" in text
    assert "--split test has no such bias" in text
    first, second = tool.held_out_images(TrainedModel(runs[0]), None, "val")
    assert not (first.rows & second.rows).any()
    assert (first.rows | second.rows).all()
    assert np.bincount(first.source.labels[first.rows]).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{a}"], "an average takes two models or more"),
        (["{a}", "{empty}"], "is neither a run's folder nor a model's"),
        (["{a}", "{other}"], "they differ in classes, img_size"),
        (["{a}", "{strange}"], "they differ in the tensors' names and shapes"),
        (["{a}", "{b}", "--to", "{a}"], "is there already and not an empty folder"),
        (["{a}", "{b}", "--data_dir", "{empty}"], "has no val"),
        (
            ["{a}", "{b}", "--data_dir", "{two}", "--split", "test"],
            "holds the validation images too, which choose",
        ),
        (["{a}", "{b}", "--batch_size", "1"], "--batch_size must be at least 2, not 1"),
    ],
)
def test_refusals_are_one_sentence(
    arguments: list[str], sentence: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("other", "strange"):
        shutil.copytree(runs[1], tmp_path / name)
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace("class2", "klasse").replace("32", "64"))
    save_file({"w": torch.ones(1)}, tmp_path / "strange" / "model.safetensors")
    (tmp_path / "empty").mkdir()
    for split in ("train", "test"):
        shutil.copytree(Path(images_of(runs[0])) / "val", tmp_path / "two" / split)
    places = {name: tmp_path / name for name in ("other", "strange", "empty", "two")} | dict(
        zip("ab", runs, strict=True)
    )
    words = [argument.format(**places) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        tool.main([*words, *([] if "--to" in words else ["--to", str(tmp_path / "soup")])])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "soup").exists()
