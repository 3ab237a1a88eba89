"""Each module of common/ imports only from lines below it, and no strategy has a name there."""

import ast
from pathlib import Path

import pytest

COMMON = Path(__file__).parent.parent / "common"
TOP_TO_BOTTOM = [
    "engine",
    "trainer",
    "preparation",
    "lr_finder",
    "evaluate",
    "progress",
    "run",
    "storage",
    "checkpoint",
    "plots",
    "batching",
    "data",
    "streaming",
    "sources",
    "remote",
    "cache",
    "decode",
    "sampling",
    "augment",
    "model",
    "config",
    "scheduling",
    "hashing",
    "errors",
]
MODULES = [path.stem for path in COMMON.glob("*.py") if path.stem != "__init__"]


def test_every_module_has_its_place():
    assert set(MODULES) == set(TOP_TO_BOTTOM)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    allowed = {f"common.{name}" for name in TOP_TO_BOTTOM[TOP_TO_BOTTOM.index(module) + 1 :]}
    allowed |= {"common.tools.sample_data"}  # depends on nothing in common/ but errors
    for node in ast.walk(ast.parse((COMMON / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("common"):
            names = {f"common.{a.name}" for a in node.names} if node.module == "common" else {node.module}
            assert names <= allowed, f"{module} imports {names - allowed}"


@pytest.mark.parametrize("path", COMMON.glob("*.py"), ids=lambda path: path.stem)
def test_no_strategy_is_named(path):
    text = path.read_text().lower()
    assert not [name for name in ("progressive", "hybrid", "train_rect", "train_standard") if name in text]
