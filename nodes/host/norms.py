"""How much an adapter changes each block of a MODEL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.archs import ArchSpec
from ...core.keys import Entry, block_norms
from .layers import wide


class _Weights(Mapping[str, Tensor]):
    """The weights that deltas depend on, float32 on the CPU, one at a time."""

    def __init__(self, model: Any, entries: Iterable[Entry]) -> None:
        self._keys = {entry.key for entry in entries if entry.algorithm.reads_weight}
        self._parameters = dict(model.model.named_parameters())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return wide(self._parameters[key], torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def norms(entries: list[Entry], spec: ArchSpec | None, model: Any) -> list[tuple[str, float]]:
    """(block, norm of its change); without a ``model`` only of what depends on no weights."""
    # An empty mapping is falsy and means that there are none.
    return block_norms(entries, spec, _Weights(model, entries) if model is not None else None)
