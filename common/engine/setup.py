"""What happens before the first step: settings that fit, the state to go on from, and a plan that fits into memory."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn

from common import UserError
from common.data.batches import Batches, stage_shapes
from common.data.decode import DecodeError, read_header
from common.data.loader import Loader
from common.data.sources.base import Source
from common.data.sources.cache import fingerprint_of
from common.engine.memory import fit_memory
from common.engine.trainer import Trainer
from common.model.create import check_size, takes_one_size
from common.model.freezing import check_frozen, linear_head
from common.model.optimizer import create_optimizer
from common.model.pretrained_cfg import PretrainedCfg
from common.run import checkpoint
from common.run.checkpoint import Progress, TrainState
from common.run.run import Run
from common.scheduling import Plan, make_plan
from common.scheduling.recipe import Facts

# Images whose headers tell how large the images are.
SIZE_SAMPLE = 500


def facts_of(run: Run, model: nn.Module, train: Source) -> Facts:
    """What the default recipe follows from."""
    # timm's networks tell by how much their last feature map is smaller than the image; ours are ResNets.
    features = getattr(model, "feature_info", None)
    return Facts(
        images=len(train),
        classes=len(train.classes),
        processes=run.accelerator.num_processes,
        # A network of one size has been built for the largest stage's, which is not to change.
        short_side=0 if takes_one_size(run.cfg.model) else typical_short_side(train),
        stride=features[-1]["reduction"] if isinstance(features, list) and features else 0,
        linear_head=linear_head(model) is not None,
    )


def sample(source: Source, most: int) -> list[int]:
    """Indices of images spread evenly over a split."""
    return np.linspace(0, len(source) - 1, min(len(source), most)).astype(int).tolist()


def typical_short_side(train: Source) -> int:
    """Median short side of the originals in pixels, of a sample of them; 0 where it would have to be fetched."""
    if train.prepared:
        return int(np.median(train.sizes()[sample(train, SIZE_SAMPLE)].min(1)))
    sides = []
    for index in sample(train, SIZE_SAMPLE) if train.group_rows is None else ():
        # An image that cannot be read is met again, and named, when it is trained on.
        with suppress(DecodeError, OSError):
            sides.append(min(read_header(train.read(index, 0))[:2]))
    return int(np.median(sides)) if sides else 0


@contextmanager
def assembled(
    run: Run, model: nn.Module, train: Source, val: Source, source: PretrainedCfg | None = None
) -> Iterator[Trainer]:
    """Everything that training needs, put together and checked; the loader's workers end with it."""
    cfg, accelerator = run.cfg, run.accelerator
    state = prepare_state(run, model, train, val)
    plan = settle_plan(run, state, train)
    batches = Batches(plan, train, val, cfg, cfg.seed, accelerator.process_index, accelerator.num_processes)
    check_sizes(run, model, batches)
    # Not prepared: Accelerate's loader fills the last batch up with images seen before, and its order is another one on
    # another number of processes.
    device, layout = accelerator.device, cfg.channels_last
    loader = Loader(train, val, seed=cfg.seed, settings=cfg, device=device, channels_last=layout)
    with closing(loader):
        trainer = Trainer(run, state, plan, batches, loader, source)
        try:
            yield trainer
        except torch.OutOfMemoryError as error:
            index = max(trainer.stage_index, 0)
            raise UserError(
                f"out of memory in stage {index + 1} at {plan.stages[index].img_size} px with {plan.micro_batch(index)} images "
                "per process: lower --batch_size and raise --accumulation, or pass --auto_batch; the last checkpoint is whole"
            ) from error


def prepare_state(run: Run, model: nn.Module, train: Source, val: Source) -> TrainState:
    """Model on its device, optimizer and EMA: new ones, or as the resumed checkpoint holds them."""
    cfg, accelerator = run.cfg, run.accelerator
    if cfg.drop_path and not any(type(module).__name__ == "DropPath" for module in model.modules()):
        raise UserError(f"--drop_path {cfg.drop_path}: the model was built without stochastic depth")
    if cfg.grad_checkpointing:
        checkpoint_gradients(model)
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = model.to(accelerator.device).to(memory_format=layout)
    ema = None
    if cfg.ema:
        from timm.utils import ModelEmaV3

        # Its decay rises as 1 - step^-0.75, lest a short run's average be mostly its random start.
        ema = ModelEmaV3(model, cfg.ema_decay, use_warmup=True, warmup_power=0.75)
    # Dropout differs between processes; the first weights did not.
    set_seed(cfg.seed, device_specific=True)
    optimizer = create_optimizer(cfg, model, momentum=cfg.momentum)
    labels, val_labels = (fingerprint_of(*s.classes, s.labels.astype(np.int64)) for s in (train, val))
    progress = Progress(num_images=len(train), labels=labels, val_labels=val_labels)
    state = TrainState(model, optimizer, ema, accelerator.scaler, progress)
    files = checkpoint.share(run.checkpoint, accelerator)
    run.checkpoint = None
    if files is not None:
        recorded = files[checkpoint.STATE]["progress"]
        if recorded["num_images"] != len(train):
            raise UserError(
                f"the checkpoint was made with {recorded['num_images']} training images, --data_dir {cfg.data_dir} has {len(train)}"
            )
        if recorded.get("labels", labels) != labels:
            raise UserError(
                f"--data_dir {cfg.data_dir} has other classes, or the images in another order, than the checkpoint was made with"
            )
        if recorded.get("val_labels", val_labels) != val_labels:
            raise UserError(
                f"--data_dir {cfg.data_dir} has other validation images than the checkpoint's best was chosen by; put them "
                f"back, or begin a run from these weights with --weights {run.folder}"
            )
        checkpoint.apply(files, state, accelerator)
        run.log.info("resumed at epoch %d, step %d", state.progress.epochs_done + 1, state.progress.step)
    return state


def checkpoint_gradients(model: nn.Module) -> None:
    """Let a model of timm keep the inputs of its blocks only, and compute the rest again in the backward pass (Chen et al., 2016).

    Raises:
        UserError: timm cannot, or there is BatchNorm.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        why = "which would count every batch twice"
        raise UserError(f"--grad_checkpointing is for networks without BatchNorm, {why}")
    try:
        # torch's stubs take every other attribute of a module for a tensor or a module.
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise UserError("--grad_checkpointing: timm has none for this model") from error


def settle_plan(run: Run, state: TrainState, train: Source) -> Plan:
    """Stages over steps; a resumed run keeps its global batches, whatever the number of processes now.

    What a late stage cannot do is refused here, before anything is written, and not hours later.
    """
    cfg = run.cfg
    cfg.check_momentum()
    if "none" not in (cfg.class_weights, cfg.sampler):
        raise UserError("--class_weights and --sampler both make up for rare classes; choose one")
    if cfg.class_weights != "none" and cfg.loss == "bce":
        # They are factors of the targets, which binary cross-entropy takes for probabilities.
        raise UserError("--class_weights goes with --loss ce; --sampler goes with both")
    for stage in run.stages:
        check_frozen(state.model, stage.frozen)
    processes, batches = run.accelerator.num_processes, state.progress.global_batches
    plan = make_plan(run.stages, len(train), processes, cfg.accumulation, batches, cfg.eval_every)
    if cfg.auto_batch:
        plan = fit_memory(run, state, plan, train)
        if batches and plan.global_batches != tuple(batches):
            # A resumed run's steps are counted in its own.
            raise UserError(
                f"--auto_batch: global batches of {batches} images do not come in equal parts that fit into memory, and this run's "
                "steps are counted in them; start anew with a smaller --batch_size"
            )
    state.progress.global_batches = list(plan.global_batches)
    return plan


def check_sizes(run: Run, model: nn.Module, batches: Batches) -> None:
    """UserError: the network cannot take a blank image of a shape of a stage, training's or evaluation's."""
    flag = "target_size" if hasattr(run.cfg, "target_size") else "img_size"
    for index, stage in enumerate(batches.plan.stages):
        items = batches.eval_items(stage.img_size, batches.plan.micro_batch(index))
        shapes = {(item.height, item.width) for item in items}
        for height, width in sorted(shapes | set(stage_shapes(stage, batches.train, run.cfg))):
            if problem := check_size(model, height, width):
                raise UserError(
                    f"stage {index + 1}: --model {run.cfg.model}: {problem}; set --{flag} or the stages' img_size"
                )
