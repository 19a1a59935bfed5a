"""A resumable state in one file: factors, optimiser moments, progress, and what it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..errors import AdapterLabError
from ..files import Adapter, read_adapter, write_adapter
from .loop import Progress

FACTOR, MOMENT = "factor", "optimizer"
_METADATA = {"identity", "circumstances", "optimizer", "progress"}


def save(
    path: Path,
    adapters: Mapping[str, Algorithm],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
    circumstances: Mapping[str, Any],
) -> None:
    """Write the state atomically.

    Args:
        identity: what a resumed run must agree on; JSON values.
        circumstances: what it may change, but is told of; JSON values.
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
        "circumstances": json.dumps(circumstances, sort_keys=True),
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
    circumstances: Mapping[str, Any],
) -> tuple[Progress, list[str]]:
    """Restore what :func:`save` wrote into ``adapters`` and ``optimizer``, bit for bit.

    Returns:
        The progress, and the names of the circumstances that changed.

    Raises:
        AdapterLabError: no state, or one of other settings; names what differs.
    """
    try:
        stored = read_adapter(path)
    except AdapterLabError as error:
        fix = "Set 'on_existing' to restart, or delete the file"
        raise AdapterLabError(error.failed, found=error.found, fix=fix) from error
    if not stored.metadata.keys() >= _METADATA:
        raise AdapterLabError(f"'{path}' is not the state of a training run")
    _require_same(path, json.loads(stored.metadata["identity"]), identity)
    before = json.loads(stored.metadata["circumstances"])
    changed = [key for key, value in circumstances.items() if before.get(key) != value]
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
    restored = Progress(progress["step"], progress["losses"], validation, progress["scale"])
    return restored, changed


def _factors(adapters: Mapping[str, Algorithm]) -> list[tuple[str, str, Tensor]]:
    return [(n, s, t) for n in sorted(adapters) for s, t in adapters[n].tensors.items()]


def _require_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    before, now = _flat(stored), _flat(wanted)
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        key = differing[0]
        raise AdapterLabError(
            f"The run '{path.parent.name}' was started with other settings",
            found=f"{key} {before.get(key, 'missing')}",
            expected=f"{now.get(key, 'none')}{more}",
            fix="Choose another run name, or set 'on_existing' to restart",
        )


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """One level of nesting resolved: a difference is then that of one module."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{key} {k}": v for k, v in cast(dict[str, Any], value).items()}
        else:
            flat[key] = value
    return flat
