"""Look closely at a trained model: what it gets right, what it confuses, and whether its probabilities can be believed.

    python -m common.tools.evaluate runs/demo
    python -m common.tools.evaluate runs/demo/model --data_dir photos --split test --to photos-evaluation

A run is evaluated on its own validation images unless told otherwise, exactly as its log did it. The report is printed, and written
beside the rest:

    report.txt, per_class.csv    precision, recall and F1 of every class
    predictions.csv              every image with its five likeliest classes
    confusion.png, reliability.png
    mistakes.png                 the wrong answers that the model was surest of
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common import UserError
from common.data.order import eval_items
from common.data.sources.base import Source
from common.data.sources.folder import FolderSource
from common.data.sources.open import open_dataset, open_source
from common.engine.evaluate import one_view, with_flip
from common.model.create import WEIGHTS
from common.run import plots
from common.run.receipt import wilson
from common.tools.command_line import check_least, in_utf8, make_folder, new_parser, one_sentence
from common.tools.evaluation_plots import draw_confusion, draw_mistakes, draw_reliability
from common.tools.model_folder import TrainedModel, add_arguments, fingerprint, model_place

TOP = 5
BATCH_SIZE = 64
BINS = 15
# Of a softmax's inverse temperature: beyond, all answers are right, or none tells anything.
SHARPNESS = (1e-2, 1e2)


class Answers(NamedTuple):
    """What the model says of every image of a split, N images and C classes."""

    labels: np.ndarray  # int64 [N], numbers of the model's classes
    logits: Tensor  # float32 [N, C]
    ranked: np.ndarray  # int64 [N, up to 5], the likeliest classes, best first

    @property
    def right(self) -> np.ndarray:
        return self.ranked[:, 0] == self.labels


def open_split(model: TrainedModel, data_dir: str | None, split: str) -> Source:
    """The images to evaluate on: the run's own, unless told otherwise. UserError: there are none."""
    if data_dir is None:
        if not model.settings:
            raise UserError("a model's folder does not know its images; pass --data_dir, or the run's folder")
        if split == "val":
            return open_dataset(model.data_settings())[1]
        data_dir = model.settings["data_dir"]
    if split == "val":
        return open_source(data_dir, split)
    folder = Path(data_dir).expanduser() / split
    if not folder.is_dir():
        raise UserError(f"--split {split}: there is no folder {folder} with a folder for each class")
    return FolderSource(folder)


def answer(model: TrainedModel, source: Source, batch_size: int, workers: int | None, tta: bool) -> Answers:
    """Ask the model about every image, once. UserError: one cannot be decoded, or the model does not know a class."""
    labels, classes = model.labels_of(source), len(model.cfg.classes)
    items = eval_items(len(source), model.size_for(source), batch_size, 0, 1, model.view)
    logits, ranked = torch.empty(len(source), classes), np.empty((len(source), min(TOP, classes)), np.int64)
    with (
        closing(model.loader(source, workers)) as loader,
        tqdm(total=len(source), unit="img", disable=None) as bar,
    ):
        for batch in loader.stream(items):
            some = model.logits(batch.images, with_flip if tta else one_view)
            logits[batch.item.indices] = some.cpu()
            # By the device's own order of equals, as in training.
            ranked[batch.item.indices] = some.topk(ranked.shape[1], dim=1).indices.cpu()
            bar.update(len(some))
    return Answers(labels, logits, ranked)


def confusion_matrix(answers: Answers) -> np.ndarray:
    """Images by class (rows) and answer (columns), int64 [C, C]."""
    classes = answers.logits.shape[1]
    return np.bincount(answers.labels * classes + answers.ranked[:, 0], minlength=classes**2).reshape(
        classes, -1
    )


def per_class(matrix: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Precision, recall, F1 (shares; NaN where there is nothing to divide by) and support of every class."""
    hits, support, answered = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    columns = {
        "precision": hits / np.where(answered, answered, np.nan),
        "recall": hits / np.where(support, support, np.nan),
        "f1": 2 * hits / np.where(support + answered, support + answered, np.nan),
        "support": support,
    }
    return pd.DataFrame(columns, pd.Index(names, name="class"))


def confused_pairs(matrix: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Each pair of a class and what it was taken for, the most frequent first."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    rows, columns = np.nonzero(wrong)
    pairs = pd.DataFrame(
        {
            "class": np.array(names, object)[rows],
            "taken for": np.array(names, object)[columns],
            "images": wrong[rows, columns],
            "share": wrong[rows, columns] / matrix.sum(1)[rows],
        }
    )
    return pairs.sort_values(["images", "share"], ascending=False, kind="stable", ignore_index=True)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by images (Guo et al., 2017)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right, BINS) - np.bincount(bins, confidence, BINS)
    return float(np.abs(gaps).sum() / len(right))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What to divide logits (float [N, C]) by so that the cross-entropy with labels (int64 [N]) is least (Guo et al., 2017).

    It is convex in the inverse temperature: its derivative is bisected.
    """
    of_labels = logits.gather(1, labels[:, None]).mean()
    low, high = np.log(SHARPNESS)
    for _ in range(40):
        middle = (low + high) / 2
        expected = (F.softmax(logits * np.exp(middle), 1) * logits).sum(1).mean()
        low, high = (middle, high) if expected < of_labels else (low, middle)
    return float(np.exp(-low))


class Calibration(NamedTuple):
    """Expected calibration errors as shares, and a temperature fitted on one half of the images."""

    all: float
    temperature: float
    before: float  # of the other half
    after: float  # of the other half, at that temperature
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # both, for `draw_reliability`


def calibrate(answers: Answers) -> Calibration:
    logits, labels = answers.logits, torch.from_numpy(answers.labels)
    held_out = np.random.default_rng(0).permutation(len(labels)) % 2 == 1
    fitted = torch.from_numpy(~held_out)
    temperature = fit_temperature(logits[fitted], labels[fitted])
    confidence, tempered = (F.softmax(logits / t, 1).amax(1).numpy() for t in (1.0, temperature))
    as_it_is, divided = ((values[held_out], answers.right[held_out]) for values in (confidence, tempered))
    before, after = expected_calibration_error(*as_it_is), expected_calibration_error(*divided)
    curves = {
        f"as it is: ECE {before:.1%}": as_it_is,
        f"temperature {temperature:.2f}: ECE {after:.1%}": divided,
    }
    error = expected_calibration_error(confidence, answers.right)
    return Calibration(error, temperature, before, after, curves)


def logged(run: Path) -> tuple[float, int]:
    """The best top-1 in a run's log, raw or EMA, in percent, and how many images a batch of that epoch had."""
    table = pd.DataFrame(plots.read_log(run / "training_log.csv"))
    best = table[["val_top1", "ema_top1"]].max(axis=1)
    return best.max(), int(table["batch_size"][best.idxmax()])


def head(title: str, answers: Answers, table: pd.DataFrame, log_top1: float | None) -> str:
    """Accuracies in words; beside the log's, where the same images were asked in the same way."""
    images, hits = len(answers.labels), int(answers.right.sum())
    in_top = int((answers.ranked == answers.labels[:, None]).sum())
    low, high = wilson(hits, images)
    lines = [
        title,
        "",
        f"top-1     {hits / images:8.2%}   {hits} of {images}; 95 % interval {low:.1%} to {high:.1%}",
        f"top-{answers.ranked.shape[1]}     {in_top / images:8.2%}   {in_top} of {images}",
        f"balanced  {table['recall'].mean():8.2%}   mean recall of the {table['recall'].count()} classes that have images",
    ]
    if log_top1 is not None:
        apart = hits - round(log_top1 * images / 100)
        same = (
            "the same, to the last image"
            if not apart
            else f"{abs(apart)} images {'fewer' if apart > 0 else 'more'}"
        )
        lines.append(f"the log   {log_top1 / 100:8.2%}   {same}")
    return "\n".join(lines)


def as_text(table: pd.DataFrame) -> str:
    formats = {name: (lambda share: f"{share:.1%}") for name in ("precision", "recall", "f1", "share")}
    return table.to_string(index=False, formatters=formats, na_rep="–")


def report(opening: str, table: pd.DataFrame, pairs: pd.DataFrame, calibration: Calibration) -> str:
    """Everything in words and tables."""
    worst = table[table["support"] > 0].sort_values("f1", kind="stable").head(10).reset_index()
    c = calibration
    parts = [
        opening,
        f"calibration: ECE {c.all:.2%} (mean gap between confidence and accuracy, {BINS} bins)\n"
        f"temperature {c.temperature:.2f}, fitted on one half of the images; ECE of the other half {c.before:.2%} → {c.after:.2%}",
        f"worst {len(worst)} of {len(table)} classes by F1 (all: per_class.csv)\n{as_text(worst)}",
        f"most confused (of {len(pairs):,} pairs)\n{as_text(pairs.head(10))}" if len(pairs) else "no mistake",
    ]
    return "\n\n".join(parts) + "\n"


def predictions(source: Source, answers: Answers, names: Sequence[str]) -> pd.DataFrame:
    """A row for each image: path, class, right, label_1, probability_1, label_2, ..."""
    probabilities = F.softmax(answers.logits, 1).gather(1, torch.from_numpy(answers.ranked)).numpy()
    labels = np.array(names, object)
    columns = {
        "path": [in_utf8(source.describe(index)) for index in range(len(source))],
        "class": labels[answers.labels],
        "right": answers.right.astype(int),
    }
    for rank in range(answers.ranked.shape[1]):
        columns[f"label_{rank + 1}"] = labels[answers.ranked[:, rank]]
        columns[f"probability_{rank + 1}"] = probabilities[:, rank]
    return pd.DataFrame(columns)


def evaluate(args: argparse.Namespace) -> str:
    """Evaluate, write everything into `args.to`, and return the report. UserError: `args.to` is a run, or as the functions called here say."""
    if any((args.to / name).exists() for name in ("training_log.csv", WEIGHTS)):
        raise UserError(
            f"--to {args.to} is the folder of a run or a model; choose another, whose files are not theirs"
        )
    model = TrainedModel(args.model, args.mixed_precision)
    source = open_split(model, args.data_dir, args.split)
    model.settings["skip_unreadable"] = args.skip_unreadable or model.settings.get("skip_unreadable", False)
    if len(source) < 2:
        raise UserError(f"{source.location} holds {len(source)} images; an evaluation takes two or more")
    has_log = (args.model / "training_log.csv").is_file()
    log_top1, batch_size = logged(args.model) if has_log else (None, BATCH_SIZE)
    answers = answer(model, source, args.batch_size or batch_size, args.workers, args.tta)
    names, matrix = model.cfg.classes, confusion_matrix(answers)
    table, pairs, calibration = per_class(matrix, names), confused_pairs(matrix, names), calibrate(answers)
    views = "two views (flip)" if args.tta else "one view"
    weights = f"weights {fingerprint(model_place(args.model))}"
    title = f"{in_utf8(args.model)}, {weights}, on {in_utf8(source.location)}\n\n{len(source)} images of {args.split}, {views} at {model.cfg.img_size} px"
    same_way = args.data_dir is None and args.split == "val" and not args.tta
    text = report(head(title, answers, table, log_top1 if same_way else None), table, pairs, calibration)
    make_folder(args.to, "--to")
    (args.to / "report.txt").write_text(text)
    table.to_csv(args.to / "per_class.csv")
    every_image = predictions(source, answers, names)
    every_image.to_csv(args.to / "predictions.csv", index=False)
    note = f"{args.model.resolve().name}: {len(source):,} images, {len(names):,} classes, {answers.right.mean():.1%} right"
    draw_confusion(args.to / "confusion.png", matrix, names, pairs, note)
    draw_reliability(args.to / "reliability.png", calibration.curves, BINS, note)
    draw_mistakes(args.to / "mistakes.png", source, every_image, note)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser("evaluate", __doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--data_dir", help="whatever the training scripts read (default: the run's)")
    add("--split", choices=("val", "test"), default="val", help="(default: %(default)s)")
    add("--to", type=Path, default=Path("evaluation"), help="folder for the results (default: %(default)s)")
    add(
        "--skip_unreadable",
        action="store_true",
        help="another image of the class stands in (default: the run's)",
    )
    add("--tta", action="store_true", help="mean of the image and its mirror image")
    add("--batch_size", type=int, help=f"images at a time (default: the run's, or {BATCH_SIZE})")
    add("--workers", type=int, help="processes that read images (default: one per usable CPU)")
    args = parser.parse_args(arguments)
    with one_sentence(parser):
        check_least(args, batch_size=1, workers=0)
        print(evaluate(args))
    print(f"tables and plots are in {args.to}")


if __name__ == "__main__":
    main()
