import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import train_finetune
from common import UserError
from common.config import parse_args
from common.engine import lr_finder
from common.engine import probe as module
from common.engine.peak import KEEPING_STATISTICS
from common.model.create import create_model
from common.model.pretrained_cfg import PretrainedCfg
from common.scheduling import BACKBONE, KEEPING_WEIGHTS
from common.tools import predict
from tests.helpers import assert_same, make_images, weights
from tests.model.models import write_model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of our own, of other classes; further down timm's are probed."""
    torch.manual_seed(0)
    cfg = PretrainedCfg("resnet18", list("abcd"), 32, mean=(0.5, 0.4, 0.3))
    return write_model(tmp_path_factory.mktemp("base"), create_model("resnet18", 4), cfg)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run_probe(data: Path, base: Path, output: Path, name: str, *flags: str) -> Path:
    model = json.loads((base / "config.json").read_text())["architecture"]
    args = ["--data_dir", str(data), "--weights", str(base), "--model", model, "--img_size", "32", "--probe"]
    args += ["--output", str(output), "--run_name", name, "--trackers", "none", "--workers", "0"]
    args += ["--mixed_precision", "no"]
    train_finetune.main(parse_args(train_finetune.FinetuneConfig, "", [*args, *flags]))
    return output / name


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_probe_ends_as_any_other_run(
    images: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = run_probe(images, base, tmp_path, "a")
    (row,) = rows(run / "training_log.csv")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_top1"] == pytest.approx(float(row["val_top1"]), abs=0.01)
    args = ["--config", str(run / "config.yaml"), "--run_name", "again"]
    train_finetune.main(parse_args(train_finetune.FinetuneConfig, "", args))
    assert_same(weights(run), weights(tmp_path / "again"))
    assert (run / "plots" / "accuracy_live.png").exists()
    # Colours tell the classes, also through random layers.
    assert float(row["train_top1"]) > 90
    assert float(row["val_top1"]) > 60
    predict.main([str(run), str(images / "val"), "--csv", str(tmp_path / "p.csv")])
    hits = sum(Path(p["path"]).parent.name == p["label_1"] for p in rows(tmp_path / "p.csv"))
    assert 100 * hits / 21 == pytest.approx(float(row["val_top1"]), abs=1e-3)
    before, after = load_file(base / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    changed = {
        key
        for key in after
        if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
    }
    assert changed == {"fc.weight", "fc.bias"}
    assert_same(after, weights(run))
    run_probe(images, base, tmp_path, "a")
    assert len(rows(run / "training_log.csv")) == 1
    assert "this run is complete" in capsys.readouterr().out


def fine_tune(data: Path, base: Path, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    """The weights after an epoch whose steps move next to nothing."""
    if "--epochs" not in flags and "--stages" not in flags:
        flags = (*flags, "--stages", '[{"epochs": 1, "img_size": 32, "batch_size": 24}]')
    args = ["--data_dir", str(data), "--weights", str(base), "--model", "resnet18", "--lr", "1e-9"]
    args += ["--output", str(output), "--run_name", "tuned", "--trackers", "none", "--workers", "0"]
    args += ["--mixed_precision", "no", *flags]
    train_finetune.main(parse_args(train_finetune.FinetuneConfig, "", args))
    return weights(output / "tuned")


def test_fine_tuning_starts_from_the_probes_head_unless_the_weights_know_the_classes(
    images: Path, base: Path, tmp_path: Path
) -> None:
    tuned = fine_tune(images, base, tmp_path, "--crop_pct", "0.875")
    probed = weights(run_probe(images, base, tmp_path, "probed"))
    assert torch.allclose(tuned["fc.weight"], probed["fc.weight"], rtol=1e-3, atol=1e-4)
    classes = [f"class{number}" for number in range(3)]
    cfg = PretrainedCfg("resnet18", classes, 32)
    known = write_model(tmp_path / "known", create_model("resnet18", 3), cfg)
    kept = fine_tune(images, known, tmp_path / "kept")
    assert torch.allclose(kept["fc.weight"], load_file(known / "model.safetensors")["fc.weight"], atol=1e-5)


@pytest.mark.parametrize(("loss", "left"), [(0.5 * math.log(3), 0.5), (2 * math.log(3), 1.0)])
def test_how_far_the_weights_have_to_go_follows_from_the_heads_loss(
    images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float, left: float
) -> None:
    told: list[float] = []

    def fit(t: Any) -> None:
        module.fit_head(t)
        told.append(t.left_to_learn)

    monkeypatch.setattr(train_finetune, "fit_head", fit)
    monkeypatch.setattr(module, "choose_head", lambda *_: (torch.zeros(3, 512), torch.zeros(3), loss))
    fine_tune(images, base, tmp_path)
    assert told == [pytest.approx(left)]


def test_processes_share_the_images_whose_features_are_wanted(
    images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[np.ndarray]] = []

    def compare(t: Any) -> None:
        wanted, parts = np.arange(0, len(t.batches.train), 3), []
        for t.batches.rank, t.batches.world in ((0, 2), (1, 2), (0, 1)):
            parts.append(module.extract(t, t.state.model.fc, wanted))
        seen.append(parts)

    monkeypatch.setattr(train_finetune, "fit_head", compare)
    fine_tune(images, base, tmp_path)
    ((first, second, whole),) = seen
    assert first.any()
    assert second.any()
    np.testing.assert_allclose(first + second, whole, rtol=1e-4, atol=1e-5)


def test_which_statistics_serve_a_head_better_is_told_without_a_trace(
    images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    def compare(t: Any) -> None:
        model = t.state.model
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        means = {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name}
        seen.append(module.losses_by_statistics(t))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
        assert all(torch.equal(dict(model.named_buffers())[name], tensor) for name, tensor in means.items())
        # By these, nothing passes the first ReLU.
        model.bn1.running_mean.add_(1e9)
        seen.append(module.losses_by_statistics(t))
        norms = [name for name, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)]
        for name in norms:
            model.set_submodule(name, nn.Identity())
        assert module.losses_by_statistics(t) == (0.0, 0.0)
        raise UserError("enough")

    monkeypatch.setattr(train_finetune, "fit_head", compare)
    with pytest.raises(SystemExit):
        fine_tune(images, base, tmp_path)
    (kept, by_batch), (spoilt, unchanged) = seen
    assert 0 < kept < 1.09
    assert by_batch == unchanged < spoilt
    assert spoilt == pytest.approx(np.log(3), abs=0.05)


@pytest.mark.parametrize(("losses", "keeps"), [((1.0, 2.0), True), ((1.0, 1.1), False), ((0.0, 0.0), False)])
def test_statistics_stay_where_the_batchs_would_spoil_the_features(
    images: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, float],
    keeps: bool,
) -> None:
    def look(t: Any) -> tuple[float, float]:
        # The weights' own: by another mean their statistics do worse than they are.
        assert t.augment.mean == (0.5, 0.4, 0.3)
        return losses

    monkeypatch.setattr("common.engine.calibrate.losses_by_statistics", look)
    tuned = fine_tune(images, base, tmp_path, "--epochs", "1", "--img_size", "32", "--batch_size", "24")
    trained = load_file(base / "model.safetensors")
    assert torch.equal(tuned["bn1.running_mean"], trained["bn1.running_mean"]) == keeps
    config = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())
    assert [stage["frozen"] for stage in config["stages"]] == [["statistics"] if keeps else []]


def test_features_are_made_once_for_the_same_weights_images_and_view(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, base, other = tmp_path / "data", tmp_path / "base", tmp_path / "other"
    shutil.copytree(images, data)
    for folder, seed in ((base, 0), (other, 1)):
        torch.manual_seed(seed)
        write_model(folder, create_model("test_resnet", 4), PretrainedCfg("test_resnet", list("abcd"), 32))
    first = run_probe(data, base, tmp_path, "first")
    made: list[int] = []
    extract = module.extract

    def counted(*args: Any) -> Any:
        made.append(1)
        return extract(*args)

    monkeypatch.setattr(module, "extract", counted)
    second = run_probe(data, base, tmp_path, "second")
    assert not made
    assert_same(weights(first), weights(second))
    run_probe(data, other, tmp_path, "other_weights")
    assert len(made) == 1
    run_probe(data, base, tmp_path, "other_view", "--crop_pct", "1.0")
    assert len(made) == 2
    # The same weights, which expect images that are normalised otherwise.
    shutil.copytree(base, tmp_path / "other_mean")
    config = tmp_path / "other_mean" / "config.json"
    described = json.loads(config.read_text())
    described["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    config.write_text(json.dumps(described))
    run_probe(data, tmp_path / "other_mean", tmp_path, "other_statistics")
    assert len(made) == 3
    # Other pixels under the same name, in the same folder.
    image = data / "train" / "class0" / "0.jpg"
    image.write_bytes((data / "train" / "class1" / "0.jpg").read_bytes())
    changed = run_probe(data, base, tmp_path, "other_pixels")
    assert len(made) == 4
    assert not torch.equal(weights(changed)["fc.weight"], weights(first)["fc.weight"])


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    images: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = run_probe(images, base, tmp_path, "dry", "--dry_run")
    assert "72 training and 21 validation images at 32 px, 3 classes" in capsys.readouterr().out
    assert not run.exists()


@pytest.mark.parametrize(
    ("processes", "last", "says"),
    [
        (2, nn.Linear(8, 3), "--probe runs in one process"),
        (1, nn.Conv2d(8, 3, 1), "ends in one linear layer, and --model some does not"),
        (1, nn.Linear(8, 3, bias=False), "ends in one linear layer"),
    ],
)
def test_what_it_cannot_do_is_refused(processes: int, last: nn.Module, says: str) -> None:
    model = nn.Sequential(nn.Flatten(), last)
    model.get_classifier = lambda: last  # type: ignore[assignment]
    cfg = SimpleNamespace(given={"weights"}, model="some", stages=[])
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=processes), cfg=cfg)
    with pytest.raises(UserError, match=says):
        module.probe(run, model, None, None, None)  # type: ignore[arg-type]


def test_processes_with_fewer_batches_ask_for_signals_as_often(
    images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def compare(t: Any) -> None:
        monkeypatch.setattr(t.run.votes, "largest", lambda own: [own + 2])
        monkeypatch.setattr(t.run, "stop_if_asked", lambda: asked.append(1))
        features = module.extract(t, t.state.model.fc, np.arange(len(t.batches.train)))
        monkeypatch.undo()
        assert features.any(1).all()

    monkeypatch.setattr(train_finetune, "fit_head", compare)
    fine_tune(images, base, tmp_path)
    # 72 images in batches of 24, and two rounds in which only others have one.
    assert len(asked) == 3 + 2


@pytest.mark.parametrize(
    ("frozen", "left", "factor"),
    [
        ([], 0.1, KEEPING_WEIGHTS),
        ([], 0.6, 0.6),
        (["statistics"], 0.6, KEEPING_STATISTICS),
        (["backbone"], 0.6, lr_finder.ABOVE_BLOW_UP),
    ],
)
def test_trained_weights_get_a_rate_that_keeps_them(
    images: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    frozen: list[str],
    left: float,
    factor: float,
) -> None:
    given: list[float] = []

    def know(t: Any) -> None:
        t.left_to_learn = left

    monkeypatch.setattr(train_finetune, "fit_head", know)

    def find(*args: Any, factor: float, fallback: float) -> None:
        given.append(factor)
        # Of trained weights a fifth, unless the head alone trains.
        assert fallback == pytest.approx(0.1 * 24 / 256 * (1 if BACKBONE in frozen else KEEPING_WEIGHTS))
        raise UserError("enough")

    monkeypatch.setattr("common.engine.peak.find_lr", find)
    stage = [{"epochs": 1, "img_size": 32, "batch_size": 24, "frozen": frozen}]
    with pytest.raises(SystemExit):
        fine_tune(images, base, tmp_path, "--lr", "auto", "--stages", json.dumps(stage))
    assert given == [factor]
