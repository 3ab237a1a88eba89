"""Parameter groups, the optimizer by name, and the moving average of the weights."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common import UserError
from common.model.create import did_you_mean

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


def param_groups(
    model: nn.Module, weight_decay: float, decay_norm_and_bias: bool, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Split the parameters by weight decay and learning rate; frozen ones too, which a later stage may thaw.

    Args:
        model: the bare model.
        weight_decay: of convolutions and linear layers.
        decay_norm_and_bias: also of norms, biases and what timm's model names in no_weight_decay().
        layer_decay: None, or the factor between the rates of a layer and of the one above it (Clark et al.,
            2020): the head has "lr_scale" 1, the last block layer_decay, the one below its square, and so on.

    Returns:
        Groups for an optimizer: "params", "weight_decay" and "lr_scale", the factor on the plan's rate.

    Raises:
        UserError: layer_decay for a model that does not tell the order of its layers.
    """
    scales = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    if layer_decay is not None:
        if not 0 < layer_decay <= 1:
            raise UserError(f"--layer_decay must be above 0 and at most 1, not {layer_decay}")
        if not hasattr(model, "group_matcher"):
            raise UserError(f"--layer_decay: {type(model).__name__} does not tell the order of its layers")
        from timm.models import group_parameters

        depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        top = max(depths.values())
        scales = {name: layer_decay ** (top - depths[name]) for name in scales}
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decays = decay_norm_and_bias or (parameter.ndim > 1 and name not in exempt)
        key = (scales[name], weight_decay if decays else 0.0)
        group = groups.setdefault(key, {"params": [], "weight_decay": key[1], "lr_scale": key[0]})
        group["params"].append(parameter)
    return list(groups.values())


def create_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer; the loop sets group["lr"] = plan's rate x group["lr_scale"] before every step.

    Args:
        cfg: has optimizer ("sgd" or a timm name), momentum, nesterov, weight_decay, decay_norm_and_bias and
            layer_decay.
        model: the bare model.

    Raises:
        UserError: timm has no optimizer of that name, or lacks what it needs.
    """
    groups = param_groups(model, cfg.weight_decay, cfg.decay_norm_and_bias, cfg.layer_decay)
    if cfg.optimizer == "sgd":
        if cfg.nesterov and cfg.momentum == 0:
            raise UserError("--nesterov needs a --momentum above 0")
        # On a CPU the fused step is several times faster. On CUDA the default one costs next to nothing, and
        # lets the gradient scaler skip a step, where the fused one skips without telling.
        fused = not torch.cuda.is_available()
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused)
        if fused and cfg.momentum > 0:
            optimizer.register_step_pre_hook(_match_buffers)
        return optimizer
    from timm.optim import create_optimizer_v2, list_optimizers

    known = list_optimizers()
    if cfg.optimizer not in known:
        raise UserError(f"--optimizer {cfg.optimizer} is unknown{did_you_mean(cfg.optimizer, known)}")
    try:
        return create_optimizer_v2(groups, cfg.optimizer, lr=0.1, weight_decay=0.0, momentum=cfg.momentum)
    except (AssertionError, ImportError) as error:  # needs a GPU, or a package that is not installed
        raise UserError(f"--optimizer {cfg.optimizer} cannot be used here: {error}") from error


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


def create_ema(model: nn.Module, decay: float) -> "ModelEmaV3":
    """Keep an average of the weights in ema.module; call ema.update(model, step=optimizer steps done).

    The decay rises as 1 - step^-0.75 up to `decay`, lest a short run's average be mostly its random start.
    BatchNorm's running statistics are averaged like weights, its counters copied.
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=0.75)
