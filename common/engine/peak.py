"""The peak of the learning rate: given, found by a sweep over the first stage's batches, or found before."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count

from common.data.order import BatchItem
from common.engine.lr_finder import ABOVE_BLOW_UP, find_lr
from common.engine.trainer import Trainer
from common.run.plots import plot_lr_finder
from common.run.processes import rank0_errors
from common.run.records import draw
from common.scheduling import (
    BACKBONE,
    KEEPING_WEIGHTS,
    STATISTICS,
    EpochPlan,
    Rates,
    batch_power,
    known_peak,
    resolve_lr,
)

# Per 256 images, when the finder's curve cannot be trusted (Goyal et al., 2017).
FALLBACK_LR = 0.1
# The peak, times the blow-up's rate, of trained weights whose BatchNorms keep their statistics. Nothing rescales what grows, so that the blow-up
# is the end: at its rate a run diverged. 0.4 and 0.6 of it ended 1.4 and 1.5 points above 0.2 (docs/results.md).
KEEPING_STATISTICS = 0.5


def settle_rates(t: Trainer) -> Rates:
    """Learning rates around the peak that was given, found now, or found before."""
    run, cfg, progress = t.run, t.run.cfg, t.state.progress
    known = progress.peak_lr or known_peak(vars(cfg), t.plan.global_batches[0])
    progress.peak_lr = known or find_peak(t)
    rates = Rates(t.plan, cfg, progress.peak_lr, batch_power(vars(cfg)))
    highest = max(map(rates.peak, range(len(t.plan.stages))))
    for group in t.state.optimizer.param_groups:
        if "max_lr_snapshot" in group:
            # Of timm's corrected optimizers: they decay by rate^2 / peak, and take the rate that they were made with for the peak.
            group["max_lr_snapshot"] = highest * group["lr_scale"]
    run.log.info("peak learning rate %.4g (--lr %s)", highest, cfg.lr)
    with rank0_errors():
        if run.is_main:
            run.records.write_schedule(t.plan, rates)
    t.lap("start" if known else "finder")
    return rates


def endless_items(t: Trainer, epoch: EpochPlan) -> Iterator[BatchItem]:
    """This process's micro-batches of an epoch, and of passes after it, for ever."""
    passes = (replace(epoch, index=index) for index in count(epoch.index))
    return chain.from_iterable(map(t.batches.train_items, passes))


def find_peak(t: Trainer) -> float:
    """Sweep the learning rate over the first stage's batches; the training state is as before afterwards."""
    run, cfg, plan = t.run, t.run.cfg, t.plan
    epoch = next(plan.epochs())
    t.enter_stage(epoch)
    t.begin_epoch(epoch)
    stream = t.loader.stream(endless_items(t, epoch))

    def step(lr: float) -> float:
        run.stop_if_asked()
        before = t.meter.sums.clone()
        t.train_step(epoch, lr, cfg.momentum, stream)
        loss = run.accelerator.reduce(t.meter.sums - before, "sum")[0]
        return float(loss) / epoch.global_batch

    fallback = resolve_lr(FALLBACK_LR, plan.global_batches[0], "linear")
    run.log.info("finding the learning rate: %d steps", cfg.lr_finder_iterations)
    factor = ABOVE_BLOW_UP
    if cfg.pretrained and BACKBONE not in epoch.stage.frozen:
        # Weights that know little of these classes have far to go: a half of the blow-up, not a fifth, won 2 points from weights whose
        # best head leaves a half open (docs/results.md). EfficientNet-Lite0's from ImageNet leaves a quarter.
        factor, fallback = max(KEEPING_WEIGHTS, t.left_to_learn), KEEPING_WEIGHTS * fallback
        if STATISTICS in epoch.stage.frozen:
            factor = KEEPING_STATISTICS
    sweep = find_lr(t.state, step, cfg.lr_finder_iterations, fallback=fallback, factor=factor)
    t.meter.bar.close()
    t.not_finite.zero_()
    with rank0_errors():
        if run.is_main:
            sweep.write_csv(run.folder / "lr_finder.csv")
            run.background.submit(draw, plot_lr_finder, run.folder)
    return sweep.suggested
