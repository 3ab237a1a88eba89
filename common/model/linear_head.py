"""A linear head for given features: logistic regression, its weight decay chosen by cross-validation."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

# Weight decays to choose from, strongest first: of the mean loss, over standardised features.
DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
FOLDS = 3
# Steps of L-BFGS at most, and the largest derivative at which it may end on a fold: it chooses the same decay in a third of the time.
ITERATIONS, ROUGH = 200, 1e-3
# Of a feature that counts, as a share of the features' mean standard deviation.
SMALLEST_STD = 1e-4


@contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32, by which derivatives would hardly ever get as small as `fit_head` waits for."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@exact_products()
def choose_head(
    features: Tensor,
    labels: Tensor,
    classes: int,
    seed: int,
    report: Callable[[str], None],
    decays: Sequence[float] = DECAYS,
) -> tuple[Tensor, Tensor, float]:
    """The weight [K, C] and bias [K], for features [N, C], of the decay that does best on images held out; and its mean loss on these.

    Best is the lowest mean loss over all folds; the chosen head is fitted to all images. `report` is given a line for each decay.
    """
    std, mean = torch.std_mean(features, 0, correction=0)
    # What hardly ever changes tells nothing, and would be blown up on the image where it does.
    scale = torch.where(std > SMALLEST_STD * std.mean(), 1 / std, 0.0)
    standardised = (features - mean) * scale
    fold = folds(labels, seed)
    heads = [features.new_zeros(classes, features.shape[1] + 1)] * FOLDS
    best_loss, best_decay, best = math.inf, decays[0], heads
    for decay in decays:
        out = features.new_empty(len(labels), classes)
        for number in range(FOLDS):
            inside, held_out = fold != number, fold == number
            heads[number] = fit_head(standardised[inside], labels[inside], decay, heads[number], ROUGH)
            out[held_out] = logits_of(heads[number], standardised[held_out])
        loss, hits = float(F.cross_entropy(out, labels)), float((out.argmax(1) == labels).double().mean())
        report(f"weight decay {decay:g}: loss {loss:.4f}, top-1 {100 * hits:.2f} on images held out")
        # The loss has one valley: weaker ones only fit the folds more closely.
        if loss > best_loss:
            break
        best_loss, best_decay, best = loss, decay, list(heads)
    head = fit_head(standardised, labels, best_decay, torch.stack(best).mean(0))
    weight = head[:, :-1] * scale
    return weight, head[:, -1] - weight @ mean, best_loss


def folds(labels: Tensor, seed: int) -> Tensor:
    """The fold of each image, int64 [N]: of every class as equal a share as can be."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    dealt = torch.empty_like(labels)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    dealt[by_class] = torch.arange(len(labels), device=labels.device) % FOLDS
    return dealt


def logits_of(head: Tensor, features: Tensor) -> Tensor:
    """[N, K] of features [N, C] and a head [K, C + 1], whose last column is the bias."""
    return F.linear(features, head[:, :-1], head[:, -1])


def fit_head(
    features: Tensor, labels: Tensor, decay: float, start: Tensor, tolerance: float = 1e-5
) -> Tensor:
    """Multinomial logistic regression: the head [K, C + 1] at which mean loss + decay / 2 x squared weights is least.

    By L-BFGS (Liu and Nocedal, 1989). The function is convex, so that `start` changes the time alone. The bias is not penalised.
    It ends where no derivative is above `tolerance`.
    """
    head = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [head],
        max_iter=ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits_of(head, features), labels) + decay / 2 * head[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.detach()
