"""What every module may use: the exception that is meant for the person at the keyboard, errors in a line, the ranges of settings."""

import math
import sys
from typing import Annotated, NamedTuple


class UserError(ValueError):
    """Something the user can mend: one sentence that names the flag or the file. Scripts print it and exit with 2."""


def first_line(error: BaseException) -> str:
    """What an error says, for a sentence of ours."""
    return str(error).partition("\n")[0] or type(error).__name__


class Range(NamedTuple):
    """The numbers that a setting takes, both ends included, and how a sentence names them."""

    words: str
    low: float
    high: float = sys.float_info.max


PositiveInt = Annotated[int, Range("a whole number above 0", 1)]
NonNegativeInt = Annotated[int, Range("a whole number from 0", 0)]
PositiveFloat = Annotated[float, Range("a number above 0", math.ulp(0.0))]
NonNegativeFloat = Annotated[float, Range("a number from 0", 0.0)]
ClosedUnitInterval = Annotated[float, Range("a number from 0 to 1", 0.0, 1.0)]
