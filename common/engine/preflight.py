"""`--dry_run`: what a run would do, and whether it could, before it costs anything."""

from common.data.batches import Batches
from common.run.run import Run
from common.scheduling import Plan, Rates, resolve_lr


def preflight(run: Run, plan: Plan, batches: Batches) -> str:
    """The plan in words and numbers."""
    cfg, train, val = run.cfg, batches.train, batches.val
    peak, note = 1.0, "relative to the LR finder's peak"
    if cfg.lr != "auto":
        peak, note = resolve_lr(cfg.lr, plan.global_batches[0], cfg.lr_scaling), "in force"
    parts = [
        f"{len(train):,} training and {len(val):,} validation images, {len(train.classes)} classes, {plan.processes} processes",
        Rates(plan, cfg, peak).table(),
        batches.bucket_tables(),
        f"{plan.total_epochs} epochs, {plan.total_steps:,} optimizer steps, {plan.images_to_see:,} images to be seen; "
        f"learning rates are {note}",
    ]
    return "\n".join(filter(None, parts))
