"""Sizes from headers: scanned once, then read from the cache."""

import shutil

import numpy as np
from PIL import Image

from common.data.sources import cache as cache_module
from common.data.sources.open import open_source
from tests.data.examples import picture


def test_sizes_are_as_seen_and_cached(tree, monkeypatch, cache, caplog):
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(0, 70, 30).save(tree / "train" / "cat" / "0.jpg", exif=turned)
    picture(0, 33, 44).save(tree / "train" / "cat" / "1.jpg", icc_profile=bytes(200_000))
    (tree / "train" / "cat" / "2.jpg").write_text("no image")
    train = open_source(str(tree), "train")
    assert train.sizes()[:4].tolist() == [[70, 30], [44, 33], [1, 1], [40, 50]]
    assert "cat/2.jpg" in caplog.text
    monkeypatch.setattr(cache_module, "_scan_sizes", None)
    again = open_source(str(tree), "train").sizes()
    assert again.shape == (18, 2)
    assert again.dtype == np.int32
    assert again[0].tolist() == [70, 30]


def test_damaged_sizes_are_made_again(tree, cache):
    open_source(str(tree), "train").sizes()
    [cached] = (cache / "sizes").glob("*.arrow")
    cached.write_bytes(b"not Arrow")
    assert open_source(str(tree), "train").sizes()[0].tolist() == [40, 50]


def test_sizes_of_a_resized_copy_are_its_own(tree, tmp_path):
    """The same names, other pixels."""
    copy = shutil.copytree(tree, tmp_path / "copy")
    for path in copy.rglob("*.jpg"):
        picture(0, 20, 10).save(path)
    first, second = open_source(str(tree), "train"), open_source(str(copy), "train")
    assert first.fingerprint == second.fingerprint
    assert first.sizes()[0].tolist() == [40, 50]
    assert second.sizes()[0].tolist() == [10, 20]
