"""Do the tests notice when the core is wrong? Break one place at a time, at random, and see which breaks nobody sees.

    python -m tests.mutants --minutes 60

A mutant is one changed operator, constant or condition, or one statement left out, in a copy of the repository; the
tests that belong to its file run against it. The survivors are printed: each is a test to write, or a line that could
as well be another.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# Those that start processes of their own take too long to run for each mutant.
ENGINE = ["tests/engine/test_device.py", "tests/engine/test_traps.py", "tests/engine/test_fit.py"]
ENGINE += ["-k", "not two_processes and not process_that_fails"]
TESTS = {
    "common/scheduling/rates.py": ["tests/scheduling"],
    "common/scheduling/plan.py": ["tests/scheduling"],
    "common/engine/fit.py": ENGINE,
    "common/engine/trainer.py": ENGINE,
    "common/engine/recording.py": ENGINE,
    "common/run/checkpoint.py": ["tests/run/test_checkpoint.py", *ENGINE],
}
COMPARISONS = {"Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Eq": "!=", "NotEq": "=="}
COMPARISONS |= {"Is": "is not", "IsNot": "is", "In": "not in", "NotIn": "in"}
ARITHMETIC = {"Add": "-", "Sub": "+", "Mult": "/", "Div": "*", "FloorDiv": "*", "Mod": "*", "Pow": "*"}
ARITHMETIC |= {"BitOr": "&", "BitAnd": "|"}


class Mutant(NamedTuple):
    """`line` of `path` from `begin` to `end` becomes `text`."""

    path: str
    line: int
    begin: int
    end: int
    text: str

    def apply(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        # Offsets of the syntax tree are in bytes.
        line = lines[self.line - 1].encode()
        lines[self.line - 1] = (line[: self.begin] + self.text.encode() + line[self.end :]).decode()
        return "".join(lines)


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """All mutants of a file's lines of code; what spans several lines stays as it is."""
    tree = ast.parse(source)
    # In annotations `|` and constants are no arithmetic.
    typed = (ast.AnnAssign, ast.arg, ast.FunctionDef)
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, typed)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part is not None
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in annotations or getattr(node, "lineno", 0) != getattr(node, "end_lineno", 1):
            continue
        for begin, end, text in _changes(node):
            yield Mutant(path, node.lineno, begin, end, text)


def _changes(node: ast.AST) -> Iterator[tuple[int, int, str]]:
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            yield left.end_col_offset, right.col_offset, f" {COMPARISONS[type(op).__name__]} "
        case ast.BinOp(left=left, op=op, right=right) if not isinstance(left, ast.Constant | ast.JoinedStr):
            # With its brackets, if there are any.
            yield node.col_offset, node.end_col_offset, _unparse(node, ARITHMETIC[type(op).__name__])
        case ast.BoolOp(op=op, values=[first, second]):
            other = "or" if isinstance(op, ast.And) else "and"
            yield first.end_col_offset, second.col_offset, f" {other} "
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node.col_offset, operand.col_offset, ""
        case ast.Constant(value=bool() as value):
            yield node.col_offset, node.end_col_offset, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield node.col_offset, node.end_col_offset, repr(value + 1)
        case (
            ast.Expr(value=ast.Call())
            | ast.AugAssign()
            | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
        ):
            yield node.col_offset, node.end_col_offset, "pass"


def _unparse(node: ast.BinOp, operator: str) -> str:
    return f"({ast.unparse(node.left)}) {operator} ({ast.unparse(node.right)})"


def is_seen(folder: Path, mutant: Mutant | None, tests: list[str], timeout: float) -> bool:
    """Whether the tests fail, or do not come to an end, with this mutant in a copy of the repository."""
    place = folder / mutant.path if mutant else None
    whole = place.read_text() if place else ""
    if place:
        place.write_text(mutant.apply(whole))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return bool(
            subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=timeout, check=False
            ).returncode
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        if place:
            place.write_text(whole)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the order in which mutants are tried")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tried at the same time")
    parser.add_argument("--only", default="", help="part of the path of the files to mutate")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    tests = {path: flags for path, flags in TESTS.items() if args.only in path}
    mutants = [m for path in tests for m in mutants_of(path, (ROOT / path).read_text())]
    random.Random(args.seed).shuffle(mutants)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for job in range(args.jobs):
            hidden = shutil.ignore_patterns(".*", "runs", "__pycache__")
            copies.put(Path(shutil.copytree(ROOT, Path(name) / str(job), ignore=hidden)))
        began = time.monotonic()
        folder = copies.get()
        for flags in {tuple(flags) for flags in tests.values()}:
            if is_seen(folder, None, list(flags), 3600):
                raise SystemExit(f"the tests fail without a mutant: {' '.join(flags)}")
        copies.put(folder)
        slow = 60 + 5 * (time.monotonic() - began)
        result: Counter[str] = Counter()

        def attempt(mutant: Mutant) -> None:
            if time.monotonic() > deadline:
                return
            copy = copies.get()
            seen = is_seen(copy, mutant, tests[mutant.path], slow)
            copies.put(copy)
            result["seen" if seen else "survived"] += 1
            if not seen:
                line = (ROOT / mutant.path).read_text().splitlines()[mutant.line - 1]
                broken = mutant.apply((ROOT / mutant.path).read_text()).splitlines()[mutant.line - 1]
                print(f"{mutant.path}:{mutant.line}\n  - {line.strip()}\n  + {broken.strip()}", flush=True)

        list(pool.map(attempt, mutants))
    print(f"{sum(result.values())} of {len(mutants)} mutants tried, {result['survived']} survived")


if __name__ == "__main__":
    main()
