"""Training: the one loop and its parts."""

from common.engine.fit import fit
