"""The random choices of a sketch: signs, offsets, flips and buckets, from a counter and a seed alone.

The same on every machine, rank and device, and nothing of the size of a model is stored.
"""

import numpy as np

from gapaware.blocks import CHUNK

_SIGN_STREAM, _OFFSET_STREAM, _FLIP_STREAM, _BUCKET_STREAM = range(4)


def counter_hash(counter: np.ndarray, *, seed: int, stream: int) -> np.ndarray:
    """Hash counters to 64 random bits each, the same on every machine.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).

    Args:
        counter: integers, any shape.
        seed: the user's seed.
        stream: which of several independent streams to draw from.

    Returns:
        uint64, of the shape of `counter`.

    Example:
        >>> counter_hash(np.arange(2), seed=0, stream=0).dtype
        dtype('uint64')
    """
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + (stream + 1) * 0xD1B54A32D192ED03) % 2**64)
    with np.errstate(over="ignore"):
        z = (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def sign_table(seed: int) -> np.ndarray:
    """Random signs ±1, shape (2·CHUNK,), float32; chunks use windows of length CHUNK of it."""
    bits = counter_hash(np.arange(2 * CHUNK), seed=seed, stream=_SIGN_STREAM) >> np.uint64(63)
    return 1.0 - 2.0 * bits.astype(np.float32)


def chunk_offsets(chunks: np.ndarray, seed: int) -> np.ndarray:
    """Where in the sign table the window of each chunk starts: integers in [0, CHUNK)."""
    hashed = counter_hash(chunks, seed=seed, stream=_OFFSET_STREAM)
    return (hashed % np.uint64(CHUNK)).astype(np.int64)


def chunk_flips(chunks: np.ndarray, seed: int) -> np.ndarray:
    """One more sign ±1 for each chunk, float64."""
    bits = counter_hash(chunks, seed=seed, stream=_FLIP_STREAM) >> np.uint64(63)
    return 1.0 - 2.0 * bits.astype(np.float64)


def buckets(dim: int, seed: int) -> np.ndarray:
    """The bucket in [0, dim) of each of the CHUNK places; every bucket gets as many, give or take one."""
    order = np.argsort(counter_hash(np.arange(CHUNK), seed=seed, stream=_BUCKET_STREAM))
    rank = np.empty(CHUNK, dtype=np.int64)
    rank[order] = np.arange(CHUNK)
    return rank % dim
