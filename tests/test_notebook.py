"""The notebook runs from top to bottom on the logs of two runs, and its numbers are theirs."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.run.test_plots import make_run

NOTEBOOK = Path(__file__).parents[1] / "docs" / "compare_runs.ipynb"


def code_cells() -> list[str]:
    """Source of each code cell; none has IPython's magics, so it is plain Python."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run all cells in one namespace, as Jupyter started in `folder` would."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])
    pyplot.close("all")
    namespace: dict = {"__name__": "__main__"}
    for number, source in enumerate(code_cells()):
        exec(compile(source, f"cell {number}", "exec"), namespace)
    return namespace


def test_notebook_is_valid_and_holds_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            ast.parse("".join(cell["source"]))


def test_every_code_cell_is_explained() -> None:
    kinds = [cell["cell_type"] for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    assert all(kinds[i - 1] == "markdown" for i, kind in enumerate(kinds) if kind == "code")


def test_notebook_compares_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs" / "fast", [30, 50, 60.25], epoch_s=30, ema_top1=["", 55, 59])
    make_run(tmp_path / "runs" / "slow", [20, 40, 55.55, 52], epoch_s=60)
    (tmp_path / "runs" / "no_run").mkdir()
    (tmp_path / "docs").mkdir()

    names = run_cells(tmp_path / "docs", monkeypatch)

    table = names["table"]
    assert list(table.index) == ["fast", "slow"]
    assert list(table["best %"]) == [60.25, 55.55]
    assert list(table["last %"]) == [60.25, 52]
    assert list(table["minutes"]) == [1.5, 4]
    assert list(names["logs"]["fast"]["accuracy"]) == [30, 55, 60.25]
    assert names["target"] == 55.5
    assert names["to_target"].round(6).values.tolist() == [[1.5, 2.0], [3.0, 1.0]]

    from matplotlib import pyplot

    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    assert len(figures) == 6
    for figure in figures:
        (axes,) = figure.axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fast", "slow"]
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    raw, smoothed = figures[0].axes[0].lines[:2]
    np.testing.assert_allclose(raw.get_ydata(), [30, 55, 60.25])
    np.testing.assert_allclose(smoothed.get_ydata()[:2], [30, (30 * 0.6 + 55) / 1.6])
    pyplot.close("all")

    smooth = names["smooth"]
    np.testing.assert_allclose(smooth([5, 5, 5], 0.9), 5)
    np.testing.assert_allclose(smooth([1, np.nan, 3], 0.5), [1, 1, (1 * 0.5 + 3) / 1.5])
    np.testing.assert_allclose(smooth([1, 2, 3], 0), [1, 2, 3])


def test_without_runs_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new" / "docs").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no folder `runs`"):
        run_cells(tmp_path / "new" / "docs", monkeypatch)
