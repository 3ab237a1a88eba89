import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from common import augment as augment_module
from common.augment import ERASING_ASPECT, IMAGENET_MEAN, IMAGENET_STD, Augment, AugmentSettings, weigh
from common.data.order import BatchItem, View

OFF = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "flip": 0.0}  # nothing but normalisation


def item_of(epoch: int, indices: np.ndarray) -> BatchItem:
    return BatchItem(0, indices, 16, 24, epoch, View(None))


def make_augment(
    num_classes: int = 10, seed: int = 0, mean=IMAGENET_MEAN, std=IMAGENET_STD, **settings
) -> Augment:
    return Augment(AugmentSettings(**settings), num_classes=num_classes, seed=seed, mean=mean, std=std)


def batch_of(size, height=16, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (size,), generator=generator)
    return images.to(memory_format=torch.channels_last), labels, item_of(3, np.arange(100, 100 + size))


def augment(*args, mix=True, strength=1.0, **settings):
    return make_augment(**settings)(*args, mix=mix, strength=strength)


def erased(size, height, width, strength=1.0, **settings):
    """Which pixels of white images are covered, bool [B, H, W]."""
    white = torch.full((size, 3, height, width), 255, dtype=torch.uint8)
    images, _ = augment(
        white,
        torch.zeros(size, dtype=torch.int64),
        item_of(0, np.arange(size)),
        strength=strength,
        **OFF,
        **settings,
    )
    covered = images == 0
    assert (covered == covered[:, :1]).all()  # all channels alike
    return covered[:, 0]


def rectangles(covered):
    """Heights and widths of the covered rectangles; asserts that they are rectangles."""
    heights, widths = covered.any(2).sum(1), covered.any(1).sum(1)
    torch.testing.assert_close(covered.sum((1, 2)), heights * widths)
    return heights, widths


def test_pure_function_of_its_arguments():
    images, labels, item = batch_of(32)
    before = images.clone()
    settings = {"erasing_prob": 0.5, "seed": 7}
    first = augment(images, labels, item, **settings)
    torch.rand(1)
    np.random.rand(1)
    second = augment(images.clone(), labels.clone(), item, **settings)
    assert torch.equal(images, before)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for other in (
        augment(images, labels, item, **settings | {"seed": 8}),
        augment(images, labels, item._replace(epoch=4), **settings),
    ):
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])


def test_an_image_is_drawn_the_same_in_any_batch():
    images, labels, item = batch_of(30)
    settings = {"erasing_prob": 0.5, "cutout_prob": 0.5, "mix": False}
    whole, _ = augment(images, labels, item, **settings)
    order = np.random.default_rng(0).permutation(30)
    for part in (order[:7], order[7:]):
        some, _ = augment(images[part], labels[part], item_of(3, item.indices[part]), **settings)
        assert torch.equal(some, whole[part])


def test_nothing_happens_at_probability_zero():
    images, labels, item = batch_of(16)
    augmentation = make_augment(label_smoothing=0.0, **OFF)
    out, targets = augmentation(images, labels, item, mix=True, strength=1.0)
    assert torch.equal(out, augmentation.normalise(images))
    assert torch.equal(targets, F.one_hot(labels, 10).float())


def test_normalise_equals_torchvision():
    images, _, _ = batch_of(8)
    expected = v2.functional.normalize(images / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    augmentation = make_augment()
    torch.testing.assert_close(augmentation.normalise(images), expected, atol=1e-6, rtol=1e-6)


def test_flips_are_flips_of_the_share_asked_for():
    images, labels, item = batch_of(2000, 4, 6)
    out, _ = augment(images, labels, item, mixup_alpha=0, cutmix_alpha=0, flip=0.7)
    augmentation = make_augment()
    same = (out == augmentation.normalise(images)).flatten(1).all(1)
    mirrored = (out == augmentation.normalise(torch.flip(images, (3,)))).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert mirrored.float().mean() == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("size", [16, 17])
def test_mixup_mixes_pixels_as_it_mixes_labels(size):
    images, _, item = batch_of(size)
    # One class per image, so that a row of the targets shows both shares and the partner.
    augmentation = make_augment(num_classes=size, cutmix_alpha=0, mixup_alpha=1.0, flip=0.0)
    out, targets = augmentation(images, torch.arange(size), item, mix=True, strength=1.0)
    expected = torch.einsum("ij,jchw->ichw", targets, augmentation.normalise(images))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert ((targets > 0).sum(1) == 2).sum() >= size - 1  # the odd one out is its own partner


def test_mixup_shares_follow_the_beta_distribution():
    labels = torch.arange(2) % 2
    images, _, _ = batch_of(4000, 1, 1)
    augmentation = make_augment(num_classes=2, cutmix_alpha=0, mixup_alpha=0.2)
    _, targets = augmentation(
        images, labels.repeat_interleave(2000), item_of(0, np.arange(4000)), mix=True, strength=1.0
    )
    own = targets[:2000, 0]
    assert own.mean() == pytest.approx(0.5, abs=0.03)
    assert own.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.05)


@pytest.mark.parametrize("size", [16, 17])
def test_cutmix_counts_its_pixels(size):
    images = torch.arange(size, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 13, 22) * 10
    augmentation = make_augment(num_classes=size, mixup_alpha=0, flip=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    out, targets = augmentation(
        images, torch.arange(size), item_of(0, np.arange(size)), mix=True, strength=1.0
    )
    origin = (out * 25.5).round().long()
    shares = torch.stack([(origin[:, 0] == i).float().mean((1, 2)) for i in range(size)], dim=1)
    torch.testing.assert_close(shares, targets, atol=1e-6, rtol=0)
    rectangles(origin[:, 0] != torch.arange(size)[:, None, None])
    assert (targets.max(1).values < 1).sum() > size // 2


def test_cutmix_boxes_are_the_papers():
    images, _, item = batch_of(4000, 32, 48)
    augmentation = make_augment(num_classes=2, mixup_alpha=0)
    _, targets = augmentation(images, torch.arange(2).repeat_interleave(2000), item, mix=True, strength=1.0)
    rng, shares = np.random.default_rng(1), []
    for _ in range(4000):
        side, y, x = np.sqrt(1 - rng.beta(1, 1)), rng.random(), rng.random()
        inside = [min(c + side / 2, 1) - max(c - side / 2, 0) for c in (y, x)]
        shares.append(1 - inside[0] * inside[1])
    own = targets[:2000, 0]
    assert own.mean() == pytest.approx(np.mean(shares), abs=0.02)
    assert own.std() == pytest.approx(np.std(shares), abs=0.02)


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_soft_targets_give_the_mixed_loss(kind):
    images, labels, item = batch_of(12)
    _, targets = augment(images, labels, item, **OFF | {kind: 1.0})
    partner = torch.cat([labels[6:], labels[:6]])
    lam = targets.gather(1, labels[:, None])[:, 0]
    differ = labels != partner
    assert differ.any()
    logits = torch.randn(12, 10)
    a, b = (F.cross_entropy(logits, each, reduction="none") for each in (labels, partner))
    expected = lam * a + (1 - lam) * b
    soft = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(soft[differ], expected[differ])
    torch.testing.assert_close(soft[~differ], a[~differ])


def test_labels_are_smoothed_where_nothing_is_mixed():
    images, labels, item = batch_of(12)
    logits = torch.randn(12, 10)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    for settings in ({"mix": False}, {"batch_aug_prob": 0.0}, {"strength": 0.0}):
        _, targets = augment(images, labels, item, label_smoothing=0.1, **settings)
        torch.testing.assert_close(F.cross_entropy(logits, targets), expected)
        assert targets.sort(1).values[:, :9].max() == pytest.approx(0.01)
    _, targets = augment(images, labels, item, label_smoothing=0.1)
    assert (targets > 0).sum(1).max() == 2  # mixed labels are not smoothed as well


def test_batches_are_mixed_as_often_as_asked_and_both_ways_alike():
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    augmentation = make_augment(batch_aug_prob=0.6, mixup_alpha=1.0, flip=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    counts = {"none": 0, "mixup": 0, "cutmix": 0}
    for epoch in range(1000):
        out, targets = augmentation(
            images, torch.tensor([0, 1]), item_of(epoch, np.array([5, 9])), mix=True, strength=1.0
        )
        grey = ((out > 0.001) & (out < 0.999)).any()
        counts["mixup" if grey else "cutmix" if targets[0].min() == 0 else "none"] += 1
    assert counts["none"] == pytest.approx(400, abs=50)
    assert counts["mixup"] == pytest.approx(300, abs=50)
    assert counts["cutmix"] == pytest.approx(300, abs=50)


def test_strength_moves_mixups_shares_towards_halves():
    images, _, _ = batch_of(2000, 2, 2)
    labels = torch.arange(2).repeat_interleave(1000)
    minor = []
    for strength in (0.0, 0.5, 1.0, 2.0):
        augmentation = make_augment(num_classes=2, label_smoothing=0.0, **OFF | {"mixup_alpha": 0.5})
        _, targets = augmentation(images, labels, item_of(0, np.arange(2000)), mix=True, strength=strength)
        minor.append(float(targets.min(1).values.mean()))
    assert minor[0] == 0
    assert minor == sorted(minor)
    assert minor[1] < 0.8 * minor[2]


def test_strength_multiplies_the_probability_of_cutmix():
    images, labels, _ = batch_of(8, 4, 4)
    augmentation = make_augment(batch_aug_prob=0.4, label_smoothing=0.0, mixup_alpha=0)
    for strength, expected in ((0.0, 0), (0.5, 60), (2.0, 240), (9.0, 300)):
        items = [item_of(epoch, np.arange(8)) for epoch in range(300)]
        targets = [augmentation(images, labels, item, mix=True, strength=strength)[1] for item in items]
        count = sum(bool((each.max(1).values < 1).any()) for each in targets)
        assert count == pytest.approx(expected, abs=30)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 40), (16, 200), (300, 12)])
def test_erasing_covers_the_area_asked_for(height, width, monkeypatch):
    monkeypatch.setattr(augment_module, "ERASING_AREA", (0.1, 0.3))
    covered = erased(3000, height, width, erasing_prob=0.25)
    hit = covered.any(2).any(1)
    assert hit.float().mean() == pytest.approx(0.25, abs=0.03)
    heights, widths = rectangles(covered[hit])
    share = covered[hit].float().mean((1, 2))
    half_pixel = (heights.float() + widths.float() + 1) / 2 / (height * width)
    assert (share >= 0.1 - half_pixel).all()
    assert (share <= 0.3 + half_pixel).all()
    assert share.mean() == pytest.approx(0.2, abs=0.01)
    assert share.std() == pytest.approx(0.2 / 12**0.5, abs=0.01)


def test_erasing_has_the_papers_aspects_and_reaches_everywhere(monkeypatch):
    monkeypatch.setattr(augment_module, "ERASING_AREA", (0.02, 0.05))
    covered = erased(1500, 100, 100, erasing_prob=1.0)
    heights, widths = rectangles(covered)
    aspect = (heights / widths).log()
    low, high = np.log(ERASING_ASPECT)
    assert aspect.min() > low - 0.15  # sides are whole pixels
    assert aspect.max() < high + 0.15
    assert aspect.mean() == pytest.approx(0, abs=0.06)
    assert aspect.std() == pytest.approx((high - low) / 12**0.5, rel=0.05)
    assert covered.any(2).any(0).all()
    assert covered.any(1).any(0).all()


def test_strength_multiplies_the_probability_of_erasing():
    for strength, expected in ((0.0, 0.0), (0.5, 0.2), (2.0, 0.8), (9.0, 1.0)):
        hit = erased(2000, 8, 8, erasing_prob=0.4, strength=strength).any(2).any(1)
        assert hit.float().mean() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("length", [5, 8])
def test_cutout_covers_squares_that_the_border_may_clip(length):
    covered = erased(2000, 24, 40, cutout_prob=0.5, cutout_length=length)
    hit = covered.any(2).any(1)
    assert hit.float().mean() == pytest.approx(0.5, abs=0.04)
    heights, widths = rectangles(covered[hit])
    assert heights.max() == widths.max() == length
    assert heights.min() == widths.min() == length - length // 2  # centred on the first or the last pixel
    inside = (1 - (length - 1) / 24) * (1 - (length - 1) / 40)
    assert ((heights == length) & (widths == length)).float().mean() == pytest.approx(inside, abs=0.05)
    assert covered.any(0).all()


@pytest.mark.parametrize("size", [9, 10])
def test_images_keep_their_layout_and_it_changes_no_pixel(size):
    images, labels, item = batch_of(size)
    for epoch in range(8):
        settings = {"erasing_prob": 0.5, "cutout_prob": 0.5, "mixup_alpha": 1.0}
        nhwc, targets = augment(images, labels, item._replace(epoch=epoch), **settings)
        nchw, _ = augment(images.contiguous(), labels, item._replace(epoch=epoch), **settings)
        assert nhwc.dtype == targets.dtype == torch.float32
        assert nhwc.is_contiguous(memory_format=torch.channels_last)
        assert nchw.is_contiguous()
        assert torch.equal(nhwc, nchw)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30), (30, 1), (7, 5)])
def test_smallest_batches_and_images(size, height, width):
    images, labels, item = batch_of(size, height, width)
    for epoch in range(20):
        out, targets = augment(images, labels, item._replace(epoch=epoch), erasing_prob=0.9, cutout_prob=0.9)
        assert out.shape == images.shape
        assert out.isfinite().all()
        torch.testing.assert_close(targets.sum(1), torch.ones(size))


def test_a_compiled_model_takes_the_batch():
    images, labels, item = batch_of(4)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.compile(backend="eager", fullgraph=True)
    for epoch in range(3):
        out, targets = augment(images, labels, item._replace(epoch=epoch), erasing_prob=0.5)
        F.cross_entropy(model(out), targets).backward()
    assert model[0].weight.grad is not None


class Crossings(TorchDispatchMode):
    """Counts what crosses between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device = self.to_host = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten._local_scalar_dense.default:
            self.to_host += 1
        elif isinstance(out, torch.Tensor):
            inputs = [each for each in args if isinstance(each, torch.Tensor)]
            if function is torch.ops.aten.copy_.default:
                inputs = inputs[1:]
            for each in inputs:
                self.to_device += (each.device.type, out.device.type) == ("cpu", "cuda")
                self.to_host += (each.device.type, out.device.type) == ("cuda", "cpu")
        return out


ON_DEVICE = {
    "mixup": ({"cutmix_alpha": 0.0}, True),
    "cutmix": ({"mixup_alpha": 0.0}, True),
    "holes": ({"erasing_prob": 1.0, "cutout_prob": 1.0}, False),
    "all": ({"erasing_prob": 1.0, "cutout_prob": 1.0}, True),
    "nothing": (OFF, False),
}


@pytest.mark.parametrize("kind", ON_DEVICE)
def test_one_small_table_crosses_to_the_device_and_nothing_comes_back(kind, monkeypatch):
    """With tensors that have a device but no memory, so no GPU is needed."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    settings, mix = ON_DEVICE[kind]
    augmentation, item = make_augment(**settings), item_of(3, np.arange(100, 110))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty((10, 3, 16, 24), dtype=torch.uint8, device="cuda")
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.empty(10, dtype=torch.int64, device="cuda")
        augmentation.normalise(images)  # the constants cross once in a run
        with Crossings() as crossings:
            out, targets = augmentation(images, labels, item, mix=mix)
        assert (crossings.to_device, crossings.to_host) == (1, 0)
        assert out.device.type == targets.device.type == "cuda"
        assert out.is_contiguous(memory_format=torch.channels_last)
        with Crossings() as crossings:
            assert augmentation.normalise(images).device.type == "cuda"
        assert (crossings.to_device, crossings.to_host) == (0, 0)


def test_warns_of_cutout_with_erasing(caplog):
    with caplog.at_level(logging.WARNING):
        make_augment(erasing_prob=0.25)
        make_augment(cutout_prob=0.5)
    assert not caplog.records
    make_augment(erasing_prob=0.25, cutout_prob=0.5)
    assert "Cutout" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_batch():
    images, labels, item = batch_of(33)
    for epoch in range(6):
        settings = {"erasing_prob": 0.5, "cutout_prob": 0.5, "mixup_alpha": 1.0}
        here = augment(images, labels, item._replace(epoch=epoch), **settings)
        there = augment(images.cuda(), labels.cuda(), item._replace(epoch=epoch), **settings)
        torch.testing.assert_close(there[0].cpu(), here[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(there[1].cpu(), here[1])


LABELS = np.repeat([0, 1, 2], [80, 15, 5])


def weighted(images, labels, item, mix=False, **settings):
    augment = Augment(AugmentSettings(**OFF | settings), num_classes=4, seed=0, train_labels=LABELS)
    return augment(images, labels, item, mix=mix)[1]


@pytest.mark.parametrize(("kind", "evenness"), [("sqrt", 0.5), ("balanced", 1.0)])
def test_class_weights_have_a_mean_of_1_over_the_images(kind, evenness):
    weights = weigh(LABELS, 4, evenness)
    assert weights[:3].numpy() / weights[0].item() == pytest.approx((80 / np.array([80, 15, 5])) ** evenness)
    assert weights[LABELS].mean().item() == pytest.approx(1)
    if kind == "balanced":
        assert weights[:3].numpy() == pytest.approx(100 / (3 * np.array([80, 15, 5])))


def test_class_weights_multiply_a_labels_own_loss_smoothed_or_mixed():
    images, _, item = batch_of(8)
    labels = torch.tensor([0, 0, 1, 2, 2, 1, 0, 2])
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    weights = weigh(LABELS, 4, 1.0)
    each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    loss = F.cross_entropy(logits, weighted(images, labels, item, class_weights="balanced"))
    torch.testing.assert_close(loss, (weights[labels] * each).mean())

    mixing = {"mixup_alpha": 0.4, "label_smoothing": 0.0, "mix": True}
    lam = weighted(images, labels, item, **mixing)
    mixed = weighted(images, labels, item, class_weights="balanced", **mixing)
    loss = F.cross_entropy(logits, mixed)
    torch.testing.assert_close(loss, -(lam * weights * logits.log_softmax(1)).sum(1).mean())


def test_the_weighted_loss_is_the_same_however_the_batch_is_shared_out():
    images, _, item = batch_of(12)
    labels = torch.arange(12) % 3
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    whole = F.cross_entropy(logits, weighted(images, labels, item, class_weights="balanced"))
    parts = [
        F.cross_entropy(
            logits[part],
            weighted(images[part], labels[part], item_of(3, item.indices[part]), class_weights="balanced"),
        )
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
