"""The spectrum of a window of updates: singular values, gap, adiabaticity, regime.

Everything here is a pure function of a Gram matrix of at most a few dozen rows, on the host, in
float64. The letters are those of The Spectral Edge Thesis (arXiv 2603.28964); `reference.py` computes
the same figures from the updates themselves.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_UPDATES = 4

# Bounds on the scale-free adiabaticity a. The thesis puts its borders at 𝒜 ≪ 1, ~ 1 and ≫ 1; a = η𝒜 was
# measured at 0.005–0.03 on grokking plateaus, 0.05–3 in ordinary training, 10–10⁴ at loss spikes.
REGIME_BOUNDS: dict[str, tuple[float, float]] = {
    "plateau": (0.0, 0.1),
    "steady": (0.1, 1.0),
    "transition": (1.0, 10.0),
    "forgetting": (10.0, float("inf")),
}

# Modes whose σ² is below this share of σ_1² are rounding errors of the Gram matrix.
_RESOLUTION = 1e-12


@dataclass(frozen=True)
class Spectrum:
    """What a window of W updates shows.

    Attributes:
        sigma: singular values σ_1 ≥ … ≥ σ_W of the window, in units of ‖θ‖.
        gap_position: k*, weighted by signal: argmax_j (σ_j/Σσ)(σ_j/σ_{j+1}), from 1 to W − 1.
        gap_position_thesis: k* of the thesis: argmax_j σ_j/σ_{j+1}.
        gap_ratio: R = σ_{k*}/σ_{k*+1}.
        gap: g = σ_{k*} − σ_{k*+1}, in units of ‖θ‖.
        g23: λ_2 − λ_3 of the Gram matrix, in units of ‖θ‖².
        change: ‖ΔG‖_F between this window and the one before, in units of ‖θ‖².
        adiabaticity: the scale-free a = ‖ΔG‖_F / g²; infinite without a gap.
        adiabatic_parameter: 𝒜 = a/η of the thesis; infinite at learning rate 0.
        alpha: stability |⟨v_j(t), v_j(t−1)⟩| of each right singular direction; NaN where there is none.
        effective_rank: exp of the entropy of σ/Σσ (Roy and Vetterli, 2007), 1 to W.
        coherence: ‖Σδ‖²/Σ‖δ‖²: W for collinear updates, 1 for white noise, less when they oscillate.
        decay_share: share of weight decay in the window's energy, ‖X_d‖²/(‖X_d‖² + ‖X − X_d‖²); None
            where it cannot be told.
        update_norm: root mean square norm of an update.
    """

    sigma: Array
    gap_position: int
    gap_position_thesis: int
    gap_ratio: float
    gap: float
    g23: float
    change: float
    adiabaticity: float
    adiabatic_parameter: float
    alpha: Array
    effective_rank: float
    coherence: float
    decay_share: float | None
    update_norm: float

    @property
    def regime(self) -> str:
        """The name of the regime that a lies in, "undetermined" when a is not known."""
        return regime(self.adiabaticity)

    def as_record(self) -> dict[str, Any]:
        """The spectrum as plain numbers and lists, for the history."""
        return {**vars(self), "sigma": self.sigma.tolist(), "alpha": self.alpha.tolist()}


def regime(adiabaticity: float) -> str:
    """Name the regime of a scale-free adiabaticity.

    Example:
        >>> [regime(a) for a in (0.01, 0.5, 3.0, 1e4, float("nan"))]
        ['plateau', 'steady', 'transition', 'forgetting', 'undetermined']
    """
    for name, (low, high) in REGIME_BOUNDS.items():
        if low <= adiabaticity < high:
            return name
    return "forgetting" if adiabaticity == float("inf") else "undetermined"


def decompose(gram: Array) -> tuple[Array, Array]:
    """Singular values and left singular directions of a window from its Gram matrix G = XXᵀ.

    Args:
        gram: (W, W), symmetric and positive semi-definite.

    Returns:
        σ of shape (W,), descending, and U of shape (W, W) with one direction a column.
    """
    eigenvalues, directions = np.linalg.eigh(gram)
    return np.sqrt(np.maximum(eigenvalues[::-1], 0.0)), directions[:, ::-1]


def gap_position(sigma: Array, *, weighted: bool = True) -> int:
    """The position k* of the spectral gap, counted from 1.

    Args:
        sigma: singular values, descending, at least two.
        weighted: True for argmax_j (σ_j/Σσ)(σ_j/σ_{j+1}), which does not jump into the tail; False for
            argmax_j σ_j/σ_{j+1} of the thesis (arXiv 2603.28964, definition of the gap position).

    Example:
        >>> sigma = np.array([10.0, 5.0, 1.0, 0.1])
        >>> gap_position(sigma), gap_position(sigma, weighted=False)
        (2, 3)
    """
    return _position(sigma, gap_ratios(sigma), weighted=weighted)


def _position(sigma: Array, ratios: Array, *, weighted: bool) -> int:
    return int((sigma[:-1] * ratios if weighted else ratios).argmax()) + 1


def gap_ratios(sigma: Array) -> Array:
    """σ_j/σ_{j+1} for j = 1 … W − 1; σ below what float64 Gram matrices resolve count as that limit."""
    resolved = np.maximum(sigma, sigma[0] * sqrt(_RESOLUTION))
    return np.asarray(resolved[:-1] / resolved[1:])


def adiabaticity(extended: Array) -> float:
    """The scale-free a = ‖G_t − G_{t−1}‖_F / g², with the weighted gap position.

    Args:
        extended: Gram matrix of W + 1 updates, (W + 1, W + 1), the oldest first.

    Returns:
        a; infinite without a gap.
    """
    sigma, _ = decompose(extended[1:, 1:])
    k = gap_position(sigma)
    return _ratio(_change(extended), float(sigma[k - 1] - sigma[k]))


def _change(extended: Array) -> float:
    difference = (extended[1:, 1:] - extended[:-1, :-1]).ravel()
    return sqrt(difference.dot(difference))


def _ratio(change: float, gap: float) -> float:
    return change / gap**2 if gap > 0 else float("inf")


def effective_rank(sigma: Array) -> float:
    """Exp of the entropy of σ/Σσ.

    Example:
        >>> round(effective_rank(np.array([1.0, 1.0, 0.0])), 6)
        2.0
    """
    share = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def stability(extended: Array, sigma: Array, directions: Array) -> Array:
    """α_j = |⟨v_j(t), v_j(t−1)⟩| from inner products alone, since v_j = Xᵀu_j/σ_j.

    Args:
        extended: Gram matrix of W + 1 updates, (W + 1, W + 1), the oldest first.
        sigma: σ of the newest W of them.
        directions: U of the newest W of them.

    Returns:
        (W,), NaN for modes that are not resolved.
    """
    sigma_before, directions_before = decompose(extended[:-1, :-1])
    overlap = np.einsum("aj,ab,bj->j", directions, extended[1:, :-1], directions_before)
    norm = sigma * sigma_before
    resolved = norm > norm[0] * sqrt(_RESOLUTION)
    alpha = np.full(len(sigma), np.nan)
    alpha[resolved] = np.abs(overlap[resolved] / norm[resolved])
    return np.asarray(np.minimum(alpha, 1.0))


def spectrum(
    extended: Array,
    *,
    lr: float,
    window: int,
    decay_gram: Array | None = None,
    decay_cross: Array | None = None,
) -> Spectrum | None:
    """Everything that is said about a window of updates.

    Args:
        extended: Gram matrix of the last n <= W + 1 updates, (n, n), the oldest first. Updates that are
            exactly zero (skipped steps) are left out.
        lr: learning rate η, for 𝒜.
        window: W.
        decay_gram: Gram matrix of the updates' weight-decay parts, (n, n), or None.
        decay_cross: inner products of updates (rows) with decay parts (columns), (n, n), or None.

    Returns:
        None with fewer than MIN_UPDATES non-zero updates. With n <= W of them the spectrum is that of
        n − 1 updates, so that there is a window before it to compare with.

    Raises:
        ValueError: the matrix holds NaN or infinity.

    Example:
        >>> X = np.diag([4.0, 3.0, 2.0, 1.0])
        >>> spectrum(X @ X.T, lr=0.1, window=3).sigma
        array([3., 2., 1.])
    """
    if not np.isfinite(extended).all():
        raise ValueError("the window holds NaN or infinite updates")
    moved = (extended.diagonal() > 0).nonzero()[0][-(window + 1) :]
    if len(moved) < MIN_UPDATES:
        return None
    kept = np.ix_(moved, moved) if len(moved) < len(extended) else ...
    extended = extended[kept]
    gram = extended[1:, 1:]
    energy = float(gram.trace())
    sigma, directions = decompose(gram)
    ratios = gap_ratios(sigma)
    k = _position(sigma, ratios, weighted=True)
    gap = float(sigma[k - 1] - sigma[k])
    change = _change(extended)
    a = _ratio(change, gap)
    share = None
    if decay_gram is not None and decay_cross is not None:
        decay = float(decay_gram[kept][1:, 1:].trace())
        cross = float(decay_cross[kept][1:, 1:].trace())
        rest = energy - 2 * cross + decay
        share = decay / (decay + rest) if decay + rest > 0 else 0.0
    return Spectrum(
        sigma=sigma,
        gap_position=k,
        gap_position_thesis=_position(sigma, ratios, weighted=False),
        gap_ratio=float(ratios[k - 1]),
        gap=gap,
        g23=float(sigma[1] ** 2 - sigma[2] ** 2),
        change=change,
        adiabaticity=a,
        adiabatic_parameter=a / lr if lr > 0 else float("inf"),
        alpha=stability(extended, sigma, directions),
        effective_rank=effective_rank(sigma),
        coherence=float(gram.sum()) / energy,
        decay_share=share,
        update_norm=sqrt(energy / len(gram)),
    )
