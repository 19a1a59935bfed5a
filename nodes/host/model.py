"""ComfyUI's MODEL and CLIP seen through the core's names, and adapters applied to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from ...core.archs import ArchSpec, detect
from ...core.errors import AdapterLabError
from ...core.files import Adapter
from ...core.keys import Entry, ModelIndex, Report, resolve
from .adapter import AdapterPatch

DIFFUSION = "diffusion_model."


@dataclass
class Applied:
    """A model and text encoder with an adapter on, and what happened."""

    model: Any
    clip: Any
    report: Report


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight name -> shape, as the model is in memory; quantised weights give the logical shape."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def index(model: Any, clip: Any = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything an adapter can reach in MODEL and CLIP.

    ComfyUI takes patches for parameters beside child modules (Wan's ``blocks.0.modulation``), but
    never applies them.
    """
    found = _patchable(model.model)
    if clip is not None:
        found |= _patchable(clip.cond_stage_model)
    return found


def _patchable(module: nn.Module) -> dict[str, tuple[int, ...]]:
    leaves = {name for name, child in module.named_modules() if not any(child.children())}
    return {n: shape for n, shape in shapes(module).items() if n.rpartition(".")[0] in leaves}


def architecture(model: Any) -> ArchSpec | None:
    """The architecture of MODEL, None when it is not in the registry."""
    return detect(ModelIndex(shapes(model.model)))


def apply(
    model: Any,
    clip: Any,
    adapter: Adapter,
    strength_model: float,
    strength_clip: float,
    on_unmatched: str,
) -> Applied:
    """Clones of ``model`` and ``clip`` with ``adapter`` added to their weights.

    Raises:
        AdapterLabError: nothing matches, or something does not and ``on_unmatched`` is "error".
    """
    entries, report = resolve(adapter, index(model, clip), architecture(model))
    rest = "Set 'on_unmatched' to report to load the rest" if on_unmatched == "error" else ""
    require_fit(report, rest)
    diffusion = [e for e in entries if e.key.startswith(DIFFUSION)]
    encoder = [e for e in entries if not e.key.startswith(DIFFUSION)]
    patched = _patched(model, diffusion, strength_model)
    return Applied(patched, clip and _patched(clip, encoder, strength_clip), report)


def require_fit(report: Report, advice: str = "") -> None:
    """Raise where nothing matched or, with ``advice`` for that case, where something did not."""
    if not report.matched:
        raise report.error()
    if advice and report.unmatched:
        raise AdapterLabError(
            f"'{report.name}' does not fit completely",
            found=report.to_text(),
            fix=advice,
        )


def _patched(target: Any, entries: Iterable[Entry], strength: float) -> Any:
    clone = target.clone()
    if strength == 0:
        return clone
    # Two modules of a file may end on the same rows: a dict holds only one patch per key.
    rounds: list[dict[Any, AdapterPatch]] = []
    for entry in entries:
        key = entry.key if entry.slice is None else (entry.key, tuple(entry.slice))
        free = next((r for r in rounds if key not in r), None)
        if free is None:
            rounds.append(free := {})
        free[key] = AdapterPatch.of(entry.algorithm)
    for patches in rounds:
        accepted = clone.add_patches(patches, strength)
        if missing := set(patches) - set(accepted):
            raise AdapterLabError("ComfyUI refused patches", found=", ".join(map(str, missing)))
    return clone
