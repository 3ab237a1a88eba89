"""The plots of a run: what they show, from which bytes of the CSV, and that nobody sees half of one."""

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from common.run import plots

LIVE = {f"{what}_live.png" for what in ("accuracy", "loss", "lr", "momentum")}
LIVE |= {"accuracy_time.png", "loss_time.png"}


def make_run(folder: Path, top1: list[float], epoch_s: float = 60, **columns: list) -> Path:
    """A run's folder with a log of these accuracies, 1,000 images an epoch; `columns` replace the usual."""
    rows = [
        {
            "epoch": i + 1,
            "stage": 1,
            "img_size": 64,
            "batch_size": 32,
            "lr": 0.1 / (i + 1),
            "momentum": 0.9,
            "train_loss": 3 - i / 10,
            "train_top1": accuracy * 0.8,
            "val_loss": 2.5 - i / 10,
            "val_top1": accuracy,
            "val_top5": min(100, accuracy + 10),
            "ema_top1": "",
            "images_per_s": 500,
            "data_wait": 0.05,
            "memory_mb": 900,
            "epoch_s": epoch_s,
            "total_s": epoch_s * (i + 1),
            "images_seen": 1000 * (i + 1),
            "skipped_steps": 0,
        }
        | {name: values[i] for name, values in columns.items()}
        for i, accuracy in enumerate(top1)
    ]
    folder.mkdir(parents=True)
    with open(folder / "training_log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["epoch", "val_top1"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def write_finder(folder: Path, losses: list[float], suggested: float = 0.02) -> None:
    lrs = np.geomspace(1e-4, 1, len(losses))
    with open(folder / "lr_finder.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "lr", "loss", "smoothed", "suggested"))
        for step, (lr, loss) in enumerate(zip(lrs, losses, strict=True)):
            writer.writerow((step, lr, loss, loss, suggested))


def is_stage_line(points: np.ndarray) -> bool:
    """Whether a line stands upright from the bottom of the axes to the top."""
    return len(points) == 2 and points[0, 0] == points[1, 0] and list(points[:, 1]) == [0, 1]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """What each plot shows at the moment it would be saved, by file name."""
    seen: dict[str, dict] = {}

    def look(axes, path: Path) -> None:
        legend = axes.get_legend()
        curves = {line.get_label(): line.get_xydata() for line in axes.lines}
        seen[path.name] = {
            "title": axes.figure.texts[0].get_text(),
            "labels": (axes.get_xlabel(), axes.get_ylabel()),
            "texts": [text.get_text() for text in axes.texts],
            "boxes": [text.get_window_extent() for text in axes.texts],
            "legend": [text.get_text() for text in legend.get_texts()] if legend else [],
            "verticals": [points[0, 0] for points in curves.values() if is_stage_line(points)],
            "curves": curves,
        }

    monkeypatch.setattr(plots, "save", look)
    return seen


def test_all_six_are_pictures_and_nothing_else_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [10, 20, 30])
    plots.write_plots(run)
    assert {path.name for path in (run / "plots").iterdir()} == LIVE
    for name in LIVE:
        with Image.open(run / "plots" / name) as image:
            assert image.width > 700
            assert image.height > 400
            assert len(image.getcolors(1 << 20)) > 20  # something is drawn


def test_titles_and_units(tmp_path: Path, drawn: dict) -> None:
    plots.write_plots(make_run(tmp_path / "run", [10, 20, 30]))
    assert {name: (plot["title"], *plot["labels"]) for name, plot in drawn.items()} == {
        "accuracy_live.png": ("Accuracy by epoch", "epoch", "accuracy (%)"),
        "accuracy_time.png": ("Accuracy over time", "minutes since the run began", "accuracy (%)"),
        "loss_live.png": ("Loss by epoch", "epoch", "cross-entropy (nats)"),
        "loss_time.png": ("Loss over time", "minutes since the run began", "cross-entropy (nats)"),
        "lr_live.png": ("Learning rate by epoch", "epoch", "learning rate"),
        "momentum_live.png": ("Momentum by epoch", "epoch", "momentum"),
    }


def test_curves_are_the_columns_of_the_log(tmp_path: Path, drawn: dict) -> None:
    plots.write_plots(make_run(tmp_path / "run", [10, 30, 20], epoch_s=90))
    accuracy, loss = drawn["accuracy_time.png"]["curves"], drawn["loss_live.png"]["curves"]
    np.testing.assert_allclose(accuracy["val top-1"], [(1.5, 10), (3, 30), (4.5, 20)])
    np.testing.assert_allclose(accuracy["train (augmented)"][:, 1], [8, 24, 16])
    np.testing.assert_allclose(loss["validation"], [(1, 2.5), (2, 2.4), (3, 2.3)])
    lr = drawn["lr_live.png"]["curves"]["plan"]
    np.testing.assert_allclose(lr[:2], [(1, 0.1), (2, 0.05)])
    assert "best 30.00 % (epoch 2)" in drawn["accuracy_live.png"]["legend"]


def test_ema_has_a_curve_only_where_it_has_values_and_may_be_the_best(tmp_path: Path, drawn: dict) -> None:
    plots.write_plots(make_run(tmp_path / "raw", [10, 20, 30]))
    assert not [label for label in drawn["accuracy_live.png"]["legend"] if "EMA" in label]
    plots.write_plots(make_run(tmp_path / "ema", [10, 20, 30], ema_top1=["", 25, 35.5]))
    legend = drawn["accuracy_live.png"]["legend"]
    assert "EMA top-1, 2/3 epochs" in legend
    assert "best 35.50 % (epoch 3)" in legend


def test_stages_are_lines_where_the_last_epoch_of_the_one_before_ended(tmp_path: Path, drawn: dict) -> None:
    stage, size = [1, 1, 2, 2, 2, 3], [32, 32, 48, 48, 48, 64]
    plots.write_plots(make_run(tmp_path / "run", [1, 2, 3, 4, 5, 6], stage=stage, img_size=size))
    assert drawn["accuracy_live.png"]["verticals"] == [2, 5]
    assert drawn["loss_time.png"]["verticals"] == [2, 5]
    assert drawn["lr_live.png"]["verticals"] == [2, 5]
    assert drawn["loss_live.png"]["texts"] == ["stage 1 · 32 px", "stage 2 · 48 px", "stage 3 · 64 px"]


def test_names_of_short_stages_are_shorter_and_overlap_nothing(tmp_path: Path, drawn: dict) -> None:
    stage, size = [1] * 50 + [2, 3] + [4] * 4, [32] * 50 + [40, 48] + [64] * 4
    plots.write_plots(make_run(tmp_path / "run", [1.0] * 56, stage=stage, img_size=size))
    plot = drawn["accuracy_live.png"]
    assert plot["verticals"] == [50, 51, 52]
    assert plot["texts"][0] == "stage 1 · 32 px"
    assert plot["texts"][-1] == "64 px"
    assert all(left.x1 <= right.x0 for left, right in zip(plot["boxes"], plot["boxes"][1:], strict=False))


def test_one_stage_has_no_lines(tmp_path: Path, drawn: dict) -> None:
    plots.write_plots(make_run(tmp_path / "run", [10, 20]))
    assert drawn["accuracy_live.png"]["verticals"] == []
    assert drawn["accuracy_live.png"]["texts"] == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("losses", [[2.0], ["nan", 2.0, "inf"], ["nan", "nan"]])
def test_one_row_and_values_that_are_not_finite_are_drawn_without_a_warning(
    tmp_path: Path, losses: list
) -> None:
    top1, stage = [10.0] * len(losses), list(range(len(losses)))
    plots.write_plots(make_run(tmp_path / "run", top1, train_loss=losses, val_loss=losses, stage=stage))
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == LIVE


def test_one_row_is_a_point(tmp_path: Path, drawn: dict) -> None:
    plots.write_plots(make_run(tmp_path / "run", [12.5]))
    np.testing.assert_allclose(drawn["accuracy_live.png"]["curves"]["val top-1"], [(1, 12.5)])


def test_nan_and_infinity_are_left_out_and_counted(tmp_path: Path, drawn: dict) -> None:
    losses = ["nan", 2.0, "inf"]
    plots.write_plots(make_run(tmp_path / "run", [10, 20, 30], train_loss=losses, val_loss=["nan"] * 3))
    (label,) = drawn["loss_live.png"]["legend"]
    assert label == "train (augmented), 1/3 epochs"
    np.testing.assert_allclose(drawn["loss_live.png"]["curves"][label], [(2, 2.0)])


def test_nothing_finite_is_an_empty_plot(tmp_path: Path, drawn: dict) -> None:
    nothing = ["nan", "nan"]
    plots.write_plots(make_run(tmp_path / "run", [1, 2], train_loss=nothing, val_loss=nothing, stage=[1, 2]))
    assert drawn["loss_live.png"]["legend"] == []
    assert drawn["loss_live.png"]["texts"] == ["stage 1 · 64 px", "stage 2 · 64 px"]


def test_no_epoch_yet_draws_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    plots.write_plots(run)
    assert not (run / "plots").exists()
    (run / "training_log.csv").write_text("")
    plots.write_plots(run)
    assert not (run / "plots").exists()


def test_a_word_among_the_numbers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twelve"):
        plots.write_plots(make_run(tmp_path / "run", [10], val_loss=["twelve"]))


def test_schedule_gives_the_whole_curve_with_the_progress_marked(tmp_path: Path, drawn: dict) -> None:
    run = make_run(tmp_path / "run", [10, 20], lr=[0.2, 0.4], momentum=[0.9, 0.85])
    with open(run / "schedule.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "epoch", "lr", "momentum"))
        writer.writerows((step, step // 4 + 1, (step + 1) / 20, 0.95 - step / 100) for step in range(16))
    plots.write_plots(run)
    curves = drawn["lr_live.png"]["curves"]
    np.testing.assert_allclose(curves["plan"][:, 0], np.arange(1, 17) / 4)  # step 0 is a quarter of epoch 1
    np.testing.assert_allclose(curves["plan"][:, 1], np.arange(1, 17) / 20)
    np.testing.assert_allclose(curves["done"], curves["plan"][:8])
    np.testing.assert_allclose(curves["now: 0.4 (epoch 2)"], [(2, 0.4)])
    np.testing.assert_allclose(drawn["momentum_live.png"]["curves"]["plan"][:, 1], 0.95 - np.arange(16) / 100)


def test_epochs_of_a_schedule_may_differ_in_length(tmp_path: Path) -> None:
    rows = (f"{step},{1 if step < 4 else 2},0.1,0.9\n" for step in range(6))
    (tmp_path / "schedule.csv").write_text("step,epoch,lr,momentum\n" + "".join(rows))
    schedule = plots.read_schedule(tmp_path)
    np.testing.assert_allclose(schedule["epoch"], [0.25, 0.5, 0.75, 1, 1.5, 2])
    assert plots.read_schedule(tmp_path / "elsewhere") is None


def test_a_plot_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", [10, 20])
    plots.write_plots(run)
    before = (run / "plots" / "accuracy_live.png").read_bytes()

    def power_cut(source: Path, target: Path) -> None:
        with Image.open(source) as image:
            image.load()  # finished, and under a name that nobody takes for a plot
        assert not Path(source).match("*.png")
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", power_cut)
    (run / "training_log.csv").write_text((run / "training_log.csv").read_text().replace(",20,", ",50,"))
    with pytest.raises(KeyboardInterrupt):
        plots.write_plots(run)
    assert (run / "plots" / "accuracy_live.png").read_bytes() == before


def test_a_refresh_is_cheap(tmp_path: Path) -> None:
    """Every epoch pays for it: about ten times a bare figure of this machine, all pictures together."""
    run = make_run(tmp_path / "run", [float(i) for i in range(90)], stage=[1] * 30 + [2] * 30 + [3] * 30)

    def bare() -> None:
        figure = Figure(figsize=(8, 5))
        figure.subplots().plot(range(90))
        figure.savefig(tmp_path / "bare.png")

    def cost(draw: Callable[[], None]) -> float:
        began = time.process_time()
        draw()
        return time.process_time() - began

    assert min(cost(lambda: plots.write_plots(run)) for _ in range(3)) < 25 * min(
        cost(bare) for _ in range(5)
    )


def test_threads_may_draw_at_the_same_time(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{i}", [10.0 + i, 20.0 + i, 30.0 + i]) for i in range(2)]
    for run in runs:
        plots.write_plots(run)
    alone = [{path.name: path.read_bytes() for path in (run / "plots").iterdir()} for run in runs]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(plots.write_plots, runs))
    assert [{path.name: path.read_bytes() for path in (run / "plots").iterdir()} for run in runs] == alone


def test_pyplot_stays_out_of_the_training_process(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [10])
    script = (
        "import pathlib, sys; from common.run.plots import write_plots; "
        f"write_plots(pathlib.Path({str(run)!r})); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(plots.__file__).parents[2]).returncode == 0
    assert (run / "plots" / "lr_live.png").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        ([2.3, 2.0, 1.0, 1.1, 4.5], ""),
        ([2.3, 2.0, 1.0, float("inf")], ""),
        ([2.3, 2.2, 2.1], "the loss did not blow up"),
        ([float("nan")] * 3, "no step was taken"),
    ],
)
def test_a_sweep_is_a_picture(tmp_path, losses, problem):
    with open(tmp_path / "lr_finder.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "lr", "loss", "smoothed", "threshold", "suggested", "problem"))
        writer.writerows((i, 10.0 ** (i - 4), x, x, "nan", 0.02, problem) for i, x in enumerate(losses))
    plots.plot_lr_finder(tmp_path)
    with Image.open(tmp_path / "plots" / "lr_finder_plot.png") as image:
        assert len(image.getcolors(1 << 20)) > 20
