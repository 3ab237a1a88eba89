"""Each room of common/ imports only from rooms below it, nothing imports tools, and no strategy has a name there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"tools"},
    {"engine"},
    {"run"},
    {"config"},
    {"data", "augment"},
    {"model", "scheduling"},
    {"__init__"},
]
FILES = sorted((ROOT / "common").rglob("*.py"))


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            modules = [
                f"common.{a.name}"
                if (ROOT / "common" / a.name).is_dir() or (ROOT / "common" / f"{a.name}.py").exists()
                else "common.__init__"
                for a in node.names
            ]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        rooms |= {module.split(".")[1] for module in modules if module.startswith("common.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    room = path.relative_to(ROOT / "common").parts[0].removesuffix(".py")
    for other in imported_rooms(path) - {room}:
        assert floor(other) > floor(room) or (other == "data" and room == "augment"), (
            f"{path} imports {other}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_strategy_is_named(path):
    if "tools" not in path.parts:
        text = path.read_text().lower()
        assert not [
            name for name in ("progressive", "hybrid", "train_rect", "train_standard") if name in text
        ]


def test_torchvision_waits_until_an_image_is_decoded() -> None:
    """Its import is as long as torch's, and `--help` and refusals need none of it."""
    program = "import train_standard, sys; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
