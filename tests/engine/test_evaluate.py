import pytest
import torch
from accelerate import Accelerator

from common.augment import Augment, AugmentSettings
from common.data.loader import Batch
from common.engine.evaluate import evaluate
from tests.engine.trainers import alone


class Fixed(torch.nn.Module):
    """Logits that the first pixel of an image chooses."""

    def forward(self, images):
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].round().long() % 6, 6).float() * 9


class Plain(Augment):
    def normalise(self, images):
        return images.float()


def batches(predicted, labels, size):
    for start in range(0, len(labels), size):
        images = torch.zeros(len(labels[start : start + size]), 3, 4, 4, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.tensor(predicted[start : start + size])
        yield Batch(images, torch.tensor(labels[start : start + size]), None, 0.0)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_exact_whatever_the_batches(size):
    predicted, labels = [0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 0, 0, 0]
    number = -(-len(labels) // size)
    scores = evaluate(
        alone(Accelerator(cpu=True)),
        [Fixed(), Fixed()],
        batches(predicted, labels, size),
        number,
        7,
        Plain(AugmentSettings(), num_classes=6, seed=0),
    )
    assert scores[0] == scores[1]
    assert scores[0].top1 == pytest.approx(100 * 5 / 7)
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), 6).float() * 9
    assert scores[0].loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    )
    assert scores[0].class_images == [4, 1, 1, 1, 0, 0]
    assert scores[0].class_hits == [2, 1, 1, 1, 0, 0]
    assert scores[0].balanced == pytest.approx(100 * (2 / 4 + 1 + 1 + 1) / 4)
    hits = (logits.topk(5, 1).indices == torch.tensor(labels)[:, None]).any(1)
    assert scores[0].top5 == pytest.approx(100 * hits.float().mean().item())


def test_a_missing_image_is_an_error():
    with pytest.raises(RuntimeError, match="6 of 7"):
        evaluate(
            alone(Accelerator(cpu=True)),
            [Fixed()],
            batches([0] * 6, [0] * 6, 3),
            2,
            7,
            Plain(AugmentSettings(), num_classes=6, seed=0),
        )
