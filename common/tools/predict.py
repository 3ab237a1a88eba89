"""Name what is on images, with the weights of a run or of a model folder.

    python -m common.tools.predict runs/demo photo.jpg more_photos/
    python -m common.tools.predict runs/demo/model photos/ --topk 3 --csv predictions.csv --json predictions.json

Images are read, cropped, resized and normalised as the run's evaluation did it, so that on its validation images as many are
right as its log says. Any format that training reads. What cannot be read is named and left out; exit code 1 if nothing could
be.
"""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import UserError
from common.data.decode import DecodeError, decode_one, read_header
from common.data.sources.base import EXTENSIONS
from common.data.sources.folder import HIDDEN
from common.tools.command_line import check_least, in_utf8, new_parser, one_sentence
from common.tools.model_folder import TrainedModel, add_arguments


class Prediction(NamedTuple):
    """The likeliest classes of an image with their probabilities, best first."""

    path: Path
    names: list[str]
    probabilities: list[float]

    def as_plain(self) -> dict[str, Any]:
        ranks = zip(self.names, self.probabilities, strict=True)
        return {"path": in_utf8(self.path), "predictions": [{"label": n, "probability": p} for n, p in ranks]}


def decode(model: TrainedModel, path: Path) -> Tensor | str:
    """An image's pixels as evaluation sees them, uint8 [1, 3, H, W]; or why it cannot be read."""
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        ((height, width),) = model.shape_of(np.array([read_header(data)[:2]])).tolist()
        return decode_one(data, height, width, model.view)
    except (DecodeError, OSError) as error:
        return getattr(error, "strerror", None) or str(error)


def logits_of(model: TrainedModel, images: Sequence[Tensor]) -> Tensor:
    """Of images [1, 3, H, W] of several shapes: float32 [N, classes] on the CPU."""
    logits = torch.empty(len(images), len(model.cfg.classes))
    for shape in {image.shape for image in images}:
        rows = [row for row, image in enumerate(images) if image.shape == shape]
        logits[rows] = model.logits(torch.cat([images[row] for row in rows])).cpu()
    return logits


def predict(
    model: TrainedModel, paths: Sequence[Path], topk: int, batch_size: int, unreadable: list[str]
) -> Iterator[Prediction]:
    """Predictions in the order of the paths; a line about each that cannot be read goes to `unreadable`."""
    names = model.cfg.classes
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=len(paths), unit="img", disable=None) as bar,
    ):
        for start in range(0, len(paths), batch_size):
            some = paths[start : start + batch_size]
            decoded = dict(zip(some, threads.map(partial(decode, model), some), strict=True))
            unreadable += [f"{in_utf8(path)}: {why}" for path, why in decoded.items() if isinstance(why, str)]
            pixels = {path: image for path, image in decoded.items() if isinstance(image, Tensor)}
            bar.update(len(some))
            if not pixels:
                continue
            best = logits_of(model, list(pixels.values())).softmax(1).topk(min(topk, len(names)))
            for path, values, classes in zip(
                pixels, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                yield Prediction(path, [names[index] for index in classes], values)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and all images below folders, in order, each once. UserError: there are none."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        found |= dict.fromkeys(_images_below(path) if path.is_dir() else [path])
    if not found:
        raise UserError(f"no image below {', '.join(map(str, paths))}")
    return list(found)


def _images_below(folder: Path) -> list[Path]:
    """As training lists them: those behind links too, and none that is hidden."""
    images = list[Path]()
    for place, folders, files in os.walk(os.fsencode(folder), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        paths = (Path(os.fsdecode(place), os.fsdecode(n)) for n in files if not n.startswith(HIDDEN))
        images += [path for path in paths if path.suffix.lower() in EXTENSIONS]
    return sorted(images)


def write(predictions: Sequence[Prediction], csv_path: Path | None, json_path: Path | None) -> None:
    """The CSV has a row for each image: path, label_1, probability_1, label_2, ..."""
    try:
        if csv_path:
            with csv_path.open("w", newline="") as file:
                writer = csv.writer(file)
                ranks = range(1, len(predictions[0].names) + 1)
                writer.writerow(
                    ["path", *(f"{part}_{rank}" for rank in ranks for part in ("label", "probability"))]
                )
                for path, *columns in predictions:
                    writer.writerow(
                        [in_utf8(path), *(cell for rank in zip(*columns, strict=True) for cell in rank)]
                    )
        if json_path:
            json_path.write_text(json.dumps([prediction.as_plain() for prediction in predictions], indent=1))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from error


def as_line(prediction: Prediction) -> str:
    ranks = zip(prediction.names, prediction.probabilities, strict=True)
    return f"{in_utf8(prediction.path)}  " + "  ".join(
        f"{name} {100 * probability:.1f} %" for name, probability in ranks
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser("predict", "Name what is on images, with the weights of a run or of a model folder.")
    add_arguments(parser)
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="image files, and folders of them")
    add("--topk", type=int, default=5, help="classes named for each image (default: %(default)s)")
    add("--csv", type=Path, metavar="FILE", help="also write a table")
    add("--json", type=Path, metavar="FILE", help="also write a list of objects")
    add("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")
    args = parser.parse_args(arguments)
    unreadable: list[str] = []
    with one_sentence(parser):
        check_least(args, topk=1, batch_size=1)
        paths = find_images(args.paths)
        model = TrainedModel(args.model, args.mixed_precision)
        predictions = []
        for prediction in predict(model, paths, args.topk, args.batch_size, unreadable):
            predictions.append(prediction)
            tqdm.write(as_line(prediction))
        if predictions:
            write(predictions, args.csv, args.json)
    for line in unreadable:
        print(f"not readable: {line}", file=sys.stderr)
    if not predictions:
        parser.exit(1, "no image could be read\n")


if __name__ == "__main__":
    main()
