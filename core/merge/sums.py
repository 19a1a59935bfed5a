"""Exact sums of deltas: as one of their own algorithm, as LoRA side by side, or dense."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..adapters.full import Full, Replaced
from ..adapters.loha import HALVES, LoHa
from ..adapters.lokr import W1, W2, LoKr
from ..adapters.lora import DOWN, MID, UP, UP_BIAS, LoRA
from ..adapters.padded import RESHAPE, Padded
from ..errors import AdapterLabError
from ..tensors import wide
from .factors import cast, dense_sum, pairs
from .kept import as_stored
from .modules import Module

Terms = Sequence[tuple[Algorithm, float]]  # each with the ratio that its delta is taken at
Suffixed = dict[str, Tensor]
Part = tuple[Tensor, Tensor, float]  # up (out, r), down (r, in * prod(k)) and what multiplies them


def kept(module: Module, ratio: float) -> Suffixed | None:
    """A whole module at ``ratio`` as it is, by canonical suffix; None where no file can say that.

    At 1 bit by bit; else the tensors stay but for a sign, and alpha has the ratio.
    """
    weight = module.weight
    if ratio == 1:
        told = weight is None or getattr(weight, "told", True)
        return as_stored(module) if told else None
    if any(part.reads_weight for part in module.parts.values()):
        return None
    derived = weight is not None and weight.bias is not None
    own = [p for name, p in module.parts.items() if name == "weight" or not derived]
    return {s: t for part in own for s, t in times(part, ratio).state().items()}


def times(algorithm: Algorithm, ratio: float) -> Algorithm:
    """``algorithm`` at ``ratio``: a sign turns a factor, bit by bit; the rest goes into alpha."""
    names = [n for n in (*algorithm.folds, UP_BIAS) if n in algorithm.tensors]
    if ratio >= 0 or not algorithm.folds or not names:
        return algorithm.at(ratio)
    turned = {name: -algorithm.tensors[name] for name in names}
    return algorithm.on({**algorithm.tensors, **turned}).at(-ratio)


def folded(terms: Terms) -> list[tuple[Algorithm, float]]:
    """``terms`` with those of the same factors as one, and without those that cancel out."""
    found: list[tuple[Algorithm, float]] = []
    for algorithm, ratio in terms:
        for i, (other, known) in enumerate(found):
            if _same(algorithm, other):
                found[i] = (other, known + ratio * algorithm.scale / other.scale)
                break
        else:
            found.append((algorithm, ratio))
    return [term for term in found if term[1] != 0]


def _same(one: Algorithm, two: Algorithm) -> bool:
    return (
        type(one) is type(two)
        and not one.reads_weight
        and two.scale != 0
        and one.tensors.keys() == two.tensors.keys()
        and all(_equal(t, two.tensors[n]) for n, t in one.tensors.items())
    )


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)


def common_shape(terms: Terms, weight: Tensor | None = None) -> tuple[int, ...]:
    """Shape of the weight that all of them fit, (out, in, *k) as far as they tell it.

    Raises:
        AdapterLabError: they do not fit one weight.
    """
    largest = [tuple(a.shape) for a, _ in terms if isinstance(a, Padded)]
    # VeRA's is as wide as the widest layer of its file.
    shapes = sorted({tuple(a.shape) for a, _ in terms}, key=lambda s: (-len(s), math.prod(s)))
    given = [] if weight is None else [tuple(weight.shape)]
    for shape in (*largest, *given, *shapes):
        if all(a.misfit(shape) is None for a, _ in terms):
            return shape
    raise AdapterLabError(
        "Deltas of different shapes cannot be added",
        found=", ".join(dict.fromkeys(f"{a.title} {tuple(a.shape)}" for a, _ in terms)),
        expected="adapters of one model",
    )


def together(terms: Terms, dtype: torch.dtype) -> Suffixed | None:
    """The sum in the terms' own algorithm; None where that has no exact form.

    (B A) o (B1 A1) + (B A) o (B2 A2) = (B A) o ([B1 B2] [A1; A2]), and likewise for
    W (x) W1 + W (x) W2.
    """
    if all(type(a) is LoHa for a, _ in terms):
        return _hadamard(terms, dtype)
    if all(type(a) is LoKr and W1 in a.tensors for a, _ in terms):
        return _kronecker(terms, dtype)
    return None


def _hadamard(terms: Terms, dtype: torch.dtype) -> Suffixed | None:
    first = terms[0][0].tensors
    for (a, b, core), (other_a, other_b, other_core) in (HALVES, HALVES[::-1]):
        alike = all(_equal(t.tensors[n], first[n]) for t, _ in terms for n in (a, b))
        if not alike or core in first or other_core in first:
            continue
        parts = [(t.tensors[other_a], t.tensors[other_b], t.scale * r) for t, r in terms]
        left, right, scale = _side_by_side(parts, dtype)
        made = {a: cast(first[a], dtype, a), b: cast(first[b], dtype, b), other_a: left,
                other_b: right}  # fmt: skip
        return {**made, "alpha": torch.tensor(scale * len(made["hada_w1_b"]))}
    return None


def _kronecker(terms: Terms, dtype: torch.dtype) -> Suffixed | None:
    first, names = terms[0][0].tensors, terms[0][0].tensors.keys()
    if any(a.tensors.keys() != names or not _equal(a.tensors[W1], first[W1]) for a, _ in terms):
        return None
    outer = {W1: cast(first[W1], dtype, W1)}
    if W2 in names:
        if len({a.tensors[W2].shape for a, _ in terms}) > 1:
            return None
        total = sum(wide(a.tensors[W2], a.tensors[W2]) * (a.scale * ratio) for a, ratio in terms)
        assert isinstance(total, Tensor)
        return {**outer, W2: cast(total, dtype, W2), "alpha": torch.tensor(terms[0][0].alpha)}
    a, b = W2 + "_a", W2 + "_b"
    if names != {W1, a, b} or len({t.tensors[b].shape[1:] for t, _ in terms}) > 1:
        return None
    parts = [(t.tensors[a], t.tensors[b], t.scale * ratio) for t, ratio in terms]
    left, right, scale = _side_by_side(parts, dtype)
    return {**outer, a: left, b: right, "alpha": torch.tensor(scale * len(right))}


def thin_parts(terms: Terms, weight: Tensor | None = None) -> list[Part] | None:
    """The factors of all terms; None where one has none. Those of LoRA are those of the file."""
    found: list[Part] = []
    for algorithm, ratio in terms:
        inner = algorithm.inner if isinstance(algorithm, Padded) else algorithm
        if type(inner) is LoRA and MID not in inner.tensors:
            up, down = (inner.tensors[name].flatten(1) for name in (UP, DOWN))
            found.append((up, down, inner.scale * ratio))
            continue
        thin = pairs(algorithm.at(ratio), weight)
        if thin is None:
            return None
        found += [(up, down, 1.0) for up, down in thin]
    return found


def concatenated(parts: Sequence[Part], shape: Sequence[int], dtype: torch.dtype) -> Suffixed:
    """LoRA whose delta is exactly the sum: the factors side by side, rank the sum of ranks.

    Raises:
        AdapterLabError: a value that does not fit into ``dtype``.
    """
    up, down, scale = _side_by_side([p for p in parts if p[2]] or parts[:1], dtype)
    rank, units = len(down), (1,) * (len(shape) - 2)
    return {
        UP: up.reshape(len(up), rank, *units),
        DOWN: down.reshape(rank, *shape[1:]),
        "alpha": torch.tensor(scale * rank),
    }


def _side_by_side(parts: Sequence[Part], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """[f1 B1 f2 B2 ..], [A1; A2; ..] and s with s f_i = s_i; most f_i are powers of two."""
    scale = _common(parts)
    ups: list[Tensor] = []
    for up, _, own in parts:
        factor = own / scale
        ups.append(cast(up if factor == 1 else wide(up, up) * factor, dtype, UP))
    downs = [cast(down.flatten(1), dtype, DOWN) for _, down, _ in parts]
    return torch.cat(ups, 1), torch.cat(downs), scale


def _common(parts: Sequence[Part]) -> float:
    """The scale under which most numbers of the factors keep their bits, fractions apart."""

    def untouched(scale: float) -> int:
        ratios = ((up.numel(), own / scale) for up, _, own in parts)
        return sum(size for size, ratio in ratios if abs(math.frexp(ratio)[0]) == 0.5)

    return max(dict.fromkeys(abs(own) for *_, own in parts if own), key=untouched, default=1.0)


def dense(
    terms: Terms, shape: Sequence[int], dtype: torch.dtype, weight: Tensor | None = None,
    usual: type[Full] = Full,
) -> Suffixed:  # fmt: skip
    """The sum as a difference of the whole weight or bias; raises as :func:`dense_sum`.

    Args:
        usual: what it is where the terms are not all of one sort of difference.
    """
    kinds = {type(a) for a, _ in terms}
    kind = kinds.pop() if len(kinds) == 1 else usual
    own = issubclass(kind, Full) and not issubclass(kind, Replaced)
    name = (kind if own else usual).suffixes[0]
    return {name: cast(dense_sum(terms, shape, weight=weight), dtype, name)}


def reshaped(terms: Terms) -> Suffixed:
    """What a file says of a weight that the terms enlarge; nothing where they don't."""
    found = [a.tensors[RESHAPE] for a, _ in terms if isinstance(a, Padded)]
    return {RESHAPE: found[0]} if found else {}
