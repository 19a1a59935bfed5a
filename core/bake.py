"""Adapters into weights: the one place outside a live model where a delta meets a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .archs import ArchSpec
from .keys import Entry, Report, resolve
from .keys.names import Override


def apply(weight: Tensor, entries: Iterable[Entry], strength: float = 1.0) -> Tensor:
    """W + m * dW of every entry, in place, each on its own range of the weight.

    Args:
        weight: float32 (out, in, *k), overwritten. entries: all of this one weight.
        strength: m.
    """
    for entry in entries if strength else ():
        part = weight if entry.slice is None else weight.narrow(*entry.slice)
        part.add_(entry.algorithm.delta(part), alpha=strength)
    return weight


def merge_into(
    weights: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    strength: float = 1.0,
    *,
    targets: Mapping[str, Override] | None = None,
    architecture: str | ArchSpec | None = None,
) -> tuple[dict[str, Tensor], Report]:
    """New float32 tensors for the weights that ``adapter`` changes, and what matched.

    Args:
        weights: any state dict; left as it is.
        strength: m in W + m * dW; 0 gives the weights themselves, bit by bit.
        targets: stem -> module of ``weights``, or (module, axis, offset, length); goes before
            matching by name.
        architecture: id or entry; found out from the names in ``weights`` by default.

    Raises:
        AdapterLabError: as :func:`~core.keys.resolve.resolve`. Nothing matching is no error here:
            the report says so, and its ``error()`` is what to raise.
    """
    entries, report = resolve(adapter, weights, architecture, targets=targets)
    by_key: dict[str, list[Entry]] = {}
    for entry in entries:
        by_key.setdefault(entry.key, []).append(entry)
    merged: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, group in by_key.items():
            merged[key] = apply(weights[key].to(torch.float32, copy=True), group, strength)
    return merged, report
