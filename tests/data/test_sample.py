import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from PIL import Image

from common import UserError
from common.data import sample
from common.data.sample import CLASSES, IMAGES_PER_CLASS, ensure_sample_data, render


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sample, "IMAGES_PER_CLASS", {"train": 2, "val": 1})


def picture(split: str, label: int, number: int) -> Image.Image:
    return Image.open(io.BytesIO(render(split, label, number)))


def test_a_picture_is_a_pure_function_of_its_name():
    assert render("train", 3, 17) == render("train", 3, 17)
    assert len({render(split, label, 0) for split in IMAGES_PER_CLASS for label in range(3)}) == 6


def test_there_are_ten_classes_and_2500_pictures():
    assert len(CLASSES) == 10
    assert {split: len(CLASSES) * count for split, count in IMAGES_PER_CLASS.items()} == {
        "train": 2000,
        "val": 500,
    }


def test_sizes_vary_so_that_batches_of_other_shapes_are_worth_it():
    pictures = [picture("train", n % 10, n) for n in range(120)]
    ratios = np.array([picture.width / picture.height for picture in pictures])
    shorts = np.array([min(picture.size) for picture in pictures])
    assert 0.55 < ratios.min() < 0.7
    assert 1.4 < ratios.max() < 1.8
    assert shorts.min() >= 72
    assert shorts.max() <= 96


def test_every_outline_lies_in_its_square_and_is_no_other_classs():
    masks = []
    for outline in sample.OUTLINES.values():
        assert np.abs(outline).max() <= 1.2
        mask = Image.new("L", (65, 65))
        sample.ImageDraw.Draw(mask).polygon([*map(tuple, np.array(outline) * 30 + 32)], 1)
        masks.append(np.asarray(mask, bool))
        assert 0.1 < masks[-1].mean() < 0.75
    for place, one in enumerate(masks):
        for other in masks[:place]:
            assert (one & other).sum() / (one | other).sum() < 0.87


def test_colour_alone_does_not_tell_the_class():
    """Nearest class mean of mean colours: chance is 10 %."""

    def colours(split: str, count: int) -> np.ndarray:
        """Mean RGB, float [classes, count, 3]."""
        return np.array(
            [[np.asarray(picture(split, label, n)).mean((0, 1)) for n in range(count)] for label in range(10)]
        )

    means = colours("train", 15).mean(1)
    seen = colours("val", 10)
    nearest = np.linalg.norm(seen[:, :, None] - means, axis=-1).argmin(-1)
    assert np.mean(nearest == np.arange(len(CLASSES))[:, None]) < 0.25


@pytest.mark.usefixtures("few")
def test_the_folder_is_an_image_folder_and_is_made_once(cache: Path, monkeypatch):
    folder = ensure_sample_data()
    assert folder == cache / "sample-v2"
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
    for split, count in sample.IMAGES_PER_CLASS.items():
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(CLASSES)
        assert len(list((folder / split).glob("*/*.jpg"))) == count * len(CLASSES)
    # Whoever wants to draw again fails.
    monkeypatch.setattr(sample, "_draw_all", None)
    assert ensure_sample_data() == folder
    assert names(cache) == [folder.name]


def test_nothing_half_made_is_left_behind(cache: Path, monkeypatch):
    def fail(folder: Path):
        (folder / "train").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "_draw_all", fail)
    with pytest.raises(UserError, match=r"cannot write the sample data to .*sample-v2: No space left"):
        ensure_sample_data()
    assert names(cache) == []


@pytest.mark.usefixtures("few")
def test_of_two_processes_one_draws(cache: Path, monkeypatch):
    draw, drawn = sample._draw_all, []

    def slowly(folder: Path) -> None:
        drawn.append(folder)
        sleep(0.3)
        draw(folder)

    monkeypatch.setattr(sample, "_draw_all", slowly)
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(ensure_sample_data) for _ in range(2)]
    assert [start.result() for start in starts] == [cache / sample.VERSION] * 2
    assert len(drawn) == 1
    assert names(cache) == [sample.VERSION]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_is_one_sentence(cache: Path):
    cache.parent.mkdir()
    cache.write_text("in the way")
    with pytest.raises(UserError, match="cannot write the sample data"):
        ensure_sample_data()
