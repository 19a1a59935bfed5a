"""The gradient of one step: how long it is, shortening it, and whether every module has one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..errors import AdapterLabError

# Not in torch's documentation, but what its own optimizers and clipping are made of.
_foreach_norm = cast(Any, torch._foreach_norm)  # pyright: ignore
_foreach_mul_ = cast(Any, torch._foreach_mul_)  # pyright: ignore


def numbers(tensor: Tensor) -> list[float]:
    """The values of a tensor with one axis."""
    return cast("list[float]", cast(Any, tensor).tolist())


def lengths(factors: Sequence[Tensor], scale: float) -> Tensor:
    """The length of each factor's gradient in float32, 0 where there is none, (n,).

    The gradients lose ``scale``, which the loss was multiplied by.
    """
    found = [factor.grad for factor in factors]
    gradients = [g for g in found if g is not None]
    if gradients and scale != 1:
        _foreach_mul_(gradients, 1 / scale)
    device = factors[0].device
    made = iter(_foreach_norm(gradients, 2.0, torch.float32) if gradients else ())
    zero = torch.zeros((), device=device)
    return torch.stack([zero if g is None else next(made).to(device) for g in found])


def joint(found: Tensor) -> Tensor:
    """The length of all gradients together, by what :func:`lengths` found."""
    return found.square().sum().sqrt()


def shorten(factors: Sequence[Tensor], length: float, most: float) -> None:
    """Shorten the gradient of all factors together, which has this length, to ``most``; 0: not.

    Reference: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks",
    algorithm 1.
    """
    if most and length > most:
        _foreach_mul_([f.grad for f in factors if f.grad is not None], most / length)


def idle(adapters: Mapping[str, Algorithm], found: Tensor) -> tuple[str, ...]:
    """The modules whose gradients are all zero, by what :func:`lengths` found at a first step.

    Zeros at one step may be chance: the input of a layer can be zero, such as an empty prompt.

    Raises:
        AdapterLabError: all modules are idle, or one is no part of the computation at all.
    """
    owners = [path for path, _ in _owned(adapters)]
    learning = {p for p, value in zip(owners, numbers(found), strict=True) if value}
    # What is left out of a step by its own dropout tells nothing.
    judged = {path: a for path, a in adapters.items() if path in owners and not a.draws}
    cut = [p for p, a in judged.items() if all(t.grad is None for t in a.trained.values())]
    if cut:
        raise AdapterLabError(
            f"{len(cut)} modules take no part in the model's computation and would learn nothing",
            found=listed(cut),
            fix="Exclude them in the targets",
        )
    if judged and not learning:
        raise AdapterLabError(
            "No module learns anything: all gradients of the first step are zero",
            found=listed(list(adapters)),
            fix="Check that the model makes pictures, and the weights and masks of the dataset",
        )
    return tuple(path for path in judged if path not in learning)


def infinite(adapters: Mapping[str, Algorithm], found: Tensor) -> list[str]:
    """The modules whose gradient is not finite, by what :func:`lengths` found."""
    pairs = zip(_owned(adapters), numbers(found), strict=True)
    return list(dict.fromkeys(path for (path, _), value in pairs if not math.isfinite(value)))


def listed(paths: Sequence[str]) -> str:
    """The first of ``paths`` and how many more there are."""
    return f"{', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}"


def _owned(adapters: Mapping[str, Algorithm]) -> list[tuple[str, str]]:
    """(module, suffix) of each factor in the order of :attr:`.optim.Optimizer.factors`."""
    return [(path, suffix) for path in sorted(adapters) for suffix in adapters[path].trained]
