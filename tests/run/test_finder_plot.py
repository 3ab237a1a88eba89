import csv

import pytest
from PIL import Image

from common.run.finder_plot import plot_lr_finder


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        ([2.3, 2.0, 1.0, 1.1, 4.5], ""),
        ([2.3, 2.0, 1.0, float("inf")], ""),
        ([2.3, 2.2, 2.1], "the loss did not blow up"),
    ],
)
def test_a_sweep_is_a_picture(tmp_path, losses, problem):
    with open(tmp_path / "lr_finder.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "lr", "loss", "smoothed", "threshold", "suggested", "problem"))
        writer.writerows((i, 10.0 ** (i - 4), x, x, "nan", 0.02, problem) for i, x in enumerate(losses))
    plot_lr_finder(tmp_path)
    with Image.open(tmp_path / "plots" / "lr_finder_plot.png") as image:
        assert len(image.getcolors(1 << 20)) > 20
