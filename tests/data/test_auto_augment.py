"""Edits of the training images: what each does, and that an image's depend on nothing but seed, epoch and image."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from common.data.auto_augment import EDITS, GREY, RAND, auto_augment
from common.data.batches import Batches, ViewSettings
from common.data.order import View
from common.scheduling import Stage, make_plan
from tests.data.examples import item, make_loader, opened

POLICIES = ["trivial", "rand", "three"]


def noise(count: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Smooth pictures, uint8 [count, height, width, 3]."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    size = (width, height)
    return np.stack(
        [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in coarse]
    )


def view(policy: str, **more) -> View:
    return View((0.35, 1.0), auto_augment=policy, magnitude=0.9, **more)


def edited(policy: str, indices, epoch: int = 0, seed: int = 5, **more) -> np.ndarray:
    images = noise(40)[np.asarray(indices)]
    auto_augment(images, item(*indices, epoch=epoch, view=view(policy, **more)), seed)
    return images


# By torchvision, at half of RandAugment's magnitude.
REFERENCES = [
    lambda image: image,
    F.autocontrast,
    F.equalize,
    lambda image: F.posterize(image, 6),
    lambda image: F.solarize(image, 128),
    lambda image: F.rotate(image, 15, fill=GREY),
    lambda image: F.affine(image, 0, [0, 0], 1, [np.degrees(np.arctan(0.15)), 0], fill=GREY, center=[0, 0]),
    lambda image: F.affine(image, 0, [0, 0], 1, [0, np.degrees(np.arctan(0.15))], fill=GREY, center=[0, 0]),
    lambda image: F.affine(image, 0, [-0.225 * 40, 0], 1, [0, 0], fill=GREY),
    lambda image: F.affine(image, 0, [0, -0.225 * 40], 1, [0, 0], fill=GREY),
    lambda image: F.adjust_brightness(image, 1.45),
    lambda image: F.adjust_saturation(image, 1.45),
    lambda image: F.adjust_contrast(image, 1.45),
    lambda image: F.adjust_sharpness(image, 1.45),
]


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_edits_are_torchvisions(number):
    [pixels] = noise(1, 40, 40)
    image = Image.fromarray(pixels)
    ours, theirs = (np.asarray(done) for done in (EDITS[number](image, 0.5, RAND), REFERENCES[number](image)))
    # Torchvision shears about another point of the corner pixel.
    assert (ours != theirs).any(2).mean() < (0.05 if number in (6, 7) else 1e-9)
    assert number == 0 or (ours != pixels).any()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_is_edited_the_same_in_any_batch(policy):
    whole = edited(policy, range(40))
    order = np.random.default_rng(1).permutation(40)
    for part in (order[:7], order[7:]):
        np.testing.assert_array_equal(edited(policy, part), whole[part])
    for other in (edited(policy, range(40), epoch=1), edited(policy, range(40), seed=6)):
        assert (other != whole).any((1, 2, 3)).mean() > 0.8
    assert (whole != noise(40)).any((1, 2, 3)).mean() > 0.7


def test_strength_is_the_share_of_images_that_are_edited():
    shares = []
    for strength in (0.0, 0.5, 1.0):
        after = edited("three", range(40), strength=strength)
        shares.append((after != noise(40)).any((1, 2, 3)).mean())
    assert shares[0] == 0
    assert 0.3 < shares[1] < 0.7
    assert shares[2] == 1


def test_all_edits_of_a_policy_occur(monkeypatch):
    seen = set()
    kept = [lambda image, m, most, n=n: seen.add((n, m > 0)) or image for n in range(len(EDITS))]
    monkeypatch.setattr("common.data.auto_augment.EDITS", kept)
    for policy in ("trivial", "rand"):
        seen.clear()
        for epoch in range(10):
            edited(policy, range(40), epoch=epoch)
        assert seen == {(n, positive) for n in range(len(EDITS)) for positive in (True, False)}


@pytest.mark.parametrize("policy", POLICIES)
def test_streams_are_equal_across_processes_workers_and_a_resume(policy, tree):
    train, val = opened(tree)

    def stream(world: int, workers: int, start: int = 0) -> list[torch.Tensor]:
        plan = make_plan([Stage(2, 32, 8 // world)], len(train), world, 1, [8])
        settings = ViewSettings(auto_augment=policy)
        per_rank = []
        for rank in range(world):
            batches = Batches(plan, train, val, settings, 3, rank, world)
            items = [each for epoch in plan.epochs() for each in batches.train_items(epoch, start)]
            loader = make_loader(train, val, seed=3, workers=workers)
            per_rank.append([batch.images.clone() for batch in loader.stream(items)])
            loader.close()
        # The images of a step, in an order that does not depend on who had them.
        steps = [torch.cat(parts).flatten(1) for parts in zip(*per_rank, strict=True)]
        return [step[sorted(range(len(step)), key=lambda i, s=step: s[i].tolist())] for step in steps]

    whole = stream(world=1, workers=0)
    assert len(whole) == 4
    for other, expected in (
        (stream(2, 0), whole),
        (stream(1, 2), whole),
        (stream(1, 0, start=3), whole[3:]),
    ):
        for one, same in zip(other, expected, strict=True):
            assert torch.equal(one, same)


def test_evaluation_sees_images_as_they_are(tree):
    train, val = opened(tree)
    plan = make_plan([Stage(1, 32, 6)], len(train), 1, 1, None)
    batches = Batches(plan, train, val, ViewSettings(auto_augment="three"), 0, 0, 1)
    assert {each.view.auto_augment for each in batches.train_items(next(plan.epochs()))} == {"three"}
    assert {each.view.auto_augment for each in batches.eval_items(32, 4)} == {"none"}
