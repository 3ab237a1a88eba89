"""Every setting of a run, joined from the rooms that read them into one flat command line."""

import argparse
import ast
import copy
import dataclasses
import inspect
import itertools
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    UserError,
)
from common.augment import AugmentSettings
from common.data.batches import ViewSettings
from common.data.loader import LoaderSettings
from common.data.sources.open import DataSettings
from common.model.create import did_you_mean
from common.model.optimizer import OptimizerSettings
from common.scheduling import ScheduleSettings, Stage, scale_stages
from common.scheduling.budget import BudgetSettings

# About a minute on two CPU cores.
DEBUG_EPOCHS, DEBUG_SIZE, DEBUG_BATCH = 6, 64, 64


@dataclass
class ModelSettings:
    """Model and loss"""

    model: str = "resnet50"
    """resnet18, 34, 50, 101, resnet18_cifar or resnet50_cifar (a stem for images below 64 px), or any timm model name."""
    drop_path: ClosedUnitInterval = 0.0
    """Stochastic depth: probability that training leaves out the last block's branch; the first's is 0 (Huang et al., 2016)."""
    loss: Literal["ce", "bce"] = "ce"
    """ce = cross-entropy; bce = binary cross-entropy of each class, summed (Wightman et al., 2021). Validation's is always ce."""


@dataclass
class SpeedSettings:
    """Precision, memory and speed"""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """null = what `accelerate launch` was told; on a CPU, bf16 where the CPU is fast at it."""
    channels_last: bool = True
    """NHWC memory layout."""
    compile: bool = False
    """torch.compile the model, once per image shape."""
    grad_checkpointing: bool = False
    """Keep less for the backward pass and compute it again: transformers of timm in less memory, at about a third more time."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step."""
    auto_batch: bool = False
    """When memory runs out, halve the batch and accumulate twice as often."""
    clip_grad: PositiveFloat | None = None
    """Maximum gradient norm; null = no clipping."""
    grad_compression: Literal["none", "fp16", "bf16"] = "none"
    """All-reduce gradients in half precision, for machines without fast links."""
    profile: NonNegativeInt = 0
    """Trace this many warm steps with torch.profiler into the run's folder; 0 = none."""


@dataclass
class RecordSettings:
    """Records, checkpoints and resume"""

    output: str = "runs"
    """Folder that holds the runs."""
    run_name: str = ""
    """Name of this run's folder; empty = script and time."""
    resume: str = "auto"
    """auto = go on where the run named --run_name stopped; a run folder, a checkpoint or s3://...; none = never go on: a folder that holds a run is refused."""
    save_freq_last: PositiveInt = 5
    """Epochs between checkpoints."""
    checkpoint_minutes: NonNegativeFloat = 15.0
    """Minutes between checkpoints within long epochs; 0 = only at epoch ends."""
    keep_every: NonNegativeInt = 0
    """Also keep the checkpoint of every so many epochs for good; 0 = none."""
    s3: str = ""
    """Mirror the run's folder to s3://bucket/prefix (another server: AWS_ENDPOINT_URL)."""
    trackers: str = "wandb"
    """Some of wandb,tensorboard,trackio, or none. W&B is online when logged in, unless WANDB_MODE says otherwise."""
    print_freq: PositiveFloat = 30.0
    """Seconds between progress lines when there is no terminal."""
    eval_every: PositiveInt = 1
    """Epochs between evaluations; the last epoch always has one. --budget makes them rarer where they take over a tenth."""
    patience: NonNegativeInt = 0
    """Epochs in a row without a new best top-1 after which the run ends; 0 = never."""
    final_eval: bool = False
    """At the end, evaluate over test sizes, crops and flips, raw and EMA."""
    dry_run: bool = False
    """The pre-flight: print the plan, check data, model and surroundings, measure loader, step and time; write nothing."""


@dataclass
class TrainConfig(
    DataSettings,
    LoaderSettings,
    ModelSettings,
    ScheduleSettings,
    OptimizerSettings,
    AugmentSettings,
    ViewSettings,
    SpeedSettings,
    BudgetSettings,
    RecordSettings,
):
    """The curriculum"""

    strategy: ClassVar[str] = "train"
    # Names of the settings that the user gave, on the command line or in a file; not annotated, for it is none itself.
    given = frozenset[str]()

    recipe: Literal["auto", "mild", "medium", "strong", "listed"] = "auto"
    """Defaults that fit data, length and machine, printed where they differ from those listed here; listed = these."""
    stages: list[Stage] = field(default_factory=list)
    """The curriculum as a list of stages, in --config or on the command line; empty = the script's own."""
    seed: Annotated[int, Range("a whole number from 0 to 2147483647", 0, 2**31 - 1)] = 0
    """Of everything random."""
    debug: bool = False
    """Shrink every stage, so that the whole curriculum runs in about a minute on two CPU cores."""

    @property
    def pretrained(self) -> bool:
        """Whether the model starts from trained weights."""
        return bool(vars(self).get("weights"))

    def curriculum(self) -> list[Stage]:
        """The strategy: each script's own list of stages; none here."""
        return []

    def read_by_curriculum(self) -> set[str]:
        """Names of the settings that the script's own list is made from."""
        read = set()

        class Watched(type(self)):  # type: ignore[misc]
            def __getattribute__(self, name: str) -> Any:
                read.add(name)
                return super().__getattribute__(name)

        watched = copy.copy(self)
        watched.__class__ = Watched
        watched.curriculum()
        return read & vars(self).keys()

    def stages_in_force(self) -> list[Stage]:
        """The user's stages or the script's, before a recipe fits them to the data.

        Raises:
            UserError: what makes the script's own list was given beside a list.
        """
        read = self.read_by_curriculum()
        own = not self.stages or "stages" in read
        if not own and (beside := sorted(self.given & read)):
            raise UserError(
                f"--{beside[0]} is for the script's own stages; leave it out, or put it into --stages"
            )
        stages = self.curriculum() if own else self.stages
        assert stages, f"{type(self).__name__} has no curriculum"
        if not self.debug:
            return stages
        largest = max(stages, key=lambda stage: stage.img_size)
        epochs = min(sum(stage.epochs for stage in stages), DEBUG_EPOCHS)
        size, batch = min(largest.img_size, DEBUG_SIZE), min(largest.batch_size, DEBUG_BATCH)
        return scale_stages(stages, epochs, size, batch)

    def largest_size(self) -> int:
        """Of the stages, in pixels; a network that fits one size only is built for it."""
        return max(stage.img_size for stage in self.stages_in_force())


@dataclass
class OneSizeConfig(TrainConfig):
    """Length and size"""

    epochs: PositiveInt = 60
    """Passes over the training set."""
    img_size: PositiveInt = 224
    """Side of the image in pixels."""
    batch_size: PositiveInt = 512
    """Images per process and micro-batch, of which an optimizer step takes --accumulation; cut down to a small dataset."""
    mixup_share: ClosedUnitInterval = 0.9
    """Share of the epochs in which all layers train, from the first of them, that use MixUp/CutMix."""


@dataclass
class CurriculumConfig(TrainConfig):
    """Length and size"""

    epochs: PositiveInt | None = None
    """Stretch or shrink all stages to this many epochs in all; null = as listed."""
    img_size: PositiveInt | None = None
    """Scale all stages so that the largest has this size; null = as listed."""
    batch_size: PositiveInt | None = None
    """Scale all batches so that the stage with the largest images has this one; null = as listed."""

    def listed(self) -> list[Stage]:
        """The stages at the lengths and sizes that the strategy was written for."""
        raise NotImplementedError

    def curriculum(self) -> list[Stage]:
        """The script's list or the user's, scaled."""
        # Of the script's own list, as many stages as there are epochs: the last, which have the largest images.
        stages = self.stages or self.listed()[-(self.epochs or 0) :]
        return scale_stages(stages, self.epochs, self.img_size, self.batch_size)


# What may differ when a run goes on: it changes no sample and no schedule, at most the rounding, and with --patience
# how far the run gets: more of it, or none, lets one that has stopped go on. The images are the same, elsewhere; --weights are read by a new run alone.
RESUME_MAY_CHANGE = (
    {f.name for kind in (RecordSettings, SpeedSettings) for f in dataclasses.fields(kind)}
    | {"data_dir", "weights", "workers", "usd_per_hour"}
) - {"mixed_precision", "accumulation", "clip_grad", "eval_every"}


def as_plain(cfg: Any) -> dict[str, Any]:
    """A config as what YAML and JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def repeatable(cfg: TrainConfig, stages: Sequence[Stage]) -> dict[str, Any]:
    """Settings that train these stages again, given as --config; those that they were made from are left out, and which run it was."""
    # Stages that a budget has lengthened would be shrunk again.
    left_out = cfg.read_by_curriculum() | {"budget", "debug", "run_name", "resume", "dry_run"}
    kept = {name: value for name, value in as_plain(cfg).items() if name not in left_out}
    return {**kept, "stages": [as_plain(stage) for stage in stages]}


def differences(cfg: TrainConfig, recorded: Mapping[str, Any]) -> list[str]:
    """Settings that the user gave and with which a recorded run would go on otherwise, as `--name a (was b)`."""
    plain = as_plain(cfg)
    return [
        f"--{name} {plain[name]} (was {recorded[name]})"
        for name in sorted(cfg.given & recorded.keys() - RESUME_MAY_CHANGE)
        if plain[name] != recorded[name]
    ]


def adopt(cfg: TrainConfig, recorded: Mapping[str, Any]) -> None:
    """Take over a recorded run's settings, but for those that the user gave and for where it lives."""
    names = vars(cfg).keys() & recorded.keys() - cfg.given - {"output", "run_name", "resume"}
    vars(cfg).update(read_settings(types_of(type(cfg)), {name: recorded[name] for name in names}, "--resume"))


# --- the command line ----------------------------------------------------------------------------------------------

Config = TypeVar("Config", bound=TrainConfig)

# How a type reads in a sentence.
WORDS = {
    "tuple": 'two numbers such as "[0.35, 1]"',
    "list": 'a list of stages such as "[{epochs: 5, img_size: 96, batch_size: 64}]" (a file goes to --config)',
    "NoneType": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
}
WRONG = (TypeError, ValueError, yaml.YAMLError)


def parse_args(config_class: type[Config], description: str, args: Sequence[str] | None = None) -> Config:
    """The command line of a script: a flag per field, `--config FILE.yaml`, `--print_config`. A flag counts before a file, wherever
    it stands, and of two flags or files the later.

    `--batch-size` stands for `--batch_size`, and `--debug` for `--debug true`.

    Raises:
        UserError: a flag is unknown or its value not of its type.
    """
    types, defaults = types_of(config_class), as_plain(config_class())
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--config FILE.yaml] [--flag VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    help_config = "YAML file with any of these settings"
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help=help_config)
    parser.add_argument("--print_config", action="store_true", help="print a file for --config, and exit")
    left = set(types)
    for kind in config_class.__mro__[:-1]:
        # A script's own word for a setting comes before its room's.
        own = {name: text for name, text in docs_of(kind).items() if name in left}
        left -= own.keys()
        group = parser.add_argument_group((kind.__doc__ or "").partition("\n")[0])
        for name, text in own.items():
            default = json.dumps(defaults[name]).strip('"[]')
            shown = [in_words(types[name])] * (types[name] is not str) + [default] * bool(default)
            text += f" [{'; '.join(shown)}]" if shown else ""
            alone: dict[str, Any] = {"nargs": "?", "const": "true"} if types[name] is bool else {}
            group.add_argument(f"--{name}", metavar="VALUE", help=text, **alone)
    words = sys.argv[1:] if args is None else args
    words = [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    try:
        options, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(str(error).removeprefix("argument ")) from error
    for word in unknown:
        if word.startswith("--"):
            read_settings(types, {word[2:].partition("=")[0]: None})
        raise UserError(f"{word} follows no flag that takes it; every setting is a flag, such as --epochs 10")
    given = dict[str, Any]()
    for file in options.config:
        given |= read_settings(types, _load(file), f"--config {file}")
    given |= read_settings(types, {name: text for name, text in vars(options).items() if name in types})
    cfg = config_class(**given)
    # null stands for what the machine does, which no checkpoint differs from.
    cfg.given = frozenset(given) - ({"mixed_precision"} if cfg.mixed_precision is None else set())
    if "print_config" in options:
        # What a file names is set, so that no recipe changes it: defaults are comments.
        for name, value in as_plain(cfg).items():
            print(textwrap.indent(yaml.safe_dump({name: value}), "" if name in given else "# "), end="")
        raise SystemExit(0)
    return cfg


def _load(file: str) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(Path(file).read_text())
    except (OSError, *WRONG) as error:
        raise UserError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise UserError(f"--config {file} holds no settings such as `epochs: 10`")
    return plain


def read_settings(types: Mapping[str, Any], plain: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings of these types, from the command line's text or from what YAML and JSON hold.

    Raises:
        UserError: a name is no setting, or a value not of its type; says `where` it stands, if not on the command line.
    """
    read, dashes = dict[str, Any](), "" if where else "--"
    before = f"{where}: " if where else dashes
    for name, value in plain.items():
        if name not in types:
            hint = did_you_mean(f"{dashes}{name}", [dashes + each for each in types])
            raise UserError(f"{before}{name} is no setting{hint} (see --help)")
        try:
            read[name] = _read(value, types[name], where or f"--{name}")
        except WRONG as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{before}{name} takes {in_words(types[name])}, not {value}") from error
    return read


def read_stages(plain: Sequence[Any], place: str = "stages") -> list[Stage]:
    """Stages as `as_plain` wrote them. UserError, TypeError: they are none."""
    stages = []
    for number, stage in enumerate(plain, 1):
        settings = read_settings(types_of(Stage), dict(stage), f"{place}, stage {number}")
        if "epochs" not in settings:
            raise UserError(f"{place}, stage {number} lacks epochs")
        stages.append(Stage(**settings))
    return stages


def _read(value: Any, kind: Any, place: str) -> Any:
    """One value as its type has it; one of `WRONG`, if it is none."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for option in options:
            with suppress(*WRONG):
                return _read(value, option, place)
        raise ValueError
    if origin is Literal:
        # YAML 1.1 reads a bare `no` as false.
        value = "no" if value is False and "no" in options else value
        return options[options.index(value)]
    if origin is Annotated:
        number = _read(value, options[0], place)
        if not options[1].low <= number <= options[1].high:
            raise ValueError
        return number
    if isinstance(value, str) and kind is not str:
        # A pair may come without its brackets.
        value = yaml.safe_load(f"[{value}]" if origin is tuple and "[" not in value else value)
    if origin is tuple:
        kinds = options[:1] * len(value) if ... in options else options
        return tuple(_read(part, kind, place) for part, kind in zip(value, kinds, strict=True))
    if origin is list:
        return read_stages(value, place)
    if kind in (str, bool, NoneType) and not isinstance(value, kind):
        raise TypeError
    # Python takes true for 1, and cuts 2.5 down to 2.
    if kind in (int, float) and isinstance(value, bool):
        raise TypeError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return value if kind is NoneType else kind(value)


def in_words(kind: Any) -> str:
    """A type as a person would say it."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(in_words, get_args(kind)))
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if get_origin(kind) is Annotated:
        return get_args(kind)[1].words
    if ... in get_args(kind):
        return "a list of names"
    return WORDS[(get_origin(kind) or kind).__name__]


def types_of(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    types = get_type_hints(kind, include_extras=True)
    return {f.name: types[f.name] for f in dataclasses.fields(kind)}


def docs_of(kind: type) -> dict[str, str]:
    """The line under each field of a dataclass, by the field's name; inherited fields are left out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {
        ast.unparse(field_node.target): " ".join(ast.literal_eval(doc.value).split())
        for field_node, doc in itertools.pairwise(tree.body)
        if isinstance(field_node, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def run_script(main: Callable[[Config], None], config_class: type[Config], description: str) -> None:
    """Parse the command line and run; what the user can mend ends in one sentence and exit code 2."""
    try:
        main(parse_args(config_class, description))
    except UserError as error:
        # All processes of a machine meet the same problem.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
