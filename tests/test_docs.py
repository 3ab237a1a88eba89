"""What the pages say exists: links, anchors, files, programs and their flags; and logged figures are the logs' own."""

import contextlib
import functools
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import train_hybrid
from common.scheduling import Stage

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))
README_LINES = 150

# Flags of programs that are not ours. One that a program of ours has, or that no page mentions, must go from here.
ELSEWHERE = {
    "accelerate launch": "--config_file --main_process_port --main_process_ip --machine_rank --num_machines --num_processes "
    "--rdzv_backend --max_restarts",
    "torchrun": "--nnodes --nproc_per_node --rdzv_endpoint --rdzv_id",
    "timm's train.py": "--data-dir --train-split --val-split --num-classes --img-size --opt --weight-decay --sched "
    "--warmup-epochs --cooldown-epochs --smoothing --amp --amp-dtype --channels-last --color-jitter --device --no-prefetcher "
    "--crop-pct",
    "aws, docker, sbatch, ruff": "--only-show-errors --ipc --signal --check",
    "the original rect script": "--dist_port",
}

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:[_-][a-z0-9]+)*")
PROGRAM = re.compile(r"(train_[a-z]+\.py)\b|-m ((?:common|tests)(?:\.\w+)*)")


def commands(page: Path) -> list[str]:
    """Every piece of code on the page: inline spans, and lines of fenced blocks with their continuations, without comments."""
    text = page.read_text()
    fenced = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in fenced.splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def file_of(program: str) -> Path:
    """The file that runs as `python train_x.py` or as `python -m some.module`."""
    if program.endswith(".py"):
        return ROOT / program
    path = ROOT / program.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def flags_of(program: str) -> set[str]:
    """The flags in a program's `--help`."""
    output, argv = io.StringIO(), sys.argv
    sys.argv = [program, "--help"]
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(file_of(program)), run_name="__main__")
    finally:
        sys.argv = argv
    assert exit_.value.code == 0, f"{program} --help ends with {exit_.value.code}"
    return set(FLAG.findall(output.getvalue()))


def modules() -> set[str]:
    mentioned = {module for page in PAGES for code in commands(page) for _, module in PROGRAM.findall(code)}
    return {module for module in mentioned if module}


@functools.cache
def our_flags() -> set[str]:
    return set().union(*(flags_of(program) for program in [*SCRIPTS, *modules()]))


def elsewhere() -> set[str]:
    return set(" ".join(ELSEWHERE.values()).split())


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@functools.cache
def anchors(page: Path) -> set[str]:
    return {
        slug(heading) for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    }


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text()))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_their_anchors_exist(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_or_anchor_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three\n[a](#one-two-three) [b](#one) [c](none.md) [d](https://x.y) ![e](e.png)\n"
    )
    assert broken_links(page) == ["#one", "none.md", "e.png"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_exist(page: Path) -> None:
    named = re.findall(r"(?:tests|common|docs|accelerate_configs)/[\w./]*\w/?", " ".join(commands(page)))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_pages_that_the_code_names_exist() -> None:
    code = [
        path
        for path in ROOT.rglob("*.[psy]*")
        if path.suffix in (".py", ".yaml", ".sbatch") and ".venv" not in path.parts
    ]
    named = {page for path in code for page in re.findall(r"\bdocs/[a-z-]+\.md", path.read_text())}
    assert len(named) > 3
    assert sorted(page for page in named if not (ROOT / page).exists()) == []


def test_every_flag_is_some_programs() -> None:
    known = our_flags() | elsewhere()
    unknown = {page.name: sorted(set(FLAG.findall(page.read_text())) - known) for page in PAGES}
    assert {page: flags for page, flags in unknown.items() if flags} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_give_a_program_its_own_flags(page: Path) -> None:
    wrong = []
    for code in commands(page):
        pieces = iter(PROGRAM.split(code)[1:])
        for script, module, after in zip(pieces, pieces, pieces, strict=True):
            program = script or module
            if program in SCRIPTS or program in modules():
                strange = set(FLAG.findall(after)) - flags_of(program)
                wrong += [f"{program} {flag}" for flag in sorted(strange)]
    assert wrong == []


def test_the_lists_above_hold_nothing_superfluous() -> None:
    mentioned = set(FLAG.findall("\n".join(page.read_text() for page in PAGES)))
    assert sorted(elsewhere() - mentioned) == [], "mentioned nowhere"


def test_the_reading_path_is_an_evening() -> None:
    rooms = {
        "scheduling": ("stages", "plan", "rates"),
        "engine": ("fit", "setup", "trainer", "evaluate", "recording"),
        "data": ("order", "batches", "loader"),
    }
    files = [ROOT / "common" / room / f"{name}.py" for room, names in rooms.items() for name in names]
    lines = [path.read_text().count("\n") for path in [*ROOT.glob("train_*.py"), *files]]
    assert len(lines) == 16
    assert sum(lines) <= 2300


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_readme_shows_the_hybrid_list_as_it_is() -> None:
    (block,) = re.findall(r"```python\n(STAGES = .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {"Stage": Stage}
    exec(block, names)
    assert names["STAGES"] == train_hybrid.STAGES


def last_top1(*runs: str) -> float:
    """Mean final top-1 of runs in docs/results, in percent."""
    summaries = [json.loads((ROOT / "docs" / "results" / run / "summary.json").read_text()) for run in runs]
    return sum(summary["last_top1"] for summary in summaries) / len(summaries)


def test_final_and_best_accuracies_are_the_logs_own() -> None:
    """Rows of docs/results.md with one log and a cell `final / best`."""
    checked = 0
    for row in (ROOT / "docs" / "results.md").read_text().splitlines():
        runs, accuracies = (
            re.findall(r"\(results/(\w+)\)", row),
            re.findall(r"\b(\d\d\.\d\d) / (\d\d\.\d\d)\b", row),
        )
        if len(runs) == len(accuracies) == 1:
            summary = json.loads((ROOT / "docs" / "results" / runs[0] / "summary.json").read_text())
            measured = (f"{summary['last_top1']:.2f}", f"{summary['best_top1']:.2f}")
            assert accuracies[0] == measured, row
            checked += 1
    assert checked >= 19


def test_results_open_with_ten_claims() -> None:
    claims = (ROOT / "docs" / "results.md").read_text().split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| .+ \| .+ \| (.+) \|$", claims, re.MULTILINE)
    assert [number for number, _ in rows] == [str(n) for n in range(1, 11)]
    assert all("](results/" in log or "make soak" in log for _, log in rows)


def test_the_claims_figures_are_the_means_of_their_logs() -> None:
    """Of those that name the logs of two sides: `a against b %`, or the difference in points."""
    checked = 0
    for row in (ROOT / "docs" / "results.md").read_text().split("\n## ")[0].splitlines():
        figure, logs = row.split(" | ")[-2:] if row.count(" | ") == 3 else ("", "")
        ours, _, theirs = (re.findall(r"results/(\w+)", side) for side in logs.partition(" against "))
        if theirs:
            a, b = last_top1(*ours), last_top1(*theirs)
            difference = f"{a - b:+.1f} points".replace("-", "−")
            assert f"{a:.1f} against {b:.1f} %" in figure or difference in figure, row
            checked += 1
    assert checked >= 6
