"""The vocabulary of a curriculum, and what follows from it at every step."""

from common.scheduling.plan import (
    BACKBONE,
    EpochPlan,
    Plan,
    Schedule,
    Stage,
    couple_strength,
    make_plan,
    scaled_lr,
)

__all__ = ["BACKBONE", "EpochPlan", "Plan", "Schedule", "Stage", "couple_strength", "make_plan", "scaled_lr"]
