"""Adapters into weights: the one place outside a live model where a delta meets a weight."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .adapters import merge_all
from .archs import ArchSpec
from .errors import AdapterLabError
from .keys import Entry, Report, resolve
from .keys.names import Override

_SCALES = ("weight_scale", "scale_weight", "comfy_quant")


def apply(weight: Tensor, entries: Iterable[Entry], strength: float = 1.0) -> Tensor:
    """W'(m) of every entry, each on its own range of the weight.

    Args:
        weight: float32 (out, in, *k), overwritten. entries: all of this one weight.
        strength: m; 0 leaves the weight as it is.

    Returns:
        ``weight``, or a larger one where an adapter asks for that.
    """
    if not strength:
        return weight
    return merge_all(weight, ((entry.slice, entry.algorithm.at(strength)) for entry in entries))


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
        strength: m; 0 gives the weights themselves, bit by bit.
        targets: stem -> module of ``weights``, or (module, axis, offset, length); goes before
            matching by name.
        architecture: id or entry; found out from the names in ``weights`` by default.

    Raises:
        AdapterLabError: as :func:`~core.keys.resolve.resolve`; a weight that is stored scaled.
            Nothing matching is no error here: the report says so, and its ``error()`` is what to
            raise.
    """
    entries, report = resolve(adapter, weights, architecture, targets=targets)
    by_key: dict[str, list[Entry]] = {}
    for entry in entries:
        by_key.setdefault(entry.key, []).append(entry)
    merged: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, group in by_key.items():
            refuse_scaled(weights, key, weights[key])
            settled = [_settled(entry, weights) for entry in group]
            merged[key] = apply(weights[key].to(torch.float32, copy=True), settled, strength)
    return merged, report


def _settled(entry: Entry, weights: Mapping[str, Tensor]) -> Entry:
    """What acts on a bias told of the weight beside it."""
    beside = weights.get(f"{entry.key.removesuffix('bias')}weight")
    if beside is None or not entry.key.endswith(".bias"):
        return entry
    weight = beside if entry.slice is None else beside.narrow(*entry.slice)
    return replace(entry, algorithm=entry.algorithm.settled(weight))


def refuse_scaled(names: Container[str], key: str, weight: Tensor) -> None:
    """A quantised weight means nothing without the scale beside it, integers without their code."""
    stem, is_weight = key.removesuffix("weight"), key.endswith(".weight")
    scales = [name for s in _SCALES if (name := stem + s) in names] if is_weight else []
    if scales or not weight.is_floating_point():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise AdapterLabError(
            f"'{key}' is quantised",
            found=f"{dtype} with '{scales[0]}'" if scales else dtype,
            expected="bf16, fp16 or fp32 weights",
            fix="Merge into the unquantised model",
        )
