"""What fits into memory: steps on blank images that leave no trace."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from common import UserError
from common.data.batches import stage_shapes
from common.data.sources.base import Source
from common.model.freezing import set_trainable_layers, train_mode
from common.run.checkpoint import TrainState, rng_state, set_rng_state
from common.run.run import Run
from common.scheduling import Plan, Stage

# Batches that lie on the device beside the one that is trained on: the next one, and its uint8 original.
BATCHES_AHEAD = 2


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Give the model's buffers, gradients and the random numbers back as they were, whatever happens."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    rng = rng_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
            parameter.grad = None
        set_rng_state(rng)


def finished(device: torch.device) -> float:
    """The time at which the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def blank_step(run: Run, net: nn.Module, batch_size: int, height: int, width: int) -> None:
    """Forward and backward on blank images, float [batch_size, 3, height, width], to their end on the device."""
    device = run.accelerator.device
    layout = torch.channels_last if run.cfg.channels_last else torch.contiguous_format
    images = torch.zeros(batch_size, 3, height, width, device=device).contiguous(memory_format=layout)
    # What training calls brings its autocast along: another around it would be compiled as another graph.
    with run.accelerator.no_sync(net):
        loss = net(images).float().logsumexp(1).mean()
    loss.backward()
    finished(device)


def fit_memory(run: Run, state: TrainState, plan: Plan, train: Source) -> Plan:
    """The plan with each stage's micro-batch halved until a step of its largest shape fits; a collective."""
    for index, stage in enumerate(plan.stages):
        size = plan.micro_batch(index)
        height, width = max(stage_shapes(stage, train, run.cfg), key=math.prod)
        while not _fits(run, state, stage, size, height, width):
            if size == 1:
                raise UserError(f"one image of {stage.img_size} px does not fit; lower --img_size")
            size //= 2
        size = -run.votes.largest(-size)[0]
        if size < plan.micro_batch(index):
            plan = plan.with_micro_batch(index, size)
            fitting = plan.micro_batch(index)
            run.log.info("stage %d: %d images per process and micro-batch fit", index + 1, fitting)
    if run.accelerator.device.type == "cuda":
        # NCCL takes its memory from the device, and not from what trials have left to PyTorch.
        torch.cuda.empty_cache()
    return plan


def _fits(run: Run, state: TrainState, stage: Stage, size: int, height: int, width: int) -> bool:
    model, device = state.model, run.accelerator.device
    with no_trace(model):
        set_trainable_layers(model, stage.frozen)
        train_mode(model, stage.frozen)
        try:
            # What training holds beside a step: optimizer state (two tensors per parameter at most, which a resumed run
            # has already), DDP's buckets, and batches on their way.
            weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            entries = chain.from_iterable(each.values() for each in state.optimizer.state.values())
            held = sum(entry.nbytes for entry in entries if isinstance(entry, torch.Tensor))
            beside = max(0, 3 * weights - held) + BATCHES_AHEAD * 5 * size * 3 * height * width
            ballast = torch.empty(beside if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
            with run.accelerator.autocast():
                blank_step(run, model, size, height, width)
            del ballast
            return True
        except torch.OutOfMemoryError:
            pass
    torch.cuda.empty_cache()
    return False


def warm_up(run: Run, net: nn.Module, model: nn.Module, size: int, shapes: list[tuple[int, int]]) -> None:
    """Compile, or let cuDNN choose, for every shape of a stage, so that no step of training has to wait for it."""
    if not run.cfg.compile and run.accelerator.device.type != "cuda":
        return
    for height, width in shapes:
        with no_trace(model):
            # Through the wrapper: DDP's overlap of all-reduce and backward is compiled inside it.
            blank_step(run, net, size, height, width)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run.log.info("warmed up %d shapes, so far %d graphs compiled", len(shapes), graphs)
