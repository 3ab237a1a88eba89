"""The optimizer by name, with its parameter groups."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common import ClosedUnitInterval, NonNegativeFloat, UserError
from common.model.create import did_you_mean
from common.model.freezing import classifiers


@dataclass
class OptimizerSettings:
    """Optimizer and weight averaging"""

    optimizer: str = "sgd"
    """sgd (with Nesterov momentum), or any timm optimizer name."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty of convolutions and linear layers."""
    decay_norm_and_bias: bool = True
    """Also decay normalisation weights and biases."""
    layer_decay: ClosedUnitInterval | None = None
    """LR factor from each layer to the one below it, towards the stem; null = one LR for all."""
    ema: bool = False
    """Also keep and evaluate an exponential moving average of the weights."""
    ema_decay: ClosedUnitInterval = 0.9999
    """Its decay per optimizer step, after warm-up."""


def create_optimizer(
    settings: OptimizerSettings, model: nn.Module, *, momentum: float
) -> torch.optim.Optimizer:
    """Build the optimizer; the loop sets momentum (or the first beta) and group["lr"] = rate x group["lr_scale"] before every step.

    timm groups the parameters: by weight decay, which 1-d tensors and those in the model's no_weight_decay() can
    do without, and with `layer_decay` by depth (Clark et al., 2020): the head has "lr_scale" 1, the last block
    layer_decay, the one below its square, and so on. The model is bare and nothing in it frozen yet.

    Raises:
        UserError: timm has no optimizer of that name, or lacks what it needs, or a run cannot go on with it.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known = list(map(str, list_optimizers()))
    if settings.optimizer not in known:
        raise UserError(
            f"--optimizer {settings.optimizer} is unknown{did_you_mean(settings.optimizer, known)}"
        )
    assert all(parameter.requires_grad for parameter in model.parameters()), (
        "timm would leave frozen ones out"
    )
    more: dict[str, Any] = {}
    if settings.optimizer == "sgd":
        # Fused: several times faster on a CPU. With gradient scaling it skips a step inside the kernel, in silence.
        more = {"fused": True, "nesterov": momentum > 0}
    elif "muon" in settings.optimizer:
        # Its steps are for hidden matrices; the head and embeddings are Adam's (Jordan et al., 2024), as timm has it for 1-d tensors.
        more = {
            "fallback_list": [f"{name}.*" for name in classifiers(model)],
            "fallback_no_weight_decay": True,
        }
    try:
        optimizer = create_optimizer_v2(
            model,
            settings.optimizer,
            lr=0.1,
            weight_decay=settings.weight_decay,
            momentum=momentum,
            filter_bias_and_bn=not settings.decay_norm_and_bias,
            layer_decay=settings.layer_decay,
            **more,
        )
    except (AssertionError, ImportError) as error:  # needs a GPU, or a package that is not installed
        raise UserError(f"--optimizer {settings.optimizer} cannot be used here: {error}") from error
    options = [value for group in optimizer.param_groups for value in group.values()]
    if (
        get_optimizer_info(settings.optimizer).second_order
        or optimizer.state_dict().keys() != {"state", "param_groups"}
        or any(isinstance(value, torch.dtype) for value in options)
    ):
        raise UserError(
            f"--optimizer {settings.optimizer} needs second derivatives, or keeps what a checkpoint cannot hold"
        )
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", 1.0)
    if settings.optimizer == "sgd" and momentum > 0:
        optimizer.register_step_pre_hook(_match_buffers)
    return optimizer


def _match_buffers(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Give every parameter to be stepped a momentum buffer in its own memory layout.

    Fused SGD fails if only some have a buffer, as after thawing, and assumes equal layouts without looking,
    which is wrong once a checkpoint in one memory format is loaded into a model in another.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)  # steps as if it had none
            elif buffer.stride() != parameter.stride():
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
