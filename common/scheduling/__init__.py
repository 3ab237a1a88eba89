"""The vocabulary of a curriculum, and what follows from it at every step."""

from common.scheduling.plan import EpochPlan, Plan, make_plan
from common.scheduling.rates import KEEPING_WEIGHTS, Rates, ScheduleSettings, known_peak, resolve_lr
from common.scheduling.stages import BACKBONE, STATISTICS, Stage, scale_stages

__all__ = [
    "BACKBONE",
    "KEEPING_WEIGHTS",
    "STATISTICS",
    "EpochPlan",
    "Plan",
    "Rates",
    "ScheduleSettings",
    "Stage",
    "known_peak",
    "make_plan",
    "resolve_lr",
    "scale_stages",
]
