"""Factors and numbers of files, or what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..errors import AdapterLabError

Tensors = Mapping[str, Tensor]


def require(factors: Tensors, *names: str) -> list[Tensor]:
    """The factors of these names; raises AdapterLabError when one of them is missing."""
    missing = ", ".join(name for name in names if name not in factors)
    if missing:
        raise AdapterLabError("A factor is missing", found=", ".join(factors), expected=missing)
    return [factors[name] for name in names]


def check_product(fits: bool, factors: Tensors, *names: str) -> None:
    """Raise AdapterLabError with the shapes of the named factors unless they fit together."""
    if not fits:
        found = ", ".join(f"{name} {tuple(factors[name].shape)}" for name in names)
        raise AdapterLabError("The factors do not multiply", found=found)


def read_scale(tensors: Tensors, rank: int, scale: float | None) -> float:
    """s = alpha / rank; ``scale`` from outside wins; a missing alpha means 1.

    Raises:
        AdapterLabError: rank 0, or an alpha that is no finite number.
    """
    if rank < 1:
        raise AdapterLabError("The rank is 0", expected="factors with at least one rank channel")
    if scale is not None:
        return scale
    return read_number(tensors, "alpha", rank) / rank


def read_number(tensors: Tensors, name: str, default: float, *, finite: bool = True) -> float:
    """The number that the tensor ``name`` holds; ``default`` without it.

    Raises:
        AdapterLabError: it has several values or none, or one that is complex, NaN or, unless
            ``finite`` is off, infinite.
    """
    tensor = tensors.get(name)
    if tensor is None:
        return default
    if tensor.numel() != 1 or tensor.is_complex():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise AdapterLabError(
            f"{name} is not a number",
            found=f"a tensor of shape {tuple(tensor.shape)}, {dtype}",
            expected="one value",
        )
    value = float(tensor.item())
    if math.isnan(value) or (finite and math.isinf(value)):
        raise AdapterLabError(f"{name} is not finite", found=str(value))
    return value
