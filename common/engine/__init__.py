"""Training: the one loop and its parts."""

from common.engine.fit import fit

__all__ = ["fit"]
