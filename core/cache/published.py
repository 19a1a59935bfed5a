"""Magnitude ratios that others measured, one JSON file a list in ``ratios/``.

Of a file's fields, "settings" are :class:`Setting` ("from" is its source), "special" is a
:class:`Special` and "match" a :class:`Match`; the others are those of :class:`Published`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import AdapterLabError

BRANCHES = ("cond", "uncond")
_FOLDER = Path(__file__).parent / "ratios"
_PREFIX = "diffusion_model."
_VIDEO = 5  # axes of a video's latent, the third one of frames


@dataclass(frozen=True)
class Special:
    """What holds for one model only.

    Attributes:
        forced: (i, n): the step that maps to step i of n is computed (FLUX).
        closest: how far a skipped step's own ratio may be from 1 (FramePack).
        boundary: where another expert takes over, as a share of 1000 timesteps; the retention
            applies to the span of each (Wan 2.2).
        high: whether steps of the first expert may be skipped.
    """

    forced: tuple[int, int] | None = None
    closest: float = math.inf
    boundary: float | None = None
    high: bool = True


PLAIN = Special()


@dataclass(frozen=True)
class Setting:
    """What a list's authors recommend with it; ``source`` is where."""

    threshold: float
    k: int
    retention: float
    source: str


@dataclass(frozen=True)
class Published:
    """One list, of the residual of the block stack.

    Attributes:
        cond: the leading 1 included, one number a step.
        uncond: None where the model has one branch.
        settings: the first is the best quality; empty where nobody recommends any.
        also: where :func:`detect` chose, other lists that the weights fit as well.
    """

    name: str
    cond: tuple[float, ...]
    uncond: tuple[float, ...] | None
    settings: tuple[Setting, ...]
    special: Special
    source: str
    note: str = ""
    also: tuple[str, ...] = ()

    def branch(self, name: str) -> tuple[float, ...]:
        """The ratios of "cond" or "uncond"."""
        return self.uncond if name == "uncond" and self.uncond else self.cond


@cache
def names() -> tuple[str, ...]:
    """Of all lists, in alphabetical order."""
    return tuple(sorted(path.name[: -len(".json")] for path in _FOLDER.glob("*.json")))


@cache
def published(name: str) -> Published:
    """The list ``name``; raises for one that nobody published."""
    if name not in names():
        raise AdapterLabError(
            f"No published ratios '{name}'", expected=f"one of {', '.join(names())}"
        )
    given = _given(name)
    special = dict(given.get("special", {}))
    if "forced" in special:
        special["forced"] = tuple(special["forced"])
    return Published(
        name, tuple(given["cond"]), tuple(given["uncond"]) if "uncond" in given else None,
        tuple(Setting(one["threshold"], one["k"], one["retention"], one["from"])
              for one in given["settings"]),
        Special(**special), given["source"], given.get("note", ""),
    )  # fmt: skip


@dataclass(frozen=True)
class _Outline:
    """What tells a published model from others of its architecture, and from tiny ones."""

    shapes: Mapping[str, Sequence[int]]
    parts: frozenset[str]  # the first components of the names
    blocks: Mapping[str, int]  # stack -> how many it has

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> _Outline:
        below = {n.removeprefix(_PREFIX): s for n, s in shapes.items() if n.startswith(_PREFIX)}
        named = below or shapes
        parts = [name.split(".", 2) for name in named]
        found = {(part[0], part[1]) for part in parts if len(part) > 1 and part[1].isdecimal()}
        return cls(named, frozenset(p[0] for p in parts), Counter(stack for stack, _ in found))


@dataclass(frozen=True)
class Match:
    """Which weights, and which runs, a list is for.

    Attributes:
        architecture: its id in the registry.
        parts: the first components of the weights' names, no others.
        blocks: name of a stack -> how many blocks it has.
        shapes: of some weights, which tell the model from others of its architecture.
        lacks: names of weights that only others have.
        uses: what the run has to go by beside its prompt, one of ``detect``'s; "": any run.
        when: "cut", "area" or "frames" of the run -> from which number on, and below which (None:
            however large). The cut is of :func:`detect`, the area that of the latent in its last
            two axes, frames are the latent's. An area or frames that are unknown may be any.
        uncond: name of the list of the other branch, where that is one by itself.
        rank: of lists that fit equally well, the lowest is the plainest.
    """

    architecture: str
    parts: Collection[str]
    blocks: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]
    lacks: Collection[str] = ()
    uses: str = ""
    when: Mapping[str, tuple[float, float | None]] = field(default_factory=dict[str, Any])
    uncond: str = ""
    rank: int = 0

    def weights(self, outline: _Outline) -> bool:
        """Whether it is for a model with these weights."""
        return (
            outline.parts == frozenset(self.parts)
            and all(outline.blocks.get(stack) == count for stack, count in self.blocks.items())
            and all([*outline.shapes.get(n, ())] == [*s] for n, s in self.shapes.items())
            and not any(name in outline.shapes for name in self.lacks)
        )

    def known(self, run: Mapping[str, float | None], uses: Collection[str]) -> int | None:
        """How much of ``when`` is known to hold; None: the list is for other runs."""
        if self.uses and self.uses not in uses:
            return None
        known = 0
        for name, (least, most) in self.when.items():
            value = run[name]
            if value is None and name != "cut":
                continue
            if value is None or not least <= value < (most or math.inf):
                return None
            known += 1
        return known


def detect(
    shapes: Mapping[str, Sequence[int]],
    *,
    architecture: str = "",
    latent: Sequence[int] = (),
    steps: int = 0,
    uses: Collection[str] = (),
    cut: float | None = None,
) -> Published | None:
    """The list for a model, None where nobody published one for its weights.

    Of several for the same weights: one for what the run ``uses``, then the one for its size,
    length and ``cut``, then that of the nearest number of steps, then the plainest.

    Args:
        shapes: of its weights, by their name in the diffusion model.
        architecture: its id in the registry, "" where the shapes have to do.
        latent: shape of the latent, batch first; () where it is not known.
        steps: of the whole schedule, 0 where that is not known.
        uses: what the run goes by beside its prompt: keys of its conditionings such as
            "reference_latents" (editing) or "time_dim_replace" (Kandinsky's first picture), and
            "noise_mask" for a latent with one.
        cut: the noise level at which the run is handed over, where it does a part of the schedule:
            two experts have the same weights' names and shapes as one model.
    """
    outline = _Outline.of(shapes)
    run = {"cut": cut, "area": math.prod(latent[-2:]) if latent else None}
    run["frames"] = latent[2] if len(latent) == _VIDEO else None
    fitting = {name: match for name, match in _matches().items() if match.weights(outline)}
    ranks = {
        name: (not match.uses, -known, _apart(steps, len(published(name).cond)), match.rank, name)
        for name, match in fitting.items()
        if architecture in ("", match.architecture)
        and (known := match.known(run, uses)) is not None
    }
    if not ranks:
        return None
    chosen = published(min(ranks, key=ranks.__getitem__))
    other = fitting.pop(chosen.name).uncond
    uncond = published(other).cond if other else chosen.uncond
    return replace(chosen, uncond=uncond, also=tuple(fitting))


def _apart(steps: int, length: int) -> float:
    return abs(math.log(steps / length)) if steps else 0.0


@cache
def _matches() -> dict[str, Match]:
    """By name, of the lists that a model can be told by."""
    return {name: Match(**match) for name in names() if (match := _given(name).get("match"))}


def _given(name: str) -> dict[str, Any]:
    return json.loads((_FOLDER / f"{name}.json").read_text("utf-8"))


def special_of(ratios: Sequence[float]) -> Special:
    """What holds for the model whose published list ``ratios`` is, if it is one."""
    return _specials().get(tuple(ratios), PLAIN)


@cache
def _specials() -> dict[tuple[float, ...], Special]:
    lists = map(published, names())
    return {ratios: one.special for one in lists for ratios in (one.cond, one.uncond) if ratios}
