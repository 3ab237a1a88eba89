import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UserError
from common.data import sample as sample_data
from common.data.sample import CLASSES, IMAGES_PER_CLASS, ensure_sample_data, render


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sample_data, "IMAGES_PER_CLASS", {"train": 2, "val": 1})
    monkeypatch.setattr(sample_data, "_pool", _same_process)


class _same_process:
    """A stand-in for the pool: spawned processes would not see what is patched, and cost seconds."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *args):
        function(*args)
        return self

    def result(self):
        return None


def test_a_picture_is_a_pure_function_of_its_name():
    assert render("train", 3, 17) == render("train", 3, 17)
    assert len({render(split, label, 0) for split in IMAGES_PER_CLASS for label in range(3)}) == 6


def test_sizes_and_modes_vary_as_photographs_do():
    pictures = [Image.open(io.BytesIO(render("train", n % 10, n))) for n in range(120)]
    ratios = np.array([picture.width / picture.height for picture in pictures])
    shorts = np.array([min(picture.size) for picture in pictures])
    assert ratios.min() < 0.6 < 1.7 < ratios.max()
    assert ratios.min() >= 0.49
    assert ratios.max() <= 2.01
    assert shorts.min() >= 96
    assert shorts.max() <= 140
    assert 0.01 < np.mean([picture.mode == "L" for picture in pictures]) < 0.15


def test_colour_alone_does_not_tell_the_class():
    """Nearest class mean of mean colours: chance is 10 %."""

    def colours(split: str, count: int) -> np.ndarray:
        """Mean RGB, float [classes, count, 3]."""
        return np.array(
            [
                [
                    np.asarray(Image.open(io.BytesIO(render(split, label, n))).convert("RGB")).mean((0, 1))
                    for n in range(count)
                ]
                for label in range(len(CLASSES))
            ]
        )

    means = colours("train", 15).mean(1)
    seen = colours("val", 10)
    nearest = np.linalg.norm(seen[:, :, None] - means, axis=-1).argmin(-1)
    assert np.mean(nearest == np.arange(len(CLASSES))[:, None]) < 0.25


@pytest.mark.usefixtures("few")
def test_the_folder_is_an_image_folder_and_is_made_once(tmp_path: Path, monkeypatch):
    folder = ensure_sample_data(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
    for split, count in sample_data.IMAGES_PER_CLASS.items():
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(CLASSES)
        assert len(list((folder / split).glob("*/*.jpg"))) == count * len(CLASSES)
    monkeypatch.setattr(sample_data, "_pool", None)  # whoever wants to draw again fails
    assert ensure_sample_data(tmp_path) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.usefixtures("few")
def test_nothing_half_made_is_left_behind(tmp_path: Path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_data, "_write_class", fail)
    with pytest.raises(UserError, match=r"cannot write the sample data to .*sample-v1: No space left"):
        ensure_sample_data(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few")
def test_a_faster_process_is_no_error(tmp_path: Path, monkeypatch):
    write = sample_data._write_class

    def write_while_another_finishes(folder: Path, split: str, label: int) -> None:
        write(folder, split, label)
        (tmp_path / sample_data.VERSION / split).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(sample_data, "_write_class", write_while_another_finishes)
    assert ensure_sample_data(tmp_path) == tmp_path / sample_data.VERSION
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the sample data"):
        ensure_sample_data(tmp_path / "file" / "cache")


@pytest.mark.usefixtures("few")
def test_the_default_place_is_the_users_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ensure_sample_data() == tmp_path / "image-classification-training" / "sample-v1"
