"""The vocabulary of a curriculum, and what follows from it at every step."""

from common.scheduling.plan import EpochPlan, Plan, make_plan
from common.scheduling.rates import (
    KEEPING_WEIGHTS,
    Rates,
    ScheduleSettings,
    batch_power,
    known_peak,
    resolve_lr,
)
from common.scheduling.stages import BACKBONE, STATISTICS, Stage, scale_stages
