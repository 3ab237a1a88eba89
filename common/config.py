"""Every setting of a run, joined from the rooms that read them into one flat command line."""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import difflib
import inspect
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Never, TypeVar, get_type_hints

from common import UserError
from common.augment import AugmentSettings
from common.data.batches import ViewSettings
from common.data.loader import LoaderSettings
from common.data.sources.open import DataSettings
from common.model.optimizer import OptimizerSettings
from common.scheduling import ScheduleSettings, Stage, scale_stages
from common.scheduling.budget import BudgetSettings

if TYPE_CHECKING:
    from jsonargparse.typing import (
        ClosedUnitInterval,
        NonNegativeFloat,
        NonNegativeInt,
        PositiveFloat,
        PositiveInt,
    )

# About a minute on two CPU cores.
DEBUG_SCALE = {"epochs": 6, "img_size": 64, "batch_size": 64}


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

    seed: NonNegativeInt = 0
    """Of everything random."""
    output: str = "runs"
    """Folder that holds the runs."""
    run_name: str = ""
    """Name of this run's folder; empty = script and time."""
    resume: str = "auto"
    """auto = go on where the run named --run_name stopped; a run folder, a checkpoint or s3://...; none = start anew."""
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
    patience: NonNegativeInt = 0
    """Epochs in a row without a new best top-1 after which the run ends; 0 = never."""
    final_eval: bool = False
    """At the end, evaluate over test sizes, crops and flips, raw and EMA."""
    debug: bool = False
    """Shrink every stage, so that the whole curriculum runs in about a minute on two CPU cores."""
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
    # Whether the model starts from trained weights.
    pretrained: ClassVar[bool] = False
    # Names of the settings that the user gave, on the command line or in a file; not annotated, for it is none itself.
    given = frozenset[str]()

    recipe: Literal["auto", "mild", "medium", "strong", "listed"] = "auto"
    """Defaults that fit data, length and machine, printed where they differ from those listed here; listed = these."""
    stages: list[Stage] = field(default_factory=list)
    """The curriculum as a list of stages, in --config or on the command line; empty = the script's own."""

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
        return read & _fields(type(self)).keys()

    def stages_in_force(self) -> list[Stage]:
        """The user's stages or the script's, before a recipe fits them to the data.

        Raises:
            UserError: what makes the script's own list was given beside a list.
        """
        if self.stages and (beside := sorted(self.given & self.read_by_curriculum())):
            raise UserError(
                f"--{beside[0]} is for the script's own stages; leave it out, or put it into --stages"
            )
        stages = self.stages or self.curriculum()
        assert stages, f"{type(self).__name__} has no curriculum"
        return scale_stages(stages, **DEBUG_SCALE) if self.debug else stages

    def largest_size(self) -> int:
        """Of the stages, in pixels; a network that fits one size only is built for it."""
        return max(stage.img_size for stage in self.stages_in_force())


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
        return scale_stages(self.stages or self.listed(), self.epochs, self.img_size, self.batch_size)

    def stages_in_force(self) -> list[Stage]:
        stages = self.curriculum()
        return scale_stages(stages, **DEBUG_SCALE) if self.debug else stages


# What may differ when a run goes on: it changes no sample and no schedule, at most the rounding, and with --patience
# how far the run gets: more of it, or none, lets one that has stopped go on.
RESUME_MAY_CHANGE = frozenset(
    [
        "data_dir",
        "workers",
        "compile",
        "channels_last",
        "grad_checkpointing",
        "auto_batch",
        "grad_compression",
        "profile",
        "output",
        "run_name",
        "resume",
        "save_freq_last",
        "checkpoint_minutes",
        "keep_every",
        "s3",
        "trackers",
        "print_freq",
        "patience",
        "final_eval",
        "dry_run",
        "usd_per_hour",
    ]
)


def as_plain(cfg: Any) -> dict[str, Any]:
    """A config as what YAML and JSON can hold."""
    return _plain(dataclasses.asdict(cfg))


def repeatable(cfg: TrainConfig, stages: Sequence[Stage]) -> dict[str, Any]:
    """Settings that train these stages again, given as --config; those that they were made from are left out."""
    left_out = cfg.read_by_curriculum() | {"budget"}
    kept = {name: value for name, value in as_plain(cfg).items() if name not in left_out}
    return {**kept, "stages": [as_plain(stage) for stage in stages]}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # jsonargparse's ranges are subclasses of float and int.
    for kind in (float, int):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


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
    for name in as_plain(cfg).keys() & recorded.keys() - cfg.given - {"output", "run_name", "resume"}:
        value = read_stages(recorded[name]) if name == "stages" else recorded[name]
        setattr(cfg, name, tuple(value) if isinstance(getattr(cfg, name), tuple) else value)


def read_stages(plain: list[dict[str, Any]]) -> list[Stage]:
    """Stages as `as_plain` wrote them."""
    return [Stage(**s | {"frozen": tuple(s["frozen"])}) for s in plain]


# --- the command line ----------------------------------------------------------------------------------------------

Config = TypeVar("Config", bound=TrainConfig)

# How an annotation reads in a sentence.
WORDS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number from 0",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number between 0 and 1",
    "tuple": 'two numbers such as "[0.35, 1]"',
    "list": "a list of stages (README.md shows one)",
    "None": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
}


def parse_args(config_class: type[Config], description: str, args: list[str] | None = None) -> Config:
    """The command line of a script: one flag per field, `--config FILE.yaml`, `--print_config`.

    Raises:
        SystemExit: with code 2 after one sentence, if a flag is unknown or its value out of range.
    """
    import jsonargparse.typing

    words = _normalised(config_class, sys.argv[1:] if args is None else args)

    class OneSentenceParser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Never:
            print(f"error: {explain(config_class, message, words)} (see --help)", file=sys.stderr)
            raise SystemExit(2)

    parser = OneSentenceParser(
        description=description,
        usage="%(prog)s [--config FILE.yaml] [--flag VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    # The rooms' modules import their ranges for the type checker alone, so that they load without jsonargparse.
    types = get_type_hints(config_class, localns=vars(jsonargparse.typing))
    defaults = as_plain(config_class())
    documented: set[str] = set()
    for kind in config_class.__mro__:
        # A script's own word for a setting comes before its room's.
        own = {name: text for name, text in docs_of(kind).items() if name not in documented}
        documented |= own.keys()
        if not own:
            continue
        group = parser.add_argument_group((kind.__doc__ or "").partition("\n")[0])
        for name, text in own.items():
            shown = "" if defaults[name] in ("", []) else f" [{defaults[name]}]".replace("[None]", "[null]")
            group.add_argument(f"--{name}", type=types[name], default=defaults[name], help=text + shown)
    namespace = parser.parse_args(words)
    cfg = config_class(**_without_config(parser.instantiate_classes(namespace)))
    cfg.given = frozenset(_without_config(parser.parse_args(words, defaults=False)))
    return cfg


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}


def docs_of(kind: type) -> dict[str, str]:
    """The line under each field of a dataclass, by the field's name; inherited fields are left out."""
    if not dataclasses.is_dataclass(kind):
        return {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {
        ast.unparse(field_node.target): " ".join(ast.literal_eval(doc.value).split())
        for field_node, doc in itertools.pairwise(tree.body)
        if isinstance(field_node, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def _without_config(namespace: Any) -> dict[str, Any]:
    return {name: value for name, value in namespace.as_dict().items() if name != "config"}


def _normalised(config_class: type[TrainConfig], args: list[str]) -> list[str]:
    """Let `--batch-size` stand for `--batch_size`, `--debug` for `--debug true`, and `0.35,1` for `[0.35, 1]`."""
    types = {name: str(f.type) for name, f in _fields(config_class).items()}
    result = []
    for arg, after in zip(args, [*args[1:], ""], strict=False):
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            arg = flag.replace("-", "_").replace("__", "--", 1) + equals + value
            if types.get(arg.removeprefix("--")) == "bool" and after not in ("true", "false"):
                arg += "=true"
        elif re.fullmatch(r"[\d.]+,[\d.]+", arg):
            arg = f"[{arg}]"
        result.append(arg)
    return result


def explain(config_class: type[TrainConfig], message: str, args: Sequence[str]) -> str:
    """The parser's complaint as one sentence that names the flag and what it takes."""
    fields = {**_fields(Stage), **_fields(config_class)}
    values = {}
    for arg, after in zip(args, [*args[1:], ""], strict=False):
        flag, equals, own = arg.partition("=")
        # --stages+ appends to a list, and is wrong in the same ways.
        values[flag.removesuffix("+")] = own if equals else after
    if unknown := re.search(
        r"[Uu]nrecognized arguments: --([^ =]+)|Option '([^']+)' is not accepted", message
    ):
        flag, key = unknown.groups()
        name, where, dashes = (flag, "", "--") if flag else (key, f"{_place(values)}: ", "")
        close = difflib.get_close_matches(name.replace("-", "_"), fields, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(dashes + each for each in close)}?" if close else ""
        return f"{where}{dashes}{name} is no setting{hint}"
    if alone := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        return f"{alone[1]} follows no flag that takes it; every setting is a flag, such as --epochs 10"
    if "are required" in message:
        return f"{_place(values)} lacks {message.rpartition(': ')[2]}"
    if "Unexpected config" in message:
        return f"--config {values['--config']} holds no settings such as `epochs: 10`"
    keys = [key for key in re.findall(r'Parser key "(\w+)"', message) if key in fields]
    if not keys:
        return " ".join(message.split())
    key = keys[-1]
    given = re.search(
        r"Given value: (.*)|Got value: (.*)|type \w+: (\S+) does not conform|: '(.*)'$", message
    )
    refused = next(filter(None, given.groups()), "") if given else ""
    own = values.get(f"--{key}", "")
    # A key of a stage, or of a file, bears no dashes; the flag of that name may be right beside it.
    if f"--{key}" not in values or refused.replace(" ", "") not in ("", own.replace(" ", "")):
        where = f"{_place(values)}: {key}"
    else:
        where, refused = f"--{key}", own
    if ", stage " in where:
        fields |= _fields(Stage)
    return f"{where} takes {in_words(str(fields[key].type))}" + (f", not {refused}" if refused else "")


def _place(values: Mapping[str, str]) -> str:
    """Where a key without dashes stands: in a file or in --stages, and the first stage with a fault, if there is one."""
    import jsonargparse
    import yaml

    place, stages = "--stages", yaml.safe_load(values.get("--stages", ""))
    if stages is None:
        place = f"--config {values['--config']}"
        stages = yaml.safe_load(Path(values["--config"]).read_text()).get("stages")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Stage)
    for number, stage in enumerate(stages if isinstance(stages, list) else [], 1):
        try:
            parser.parse_object(stage)
        except (argparse.ArgumentError, TypeError):
            return f"{place}, stage {number}"
    return place


def in_words(annotation: str) -> str:
    """An annotation as a person would say it."""
    parts = []
    for part in re.split(r" \| ", annotation):
        literal = re.fullmatch(r"Literal\[(.*)\]", part)
        word = re.sub("[\"']", "", literal[1]) if literal else WORDS.get(part.partition("[")[0], part)
        parts.append(word)
    return " or ".join(parts)


def run_script(main: Callable[[Config], None], config_class: type[Config], description: str) -> None:
    """Parse the command line and run; what the user can mend ends in one sentence and exit code 2."""
    try:
        main(parse_args(config_class, description))
    except UserError as error:
        # All processes of a machine meet the same problem.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
