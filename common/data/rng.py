"""Random numbers without state: pure functions of what they are for, whatever the worker or rank."""

import numpy as np

# Streams: independent draws for the same image.
CROP, FLIP, ERASE, CUTOUT, ORDER, ROWS, SUBSET, ASPECT, CLASSES, AUTO = range(10)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: np.ndarray) -> np.ndarray:
    """Turn counters into well-mixed 64-bit words: splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def uniforms(seed: int, epoch: int, indices: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Draw `count` numbers in [0, 1) for each image, float64 [len(indices), count].

    The numbers depend on (seed, epoch, index, stream, draw) alone: not on the batch an image happens to be
    in, nor on numpy's version.
    """
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, stream):
        key = _mix(key + np.uint64(part % 2**64) + _GOLDEN)
    images = _mix(key + (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    draws = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (_mix(images[:, None] + draws) >> np.uint64(11)) * 2.0**-53
