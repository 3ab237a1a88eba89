"""Average the weights of several runs into one model, a "soup" (Wortsman et al., 2022), and say whether it is better.

    python -m common.tools.average runs/seed0 runs/seed1 runs/seed2 --to soup --split test
    python -m common.tools.average runs/a runs/a/checkpoints/step_00001000 --to soup --uniform

Ingredients are runs (their best weights), model folders, and checkpoints that a run keeps (--keep_every; their raw weights), of one
architecture, the same classes and the same images. The uniform soup is the mean of all. The greedy one begins with the best
ingredient and takes in each next best if that makes it no worse. BatchNorm's statistics do not average: they are taken anew on
training images.

One set of images chooses, another reports, and has chosen nothing here:

    --split test    the validation images choose, those of the folder `test` report
    --split val     every second validation image of a class chooses, the others report

The training images cannot choose: all ingredients know them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from common import UserError
from common.data.order import BatchItem, eval_items
from common.data.sources.base import Source
from common.data.sources.open import open_dataset, open_source
from common.model.create import WEIGHTS
from common.model.pretrained_cfg import CONFIG, PretrainedCfg, read_pretrained_cfg
from common.run import checkpoint
from common.tools.command_line import check_least, new_parser, one_sentence
from common.tools.evaluate import answer, open_split, wilson
from common.tools.model_folder import TrainedModel, add_target, check_target, model_place

BATCH_SIZE = 64
# Training images that BatchNorm's statistics are taken from, at most: they are taken for every soup that is tried.
STATISTICS_IMAGES = 10_000

State = Mapping[str, Tensor]


class Ingredient(NamedTuple):
    """Weights, and what they know about themselves; `run` is the folder that `TrainedModel` takes."""

    name: str
    run: Path
    cfg: PretrainedCfg
    state: State


class HeldOut(NamedTuple):
    """Some images of a split: `rows` are those that count, bool [N]."""

    name: str
    source: Source
    rows: np.ndarray

    @property
    def images(self) -> int:
        return int(self.rows.sum())


class Setup(NamedTuple):
    """What it takes to try weights: a model to put them into, training images, and how images are read."""

    model: TrainedModel
    train: Source
    batch_size: int
    workers: int | None


class Candidate(NamedTuple):
    """Weights that were tried: hits of the images that choose, and of those that report."""

    name: str
    state: State
    chose: int
    reported: int


def read_ingredient(path: Path) -> Ingredient:
    """Read a run, a model's folder or a checkpoint. UserError: it is none of them, or damaged."""
    run, file = path, path / WEIGHTS
    if (path / checkpoint.MANIFEST).is_file():
        # Which compares its files with the manifest.
        checkpoint.read(path)
        run = path.absolute().parent.parent
    else:
        file = model_place(path) / WEIGHTS
    cfg = read_pretrained_cfg(model_place(run))
    try:
        return Ingredient(str(path), run, cfg, load_file(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def check_same_kind(ingredients: Sequence[Ingredient]) -> None:
    """UserError: they are not of one architecture, the same classes and the same images."""
    first = ingredients[0]
    for other in ingredients[1:]:
        differ = [
            f.name for f in fields(PretrainedCfg) if getattr(other.cfg, f.name) != getattr(first.cfg, f.name)
        ]
        shapes, others = ({k: t.shape for k, t in each.state.items()} for each in (first, other))
        if differ or shapes != others:
            why = ", ".join(differ) or "the tensors' names and shapes"
            raise UserError(f"{other.name} cannot be averaged with {first.name}: they differ in {why}")


def mean_of(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of every tensor in its own dtype; of integers, such as counts of batches, the first's."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }


def statistics_items(setup: Setup) -> list[BatchItem]:
    """Batches of training images as evaluation sees them, in random order: a batch of one class has too small a variance.

    Incomplete ones are left out, if there are others: one image alone may have no variance at all.
    """
    model, train = setup.model, setup.train
    chosen = np.random.default_rng(0).permutation(len(train))[:STATISTICS_IMAGES]
    items = eval_items(len(chosen), model.size_for(train, chosen), setup.batch_size, 0, 1, model.view)
    whole = [item for item in items if len(item.indices) == setup.batch_size] or items
    return [item._replace(indices=chosen[item.indices]) for item in whole]


def soup_of(setup: Setup, ingredients: Sequence[Candidate]) -> dict[str, Tensor]:
    """The mean of some weights, with BatchNorm's statistics taken anew: means over all batches, as torch's `update_bn`.

    Unlike there, everything else stays in evaluation mode: dropout would change what the layers see. Statistics in which the
    ingredients agree were kept by their trainings, and stay.
    """
    model, (first, *others) = setup.model, [candidate.state for candidate in ingredients]
    model.model.load_state_dict(mean_of([first, *others]))
    norms = [
        module
        for name, module in model.model.named_modules()
        if isinstance(module, _BatchNorm)
        and any(
            not torch.equal(first[f"{name}.running_mean"], each[f"{name}.running_mean"]) for each in others
        )
    ]
    if norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with closing(model.loader(setup.train, setup.workers)) as loader:
            for batch in loader.stream(statistics_items(setup)):
                model.logits(batch.images)
        model.model.eval()
    return {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.model.state_dict().items()
    }


def hits_of(setup: Setup, state: State, parts: Sequence[HeldOut]) -> list[int]:
    """How many images of each part the weights get right."""
    setup.model.model.load_state_dict(state)
    right = {
        source.location: answer(setup.model, source, setup.batch_size, setup.workers, tta=False).right
        for source in {part.source.location: part.source for part in parts}.values()
    }
    return [int(right[part.source.location][part.rows].sum()) for part in parts]


def greedy(setup: Setup, candidates: Sequence[Candidate], chooser: HeldOut) -> tuple[list[Candidate], State]:
    """The ingredients that the greedy soup takes, best first, and its weights (Wortsman et al., 2022, recipe 1)."""
    first, *others = sorted(candidates, key=lambda candidate: -candidate.chose)
    taken, state, best = [first], first.state, first.chose
    for candidate in others:
        tried = soup_of(setup, [*taken, candidate])
        (hits,) = hits_of(setup, tried, [chooser])
        if hits >= best:
            taken, state, best = [*taken, candidate], tried, hits
    return taken, state


def held_out_images(model: TrainedModel, data_dir: str | None, split: str) -> list[HeldOut]:
    """The images that choose, and those that report. UserError: there are none, or they are the same."""
    val = open_split(model, data_dir, "val")
    everything = np.ones(len(val), bool)
    if split == "test":
        test = open_split(model, data_dir, "test")
        # A dataset without val is validated on test.
        if test.location == val.location:
            raise UserError(
                f"--split test: {test.location} holds the validation images too, which choose and so cannot report; "
                "take --split val, or make a folder val"
            )
        return [HeldOut("val", val, everything), HeldOut("test", test, np.ones(len(test), bool))]
    even = np.zeros(len(val), bool)
    for label in np.unique(val.labels):
        even[np.flatnonzero(val.labels == label)[::2]] = True
    if even.all():
        raise UserError(
            f"--split val: {val.location} has no class with two images, of which one could report"
        )
    return [HeldOut("half of val", val, even), HeldOut("the other half", val, ~even)]


def table(candidates: Sequence[Candidate], chooser: HeldOut, reporter: HeldOut) -> str:
    """Accuracies of ingredients and soups side by side."""
    width = max(len(candidate.name) for candidate in candidates)
    heads = (f"{chooser.name} ({chooser.images}) chooses", f"{reporter.name} ({reporter.images}) reports")
    lines = [f"{'top-1 on':<{width}}  {heads[0]:>26}  {heads[1]:>30}  95 % interval"]
    for candidate in candidates:
        low, high = wilson(candidate.reported, reporter.images)
        chose, reported = candidate.chose / chooser.images, candidate.reported / reporter.images
        lines.append(f"{candidate.name:<{width}}  {chose:>26.2%}  {reported:>30.2%}  {low:.1%} to {high:.1%}")
    return "\n".join(lines)


def average(args: argparse.Namespace) -> str:
    """Make both soups, write one of them into `args.to`, and return the report. UserError: as the functions called here say."""
    check_target(args.to)
    if len(args.models) < 2:
        raise UserError("an average takes two models or more")
    ingredients = [read_ingredient(path) for path in args.models]
    check_same_kind(ingredients)
    model = TrainedModel(ingredients[0].run, args.mixed_precision)
    parts = held_out_images(model, args.data_dir, args.split)
    own_train = args.data_dir is None
    train = open_dataset(model.data_settings())[0] if own_train else open_source(args.data_dir, "train")
    setup = Setup(model, train, args.batch_size, args.workers)

    candidates = [Candidate(i.name, i.state, *hits_of(setup, i.state, parts)) for i in ingredients]
    mean = soup_of(setup, candidates)
    uniform = Candidate(f"uniform soup of {len(candidates)}", mean, *hits_of(setup, mean, parts))
    taken, best = greedy(setup, candidates, parts[0])
    soup = Candidate(f"greedy soup of {len(taken)}", best, *hits_of(setup, best, parts))
    lines = [
        table([*candidates, uniform, soup], *parts),
        f"the greedy soup takes {', '.join(candidate.name for candidate in taken)}",
        f"written: the {'uniform' if args.uniform else 'greedy'} soup",
    ]
    if args.split == "val":
        lines.append(
            "val also chose each run's best epoch, so that the runs' own figures flatter them; --split test has no such bias"
        )
    text = "\n".join(lines)
    args.to.mkdir(exist_ok=True)
    save_file(dict((uniform if args.uniform else soup).state), args.to / WEIGHTS)
    (args.to / CONFIG).write_text(json.dumps(ingredients[0].cfg.timm_config(), indent=1))
    (args.to / "report.txt").write_text(text + "\n")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser("average", __doc__)
    add = parser.add_argument
    add("models", type=Path, nargs="+", metavar="RUN|MODEL_DIR|CHECKPOINT", help="two or more")
    add_target(parser)
    add("--uniform", action="store_true", help="write the mean of all instead of the greedy soup")
    add("--data_dir", help="whatever the training scripts read (default: the first run's)")
    report = "the images that report (default: %(default)s)"
    add("--split", choices=("val", "test"), default="val", help=report)
    add("--mixed_precision", choices=("no", "bf16", "fp16"), help="(default: the first run's)")
    add("--batch_size", type=int, default=BATCH_SIZE, help="images at a time (default: %(default)s)")
    add("--workers", type=int, help="processes that read images (default: one per usable CPU)")
    args = parser.parse_args(arguments)
    with one_sentence(parser):
        check_least(args, batch_size=2, workers=0)
        print(average(args))
    print(f"the model is in {args.to}")


if __name__ == "__main__":
    main()
