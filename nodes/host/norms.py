"""How much an adapter changes each block of a MODEL."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.archs import ArchSpec
from ...core.keys import Entry, block_norms
from ...core.keys.norms import needs_weight
from .layers import bare, submodules, wide
from .progress import INTERVAL, Bar


class _Weights(Mapping[str, Tensor]):
    """The weights that deltas depend on, float32 on the CPU, one at a time."""

    def __init__(self, model: Any, entries: Iterable[Entry]) -> None:
        self._keys = {entry.key for entry in entries if needs_weight(entry.algorithm)}
        self._patcher, self._modules = model, submodules(model.model)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        path, _, name = key.rpartition(".")
        live = self._modules[path]._parameters[name]
        return wide(bare(self._patcher, key, live), torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def norms(
    entries: Sequence[Entry], spec: ArchSpec | None, model: Any, node_id: str | None = None
) -> list[tuple[str, float]]:
    """(block, norm of its change); without a ``model`` only of what depends on no weights.

    Dense deltas of large layers take seconds each: the node ``node_id`` shows how far it is, and
    a cancelled run ends between two modules.
    """
    # An empty mapping is falsy and means that there are none.
    weights = _Weights(model, entries) if model is not None else None
    return block_norms(_watched(entries, Bar(len(entries), node_id)), spec, weights)


def _watched(entries: Sequence[Entry], bar: Bar) -> Iterator[Entry]:
    """The entries one by one, with the bar at the first and then at its interval."""
    due = 0.0
    for done, entry in enumerate(entries):
        if time.monotonic() >= due:
            bar.update(done, f"measuring module {done + 1} of {len(entries)}")
            due = time.monotonic() + INTERVAL
        yield entry
