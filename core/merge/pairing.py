"""Which modules of several adapter files act on the same rows of the same weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from ..archs import ARCHITECTURES, ArchSpec
from ..errors import AdapterLabError
from ..files import Adapter
from ..keys import KeyFormat, convert
from ..keys.places import Place, find_specs, locate
from .base import keyed
from .modules import Module, Source, Tick, quiet


@dataclass(frozen=True)
class Group:
    """Modules whose deltas are added to the same rows.

    Attributes:
        name: of the module of the result. members: (which file, its module), at most one of each.
        form: format that the result's keys are spelled in.
        beside: whether other modules of the result act on some of these rows too.
    """

    name: str
    members: list[tuple[int, Module]]
    form: KeyFormat
    beside: bool = False

    def key(self, suffix: str) -> str:
        """How the result spells a tensor of this module."""
        spelled = (m.stem.keys[suffix] for _, m in self.members if suffix in m.stem.keys)
        return next(spelled, f"{self.name}.{self.form.spell(suffix)}")


class Pairing:
    """The modules of several files, paired by what they act on and not by their names.

    Names stay what they are where all files agree; else all modules go over into the format of
    the first file, one weight of the model at a time.

    Args:
        adapters: in memory or open files. architecture: id, where the names leave it open.

    Raises:
        AdapterLabError: files of different architectures.
    """

    def __init__(
        self, adapters: Sequence[Mapping[str, Tensor]], architecture: str | None = None
    ) -> None:
        self.sources = [Source(adapter) for adapter in adapters]
        self.form = next((s.form for s in self.sources if s.stems), self.sources[0].form)
        self.spec = _architecture(self.sources, architecture)
        self._places = [
            {name: locate(stem, self.form, self.spec) for name, stem in source.stems.items()}
            for source in self.sources
        ]
        self._clusters = self._by_weight()
        same_form = all(source.form is self.form for source in self.sources if source.stems)
        self.converts = not (same_form and all(map(self._agree, self._clusters.values())))

    def __len__(self) -> int:
        return len(self._clusters)

    def groups(self, tick: Tick = quiet) -> Iterator[Group]:
        """Every module of the result, its tensors read now.

        Raises:
            AdapterLabError: malformed modules, or ones that the format has no name for.
        """
        for done, ((_, path), cluster) in enumerate(self._clusters.items()):
            tick(done, len(self), f"merging {path}")
            yield from self._converted(cluster) if self.converts else self._direct(cluster)

    def _by_weight(self) -> dict[tuple[str, str], dict[int, list[str]]]:
        """(part, own path) -> file -> its modules there."""
        clusters: dict[tuple[str, str], dict[int, list[str]]] = {}
        for i, (source, places) in enumerate(zip(self.sources, self._places, strict=True)):
            for name, stem in source.stems.items():
                place = places[name]
                where = (place.part, place.own_path) if place else ("", stem.clean)
                clusters.setdefault(where, {}).setdefault(i, []).append(name)
        return clusters

    def _agree(self, cluster: Mapping[int, list[str]]) -> bool:
        """Whether one name means the same rows in all files, and other names mean others."""
        if len(cluster) == 1:
            return True
        rows = {
            name: _rows(self._places[i][name]) for i, names in cluster.items() for name in names
        }
        return len(rows) == 1 or (None not in rows.values() and len({*rows.values()}) == len(rows))

    def _direct(self, cluster: Mapping[int, list[str]]) -> Iterator[Group]:
        whole = {_rows(self._places[i][n]) is None for i, names in cluster.items() for n in names}
        for name in dict.fromkeys(chain.from_iterable(cluster.values())):
            members = [(i, self.sources[i].module(name)) for i in cluster if name in cluster[i]]
            yield Group(name, members, self.form, len(whole) > 1)

    def _converted(self, cluster: Mapping[int, list[str]]) -> Iterator[Group]:
        found: dict[str, list[tuple[int, Module]]] = {}
        whole: set[bool] = set()
        for i, names in cluster.items():
            source = self.sources[i]
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors |= keyed(source.module(name).stem)
            part = Adapter(tensors, source.adapter.metadata, source.adapter.config)
            spec = self.spec.id if self.spec else None
            written = Source(convert(part, self.form.id, spec))
            for module in written.modules():
                found.setdefault(module.name, []).append((i, module))
                whole.add(_rows(locate(module.stem, self.form, self.spec)) is None)
        for name, members in found.items():
            yield Group(name, members, self.form, len(whole) > 1)


def _rows(place: Place | None) -> tuple[object, object] | None:
    """What of a weight a name stands for; None for all of it in its own order."""
    alias = place.alias if place else None
    if alias is None or (alias.rows is None and alias.order is None):
        return None
    return alias.rows, alias.order


def _architecture(sources: Sequence[Source], asked: str | None) -> ArchSpec | None:
    """The architecture that all files can be for; text encoders alone go with any."""
    if asked:
        return ARCHITECTURES[asked]
    left: list[ArchSpec] = []
    seen = ""
    for source in sources:
        specs = find_specs(source.stems.values(), source.adapter.metadata)
        both = [spec for spec in specs if spec in left]
        if left and specs and not both:
            raise AdapterLabError(
                "The adapters are for different models",
                found=f"{left[0].title} ({seen or 'the first'}) and {specs[0].title} "
                f"({source.adapter.name or 'another'})",
                fix="Merge adapters of one model",
            )
        seen = seen if left else source.adapter.name
        left = both or left or specs
    return left[0] if left else None
