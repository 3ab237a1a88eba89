import pytest
import torch
from torch import nn

from common.model import linear_head
from common.model.linear_head import choose_head, fit_head, folds, logits_of

GENERATOR = torch.Generator().manual_seed(0)


def some_features(images: int = 120, width: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 features of unequal scale, one of which never changes, and labels that they tell in part."""
    labels = torch.arange(images) % classes
    features = torch.randn(images, width, generator=GENERATOR, dtype=torch.float64)
    features[:, :classes] += 1.5 * nn.functional.one_hot(labels, classes)
    features = features * torch.logspace(-1, 1, width, dtype=torch.float64) + 5
    features[:, -1] = 0.1
    return features, labels


@pytest.mark.parametrize("decay", [0.1, 0.001])
def test_the_head_is_the_logistic_regression(decay: float) -> None:
    features, labels = some_features()
    z = (features - features.mean(0)) / features.std(0).clamp(min=1e-9)
    head = fit_head(z, labels, decay, torch.zeros(3, 7, dtype=torch.float64))
    # The gradient of mean loss + decay / 2 x squared weights, by hand: it is zero at the one minimum.
    error = (logits_of(head, z).softmax(1) - nn.functional.one_hot(labels, 3)) / len(z)
    assert (error.T @ z + decay * head[:, :-1]).abs().max() < 1e-5
    assert error.sum(0).abs().max() < 1e-5
    assert head[:, :-1].abs().max() > 0.1


def test_the_chosen_head_takes_raw_features_and_has_the_lowest_loss_held_out() -> None:
    features, labels = some_features()
    lines: list[str] = []
    weight, bias, loss = choose_head(features, labels, 3, 0, lines.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert loss == pytest.approx(min(losses), abs=1e-4)
    # It goes on to the first decay that is worse.
    assert 2 < len(losses) < len(linear_head.DECAYS)
    assert losses.index(min(losses)) == len(losses) - 2
    assert not weight[:, -1].any()
    z = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-9)
    expected = fit_head(
        z, labels, linear_head.DECAYS[len(losses) - 2], torch.zeros(3, 7, dtype=torch.float64)
    )
    logits = features @ weight.T + bias
    torch.testing.assert_close(logits.softmax(1), logits_of(expected, z).softmax(1), atol=1e-3, rtol=0)


def test_every_fold_has_its_share_of_every_class() -> None:
    labels = torch.tensor([0] * 30 + [1] * 7 + [2] * 2)
    fold = folds(labels, 0)
    counts = torch.stack(
        [labels[fold == number].bincount(minlength=3) for number in range(linear_head.FOLDS)]
    )
    assert (counts.max(0).values - counts.min(0).values <= 1).all()
    assert torch.equal(fold, folds(labels, 0))
    assert not torch.equal(fold, folds(labels, 1))
