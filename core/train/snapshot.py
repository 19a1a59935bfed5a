"""A resumable state in one file: factors, optimiser moments, progress, and what it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..errors import AdapterLabError
from ..files import Adapter, read_adapter, write_adapter
from .loop import Progress

FACTOR, MOMENT = "factor", "optimizer"


def save(
    path: Path,
    adapters: Mapping[str, Algorithm],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
) -> None:
    """Write the state atomically.

    Args:
        identity: what a resumed run must agree on; JSON values.
    """
    state = optimizer.state_dict()["state"]
    tensors = {f"{FACTOR}|{name}|{suffix}": t.detach() for name, suffix, t in _factors(adapters)}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{MOMENT}|{index}|{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    metadata = {
        "identity": json.dumps(identity, sort_keys=True),
        "optimizer": json.dumps(scalars),
        "progress": json.dumps(vars(progress)),
    }
    adapter = Adapter(tensors)
    adapter.metadata.update(metadata)
    write_adapter(path, adapter)


def load(
    path: Path,
    adapters: Mapping[str, Algorithm],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> Progress:
    """Restore what :func:`save` wrote into ``adapters`` and ``optimizer``, bit for bit.

    Raises:
        AdapterLabError: the state belongs to other settings; names what differs.
    """
    stored = read_adapter(path)
    _require_same(path, json.loads(stored.metadata["identity"]), identity)
    with torch.no_grad():
        for name, suffix, tensor in _factors(adapters):
            tensor.copy_(stored[f"{FACTOR}|{name}|{suffix}"])
    state: dict[int, dict[str, Any]] = {
        int(i): dict(entries) for i, entries in json.loads(stored.metadata["optimizer"]).items()
    }
    for key, tensor in stored.items():
        kind, index, entry = key.split("|")
        if kind == MOMENT:
            state.setdefault(int(index), {})[entry] = tensor.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    progress = json.loads(stored.metadata["progress"])
    validation = [(int(step), float(loss)) for step, loss in progress["validation"]]
    return Progress(progress["step"], progress["losses"], validation)


def _factors(adapters: Mapping[str, Algorithm]) -> list[tuple[str, str, Tensor]]:
    return [(n, s, t) for n in sorted(adapters) for s, t in adapters[n].tensors.items()]


def _require_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [key for key in wanted if stored.get(key) != wanted[key]]
    if differing:
        found = ", ".join(f"{key} was {_short(stored.get(key))}" for key in differing)
        expected = ", ".join(f"{key} {_short(wanted[key])}" for key in differing)
        raise AdapterLabError(
            f"The run '{path.parent.name}' was started with other settings",
            found=found,
            expected=expected,
            fix="Choose another run name, or set 'on_existing' to restart",
        )


def _short(value: Any, limit: int = 60) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
