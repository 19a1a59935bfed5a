"""Deltas of any algorithm as products of thin matrices, and LoRA factors of what they sum to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Algorithm, Ordered
from ..adapters.hra import HRA
from ..adapters.loha import LoHa
from ..adapters.lokr import LoKr
from ..adapters.lora import DOWN, UP, LoRA
from ..adapters.padded import Padded
from ..adapters.thin import Thin
from ..adapters.wrapper import Acting
from ..errors import AdapterLabError
from ..files import is_finite
from ..lowrank import Spectrum, dense, factored, until
from ..tensors import inner, khatri_rao, kron, wide
from .ranks import RankRule

Pair = tuple[Tensor, Tensor]
Shape = Sequence[int]
_START = 32  # singular values to begin with where a rule does not say how many it takes


def pairs(algorithm: Algorithm, weight: Tensor | None = None) -> list[Pair] | None:
    """Factors with dW.flatten(1) = sum_i up_i down_i exactly, scale included; None where the
    algorithm has none that are thinner than dW.

    Args:
        weight: W (out, in, *k), float32, of what takes it to know (VeRA its shape, HRA, T-LoRA
            its values); None where it is not known.

    Returns:
        (up (out, r), down (r, in * prod(k))), wide.
    """
    found = _pairs(algorithm, weight)
    if found is None or sum(up.shape[1] for up, _ in found) >= min(_flat(algorithm, weight)):
        return found if isinstance(algorithm, LoRA) else None
    return found


def spectrum_of(
    terms: Sequence[tuple[Algorithm, float]],
    rule: RankRule,
    shape: Shape,
    *,
    weight: Tensor | None = None,
    exact: bool = False,
    seed: int = 0,
) -> Spectrum:
    """Singular values and vectors of sum_i ratio_i dW_i, as many as ``rule`` takes.

    From the thin factors where all have them and that is cheaper than the dense sum.

    Args:
        shape: (out, in, *k) of dW. weight: W, float32, where an algorithm depends on it.
        exact: no random sketch of a dense sum.

    Raises:
        AdapterLabError: an algorithm depends on W and that is not given; NaN or infinity.
    """
    scaled = [a.at(ratio) for a, ratio in terms]
    if len(scaled) == 1 and isinstance(scaled[0], LoKr):
        return _kronecker(scaled[0], rule.cap(shape))
    thin = [pairs(a, weight) for a in scaled]
    known = [pair for some in thin if some is not None for pair in some]
    if all(some is not None for some in thin) and _is_cheaper(known, rule.cap(shape), shape, exact):
        return factored(known)
    total = dense_sum(terms, shape, weight=weight).flatten(1)
    return decomposed(total, rule, shape, exact=exact, seed=seed)


def decomposed(
    matrix: Tensor, rule: RankRule, shape: Shape, *, exact: bool = False, seed: int = 0
) -> Spectrum:
    """Singular values and vectors of (out, in * prod(k)), as many as ``rule`` takes.

    Args:
        shape: (out, in, *k). exact: no random sketch.
    """
    if exact or rule.rule == "sv_cumulative":
        return dense(matrix, 0, exact=True)
    if rule.rule == "fixed":
        return dense(matrix, rule.cap(shape), seed=seed)
    start = min(_START, rule.cap(shape))
    return until(matrix, lambda found: rule.settled(found, shape), start=start, seed=seed)


def dense_sum(
    terms: Sequence[tuple[Algorithm, float]], shape: Shape, *, weight: Tensor | None = None
) -> Tensor:
    """sum_i ratio_i dW_i, (out, in, *k), float32; raises as :func:`spectrum_of`."""
    total = torch.zeros(tuple(shape))
    for algorithm, ratio in terms:
        if weight is None and algorithm.reads_weight:
            raise AdapterLabError(
                f"{algorithm.title}{' with DoRA' if 'DoRA' in algorithm.traits else ''} depends on "
                "the weight it changes, which is not known",
                fix="Give the model that the adapter is for",
            )
        like = torch.zeros(()).expand(tuple(shape)) if weight is None else weight
        total += algorithm.at(ratio).delta(like).reshape(total.shape)
    return total


def lora_of(
    spectrum: Spectrum,
    rank: int,
    shape: Shape,
    dtype: torch.dtype,
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """LoRA tensors by canonical suffix of the first ``rank`` singular values.

    Both factors get sqrt(S), so that values of float16 and bfloat16 hold either alike.

    Args:
        shape: (out, in, *k) of the weight: up is (out, r, 1, ..) and down (r, in, *k).
        alpha: None is the rank, a scale of 1; else the factors are divided by the scale.

    Raises:
        AdapterLabError: alpha 0, or a value that does not fit into ``dtype``.
    """
    rank = max(1, min(rank, len(spectrum.s)))
    scale = 1.0 if alpha is None else alpha / rank
    if not scale:
        raise AdapterLabError("An alpha of 0 is a delta of zeros", found="alpha 0")
    root = (spectrum.s[:rank] / abs(scale)).sqrt()
    up = spectrum.u[:, :rank] * (root * math.copysign(1.0, scale))
    down = spectrum.vh[:rank] * root[:, None]
    factors = {
        UP: up.reshape(len(up), rank, *(1 for _ in shape[2:])),
        DOWN: down.reshape(rank, *shape[1:]),
    }
    found = {name: cast(t, dtype, name) for name, t in factors.items()}
    return {**found, "alpha": torch.tensor(float(rank if alpha is None else alpha))}


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` on the CPU in ``dtype``; AdapterLabError for values that do not fit."""
    made = tensor.to("cpu", dtype).contiguous()
    if not is_finite(made):
        short = str(dtype).removeprefix("torch.")
        raise AdapterLabError(f"'{name}' does not fit into {short}", fix="Choose another dtype")
    return made


def _pairs(algorithm: Algorithm, weight: Tensor | None) -> list[Pair] | None:
    match algorithm:
        case Acting():
            return _pairs(algorithm.acting, weight)
        case Padded():
            return _pairs(algorithm.inner, weight)
        case Ordered():
            theirs = None if weight is None else weight[algorithm.order]
            found = _pairs(algorithm.inner, theirs)
            return found and [(up[algorithm.inverse], down) for up, down in found]
        case Thin() | HRA():
            return None if weight is None else _pairs(algorithm.settled(weight), None)
        case LoRA():
            up, down, mid = algorithm.factors(algorithm.tensors[DOWN])
            return [(up, down if mid is None else inner(mid, down).flatten(1))]
        case LoHa():
            form = algorithm.form(algorithm.tensors["hada_w1_a"])
            b1, a1, b2, a2 = (wide(t, t) for t in form.tensors)
            return [(khatri_rao(b1, b2) * form.scale, khatri_rao(a1.T, a2.T).T)]
        case LoKr():
            first, second = _halves(algorithm)
            up, down = (kron(one, two) for one, two in zip(first, second, strict=True))
            return [(up, down)]
        case _:
            return None


def _halves(lokr: LoKr) -> tuple[Pair, Pair]:
    """s W1 and W2 (c, d * prod(k)) as products, either factor of a full one being the identity."""
    found: list[Pair] = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in lokr.tensors:
            matrix = wide(lokr.tensors[name], lokr.tensors[name]).flatten(1)
            rows, columns = matrix.shape
            unit = torch.eye(min(rows, columns), dtype=matrix.dtype)
            found.append((unit, matrix) if rows <= columns else (matrix, unit))
            continue
        a, b = (wide(lokr.tensors[name + end], lokr.tensors[name + end]) for end in ("_a", "_b"))
        core = lokr.tensors.get("lokr_t2") if name == "lokr_w2" else None
        if core is not None:
            found.append((a.T, inner(wide(core, b), b).flatten(1)))
        else:
            found.append((a.flatten(1), b.flatten(1)))
    (left, right), second = found
    return (left * lokr.scale, right), second


def _kronecker(lokr: LoKr, rank: int) -> Spectrum:
    """Of W1 (x) W2: its singular values are the products of theirs."""
    first, second = (factored([half]) for half in _halves(lokr))
    s, order = torch.outer(first.s, second.s).flatten().sort(descending=True, stable=True)
    kept = order[:rank]
    i, j = kept // len(second.s), kept % len(second.s)
    u = (first.u[:, None, i] * second.u[None, :, j]).flatten(0, 1)
    vh = (first.vh[i, :, None] * second.vh[j, None, :]).flatten(1)
    total, rest = (math.sqrt(float(t.double().square().sum())) for t in (s, s[rank:]))
    return Spectrum(u, s[:rank], vh, total, float(s.double().sum()), rest)


def _is_cheaper(known: Sequence[Pair], cap: int, shape: Shape, exact: bool) -> bool:
    """Whether factors are decomposed in fewer multiplications than their dense sum."""
    out, width = shape[0], math.prod(shape[1:])
    r, small, big = sum(up.shape[1] for up, _ in known), min(out, width), out * width
    thin = 4 * (out + width) * r * r + 30 * min(r, small) ** 3
    whole = exact or 4 * cap >= small
    return thin <= 2 * big * r + (4 * big * small + 40 * small**3 if whole else 24 * big * cap)


def _flat(algorithm: Algorithm, weight: Tensor | None) -> tuple[int, int]:
    shape = algorithm.shape if weight is None else weight.shape
    return shape[0], math.prod(shape[1:])
