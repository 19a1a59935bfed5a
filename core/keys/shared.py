"""Tensors that a file keeps once for all its modules: VeRA's random matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters import Tensors
from ..errors import AdapterLabError
from ..files import Adapter
from .stems import Stem, read_stems

A, B, LAMBDA_B, LAMBDA_D = "vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"


def read_modules(adapter: Adapter) -> dict[str, Stem]:
    """The modules of a file by stem, each with all that the file holds for it; raises as
    :func:`read_stems` and :func:`share`."""
    stems = read_stems(adapter)
    complete(stems, adapter.config)
    return stems


def complete(
    stems: dict[str, Stem], config: Mapping[str, Any] | None = None, width: int = 0
) -> None:
    """Put into ``stems`` what :func:`share` gives them, and take out what is no module."""
    modules = {name: stem.tensors for name, stem in stems.items()}
    shared = share(modules, config, width)
    keys = {s: stems[name].keys[s] for name, t in shared.items() if not t for s in modules[name]}
    for name, tensors in shared.items():
        if tensors:
            stems[name].tensors.update(tensors)
            stems[name].keys.update({s: keys[s] for s in tensors if s in keys})
        else:
            del stems[name]


def share(
    modules: Mapping[str, Tensors], config: Mapping[str, Any] | None = None, width: int = 0
) -> dict[str, dict[str, Tensor]]:
    """What the modules of a file lack and another stem of it has: stem -> suffix -> tensor.

    A stem with matrices and no vectors ("base_model") is no module: it gets an entry without
    tensors, so that the caller can take it out. Nothing is copied. Files without VeRA give {}.

    Args:
        modules: stem -> canonical suffix -> tensor.
        config: peft's; its ``projection_prng_key`` and ``r`` make matrices that were not saved.
        width: inputs of the widest layer that was trained, which the matrices depend on; 0 where
            it isn't known. Only if every module of the file is known can it be.

    Raises:
        AdapterLabError: different matrices in the places where the shared ones are.
    """
    lacking = [n for n, t in modules.items() if LAMBDA_D in t and not (A in t and B in t)]
    sources = {n: t for n, t in modules.items() if (A in t or B in t) and LAMBDA_D not in t}
    found: dict[str, Tensor] = _merged(sources)
    if lacking and not found and config and width:
        rows = max(len(modules[name][LAMBDA_B]) for name in lacking if LAMBDA_B in modules[name])
        key, rank = config.get("projection_prng_key", 0), len(modules[lacking[0]][LAMBDA_D])
        found = dict(zip((A, B), projections(key, rank, rows, width), strict=True))
    return {**{name: {} for name in sources}, **{name: found for name in lacking if found}}


def projections(key: int, rank: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """A (r, width) and B (rows, r) as peft draws them: from ``key``, on the CPU, A first.

    Uniform within sqrt(6 / fan_in), fan_in being width and r.

    Reference: He et al. 2015, section 2.2; peft's ``VeraModel``.
    """
    generator = torch.Generator().manual_seed(key)
    bounds = math.sqrt(6 / width), math.sqrt(6 / rank)
    a, b = torch.empty(rank, width), torch.empty(rows, rank)
    for matrix, bound in zip((a, b), bounds, strict=True):
        matrix.uniform_(-bound, bound, generator=generator)
    return a, b


def _merged(sources: Mapping[str, Tensors]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for tensors in sources.values():
        for suffix in tensors.keys() & {A, B}:
            known = found.setdefault(suffix, tensors[suffix])
            if known is not tensors[suffix] and not _same(known, tensors[suffix]):
                where = ", ".join(f"'{name}'" for name in sources)
                raise AdapterLabError(f"{suffix} is there twice", found=f"{where}, not the same")
    return found


def _same(one: Tensor, two: Tensor) -> bool:
    if one.is_meta or two.is_meta:  # of a file whose values are not read yet
        return one.shape == two.shape
    return torch.equal(one, two)
