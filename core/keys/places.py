"""What a stem names, found without a model: through the layers and aliases of architectures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import load_parts
from ..archs import ARCHITECTURES, Alias, ArchSpec, likely
from ..errors import AdapterLabError
from . import encoders
from .base import OTHER, KeyFormat, guess, readers
from .stems import Stem


@dataclass(frozen=True)
class Place:
    """One module of a model.

    Attributes:
        part: "model" or which text encoder. path: as the file calls it, dotted.
        own: template of its own name, "" where no architecture knows it.
        numbers: what each ``{}`` stands for.
        alias: what its name is an instance of; None for its own name.
    """

    part: str
    path: str
    own: str = ""
    numbers: tuple[str, ...] = ()
    alias: Alias | None = None

    @property
    def own_path(self) -> str:
        """Its path in own names."""
        return self.own.format(*self.numbers) if self.own else self.path


def find_spec(stems: Iterable[Stem], metadata: Mapping[str, str]) -> ArchSpec | None:
    """The architecture of the diffusion model that a file is for."""
    return next(iter(find_specs(stems, metadata)), None)


def find_specs(stems: Iterable[Stem], metadata: Mapping[str, str]) -> list[ArchSpec]:
    """The architectures that a file can be for, by names, metadata and sizes, best first.

    Of several, those are left whose files of this format have such names most.
    """
    modules = list(stems)
    bodies = _bodies(modules, hint=True) or _bodies(modules, hint=False)

    def shape(body: str) -> tuple[int, ...]:
        try:
            weight = load_parts(bodies[body].tensors).get("weight")
        except AdapterLabError:  # a broken module says nothing
            return ()
        return weight.shape if weight else ()

    specs = likely(bodies, metadata, shape)
    form = guess([stem.clean for stem in modules]) if len(specs) > 1 else None
    if form is None:
        return specs
    usual = {spec: sum(_usual(body, form, spec) for body in bodies) for spec in specs}
    return [spec for spec in specs if usual[spec] == max(usual.values())]


def _usual(body: str, form: KeyFormat, spec: ArchSpec) -> bool:
    """Whether files of this format and architecture have such a name."""
    family = spec.families.get(form.id, form.family)
    if family == "own":
        return any(True for _ in spec.own.find(body))
    return any(alias.family == family for alias, _ in spec.theirs.find(body))


def _bodies(stems: list[Stem], *, hint: bool) -> dict[str, Stem]:
    """What the stems can call modules of a diffusion model, in formats of which prefixes hint."""
    forms = [form for form in readers() if form.hint is hint]
    read = ((one, stem) for stem in stems for form in forms for name in _names(stem)
            for one in form.read(name))  # fmt: skip
    return {one.body: stem for one, stem in read if "model" in one.parts}


def _names(stem: Stem) -> tuple[str, ...]:
    return (stem.clean, f"{stem.clean}_lora") if stem.joint else (stem.clean,)


def locate(stem: Stem, form: KeyFormat, spec: ArchSpec | None) -> Place | None:
    """Where a stem belongs: by the layers of an architecture, else by its dotted path alone.

    Args:
        form: the format to be written, in which a name may stay what it is.
    """
    read = [one for name in _names(stem) for f in readers() for one in f.read(name)]
    for used, parts, body in read:
        if "model" in parts:
            for entry in (spec, *ARCHITECTURES.values()):
                found = _known(body, entry, aliases=entry is spec) if entry else None
                if found:
                    return found
        if parts != ("model",):
            layer = encoders.locate((*_prefixed(stem.clean, used, spec), *parts), body)
            if layer:
                return Place(*layer)
    usable = [one for one in read if one.form.id == (form.like or form.id)]
    if not any(one.form.separator == "_" for one in read):
        # The longest prefix leaves the shortest path.
        usable += sorted(read, key=lambda one: len(one.body))
    return next((Place(_part(one.parts), one.body) for one in usable), None)


def _prefixed(name: str, form: KeyFormat, spec: ArchSpec | None) -> Iterator[str]:
    """The text encoders that ``name`` is of by the prefixes of this very architecture."""
    for part, prefix in spec.prefixes.get(form.id, {}).items() if spec else ():
        if part != "model" and name.startswith(prefix):
            yield part


def _part(parts: Sequence[str]) -> str:
    return parts[0] if parts[0] != OTHER else OTHER


def _known(body: str, spec: ArchSpec, *, aliases: bool) -> Place | None:
    """``body`` among the names of one architecture; of others aliases are no evidence."""
    if "model" not in spec.parts:
        return None
    for template, numbers in spec.own.find(body):
        return Place("model", template.format(*numbers), template, numbers)
    for alias, numbers in spec.theirs.find(body) if aliases else ():
        return Place("model", alias.theirs.format(*numbers), alias.own, numbers, alias)
    return None


@dataclass(frozen=True)
class Span:
    """The rows of a fused weight that one name of it stands for."""

    alias: Alias
    offset: int
    length: int

    @property
    def rows(self) -> Tensor:
        """Indices of its rows in the fused weight, in the order of the file."""
        rows = torch.arange(self.offset, self.offset + self.length)
        return rows if self.alias.order is None else rows[self.alias.order(self.length)]


class Families:
    """The names of one architecture by own template and family."""

    def __init__(self, spec: ArchSpec | None) -> None:
        self._aliases: dict[tuple[str, str], list[Alias]] = {}
        for alias in spec.aliases if spec else ():
            if not alias.refuse:
                self._aliases.setdefault((alias.own, alias.family), []).append(alias)

    def whole(self, own: str, family: str) -> Alias | None:
        """The family's first name of all of the weight."""
        return next((a for a in self._aliases.get((own, family), ()) if a.rows is None), None)

    def same(self, alias: Alias, family: str) -> Alias | None:
        """The family's name of the rows that ``alias`` names, in the order of the weight."""
        known = self._aliases.get((alias.own, family), ())
        return next((a for a in known if a.rows == alias.rows and a.order is alias.order), None)

    def spans(self, own: str, family: str, total: int, hidden: int) -> list[Span]:
        """The ranges that tile a weight of ``total`` rows, in order; [] where they don't."""
        spans: dict[tuple[int, int], Span] = {}
        for alias in self._aliases.get((own, family), ()):
            if alias.rows is not None:
                offset, length = alias.span(total, hidden)
                spans.setdefault((offset, length), Span(alias, offset, length))
        ordered = [spans[place] for place in sorted(spans)]
        return ordered if _tiles(ordered, total) else []

    def total(self, own: str, pieces: Mapping[Alias, int], hidden: int) -> int | None:
        """Rows of the weight whose ranges have so many; None where that is open."""
        family = next(iter(pieces)).family
        given, largest = sum(pieces.values()), max(pieces.values())
        fitting = {
            total: len(spans)
            for total in (given, *(largest * n for n in range(2, 9)))
            if (spans := self.spans(own, family, total, hidden))
            and {a.span(total, hidden) for a in pieces} <= {(s.offset, s.length) for s in spans}
            and all(a.span(total, hidden)[1] == rows for a, rows in pieces.items())
        }
        if given in fitting and fitting[given] == len(pieces):
            return given
        return next(iter(fitting)) if len(fitting) == 1 else None


def _tiles(spans: Sequence[Span], total: int) -> bool:
    ends = [0, *(span.offset + span.length for span in spans)]
    starts = [*(span.offset for span in spans), total]
    return len(spans) > 1 and ends == starts and all(span.length > 0 for span in spans)


def modules_by_own(places: Iterable[tuple[str, Place]]) -> Iterator[tuple[str, str, list[str]]]:
    """(own path, family, stems) of the ranges of each fused weight, one family at a time."""
    groups: dict[tuple[str, str], list[str]] = {}
    for stem, place in places:
        if place.alias is not None and place.alias.rows is not None:
            groups.setdefault((place.own_path, place.alias.family), []).append(stem)
    for (path, family), stems in groups.items():
        yield path, family, stems
