"""A resumable state in one file: factors, optimizer, averages, progress, what it belongs to.

Tensors and the losses, which are many, are stored as such; what refers to them, and all else, is
JSON in the metadata. Python writes a float so that reading gives the same bits, so nothing changes
on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..errors import AdapterLabError
from ..files import Adapter, read_adapter, write_adapter
from .ema import Tracker
from .optim import Optimizer
from .packing import Packing, decode
from .progress import Progress
from .record import flat

_METADATA = {"identity", "circumstances", "settings", "optimizer", "progress"}
_LOSSES = "progress|losses"  # float64


class OtherRun(AdapterLabError):
    """The state is of a run that trains something else."""


def save(
    path: Path,
    adapters: Mapping[str, Algorithm],
    optimizer: Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
    circumstances: Mapping[str, Any],
    trackers: Tracker | None = None,
) -> None:
    """Write the state atomically.

    Args:
        identity: what a resumed run must agree on; JSON values.
        circumstances: what it may change, but is told of; JSON values. The settings of the
            optimizer are among them by themselves.
    """
    state = Adapter({f"factor|{key}": t.detach() for key, t in _factors(adapters).items()})
    packing = Packing(exact=True)
    packed = packing.encode(optimizer.state_dict(), "optimizer")
    state.update({name: t.detach() for name, t in packing.tensors.items()})
    for width, averages in trackers.states.items() if trackers else ():
        state.update({f"ema|{width}|{i}": average for i, average in enumerate(averages)})
    rest = dict(vars(progress))
    state[_LOSSES] = torch.tensor(rest.pop("losses"), dtype=torch.float64)
    parts = {
        "identity": identity,
        "circumstances": circumstances,
        "settings": asdict(optimizer.config),
        "optimizer": packed,
        "progress": rest,
    }
    state.metadata.update({k: json.dumps(v, sort_keys=k == "identity") for k, v in parts.items()})
    write_adapter(path, state)


def load(
    path: Path,
    adapters: Mapping[str, Algorithm],
    optimizer: Optimizer,
    identity: Mapping[str, Any],
    circumstances: Mapping[str, Any],
    trackers: Tracker | None = None,
) -> tuple[Progress, list[str]]:
    """Restore what :func:`save` wrote into ``adapters``, ``optimizer`` and ``trackers``, bit for
    bit.

    Averages that were not tracked before begin with the factors as they are.

    Returns:
        The progress, and the names of the circumstances and settings that changed.

    Raises:
        OtherRun: a state of other modules or factors; names what differs.
        AdapterLabError: no state, one of another optimizer, or a damaged one.
            Nothing is restored then.
    """
    stored, parts = _read(path)
    _require_same(path, parts["identity"], identity)
    factors = _factors(adapters)
    for key, factor in factors.items():
        _require_fit(path, f"factor|{key}", stored, factor)
    try:
        # Before the factors: it refuses the state of another optimizer.
        optimizer.load_state_dict(decode(parts["optimizer"], lambda key: stored[key or ""]))
        # In older states they are among the JSON.
        losses = {"losses": cast(Any, stored[_LOSSES]).tolist()} if _LOSSES in stored else {}
        progress = Progress.restored(parts["progress"] | losses)
    except (KeyError, TypeError, ValueError, IndexError) as err:
        raise AdapterLabError(f"The state '{path}' is damaged", found=f"no or a bad {err}") from err
    with torch.no_grad():
        for key, factor in factors.items():
            factor.copy_(stored[f"factor|{key}"])
    if trackers is not None:
        _restore(trackers, stored, optimizer)
    changed = _changed(parts["circumstances"], circumstances)
    settings = _changed(parts["settings"], asdict(optimizer.config))
    return progress, changed + [name.replace("_", " ") for name in settings]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key, value in now.items() if before.get(key) != value]


def _read(path: Path) -> tuple[Adapter, dict[str, Any]]:
    fix = "Set 'on_existing' to restart, or delete the file"
    try:
        stored = read_adapter(path)
    except AdapterLabError as error:
        raise AdapterLabError(error.failed, found=error.found, fix=fix) from error
    if not stored.metadata.keys() >= _METADATA:
        raise AdapterLabError(f"'{path}' is not the state of a training run", fix=fix)
    try:
        return stored, {name: json.loads(stored.metadata[name]) for name in _METADATA}
    except ValueError as err:
        raise AdapterLabError(f"The state '{path}' is damaged", found=str(err), fix=fix) from err


def _restore(trackers: Tracker, stored: Adapter, optimizer: Optimizer) -> None:
    for width, averages in trackers.states.items():
        for i, (average, factor) in enumerate(zip(averages, optimizer.factors, strict=True)):
            average.copy_(stored.get(f"ema|{width}|{i}", factor.detach()))


def _factors(adapters: Mapping[str, Algorithm]) -> dict[str, Tensor]:
    """Every tensor of the adapters, those included that training leaves alone."""
    return {f"{n}|{s}": t for n in sorted(adapters) for s, t in adapters[n].tensors.items()}


def _require_fit(path: Path, key: str, stored: Mapping[str, Tensor], factor: Tensor) -> None:
    found = stored.get(key)
    if found is None or found.shape != factor.shape or found.dtype != factor.dtype:
        facts = [
            "none" if t is None else f"{tuple(t.shape)}, {str(t.dtype).removeprefix('torch.')}"
            for t in (found, factor)
        ]
        raise _other(path, f"{key.replace('|', ' ')} {facts[0]}", facts[1])


def _require_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    before, now = flat(stored, join=" "), flat(wanted, join=" ")
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        key = differing[0]
        found, expected = before.get(key, "missing"), now.get(key, "none")
        raise _other(path, f"{key} {found}", f"{expected}{more}")


def _other(path: Path, found: str, expected: str) -> OtherRun:
    return OtherRun(
        f"The run '{path.parent.name}' was started with other settings",
        found=found,
        expected=expected,
        fix="Choose another run name, or set 'on_existing' to restart",
    )
