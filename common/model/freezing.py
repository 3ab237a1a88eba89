"""Which layers train: freezing by module names, and what "backbone" and "statistics" mean among them."""

from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import UserError


def under(name: str, prefix: str) -> bool:
    """Whether a parameter or module is `prefix` or inside it: layer1.0 is under layer1, layer10 is not."""
    return name == prefix or name.startswith(f"{prefix}.")


def classifiers(model: nn.Module) -> list[str]:
    """Names of the modules that make logits: one, but for distilled transformers, which have two."""
    # torch's stubs take every other attribute of a module for a tensor or a module.
    found = model.get_classifier()  # type: ignore[operator]
    modules = found if isinstance(found, tuple) else (found,)
    return [name for name, module in model.named_modules() if any(module is each for each in modules)]


def linear_head(model: nn.Module) -> nn.Linear | None:
    """The one linear layer with a bias that makes the logits; None where something else does."""
    heads = [model.get_submodule(name) for name in classifiers(model)]
    head = heads[0] if len(heads) == 1 else None
    return head if isinstance(head, nn.Linear) and head.bias is not None else None


def _is_frozen(model: nn.Module, frozen: Sequence[str]) -> Callable[[str], bool]:
    """A test for names of parameters and modules; "backbone" stands for all but the classifier."""
    heads = classifiers(model) if "backbone" in frozen else []

    def test(name: str) -> bool:
        if heads and not any(under(name, head) or under(head, name) for head in heads):
            return True
        return any(under(name, prefix) for prefix in frozen)

    return test


def set_trainable_layers(model: nn.Module, frozen: Sequence[str]) -> None:
    """Freeze the bare model's parameters under the names in `frozen`, such as "conv1" or "layer4.0", and thaw all others.

    The backward pass ends early only if all layers below are frozen too.
    """
    is_frozen = _is_frozen(model, frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
        if is_frozen(name):
            parameter.grad = None  # a gradient left over would let the optimizer go on moving it


def check_frozen(model: nn.Module, frozen: Sequence[str]) -> None:
    """UserError: a name of `frozen` matches nothing in the model, or nothing is left to train."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in frozen:
        if prefix not in ("backbone", "statistics") and not any(under(name, prefix) for name in names):
            layers = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UserError(f"frozen: {prefix!r} is no layer of the model, which has {layers}")
    if all(map(_is_frozen(model, frozen), names)):
        raise UserError(f"frozen: {', '.join(frozen)} leaves nothing to train")


def train_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """model.train(), but frozen modules in eval: BatchNorm keeps its statistics there, dropout is off.

    With "statistics" every BatchNorm keeps them, and normalises with them instead of the batch's.
    """
    model.train()
    is_frozen, keeps_statistics = _is_frozen(model, frozen), "statistics" in frozen
    for name, module in model.named_modules():
        if (name and is_frozen(name)) or (keeps_statistics and isinstance(module, _BatchNorm)):
            module.eval()
