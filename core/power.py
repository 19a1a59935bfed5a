"""Power-function profiles: what an average over a training weighs, and what it is made from.

    p(tau) = (g + 1) tau^g / t^(g + 1),  0 <= tau <= t
    sigma_rel = ((g + 1) / ((g + 2)^2 (g + 3)))^0.5

sigma_rel is the standard deviation of the profile relative to t, from 0 (the last weights alone)
to 12^-0.5 (the plain mean of all, g = 0).

Reference: Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(EDM2), arXiv 2312.02696, section 3, appendix C, algorithms 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import AdapterLabError

Floats = NDArray[np.float64]
Snapshot = tuple[float, float]  # (t, sigma_rel) of an average that was tracked up to step t

WIDEST = 12**-0.5
_NARROWEST = 1e-6  # the last step alone, however long the training
_REPEATED = 1e-12  # singular values of the system, relative to the largest, that count as 0


def gamma(sigma_rel: float) -> float:
    """The exponent whose profile has the relative width ``sigma_rel``.

    The root, at least 0, of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) with s = sigma_rel.

    Raises:
        AdapterLabError: there is none: not in (0, 12^-0.5].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise AdapterLabError(
            "There is no average of this width",
            found=f"sigma_rel {sigma_rel}",
            expected="more than 0 and at most 0.2886, which is the plain mean of the whole "
            "training: nothing that grows with the step is wider",
        )
    inverse = max(sigma_rel, _NARROWEST) ** -2
    roots = [complex(r) for r in np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])]
    return max(0.0, *(root.real for root in roots if abs(root.imag) < 1e-9))


def weights(times: Sequence[float], sigma_rel: float = 0.15) -> Floats:
    """What each checkpoint weighs: the profile's mass since the one before; (n,), sums to 1.

    w_k = (t_k^(g + 1) - t_(k-1)^(g + 1)) / t_n^(g + 1), t_0 = 0

    Args:
        times: steps of the checkpoints, ascending, of any spacing.

    Raises:
        AdapterLabError: no times, not ascending or negative; no such width.
    """
    t = np.asarray(times, np.float64)
    if t.ndim != 1 or not len(t) or not t[-1] > 0 or t[0] < 0 or not bool((np.diff(t) > 0).all()):
        raise AdapterLabError(
            "These steps are no course of a training", found=f"{list(times)}"[:120],
            expected="one or more steps, each larger than the one before",
        )  # fmt: skip
    return np.diff(np.concatenate(([0.0], (t / t[-1]) ** (gamma(sigma_rel) + 1))))


def musubi_betas(
    n: int, beta: float = 0.95, beta2: float | None = None, sigma_rel: float | None = None
) -> list[float]:
    """The n - 1 decays with which musubi-tuner takes up the second to the last of ``n`` files.

    Constant; with ``beta2`` linear from ``beta`` to it; with ``sigma_rel`` (1 - 1/i)^(g + 1) for
    i = 1, 2, .., the first of which is 0.

    Raises:
        AdapterLabError: no files, a decay outside [0, 1], no such width.

    Reference: kohya-ss/musubi-tuner 30c658c, ``lora_post_hoc_ema.py``.
    """
    if n < 1:
        raise AdapterLabError("There is nothing to average", found=f"{n} files")
    if sigma_rel is not None:
        power = gamma(sigma_rel) + 1
        return [(1 - 1 / i) ** power for i in range(1, n)]
    last = beta if beta2 is None else beta2
    for value in (beta, last):
        if not 0 <= value <= 1:
            raise AdapterLabError(
                "This decay makes no average", found=f"beta {value}", expected="from 0 to 1"
            )
    return [beta + (last - beta) * (i / (n - 2)) if n > 2 else beta for i in range(n - 1)]


def unrolled(betas: Sequence[float]) -> Floats:
    """What each of n files weighs in the end where theta <- beta theta + (1 - beta) w; (n,)."""
    found = np.ones(len(betas) + 1)
    for i, beta in enumerate(betas):
        found[: i + 1] *= beta
        found[i + 1] = 1 - beta
    return found


def musubi_weights(
    n: int, beta: float = 0.95, beta2: float | None = None, sigma_rel: float | None = None
) -> Floats:
    """What each of ``n`` files weighs in the result of :func:`musubi_betas`; (n,), sums to 1."""
    return unrolled(musubi_betas(n, beta, beta2, sigma_rel))


def decays(found: Sequence[float]) -> list[float]:
    """The decays that lead to positive weights, of the second file to the last."""
    sums = np.cumsum(found)
    return [float(a / b) for a, b in zip(sums[:-1], sums[1:], strict=True)]


def solve(snapshots: Sequence[Snapshot], sigma_rel: float, t: float) -> Floats:
    """Coefficients whose sum of ``snapshots`` comes nearest to the profile of ``sigma_rel`` at
    ``t``; (n,), of either sign.

    The normal equations A x = b of least squares between profiles, A_ij = <p_i, p_j>,
    b_i = <p_i, p>, in float64; where snapshots repeat, the shortest of all solutions.

    Raises:
        AdapterLabError: no snapshots, a step that is not positive, no such width.
    """
    system, target, _ = _system(snapshots, sigma_rel, t)
    # Profiles of unit length: the condition number no longer grows with the range of steps.
    unit = np.sqrt(system.diagonal())
    return np.linalg.lstsq(system / np.outer(unit, unit), target / unit, _REPEATED)[0] / unit


def profile_error(
    snapshots: Sequence[Snapshot], coefficients: Sequence[float], sigma_rel: float, t: float
) -> float:
    """||sum x_i p_i - p|| / ||p|| of the profiles, in L2."""
    system, target, own = _system(snapshots, sigma_rel, t)
    x = np.asarray(coefficients, np.float64)
    return math.sqrt(max(0.0, float(1 - 2 * (x @ target) / own + x @ system @ x / own)))


def dot(a: tuple[Floats, Floats], b: tuple[Floats, Floats]) -> Floats:
    """The integrals of p_a p_b for arrays (t, g) of profiles, broadcast."""
    (ta, ga), (tb, gb) = a, b
    later = np.where(ta < tb, gb, ga)
    ratio = np.minimum(ta, tb) / np.maximum(ta, tb)
    return (ga + 1) * (gb + 1) * ratio**later / ((ga + gb + 1) * np.maximum(ta, tb))


def density(snapshots: Sequence[Snapshot], coefficients: Sequence[float], at: Floats) -> Floats:
    """sum x_i p_i(tau) at the steps ``at``; the shape of ``at``."""
    found = np.zeros_like(at)
    for (t, width), x in zip(snapshots, coefficients, strict=True):
        g = gamma(width)
        found += np.where(at <= t, x * (g + 1) * (np.minimum(at, t) / t) ** g / t, 0.0)
    return found


def width(times: Sequence[float], found: Sequence[float]) -> float:
    """The standard deviation of positive weights over the steps, relative to the last step."""
    t = np.asarray(times, np.float64) / times[-1]
    w = np.asarray(found, np.float64) / float(np.sum(found))
    return math.sqrt(max(0.0, float(w @ t**2 - (w @ t) ** 2)))


def _system(
    snapshots: Sequence[Snapshot], sigma_rel: float, t: float
) -> tuple[Floats, Floats, float]:
    """A (n, n), b (n,) and <p, p> of the wanted profile."""
    if not snapshots or not t > 0 or not all(step > 0 for step, _ in snapshots):
        raise AdapterLabError(
            "Nothing to reconstruct an average from",
            found=f"{len(snapshots)} snapshots, end step {t}",
            expected="snapshots after step 1 or later",
        )
    exponents = {s: gamma(s) for s in dict.fromkeys(s for _, s in snapshots)}
    times = np.array([float(step) for step, _ in snapshots])
    powers = np.array([exponents[s] for _, s in snapshots])
    wanted = np.array([float(t)]), np.array([gamma(sigma_rel)])
    system = dot((times[:, None], powers[:, None]), (times[None], powers[None]))
    return system, dot((times, powers), wanted), float(dot(wanted, wanted)[0])
