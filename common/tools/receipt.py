"""Check a run's receipt against its log: images, epochs, accuracy with its interval, minutes and price are computed anew.

    python -m common.tools.receipt runs/a

Ends with exit code 1 if a figure of `receipt.json` is not what `training_log.csv` says.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import UserError
from common.run.receipt import accuracy
from common.tools.command_line import new_parser, one_sentence

# Of the training log's figures, which have six digits; and seconds by which clocks may disagree.
ROUNDING, CLOCKS_S = 1e-4, 2.0


def checks(receipt: dict[str, Any], rows: list[dict[str, str]]) -> Iterator[tuple[str, float, float, bool]]:
    """Name, figure of the receipt, figure of the log, and whether they agree."""
    last, minutes, total = rows[-1], receipt["minutes"], receipt["total_minutes"]
    computed = accuracy(rows, receipt["val_images"])
    low, high = computed["interval_95"]
    figures = [
        ("epochs", receipt["epochs"], float(last["epoch"])),
        ("images seen", receipt["images_seen"], float(last["images_seen"])),
        ("last top-1 (%)", receipt["last_top1"], computed["last_top1"]),
        ("best top-1 (%)", receipt["best_top1"], computed["best_top1"]),
        ("interval from (%)", receipt["interval_95"][0], low),
        ("interval to (%)", receipt["interval_95"][1], high),
        ("minutes in all", total, sum(minutes.values())),
    ]
    if usd_per_hour := receipt["usd_per_hour"]:
        figures.append(("price (USD)", receipt["price_usd"], sum(minutes.values()) / 60 * usd_per_hour))
    for name, stated, found in figures:
        yield name, stated, found, math.isclose(stated, found, rel_tol=ROUNDING, abs_tol=1e-9)
    training = [value for part, value in minutes.items() if part.startswith("train ")]
    stated, logged = sum(training) + minutes["wait"], sum(float(row["epoch_s"]) for row in rows) / 60
    # An epoch's seconds have its evaluation in them, and checkpoints that were written meanwhile.
    stated += minutes["evaluate"] + minutes.get("save", 0.0)
    # The log's epochs know only the time since a restart; and the final evaluation is none of them.
    yield "minutes of epochs", stated, logged, stated >= logged - CLOCKS_S / 60
    elapsed = float(last["total_s"]) / 60
    yield "minutes until the last epoch", total, elapsed, total >= elapsed


def check(folder: Path) -> tuple[str, bool]:
    """The table, and whether all agrees. UserError: there is no receipt, or no log to check it against."""
    try:
        receipt = json.loads((folder / "receipt.json").read_text())
        with open(folder / "training_log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        results = list(checks(receipt, rows))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} has no receipt to check: {Path(error.filename).name} is missing"
        ) from error
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{folder}: its receipt or its log cannot be read ({error})") from error
    lines = [
        f"{'ok' if fine else 'WRONG':<6}{name:<30}{stated:>14,.2f}{found:>14,.2f}"
        for name, stated, found, fine in results
    ]
    return "\n".join([f"{'':<6}{'':<30}{'receipt':>14}{'log':>14}", *lines]), all(r[-1] for r in results)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser("receipt", "Check a run's receipt against its log.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    with one_sentence(parser):
        table, fine = check(parser.parse_args(arguments).folder)
    print(table)
    if not fine:
        parser.exit(1, "the receipt does not agree with the log\n")


if __name__ == "__main__":
    main()
