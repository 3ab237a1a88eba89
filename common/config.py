"""`TrainConfig`: every setting the five scripts share, and the command line made from it."""

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from common import UserError
from common.scheduling import Schedule, Stage, couple_strength

__all__ = ["CurriculumConfig", "TrainConfig", "UserError", "main_with", "parse_args"]

Kind = TypeVar("Kind")
DEBUG_SCALE = {"epochs": 6, "img_size": 64, "batch_size": 64}  # about a minute on two CPU cores


@dataclass
class TrainConfig:
    """Settings of a training run.

    Args:
        data_dir: ImageFolder tree (train/<class>/*.jpg, val/...), prepared pyramid, Parquet or Arrow folder, hub id org/name, or s3:// and hf:// addresses of shards; empty = the built-in sample data.
        streaming: read Parquet or Arrow shards as they are needed instead of keeping the dataset on this machine.
        workers: loader processes per training process; null = the CPUs this process may use, shared out.
        prefetch: batches each worker prepares ahead.
        skip_unreadable: let another image of its class stand in for one that cannot be decoded.
        model: resnet18, resnet34, resnet50, resnet101, or any timm model name.
        weights: start from these weights: a run folder, a .safetensors or .pth file, a timm pretrained tag, or "timm" for the default one.
        optimizer: sgd, or any timm optimizer name.
        lr: base learning rate per 256 images, or "auto" for the LR finder's suggestion as the peak.
        lr_scaling: linear = multiply a numeric --lr by global batch / 256; none = take it as it is.
        max_lr: upper limit of every stage's peak learning rate; null = none.
        stage_wise: one OneCycle per stage instead of one over the whole run.
        pct_start: share of the cycle spent warming up.
        div_factor: peak / first learning rate.
        final_div_factor: first / last learning rate.
        dampening: share of a stage over which the LR glides from the previous stage's scale (global OneCycle).
        momentum: centre of the momentum cycle (SGD), or of the first beta (Adam).
        momentum_swing: the momentum cycles between momentum + swing and momentum - swing; 0 = constant.
        nesterov: Nesterov momentum.
        weight_decay: L2 penalty.
        decay_norm_and_bias: also decay normalisation weights and biases.
        layer_decay: LR factor from each layer group to the one below it, towards the stem; null = one LR for all.
        accumulation: micro-batches per optimizer step.
        clip_grad: maximum gradient norm; null = no clipping.
        lr_finder_iterations: steps of the LR finder's sweep.
        mixup_alpha: MixUp's Beta parameter; 0 = off.
        cutmix_alpha: CutMix's Beta parameter; 0 = off.
        batch_aug_prob: probability that a batch is mixed at all.
        label_smoothing: used on batches that are not mixed.
        erasing_prob: probability of Random Erasing, per image.
        erasing_area: smallest and largest erased share of the image.
        cutout_prob: probability of Cutout, per image.
        cutout_holes: holes per image.
        cutout_length: side of a hole in pixels.
        flip: probability of a horizontal flip.
        crop_scale: smallest and largest share of the image that a random training crop covers.
        couple_strength: strengthen random crops, MixUp, CutMix and Random Erasing in proportion to the stage's image size.
        crop_pct: share of the (shorter) side that evaluation's centre crop keeps.
        rect_val: evaluate each image whole, at the aspect ratio nearest its own.
        rect_area: what rectangular shapes hold constant: short = the short side, constant = the pixels per image.
        rect_buckets: number of different shapes at most.
        rect_scale: crop_scale of stages with shape rect.
        ema: also keep and evaluate an exponential moving average of the weights.
        ema_decay: its decay per optimizer step, after warm-up.
        final_eval: at the end of the run, evaluate over test sizes, crops and flips, raw and EMA.
        mixed_precision: no, fp16 or bf16; null = what `accelerate launch` was told.
        tf32: let matrix products on the GPU use TF32.
        channels_last: NHWC memory layout.
        compile: torch.compile the model, once per image shape.
        auto_batch: when memory runs out, halve the batch and accumulate twice as often.
        grad_compression: all-reduce gradients in half precision, for machines without fast links.
        nan_patience: consecutive steps with a loss that is not finite before training stops.
        seed: of everything random.
        output: folder that holds the runs.
        run_name: name of this run's folder; empty = script and time.
        resume: auto = go on where the run named --run_name stopped, also from --s3 if its folder is gone; a run folder or checkpoint; s3://…; none = start anew.
        save_freq_last: epochs between checkpoints.
        checkpoint_minutes: minutes between checkpoints within long epochs; 0 = only at epoch ends.
        keep_every: also keep a numbered checkpoint every this many epochs; 0 = none.
        s3: mirror the run's folder to s3://bucket/prefix.
        s3_endpoint: address of an S3-compatible server.
        wandb: auto = online when logged in, otherwise offline; offline; off.
        wandb_project: W&B project.
        print_freq: seconds between progress lines when there is no terminal.
        debug: shrink every stage, so that the whole curriculum runs in about a minute on two CPU cores.
        dry_run: print the plan and stop.
    """

    strategy: ClassVar[str] = "train"

    data_dir: str = ""
    streaming: bool = False
    workers: int | None = None
    prefetch: int = 4
    skip_unreadable: bool = False

    model: str = "resnet50"
    weights: str = ""

    optimizer: str = "sgd"
    lr: float | Literal["auto"] = "auto"
    lr_scaling: Literal["linear", "none"] = "linear"
    max_lr: float | None = None
    stage_wise: bool = False
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    dampening: float = 0.1
    momentum: float = 0.9
    momentum_swing: float = 0.05
    nesterov: bool = True
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    layer_decay: float | None = None
    accumulation: int = 1
    clip_grad: float | None = None
    lr_finder_iterations: int = 100

    mixup_alpha: float = 0.2
    cutmix_alpha: float = 1.0
    batch_aug_prob: float = 1.0
    label_smoothing: float = 0.1
    erasing_prob: float = 0.0
    erasing_area: tuple[float, float] = (0.02, 0.33)
    cutout_prob: float = 0.0
    cutout_holes: int = 1
    cutout_length: int = 8
    flip: float = 0.5
    crop_scale: tuple[float, float] = (0.08, 1.0)
    couple_strength: bool = False

    crop_pct: float = 0.875
    rect_val: bool = False
    rect_area: Literal["short", "constant"] = "short"
    rect_buckets: int = 9
    rect_scale: tuple[float, float] = (0.35, 1.0)
    ema: bool = False
    ema_decay: float = 0.9999
    final_eval: bool = False

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    tf32: bool = True
    channels_last: bool = True
    compile: bool = False
    auto_batch: bool = False
    grad_compression: Literal["none", "fp16", "bf16"] = "none"
    nan_patience: int = 10

    seed: int = 0
    output: str = "runs"
    run_name: str = ""
    resume: str = "auto"
    save_freq_last: int = 5
    checkpoint_minutes: float = 15.0
    keep_every: int = 0
    s3: str = ""
    s3_endpoint: str | None = None
    wandb: Literal["auto", "offline", "off"] = "auto"
    wandb_project: str = "image-classification"
    print_freq: float = 30.0

    debug: bool = False
    dry_run: bool = False

    def curriculum(self) -> list[Stage]:
        """The strategy: each script's own list of stages."""
        raise NotImplementedError

    def stages_in_force(self) -> list[Stage]:
        stages = self.curriculum()
        stages = couple_strength(stages) if self.couple_strength else stages
        return scale_stages(stages, **DEBUG_SCALE) if self.debug else stages

    def schedule(self, peak_lr: float) -> Schedule:
        max_lr = math.inf if self.max_lr is None else self.max_lr
        return from_settings(Schedule, self, peak_lr=peak_lr, max_lr=max_lr)

    def validate(self) -> None:
        """Refuse values and combinations that cannot be meant."""
        positive = (
            "prefetch",
            "accumulation",
            "lr_finder_iterations",
            "nan_patience",
            "rect_buckets",
            "save_freq_last",
        )
        positive += ("div_factor", "final_div_factor", "print_freq")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "momentum_swing", "checkpoint_minutes", "keep_every", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("lr", "max_lr", "clip_grad", "layer_decay"):
            value = getattr(self, name)
            if value not in (None, "auto") and value <= 0:
                raise UserError(f"--{name} must be above 0, not {value}")
        for name in (
            "pct_start",
            "dampening",
            "ema_decay",
            "batch_aug_prob",
            "flip",
            "erasing_prob",
            "cutout_prob",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} must be from 0 to 1, not {getattr(self, name)}")
        for name in ("crop_scale", "rect_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise UserError(f"--{name} needs 0 < smallest <= largest <= 1, not {low}, {high}")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"--crop_pct must be above 0 and at most 1, not {self.crop_pct}")
        if self.momentum + self.momentum_swing >= 1 or self.momentum < self.momentum_swing:
            raise UserError("--momentum plus or minus --momentum_swing must stay from 0 to below 1")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must not be negative, not {self.workers}")


def from_settings(kind: type[Kind], cfg: TrainConfig, **more: Any) -> Kind:
    """A dataclass whose fields are the settings of the same name, but for those in `more`."""
    names = {f.name for f in dataclasses.fields(kind)} & {f.name for f in dataclasses.fields(cfg)}
    return kind(**{name: getattr(cfg, name) for name in names} | more)


# What may differ when a run goes on: it changes no sample and no schedule, at most the rounding.
FREE_TO_CHANGE = frozenset(
    [
        "data_dir",
        "workers",
        "prefetch",
        "compile",
        "channels_last",
        "auto_batch",
        "output",
        "run_name",
        "resume",
        "save_freq_last",
        "checkpoint_minutes",
        "keep_every",
        "s3",
        "s3_endpoint",
        "wandb",
        "wandb_project",
        "print_freq",
        "dry_run",
        "final_eval",
        "nan_patience",
        "grad_compression",
        "tf32",
    ]
)


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Settings in which two dumped configs would train differently, as `--name a (was b)`."""
    names = sorted((mine.keys() | theirs.keys()) - FREE_TO_CHANGE)
    return [
        f"--{name} {mine.get(name)} (was {theirs.get(name)})"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]


def as_plain(cfg: Any) -> dict[str, Any]:
    """A config as what YAML and JSON can hold."""
    plain = dataclasses.asdict(cfg)
    return _lists(plain)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def scale_stages(
    stages: list[Stage], epochs: int | None = None, img_size: int | None = None, batch_size: int | None = None
) -> list[Stage]:
    """The same curriculum, shorter, smaller or on smaller GPUs: proportions stay.

    Args:
        epochs: of the whole run; each stage keeps at least one.
        img_size: of the largest stage; the others come out as multiples of 8, at least 16.
        batch_size: of the stage with the largest images.
    """
    largest = max(stages, key=lambda stage: stage.img_size)
    total = sum(stage.epochs for stage in stages)
    size_scale = (img_size or largest.img_size) / largest.img_size
    batch_scale = (batch_size or largest.batch_size) / largest.batch_size

    def size(stage: Stage) -> int:
        if size_scale == 1 or stage.img_size == largest.img_size:
            return round(stage.img_size * size_scale)
        return max(16, 8 * round(stage.img_size * size_scale / 8))

    return [
        dataclasses.replace(
            stage,
            epochs=max(1, round(stage.epochs * (epochs or total) / total)),
            img_size=size(stage),
            batch_size=max(1, round(stage.batch_size * batch_scale)),
        )
        for stage in stages
    ]


@dataclass
class CurriculumConfig(TrainConfig):
    """Settings of a training run through a list of stages.

    Args:
        stages: the curriculum, as a YAML list in --config or on the command line.
        epochs: stretch or shrink all stages to this many epochs in all; null = as listed.
        img_size: scale all stages so that the largest has this size; null = as listed.
        batch_size: scale all batches so that the stage with the largest images has this one; null = as listed.
    """

    stages: list[Stage] = field(default_factory=list)
    epochs: int | None = None
    img_size: int | None = None
    batch_size: int | None = None

    def curriculum(self) -> list[Stage]:
        for name in ("epochs", "img_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if not self.stages:
            raise UserError("--stages is empty; a curriculum needs at least one stage")
        return scale_stages(self.stages, self.epochs, self.img_size, self.batch_size)


Config = TypeVar("Config", bound=TrainConfig)


def parse_args(config_class: type[Config], description: str, args: list[str] | None = None) -> Config:
    """The command line of a script: one flag per field, `--config FILE.yaml`, `--print_config`."""
    from jsonargparse import ArgumentParser

    class OneSentenceParser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> None:
            print(f"error: {' '.join(str(message).split())} (see --help)", file=sys.stderr)
            raise SystemExit(2)

    parser = OneSentenceParser(
        description=description, usage="%(prog)s [--config FILE.yaml] [--flag VALUE ...]"
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_class_arguments(config_class, as_group=False)
    parser.set_defaults(_plain_stages(config_class))
    namespace = parser.parse_args(_with_bare_switches(config_class, sys.argv[1:] if args is None else args))
    namespace.pop("config", None)
    return config_class(**parser.instantiate_classes(namespace).as_dict())


def _plain_stages(config_class: type[TrainConfig]) -> dict[str, list[dict[str, Any]]]:
    """Default lists of stages as plain values, which `--print_config` can write."""
    lists = {
        f.name: f.default_factory() for f in dataclasses.fields(config_class) if callable(f.default_factory)
    }
    return {name: [as_plain(stage) for stage in stages] for name, stages in lists.items()}


def _with_bare_switches(config_class: type[TrainConfig], args: list[str]) -> list[str]:
    """Let `--debug` stand for `--debug true`."""
    switches = {f"--{f.name}" for f in dataclasses.fields(config_class) if f.type in (bool, "bool")}
    followed_by = [*args, ""][1:]
    return [
        f"{arg}=true" if arg in switches and after not in ("true", "false") else arg
        for arg, after in zip(args, followed_by, strict=True)
    ]


def main_with(main: Callable[[Config], None], config_class: type[Config], description: str) -> None:
    """Parse the command line and run; what the user can mend ends in one sentence and exit code 2."""
    try:
        cfg = parse_args(config_class, description)
        cfg.validate()
        main(cfg)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a machine meet the same problem
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
