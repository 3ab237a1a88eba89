"""The backbone runs once, as it is, and a linear head is fitted to what it makes of the images.

Fine-tuning starts from there, and `train_finetune.py --probe` ends there.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from common import UserError
from common.augment import AugmentSettings
from common.data.batches import Batches
from common.data.order import subset
from common.data.sources.base import Source
from common.data.sources.cache import cache_folder, fingerprint_of
from common.engine.recording import begin, finish, record
from common.engine.setup import assembled
from common.engine.trainer import Trainer
from common.model.freezing import classifiers, linear_head, under
from common.model.linear_head import choose_head
from common.model.optimizer import OptimizerSettings
from common.model.pretrained_cfg import PretrainedCfg
from common.run.checkpoint import write_durably
from common.run.run import Run
from common.scheduling import BACKBONE, Rates, ScheduleSettings

TRAIN = 0
# Images per forward pass: without gradients larger ones are no faster on a CPU, and hardly on a GPU.
BATCH = 128
# Settings of a training in steps, which does not take place, beside those of its schedule, optimizer and augmentation.
STEPS = {"recipe", "epochs", "head_epochs", "mixup_share", "accumulation"}
STEPS |= {"budget", "loss", "clip_grad", "crop_scale", "eval_every", "final_eval", "patience", "sampler"}
# Training images that tell which statistics serve a BatchNorm better, and the weight decay of the heads that are compared: the middle one.
LOOK_IMAGES, LOOK_DECAY = 1024, 0.01
# Images that a head to start from is fitted to, at most: their features have to lie in memory.
START_IMAGES = 50_000


def fit_head(t: Trainer) -> None:
    """Fit the head before the first step, unless it knows the classes, the first stage trains it alone, or it is no single linear layer.

    What trains from there on distorts the features less than from a random head (LP-FT: Kumar et al., 2022). A collective.
    """
    head, train = head_to_fit(t), t.batches.train
    if head is None:
        return
    t.run.log.info("fitting the head to the weights' features")
    images = subset(train.labels, min(1.0, START_IMAGES / len(train)), t.run.cfg.seed)
    own = torch.from_numpy(extract(t, head, images)).to(t.run.accelerator.device)
    loss = _set_head(t, head, t.run.accelerator.reduce(own, "sum"), train.labels[images])
    # The same on all processes, to the last bit: the peak follows from it.
    left = torch.tensor(min(1.0, loss / math.log(len(train.classes))), device=own.device)
    t.left_to_learn = float(t.run.accelerator.reduce(left, "mean"))
    t.lap("passes")


def head_to_fit(t: Trainer) -> nn.Linear | None:
    """The head, where `fit_head` fits it."""
    knows = t.knows_classes or BACKBONE in t.plan.stages[0].frozen
    return None if knows else linear_head(t.state.model)


def fit_evaluations(train: Source, val: Source) -> float:
    """What `fit_head` costs, in evaluations: it sees training images in evaluation's view."""
    return min(len(train), START_IMAGES) / len(val)


def _set_head(t: Trainer, head: nn.Linear, features: Tensor, labels: np.ndarray) -> float:
    """The best head for features [N, C] of images with these labels [N], in place; returns its loss on images held out."""
    classes, targets = len(t.batches.train.classes), torch.from_numpy(labels).to(features.device)
    weight, bias, loss = choose_head(features, targets, classes, t.run.cfg.seed, t.run.log.info)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return loss


@torch.inference_mode()
def losses_by_statistics(t: Trainer) -> tuple[float, float]:
    """How well a head can do on the first training batches' features: its loss on images held out, twice.

    First where BatchNorm normalises by the statistics of the weights, then by the batch's, as in training. Both are 0 where it
    cannot be told: without BatchNorm, or one linear layer at the end. A collective that leaves weights and statistics as they are.
    """
    model, accelerator = t.state.model.eval(), t.run.accelerator
    head, norms = linear_head(model), [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if head is None or not norms:
        return 0.0, 0.0
    items = (
        item._replace(indices=item.indices[:BATCH]) for item in t.batches.train_items(next(t.plan.epochs()))
    )
    momentum = [norm.momentum for norm in norms]
    seen, labels, by_weights, by_batch = 0, list[Tensor](), list[Tensor](), list[Tensor]()
    with features_of(t, head) as forward:
        for batch in t.loader.stream(items):
            t.run.stop_if_asked()
            labels.append(accelerator.gather(batch.labels))
            for norm in norms:
                norm.eval()
            by_weights.append(accelerator.gather(forward(batch.images)))
            for norm in norms:
                norm.train()
                norm.momentum = 0.0
            by_batch.append(accelerator.gather(forward(batch.images)))
            seen += len(labels[-1])
            if seen >= LOOK_IMAGES:
                break
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before
    with torch.inference_mode(False):
        known, classes = torch.cat(labels).clone(), len(t.batches.train.classes)
        pair = [
            choose_head(
                torch.cat(some).clone(), known, classes, t.run.cfg.seed, t.run.log.debug, [LOOK_DECAY]
            )[2]
            for some in (by_weights, by_batch)
        ]
    # The same on all processes, to the last bit.
    kept, batch_loss = accelerator.reduce(torch.tensor(pair, device=accelerator.device), "mean").tolist()
    return kept, batch_loss


def probe(run: Run, model: nn.Module, train: Source, val: Source, source: PretrainedCfg | None) -> None:
    """Fit the head of `model` to features of the training images, evaluate, record and save: a run of one epoch.

    Raises:
        UserError: several processes, settings of a training in steps, or a model that does not end in one linear layer.
    """
    cfg, accelerator = run.cfg, run.accelerator
    if accelerator.num_processes > 1:
        raise UserError("--probe runs in one process: start it with python, or --num_processes 1")
    kinds = ScheduleSettings, OptimizerSettings, AugmentSettings
    idle = STEPS | {field.name for kind in kinds for field in dataclasses.fields(kind)}
    # A probe's own config.yaml names them all, and its one epoch.
    defaults = type(cfg)()
    given = sorted(name for name in cfg.given & idle if getattr(cfg, name) != getattr(defaults, name))
    if sum(stage.epochs for stage in cfg.stages) > 1:
        given.append("stages")
    if given:
        raise UserError(f"--probe takes no steps of training: leave out --{', --'.join(given)}")
    head = linear_head(model)
    if head is None:
        raise UserError(
            f"--probe needs a model that ends in one linear layer, and --model {cfg.model} does not"
        )
    last = cfg.stages_in_force()[-1]
    batch_size = min(last.batch_size if "batch_size" in cfg.given else BATCH, len(train))
    stage = dataclasses.replace(last, epochs=1, batch_size=batch_size, mixup=False, lr_scale=None)
    run.stages = run.stages or [stage]
    with assembled(run, model, train, val, source) as trainer:
        if cfg.dry_run:
            print(
                f"{len(train):,} training and {len(val):,} validation images at {stage.img_size} px, "
                f"{len(train.classes)} classes, a head for {head.in_features} features"
            )
            return
        begin(trainer, {})
        trainer.stage_index = 0
        for epoch in trainer.plan.epochs(trainer.state.progress.epochs_done):
            trainer.begin_epoch(epoch)
            features = cached_features(trainer, head).to(accelerator.device)
            _set_head(trainer, head, features, train.labels)
            labels = torch.from_numpy(train.labels).to(accelerator.device)
            _count(trainer, head(features).detach(), labels)
            trainer.lap_training()
            items = trainer.batches.eval_items(epoch.stage.img_size, trainer.plan.micro_batch(0))
            scores = trainer.evaluate(epoch, trainer.loader.stream(items))
            record(trainer, epoch, Rates(trainer.plan, cfg, 0.0), scores)
    finish(trainer, trained=False)


def _count(t: Trainer, logits: Tensor, labels: Tensor) -> None:
    """Enter into the epoch's meter what training in steps would have: loss and hits on the training images, and the time."""
    images = t.plan.total_steps * t.plan.global_batches[0]
    hits = (logits.argmax(1) == labels).double().mean()
    t.meter.sums = torch.stack([F.cross_entropy(logits, labels).double(), hits]) * images
    t.meter.step, t.meter.stopped = t.plan.total_steps, time.monotonic()
    t.meter.bar.close()
    t.state.progress.step = t.plan.total_steps
    t.state.progress.images_seen = len(labels)


def cached_features(t: Trainer, head: nn.Linear) -> Tensor:
    """`extract` for every training image, float32 [N, C] on the CPU; kept under a hash of all that it follows from."""
    cfg, train, size = t.run.cfg, t.batches.train, t.plan.stages[0].img_size
    (name,) = classifiers(t.state.model)
    body = {key: tensor for key, tensor in t.state.model.state_dict().items() if not under(key, name)}
    weights = fingerprint_of(*(part for key in sorted(body) for part in (key, body[key].cpu().numpy())))
    # Folders are known by names alone, which may hold other pixels tomorrow. Streamed shards tell, and would be fetched twice.
    images = [train.fingerprint]
    for index in range(len(train)) if train.group_rows is None else ():
        # An image that cannot be read is met again, and named, when it is decoded.
        with suppress(OSError):
            images.append(fingerprint_of(train.read(index, size)))
    view = (size, cfg.crop_pct, cfg.rect_val, cfg.rect_area, t.augment.mean, t.augment.std)
    key = fingerprint_of(cfg.model, weights, images, view, t.run.accelerator.mixed_precision)
    path = cache_folder() / "features" / f"{key}.safetensors"
    if path.exists():
        return load_file(path)["features"]
    features = torch.from_numpy(extract(t, head, np.arange(len(train))))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, to_safetensors({"features": features}))
    except OSError as error:
        t.run.log.info("features are not kept for the next probe: %s", error)
    return features


@torch.inference_mode()
def extract(t: Trainer, head: nn.Linear, images: np.ndarray) -> np.ndarray:
    """What enters the head for these training images [N] in evaluation's view: float32 [N, C], 0 where another process has it."""
    run, train = t.run, t.batches.train
    t.state.model.eval()
    as_val = Batches(t.plan, train, train, run.cfg, run.cfg.seed, t.batches.rank, t.batches.world)
    features = np.zeros((len(images), head.in_features), np.float32)
    place = np.full(len(train), -1)
    place[images] = np.arange(len(images))
    every = as_val.eval_items(t.plan.stages[0].img_size, t.plan.micro_batch(0))
    wanted = (item._replace(split=TRAIN, indices=item.indices[place[item.indices] >= 0]) for item in every)
    items = [item for item in wanted if len(item.indices)]
    stream = t.loader.stream(items)
    bar = tqdm(total=len(images), desc="features", unit="img", disable=None, leave=False)
    with bar, features_of(t, head) as forward:
        # Processes may have different numbers of batches, and all have to ask equally often.
        for _ in range(run.votes.largest(len(items))[0]):
            run.stop_if_asked()
            batch = next(stream, None)
            if batch is None:
                continue
            features[place[batch.item.indices]] = forward(batch.images).cpu().numpy()
            bar.update(len(batch.labels))
    return features


@contextmanager
def features_of(t: Trainer, head: nn.Linear) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from raw images [B, 3, H, W] to what enters the head: float32 [B, C]."""
    caught: list[Tensor] = []
    # Whatever the network is called inside, this is what its logits are made of.
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))

    def forward(images: Tensor) -> Tensor:
        with t.run.accelerator.autocast():
            t.state.model.forward(t.augment.normalise(images))
        return caught.pop().float()

    with hook:
        yield forward
