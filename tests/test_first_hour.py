"""A beginner's wrong and odd calls: at most two lines on stderr, exit code 2, no traceback, nothing changed on disk."""

import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from common.config import run_script
from tests.helpers import FAST, ROOT, make_images, run_training
from train_finetune import FinetuneConfig
from train_hybrid import HybridConfig
from train_progressive import ProgressiveConfig
from train_rect import RectConfig
from train_standard import StandardConfig

SCRIPTS = {
    "standard": StandardConfig,
    "progressive": ProgressiveConfig,
    "hybrid": HybridConfig,
    "rect": RectConfig,
    "finetune": FinetuneConfig,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with good and bad data, weights and a run; every case starts here and leaves it as it was."""
    place = tmp_path_factory.mktemp("hour")
    make_images(place / "good", train=8, val=2)
    make_images(place / "bare", train=3, val=1)
    (place / "bare" / "train").rename(place / "classes")
    make_images(place / "no_val", train=3, val=1)
    (place / "no_val" / "val").rename(place / "no_train")
    make_images(place / "one_class", classes=1, train=3, val=1)
    make_images(place / "tiny", classes=2, train=1, val=1)
    make_images(place / "hollow", train=3, val=1)
    for image in (place / "hollow" / "train" / "class1").iterdir():
        image.unlink()
    make_images(place / "broken", train=8, val=2)
    (place / "broken" / "train" / "class0" / "0.jpg").write_bytes(b"no picture")
    make_images(place / "differ", train=3, val=1)
    (place / "differ" / "val" / "class1").rename(place / "differ" / "val" / "clas1")
    (place / "empty").mkdir()
    (place / "no_classes" / "train").mkdir(parents=True)
    (place / "flat" / "train").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(place / "flat" / "train" / "a.jpg")
    (place / "file").write_text("in the way")
    (place / "weights.pth").write_text("no tensors")
    (place / "weights.safetensors").write_text("no tensors")
    (place / "things").mkdir()
    (place / "things" / "notes.txt").write_text("not a run")
    run_training(StandardConfig, place / "good", place / "runs", "a", "--epochs", "1", "--batch_size", "16")
    return place


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file, by path; "" for a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def refused(place, monkeypatch, capfd, call, args) -> str:
    """The one or two lines with which a call ends."""
    monkeypatch.chdir(place)
    before = tree(place)
    monkeypatch.setattr(sys, "argv", ["program", *args])
    with pytest.raises(SystemExit) as end:
        call()
    text = capfd.readouterr().err
    assert end.value.code == 2, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 2, text
    assert "error: " in lines[-1]
    assert tree(place) == before
    return text


# Script and flags, YAML of --config or "", and what the sentence says.
FLAGS = [
    ("standard", "--learning_rate 1", "--learning_rate is no setting"),
    ("standard", "--epoch 3", "did you mean --epochs"),
    ("standard", "--batch-sizes 3", "did you mean --batch_size"),
    ("standard", "--img-siz 3", "did you mean --img_size"),
    ("standard", "--optimiser sgd", "did you mean --optimizer"),
    ("standard", "--weights a.pth", "--weights is no setting"),
    ("standard", "--target_size 64", "--target_size is no setting"),
    ("rect", "--img_size 64", "--img_size is no setting"),
    ("hybrid", "--progressive", "did you mean --progressive_freezing"),
    ("standard", "photos", "photos"),
    ("standard", "-e 3", "-e"),
    ("standard", "--epochs", "--epochs"),
    ("standard", "--epochs 0", "--epochs takes a whole number above 0, not 0"),
    ("standard", "--epochs 2.5", "--epochs takes a whole number above 0, not 2.5"),
    ("standard", "--epochs true", "--epochs takes a whole number above 0, not true"),
    ("standard", "--lr true", "--lr takes"),
    ("standard", "--layer_decay 1.5", "--layer_decay takes"),
    ("standard", "--weight_decay -1", "--weight_decay takes"),
    ("standard", "--ema_decay 2", "--ema_decay takes"),
    ("standard", "--lr .nan", "--lr takes"),
    ("standard", "--lr inf", "--lr takes a number above 0 or auto, not inf"),
    ("standard", "--epochs ten", "--epochs takes a whole number above 0, not ten"),
    ("standard", "--batch-size 0", "--batch_size takes a whole number above 0, not 0"),
    ("standard", "--batch-size=many", "--batch_size takes a whole number above 0, not many"),
    ("standard", "--img_size -8", "--img_size takes"),
    ("standard", "--lr fast", "--lr takes a number above 0 or auto, not fast"),
    ("standard", "--lr -1", "--lr takes"),
    ("standard", "--seed -1", "--seed takes"),
    ("standard", "--seed 4294967296", "--seed takes a whole number from 0 to 2147483647"),
    ("standard", "--debug maybe", "maybe"),
    ("standard", "--channels_last=maybe", "--channels_last takes true or false"),
    ("standard", "--mixed_precision fp8", "--mixed_precision takes no, fp16, bf16 or null, not fp8"),
    ("standard", "--mixed_precision fp16", "--mixed_precision fp16 needs a GPU"),
    ("standard", "--trackers on", "--trackers takes none or some of wandb,tensorboard,trackio, not on"),
    ("standard", "--patience -1", "--patience takes a whole number from 0, not -1"),
    ("standard", "--class_weights auto", "--class_weights takes none, sqrt, balanced, not auto"),
    ("standard", "--sampler balanced --class_weights sqrt", "--class_weights and --sampler both"),
    ("standard", "--momentum 0.99", "--momentum plus or minus --momentum_swing must stay"),
    (
        "hybrid",
        '--stages [{"epochs":1},{"epochs":1,"frozen":["layer9"]}]',
        "'layer9' is no layer of the model",
    ),
    ("standard", "--recipe soft", "--recipe takes"),
    ("standard", "--crop_scale wide", "--crop_scale takes two numbers"),
    ("standard", "--crop_scale 0.9,0.2", "--crop_scale"),
    ("standard", "--mixup_alpha -1", "--mixup_alpha takes"),
    ("standard", "--mixup_share 90", "--mixup_share takes a number from 0 to 1, not 90"),
    ("standard", "--data_dir nobody/has this", "this follows no flag"),
    ("standard", '--stages [{"epochs":1}] --batch_size 4', "--batch_size is for the script's own stages"),
    (
        "finetune",
        '--weights runs/a --head_epochs 2 --stages [{"epochs":1}]',
        "is for the script's own stages",
    ),
    ("standard", "--workers -2", "--workers takes"),
    ("standard", "--budget soon", "--budget takes a time or a sum such as 90s, 45min, 2h or 12usd, not soon"),
    ("standard", "--budget 0min", "--budget takes"),
    ("standard", "--budget 12usd", "--budget 12usd needs the machine's price, --usd_per_hour"),
    ("standard", "--budget 12usd --usd_per_hour 0", "--usd_per_hour takes a number above 0"),
    ("standard", "--budget 1h --epochs 3", "--budget decides the number of epochs; leave out --epochs"),
    ("standard", "--stages many", "stages takes a list of stages"),
    ("hybrid", '--stages [{"epochs":0}]', "--stages, stage 1: epochs takes a whole number above 0, not 0"),
    ("hybrid", '--stages+ [{"epochs":1}]', "--stages+ is no setting; did you mean --stages"),
    ("hybrid", '--stages [{"epochs":1', "--stages takes a list of stages"),
    ("standard", "--stages [{}]", "--stages, stage 1 lacks epochs"),
    ("standard", "--stages [5]", "--stages takes a list of stages"),
    ("standard", "--config nowhere.yaml", "nowhere.yaml"),
    ("standard", "--model resnet51", "did you mean resnet51"),
    ("standard", "--model rsnet18", "did you mean"),
    (
        "standard",
        "--model test_vit --img_size 56",
        "stage 1: --model test_vit: the model cannot take images of 56x56",
    ),
    (
        "progressive",
        "--model test_coatnet",
        "stage 1: --model test_coatnet: the model cannot take images of 56x56 px",
    ),
    ("rect", "--model test_vit --target_size 40", "set --target_size"),
    ("standard", "--optimizer sdg", "did you mean sgd"),
    ("standard", "--optimizer admw", "did you mean adamw"),
    ("standard", "--optimizer kron", "--optimizer kron needs second derivatives, or keeps what"),
    ("standard", "--auto_augment randaug", "--auto_augment takes none, trivial, rand, three, not randaug"),
    ("standard", "--rand_magnitude 9", "--rand_magnitude takes a number from 0 to 1, not 9"),
    ("standard", "--loss bce --class_weights sqrt", "--class_weights goes with --loss ce"),
    ("standard", "--loss mse", "--loss takes ce, bce, not mse"),
    ("standard", "--drop_path 2", "--drop_path takes a number from 0 to 1, not 2"),
    ("standard", "--drop_path 0.1 --model vgg11", "vgg11 has no stochastic depth"),
    ("standard", "--grad_checkpointing", "--grad_checkpointing is for networks without BatchNorm"),
    ("progressive", "--lr 0", "--lr takes"),
    ("finetune", "", "--weights is needed"),
    ("finetune", "--weights nowhere.pth", "nowhere.pth"),
    ("finetune", "--weights weights.pth", "weights.pth cannot be read"),
    ("finetune", "--weights weights.safetensors", "cannot be read as a file of tensors only"),
    ("finetune", "--weights things", "things is neither a run's folder nor a model's"),
    ("finetune", "--weights runs/a --model resnet18", "they are of --model test_resnet"),
    ("finetune", "--weights runs/a --epochs 3 --head_epochs 3", "--head_epochs 3 must be below --epochs 3"),
    ("finetune", "--weights runs/a --probe --epochs 3", "training: leave out --epochs, --lr, --recipe"),
    ("finetune", "--weights runs/a --probe --budget 1h", "training: leave out --budget"),
    ("finetune", "--probe", "--weights is needed"),
    ("standard", "--data_dir nowhere", "nowhere is not a folder"),
    ("standard", "--data_dir file", "file is not a folder"),
    ("standard", "--data_dir empty", "has no train folder"),
    ("standard", "--data_dir good/train", "pass its parent"),
    ("standard", "--data_dir good/val", "pass its parent"),
    ("standard", "--data_dir classes", "common.tools.split"),
    ("standard", "--data_dir no_val", "common.tools.split"),
    ("standard", "--data_dir no_classes", "holds no class folders"),
    ("standard", "--data_dir flat", "holds no class folders"),
    ("standard", "--data_dir hollow", "class1 holds no images"),
    ("standard", "--data_dir one_class", "one class only"),
    ("standard", "--data_dir differ", "lacks 1 of the classes: class1"),
    ("standard", "--output file --run_name new", "choose another --output"),
    ("standard", "--output . --run_name things", "choose another --run_name"),
    ("standard", "--run_name exp1/seed0", "--run_name exp1/seed0 is a path"),
    ("standard", "--run_name ..", "--run_name .. is a path"),
    ("standard", "--resume nowhere", "--resume nowhere"),
    ("standard", "--resume things", "holds no checkpoint"),
    ("standard", "--resume empty", "holds no checkpoint"),
    ("standard", "--resume runs/a --run_name b", "leave out --run_name"),
    ("rect", "--resume runs/a", "a run of train_standard.py"),
    ("standard", "--run_name a --output runs --epochs 7", "--epochs 7 (was 1)"),
    ("standard", "--run_name a --output runs --resume none", "already holds a run"),
]


@pytest.mark.parametrize(("script", "flags", "says"), FLAGS, ids=[f"{s} {f}" for s, f, _ in FLAGS])
def test_flags(script, flags, says, place, monkeypatch, capfd):
    config = SCRIPTS[script]
    main = sys.modules[config.__module__].main
    flags = flags.split()
    given = [] if "--resume" in flags and "none" not in flags else [*FAST]
    given = [] if "--run_name" in flags and "a" in flags else given
    if "--data_dir" not in flags and "--resume" not in flags:
        given += ["--data_dir", "good"]
    for name, value in (("--output", "new"), ("--run_name", "new"), ("--batch_size", "16")):
        if not {name, "--resume", "a"} & set(flags):
            given += [name, value]
    text = refused(place, monkeypatch, capfd, lambda: run_script(main, config, ""), [*given, *flags])
    assert says in text


# What stands in the file of --config.
YAML = [
    ("standard", "epoch: 3", "c.yaml: epoch is no setting; did you mean epochs?"),
    ("standard", "batch-size: 3", "did you mean batch_size"),
    ("standard", "optimiser: sgd", "did you mean optimizer"),
    ("standard", "epochs: ten", "c.yaml: epochs takes a whole number above 0, not ten"),
    ("standard", "epochs: -1", "c.yaml: epochs takes a whole number above 0, not -1"),
    ("standard", "lr: fast", "c.yaml: lr takes a number above 0 or auto, not fast"),
    ("standard", "debug: perhaps", "c.yaml: debug takes true or false"),
    ("standard", "crop_scale: [0.1]", "c.yaml: crop_scale takes two numbers"),
    ("standard", "sampler: equal", "c.yaml: sampler takes"),
    ("standard", "stages: 5", "c.yaml: stages takes a list of stages"),
    ("standard", "stages: [{img_size: 64}]", "c.yaml, stage 1 lacks epochs"),
    ("hybrid", "stages: [{epochs: 1}, {epochs: 1, img_sise: 64}]", "c.yaml, stage 2: img_sise is no setting"),
    ("hybrid", "stages: [{epochs: 1}, {epochs: 1, img_size: big}]", "c.yaml, stage 2: img_size takes"),
    ("hybrid", "stages: [{epochs: 1, mixup: 7}]", "c.yaml, stage 1: mixup takes"),
    ("hybrid", "stages: [{epochs: 1, shape: oval}]", "c.yaml, stage 1: shape takes"),
    ("hybrid", "stages: [{epochs: 1, frozen: 5}]", "c.yaml, stage 1: frozen takes a list of names, not 5"),
    ("progressive", "stages: [{epochs: 0}]", "c.yaml, stage 1: epochs takes"),
    ("standard", "- 1", "c.yaml holds no settings"),
    ("standard", "just words", "c.yaml holds no settings"),
    ("standard", "epochs: [3", "error: "),
    ("standard", "stages: [{epochs: 1}]", "--epochs is for the script's own stages"),
]


@pytest.mark.parametrize(("script", "content", "says"), YAML, ids=[f"{s} {c}" for s, c, _ in YAML])
def test_yaml(script, content, says, place, tmp_path, monkeypatch, capfd):
    config = SCRIPTS[script]
    main = sys.modules[config.__module__].main
    (tmp_path / "c.yaml").write_text(content)
    args = [*FAST, "--data_dir", "good", "--output", "new", "--config", str(tmp_path / "c.yaml")]
    args += ["--epochs", "3"] if "own stages" in says else []
    assert says in refused(place, monkeypatch, capfd, lambda: run_script(main, config, ""), args)


TOOLS = [
    ("tools.split", "--data_dir nowhere --out o", "nowhere is not a folder"),
    ("tools.split", "--data_dir good --out o", "is split already"),
    ("tools.split", "--data_dir empty --out o", "no class folders"),
    (
        "tools.split",
        "--data_dir classes --out o --val_fraction 20",
        "--val_fraction must lie between 0 and 1",
    ),
    ("tools.split", "--data_dir classes --out o --seed -1", "--seed must be at least 0"),
    ("tools.split", "--data_dir classes --out things", "--out things"),
    ("tools.split", "--data_dir tiny/train --out o", "class0"),
    ("tools.prepare", "--data_dir good", "--data_dir and --out are both needed"),
    ("tools.prepare", "--data_dir nowhere --out o", "nowhere is not a folder"),
    ("tools.prepare", "--data_dir good --out o --levels 4", "--levels must be"),
    ("tools.prepare", "--data_dir good --out o --quality 0", "--quality must be"),
    ("tools.prepare", "--data_dir good --out o --workers -1", "--workers must be at least 0"),
    ("tools.prepare", "--data_dir good --out things", "--out"),
    ("tools.inspect_data", "--data_dir nowhere --out o", "nowhere is not a folder"),
    ("tools.inspect_data", "--data_dir empty --out o", "no class folders"),
    ("tools.inspect_data", "--data_dir good --out file", "--out file cannot be written"),
    ("tools.inspect_data", "--data_dir good --out o --workers -1", "--workers must be at least 0"),
    ("tools.compare", "nowhere", "nowhere"),
    ("tools.receipt", "nowhere", "nowhere has no receipt to check"),
    ("tools.receipt", "things", "receipt.json is missing"),
    ("tools.race", "--data_dir good --budget soon --output o", "--budget takes"),
    ("tools.race", "--data_dir nowhere --budget 1h --output o", "--data_dir nowhere"),
    ("tools.compare", "things", "things"),
    ("tools.compare", "runs/a --target 120 --out o", "--target must be a percentage"),
    ("tools.compare", "runs/a --usd_per_hour 0 --out o", "--usd_per_hour must be above 0"),
    ("tools.export", "nowhere --to o", "nowhere is neither a run's folder nor a model's"),
    ("tools.export", "runs/a --to things", "--to things is there already and not an empty folder"),
    ("tools.export", "runs/a --to o --normalized", "pass --onnx or --pt2 too"),
    ("tools.export", "runs/a --to o --push flowers", "--push takes a name like organisation/model"),
    ("tools.average", "runs/a --to o", "two models or more"),
    ("tools.average", "runs/a things --to o", "things is neither a run's folder nor a model's"),
    ("tools.average", "runs/a runs/a --to o --data_dir nowhere", "nowhere is not a folder"),
    ("tools.average", "runs/a runs/a --to o --split test", "--split test: there is no folder"),
    ("tools.benchmark_dataloader", "--data_dir nowhere", "nowhere is not a folder"),
    ("model.__main__", "--model resnet51", "did you mean"),
]


@pytest.mark.parametrize(("tool", "args", "says"), TOOLS, ids=[f"{t} {a}" for t, a, _ in TOOLS])
def test_tools(tool, args, says, place, monkeypatch, capfd):
    main = importlib.import_module(f"common.{tool}").main
    call = lambda: sys.exit(main(args.split()))  # noqa: E731
    assert says in refused(place, monkeypatch, capfd, call, args.split())


# Data, flags, and what a pre-flight says that has to say no.
DRY = [
    (
        "broken",
        "",
        ["error    images: 29 of 30 sampled ones", "class0/0.jpg (", "or pass --skip_unreadable", "1 error,"],
    ),
    ("good", "--s3 nowhere", ["error: --s3 takes s3://bucket/prefix"]),
]


@pytest.mark.parametrize(("data", "flags", "says"), DRY, ids=[f"{d} {f}" for d, f, _ in DRY])
def test_a_preflight_with_an_error(data, flags, says, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = tree(place)
    args = [*FAST, "--data_dir", data, "--img_size", "32", "--batch_size", "16", "--dry_run", *flags.split()]
    monkeypatch.setattr(sys, "argv", ["program", *args])
    with pytest.raises(SystemExit) as end:
        run_script(sys.modules[StandardConfig.__module__].main, StandardConfig, "")
    text, errors = capfd.readouterr()
    assert end.value.code == 2
    for words in says:
        assert words in text + errors, text
    assert "first loss" not in text
    assert "Traceback" not in errors
    assert tree(place) == before


def test_precision_of_the_launcher(place, monkeypatch, capfd):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    main = sys.modules[StandardConfig.__module__].main
    text = refused(
        place, monkeypatch, capfd, lambda: run_script(main, StandardConfig, ""), ["--data_dir", "good"]
    )
    assert "mixed_precision: fp8 is not supported" in text


def test_a_script_as_it_is_called():
    """The whole program, with what its imports may say on stderr."""
    done = subprocess.run(
        [sys.executable, "train_standard.py", "--epoch", "3"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: --epoch is no setting; did you mean --epochs? (see --help)\n"
