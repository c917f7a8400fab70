"""The slow twin: every figure from its formula, in NumPy and SciPy float64, on the updates themselves.

Nothing in the package uses this file, and nothing else in it needs SciPy, which `gapaware[dev]` brings. The
tests hold everything fast against it.
"""

import numpy as np
import scipy.linalg
import scipy.stats

from gapaware.blocks import CHUNK
from gapaware.hashing import buckets, chunk_flips, chunk_offsets, sign_table
from gapaware.spectrum import Array


def count_sketch(x: Array, dim: int, seed: int) -> Array:
    """Σ_i sign(i)·x_i over the elements of each bucket.

    Args:
        x: (P,).
        dim: number of buckets.
        seed: of the hash.

    Returns:
        (dim,).
    """
    element = np.arange(len(x))
    chunk, place = element // CHUNK, element % CHUNK
    sign = chunk_flips(chunk, seed) * sign_table(seed)[chunk_offsets(chunk, seed) + place]
    return np.asarray(
        np.bincount(buckets(dim, seed)[place], weights=sign * x, minlength=dim), np.float64
    )


def gram(updates: Array) -> Array:
    """G = XXᵀ of a window X, (W, P) → (W, W)."""
    return updates @ updates.T


def singular_values(updates: Array) -> Array:
    """σ_1 ≥ … ≥ σ_W of a window X, (W, P) → (W,)."""
    return np.asarray(scipy.linalg.svdvals(updates))


def gap_position_thesis(sigma: Array) -> int:
    """k* = argmax_j σ_j/σ_{j+1}, from 1 (arXiv 2603.28964)."""
    return max(range(1, len(sigma)), key=lambda j: sigma[j - 1] / sigma[j])


def gap_position(sigma: Array) -> int:
    """k* = argmax_j (σ_j/Σσ)(σ_j/σ_{j+1}), from 1."""
    total = sum(sigma)
    return max(range(1, len(sigma)), key=lambda j: sigma[j - 1] / total * sigma[j - 1] / sigma[j])


def gap(sigma: Array, k: int) -> float:
    """G = σ_k − σ_{k+1}."""
    return float(sigma[k - 1] - sigma[k])


def adiabaticity(updates: Array) -> float:
    """A = ‖G_t − G_{t−1}‖_F / g² of the last W of W + 1 updates, (W + 1, P)."""
    sigma = singular_values(updates[1:])
    change = scipy.linalg.norm(gram(updates[1:]) - gram(updates[:-1]))
    return float(change / gap(sigma, gap_position(sigma)) ** 2)


def adiabatic_parameter(updates: Array, lr: float) -> float:
    """𝒜 = ‖ΔG‖_F / (η g²) of the thesis."""
    return adiabaticity(updates) / lr


def stability(updates: Array) -> Array:
    """α_j = |⟨v_j(t), v_j(t−1)⟩| of the right singular directions, (W + 1, P) → (W,)."""
    _, _, now = scipy.linalg.svd(updates[1:], full_matrices=False)
    _, _, before = scipy.linalg.svd(updates[:-1], full_matrices=False)
    return np.asarray(np.abs((now * before).sum(1)))


def effective_rank(sigma: Array) -> float:
    """Exp of the entropy of σ/Σσ (Roy and Vetterli, 2007)."""
    return float(np.exp(scipy.stats.entropy(sigma)))


def coherence(updates: Array) -> float:
    """‖Σδ‖² / Σ‖δ‖²."""
    return float((updates.sum(0) ** 2).sum() / (updates**2).sum())


def decay_share(updates: Array, decay: Array) -> float:
    """‖X_d‖² / (‖X_d‖² + ‖X − X_d‖²) of a window X and its weight-decay part X_d, both (W, P)."""
    by_decay, by_gradient = (decay**2).sum(), ((updates - decay) ** 2).sum()
    return float(by_decay / (by_decay + by_gradient))


def distant_cosines(updates: Array, distances: Array, spans: Array, memory: int) -> list[float]:
    """Cosines of all pairs of updates per learning rate that begin at least `memory` steps apart.

    Args:
        updates: (n, P).
        distances: Σ lr × factor over the steps of each update, (n,).
        spans: optimizer steps in each, (n,).
        memory: optimizer steps.
    """
    start = [sum(spans[:i]) for i in range(len(spans))]
    directions = [x / distance for x, distance in zip(updates, distances, strict=True)]
    return [
        float(x @ y / (scipy.linalg.norm(x) * scipy.linalg.norm(y)))
        for i, x in enumerate(directions)
        for j, y in enumerate(directions)
        if start[j] - start[i] >= memory
    ]
