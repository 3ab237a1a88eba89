"""Wrong input ends in one clear sentence that names the flag or the file, with a code other than 0 and no traceback."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import yaml

from common import UserError
from common.config import as_plain, parse_args, repeatable, run_script
from common.scheduling import Stage, scale_stages
from tests.helpers import last_checkpoint, make_images, run_training
from train_hybrid import EXPERT_STAGES, HybridConfig
from train_progressive import ProgressiveConfig
from train_rect import RectConfig
from train_standard import StandardConfig

SMALL = ("--epochs", "1", "--batch_size", "16")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", train=8, val=2)


def test_flags_yaml_and_defaults_meet(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 7\nlr: 0.3\n")
    cfg = parse_args(StandardConfig, "", ["--config", str(tmp_path / "c.yaml"), "--lr", "auto", "--debug"])
    assert (cfg.epochs, cfg.lr, cfg.debug, cfg.batch_size) == (7, "auto", True, 512)


def test_a_flag_counts_before_a_file_that_follows_it(tmp_path):
    (tmp_path / "c.yaml").write_text("run_name: old\nlr: 0.3\n")
    cfg = parse_args(StandardConfig, "", ["--run_name", "new", "--config", str(tmp_path / "c.yaml")])
    assert (cfg.run_name, cfg.lr) == ("new", 0.3)
    assert cfg.given == {"run_name", "lr"}


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--lr 1e-4", "lr", 1e-4),
        ("--batch-size 3", "batch_size", 3),
        ("--epochs 3.0", "epochs", 3),
        ("--lr 1", "lr", 1.0),
        # No float holds it.
        ("--keep_every 9007199254740993", "keep_every", 2**53 + 1),
        ("--batch_size=3 --batch_size 4", "batch_size", 4),
        ("--debug --epochs 2", "debug", True),
        ("--channels_last false", "channels_last", False),
        ("--crop_scale 0.35,1", "crop_scale", (0.35, 1.0)),
        ("--crop_scale [0.35,1]", "crop_scale", (0.35, 1.0)),
        ("--clip_grad null", "clip_grad", None),
        ("--mixed_precision no", "mixed_precision", "no"),
        ("--run_name 2024", "run_name", "2024"),
        ('--stages [{"epochs":1,"mixup":false,"frozen":["a","b"]}]', "stages", [Stage(1, mixup=False, frozen=("a", "b"))]),
    ],
)  # fmt: skip
def test_values_as_they_are_written(words, name, value, tmp_path):
    cfg = parse_args(StandardConfig, "", words.split())
    assert getattr(cfg, name) == value
    assert name in cfg.given
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(as_plain(cfg)))
    again = parse_args(StandardConfig, "", ["--config", str(tmp_path / "c.yaml")])
    assert again == cfg


def test_numbers_in_yaml_may_have_an_exponent(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-4")
    assert parse_args(StandardConfig, "", ["--config", str(tmp_path / "c.yaml")]).lr == 1e-4


def test_a_bare_no_in_yaml_is_a_word_and_null_is_no_wish(tmp_path):
    (tmp_path / "c.yaml").write_text("mixed_precision: no\ngrad_compression: none")
    assert parse_args(StandardConfig, "", ["--config", str(tmp_path / "c.yaml")]).mixed_precision == "no"
    (tmp_path / "c.yaml").write_text("mixed_precision: null\nseed: 1")
    cfg = parse_args(StandardConfig, "", ["--config", str(tmp_path / "c.yaml")])
    assert (cfg.mixed_precision, cfg.given) == (None, {"seed"})


def test_stages_from_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"stages": [{"epochs": 2, "frozen": ["layer1"], "mixup": False}]})
    )
    cfg = parse_args(HybridConfig, "", ["--config", str(tmp_path / "c.yaml")])
    assert cfg.stages == [Stage(2, frozen=("layer1",), mixup=False)]


@pytest.mark.parametrize("config", [StandardConfig, HybridConfig, RectConfig, ProgressiveConfig])
def test_printed_config_can_be_read_again(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(config, "", ["--print_config"])
    assert end.value.code == 0
    # All of them as comments: what a file names counts as set, and no recipe would change it.
    every = capsys.readouterr().out
    assert yaml.safe_load(every) is None
    assert yaml.safe_load(every.replace("# ", "")) == as_plain(config())
    stages = json.dumps([{"epochs": 3, "frozen": ["layer1"]}])
    given = ["--epochs", "7", "--stages", stages, "--mixed_precision", "no"]
    with pytest.raises(SystemExit):
        parse_args(config, "", [*given, "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    again = parse_args(config, "", ["--config", str(tmp_path / "c.yaml")])
    assert again == parse_args(config, "", given)
    assert again.given == {"epochs", "stages", "mixed_precision"}


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(StandardConfig, "", ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for flag in ("--img_size", "--batch_size", "--lr", "--resume", "--mixup_alpha"):
        assert flag in text


def test_scaling_a_curriculum_keeps_its_proportions():
    stages = [Stage(25, 56, 4096), Stage(25, 112, 1024), Stage(50, 224, 256)]
    small = scale_stages(stages, epochs=8, img_size=64, batch_size=32)
    assert [(s.epochs, s.img_size, s.batch_size) for s in small] == [(2, 16, 512), (2, 32, 128), (4, 64, 32)]
    for epochs in range(3, 30):
        assert sum(stage.epochs for stage in scale_stages(stages, epochs)) == epochs
    assert scale_stages(stages) == stages


def test_progressive_freezing_is_the_expert_curriculum():
    cfg = parse_args(HybridConfig, "", ["--progressive_freezing"])
    assert cfg.curriculum() == EXPERT_STAGES
    assert cfg.ema
    assert sum(stage.epochs for stage in EXPERT_STAGES) == 80


def test_no_amp():
    assert parse_args(RectConfig, "", ["--no_amp"]).mixed_precision == "no"


def fails(capsys, config=StandardConfig, *args):
    """Run as a script would; returns the sentence on stderr or stdout."""
    old, sys.argv = sys.argv, ["train.py", *args]
    try:
        with pytest.raises(SystemExit) as end:
            run_script(sys.modules[config.__module__].main, config, "")
    finally:
        sys.argv = old
    assert end.value.code == 2
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--learning_rate", "1"), "--learning_rate"),
        (("--lr", "fast"), "lr"),
        (("--lr", "-1"), "--lr"),
        (("--epochs", "0"), "--epochs"),
        (("--batch_size", "0"), "--batch_size"),
        (("--img_size", "0"), "--img_size"),
        (("--flip", "2"), "--flip"),
        (("--crop_scale", "[0.5, 0.1]"), "--crop_scale"),
        (("--momentum", "0.99"), "--momentum"),
        (("--workers", "-2"), "--workers"),
        (("--mixup_alpha", "-1"), "--mixup_alpha"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--model", "resnet51"), "resnet51"),
        (("--optimizer", "sdg"), "sdg"),
        (("--data_dir", "nowhere"), "nowhere"),
        (("--mixed_precision", "fp16"), "--mixed_precision"),
        (("--resume", "nowhere"), "--resume"),
        (("--weights", "nowhere.pth"), "--weights is no setting"),
    ],
)
def test_wrong_flags_are_named(flags, named, data, tmp_path, capsys):
    where = () if "--data_dir" in flags else ("--data_dir", str(data))
    more = (
        "--output",
        str(tmp_path),
        "--trackers",
        "none",
        "--model",
        "test_resnet",
        "--workers",
        "0",
        *SMALL,
    )
    assert named in fails(capsys, StandardConfig, *where, *more, *flags)


def test_empty_data_folder(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    assert str(tmp_path) in fails(
        capsys, StandardConfig, "--data_dir", str(tmp_path), "--output", str(tmp_path / "runs")
    )


def test_classes_that_differ(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / "val" / "class1").rename(tmp_path / "d" / "val" / "clas1")
    text = fails(
        capsys, StandardConfig, "--data_dir", str(tmp_path / "d"), "--output", str(tmp_path / "runs")
    )
    assert "class1" in text


@pytest.mark.parametrize("kind", ["truncated", "text"])
def test_unreadable_images_end_training_with_their_path_or_are_replaced(kind, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "d")
    broken = tmp_path / "d" / "train" / "class0" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:300] if kind == "truncated" else b"this is no photograph")
    flags = (
        "--data_dir",
        str(tmp_path / "d"),
        "--output",
        str(tmp_path / "runs"),
        "--trackers",
        "none",
        *SMALL,
    )
    flags += (
        "--model",
        "test_resnet",
        "--workers",
        "0",
        "--img_size",
        "32",
        "--lr",
        "0.1",
        "--batch_size",
        "24",
        "--mixed_precision",
        "no",
    )
    text = fails(capsys, StandardConfig, *flags, "--run_name", "stops")
    assert str(broken) in text
    assert "--skip_unreadable" in text
    run = run_training(
        StandardConfig,
        tmp_path / "d",
        tmp_path / "runs",
        "skips",
        *SMALL,
        "--batch_size",
        "24",
        "--skip_unreadable",
    )
    log = (run / "training_log.txt").read_text()
    assert log.count(str(broken)) == 1
    assert "1 unreadable" in log


def test_output_that_cannot_be_written(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ("--data_dir", str(data), "--output", str(tmp_path / "file"), "--trackers", "none", *SMALL)
    assert "--output" in fails(capsys, StandardConfig, *flags)


def test_a_checkpoint_of_another_model(data, tmp_path):
    run = run_training(StandardConfig, data, tmp_path, "one", *SMALL)
    (run / "config.yaml").unlink()  # as if copied by hand
    for leftover in ("logs", "plots"):
        shutil.rmtree(run / leftover)
    with pytest.raises((UserError, SystemExit)):
        run_training(StandardConfig, data, tmp_path, "one", *SMALL, "--model", "resnet18")


def test_a_damaged_checkpoint_is_passed_over_and_named(data, tmp_path, capsys):
    flags = ("--epochs", "2", "--batch_size", "16", "--save_freq_last", "1")
    run = run_training(StandardConfig, data, tmp_path, "one", *flags)
    weights_file = last_checkpoint(run) / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    run_training(StandardConfig, data, tmp_path, "one", *flags)
    text = capsys.readouterr().out
    assert "damaged checkpoint passed over" in text
    assert "model.safetensors" in text
    assert "resumed" in text


def test_dry_run_trains_nothing(data, tmp_path, capsys):
    run_training(StandardConfig, data, tmp_path, "dry", *SMALL, "--dry_run")
    text = capsys.readouterr().out
    assert "optimizer steps" in text
    assert not (tmp_path / "dry").exists()


def test_what_a_budget_made_of_a_debug_run_is_not_shrunk_again(tmp_path):
    cfg = parse_args(StandardConfig, "", ["--debug", "--budget", "2min"])
    planned = [replace(stage, epochs=18) for stage in cfg.stages_in_force()]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(repeatable(cfg, planned)))
    again = parse_args(StandardConfig, "", ["--config", str(tmp_path / "config.yaml")])
    assert again.stages_in_force() == planned
