"""ComfyUI's MODEL and CLIP seen through the core's names, and adapters applied to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from ...core import schedule as schedules
from ...core.adapters import ALGORITHMS
from ...core.archs import ArchSpec, detect
from ...core.errors import AdapterLabError
from ...core.files import Adapter
from ...core.keys import Entry, ModelIndex, Report, blocks, resolve
from ...core.keys.blocks import BlockWeights
from ...core.schedule import Schedule
from .adapter import merge
from .bypass import attach
from .layers import bare, full, submodules
from .mode import BYPASS, Mode, choose
from .parts import Part, acts_on_layer
from .values import is_patchable

DIFFUSION = "diffusion_model."


@dataclass(frozen=True)
class Applied:
    """A model and text encoder with an adapter on, and what happened.

    Attributes:
        mode: of the diffusion model, or of the text encoder where the file has nothing else.
        strength: what the adapter's change is multiplied by, "" where that is 1 everywhere.
    """

    model: Any
    clip: Any
    report: Report
    mode: Mode
    schedule: Schedule = Schedule()
    strength: str = ""

    def to_text(self) -> str:
        """The report with a line for the mode and one for a strength that is not 1."""
        verdict, *rest = self.report.to_text().split("\n")
        strength = [f"Strength: {self.strength}"] if self.strength else []
        return "\n".join((verdict, self.mode.to_text(), *strength, *rest))

    def to_dict(self) -> dict[str, Any]:
        """The report as data, with "mode", "strength" and, where it changes, "schedule"."""
        varying = self.schedule.constant is None
        points = {"schedule": [list(point) for point in self.schedule.points]} if varying else {}
        more = {"mode": self.mode.to_dict(), "strength": self.strength or "1"}
        return {**data(self.report), **more, **points}


def data(report: Report) -> dict[str, Any]:
    """The report as data for the panel: each match with the title of its algorithm."""
    given: dict[str, Any] = report.to_dict()
    rows = given["matched"].items()
    titled = {stem: {**row, "title": ALGORITHMS[row["algorithm"]].title} for stem, row in rows}
    return {**given, "matched": titled}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight name -> shape, as the model is in memory; quantised weights give the logical shape."""
    return {
        f"{path}.{name}" if path else name: tuple(parameter.shape)
        for path, child in submodules(module).items()
        for name, parameter in child._parameters.items()
        if parameter is not None
    }


def index(model: Any, clip: Any = None) -> ModelIndex:
    """Everything an adapter can reach in MODEL and CLIP."""
    found = _unpatched(model)
    if clip is not None:
        found |= _unpatched(clip.patcher)
    return ModelIndex(found)


def _unpatched(patcher: Any) -> dict[str, tuple[int, ...]]:
    """Shapes without what some clone in memory has merged: a patch may widen a weight."""
    found = shapes(patcher.model)
    for key, kept in patcher.backup.items():
        if key in found:
            found[key] = tuple(kept.weight.shape)
    return found


def architecture(model: Any) -> ArchSpec | None:
    """The architecture of MODEL, None when it is not in the registry."""
    return detect(index(model))


def apply(
    model: Any,
    clip: Any,
    adapter: Adapter,
    strength_model: float = 1.0,
    strength_clip: float = 1.0,
    on_unmatched: str = "report",
    *,
    mode: str = "auto",
    block_weights: str = "",
    schedule: str = "",
    alpha: float = 0.0,
) -> Applied:
    """Clones of ``model`` and ``clip`` with ``adapter`` on.

    Args:
        strength_model: m for the diffusion model. strength_clip: for text encoders.
        on_unmatched: "report" or "error". mode: one of ``mode.MODES``.
        block_weights: as ``core.keys.blocks`` reads them. schedule: as ``core.schedule`` does.
        alpha: to assume where nothing tells the scale, 0 for the rank.

    Raises:
        AdapterLabError: nothing matches, something does not and ``on_unmatched`` is "error", or
            the settings are not understood or contradict each other.
    """
    names = index(model, clip)
    spec = detect(names)
    over, weights = schedules.parse(schedule), blocks.parse(block_weights, spec)
    entries, report = resolve(adapter, names, spec, alpha=alpha or None)
    strict = on_unmatched == "error"
    require_fit(report, "Set 'on_unmatched' to report to load the rest" if strict else "")
    _tell(report, weights, names, entries)
    diffusion = [e for e in entries if e.key.startswith(DIFFUSION)]
    encoder = [e for e in entries if not e.key.startswith(DIFFUSION)]
    adapted, chosen = _adapted(model, _parts(diffusion, strength_model, weights, over), mode)
    if clip is not None:
        # A text encoder runs before sampling and knows no progress.
        clip, other = _adapted(clip, _parts(encoder, strength_clip, weights, Schedule()), mode)
        chosen = chosen if diffusion or not encoder else other
    strength = _strength(strength_model, strength_clip if clip and encoder else 1.0, over)
    return Applied(adapted, clip, report, chosen, over, strength)


def _strength(model: float, clip: float, schedule: Schedule) -> str:
    """Strengths as the report names them: "0.3 x 0.5 (schedule), text encoder 0.8"."""
    constant, text = schedule.constant, f"{model:g}"
    if constant is None:
        text = f"{model:g} x the schedule" if model != 1 else "that of the schedule"
    elif constant != 1:
        text = f"{model:g} x {constant:g} (schedule)"
    if clip != 1:
        text = f"{text}, text encoder {clip:g}"
    return "" if text == "1" else text


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


def _tell(
    report: Report, weights: BlockWeights, names: ModelIndex, entries: Iterable[Entry]
) -> None:
    """What block weights do and what they fail to do, into the report."""
    if not weights:
        return
    found = {entry.stem: weights.weight_of(entry.path, entry.part) for entry in entries}
    report.strengths.update({stem: weight for stem, weight in found.items() if weight != 1})
    places = [(path, part) for part, modules in names.parts.items() for path in modules]
    unused = weights.unused(places)
    report.warnings += [f"The block weight '{line}' hits nothing in the model" for line in unused]


def _parts(
    entries: Iterable[Entry], strength: float, weights: BlockWeights, schedule: Schedule
) -> list[Part]:
    """The entries at their strengths, without those at 0."""
    parts = [
        Part(
            entry.key, entry.slice, entry.algorithm,
            strength * weights.weight_of(entry.path, entry.part), schedule,
        )
        for entry in entries
    ]  # fmt: skip
    return [part for part in parts if part.strength != 0 and schedule.constant != 0]


def _adapted(target: Any, parts: Sequence[Part], asked: str) -> tuple[Any, Mode]:
    """A clone of MODEL or CLIP with ``parts`` on."""
    clone = target.clone()
    patcher = getattr(clone, "patcher", clone)
    # A clone is born with the mark of a model that it has not touched yet.
    patcher.is_injected = False
    modules = submodules(patcher.model)
    parts = [_beside_weight(part, patcher, modules[part.path]) for part in parts]
    mode = choose(asked, modules, parts)
    layers: list[Part] = []
    values: list[Part] = []
    patches: list[Part] = []
    for part in parts:
        module = modules[part.path]
        if mode.chosen == BYPASS and acts_on_layer(module, part):
            layers.append(part)
        elif part.varies or not is_patchable(module, part.name):
            values.append(part)
        else:
            patches.append(part)
    merge(patcher, patches)
    if layers or values:
        attach(patcher, values, layers)
    return clone, mode


def _beside_weight(part: Part, patcher: Any, module: Any) -> Part:
    """What acts on a bias told of the model's own weight beside it, where it needs to know that."""
    if part.name != "bias" or part.algorithm.reads_output:
        return part
    weight = full(bare(patcher, f"{part.path}.weight", module.weight), module, torch.device("cpu"))
    rows = weight if part.slice is None else weight.narrow(*part.slice)
    return replace(part, algorithm=part.algorithm.settled(rows))
