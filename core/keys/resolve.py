"""Matches the modules of an adapter file with the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..adapters import ALGORITHMS, Algorithm, load
from ..archs import ARCHITECTURES, ArchSpec, detect, detect_stems, wildcard
from ..errors import AdapterLabError
from ..files import Adapter
from .base import FORMATS, KeyFormat
from .index import ModelIndex
from .names import Names, Override, Slice, Target
from .report import Match, Report
from .scale import config_scale
from .stems import Stem, read_stems

_Hits = Mapping[str, list[Target]]  # stem -> what it names


@dataclass(frozen=True)
class Entry:
    """One adapter module and the weight, or range of its rows, that its delta is added to.

    Attributes:
        stem: the module's name in the file.
        key: name of the weight in the given index. path: of its module, own names.
        part: "model", or which text encoder. slice: (axis, offset, length).
    """

    stem: str
    key: str
    slice: Slice | None
    algorithm: Algorithm
    path: str
    part: str = "model"


def resolve(
    adapter: Mapping[str, Tensor],
    index: Mapping[str, object],
    architecture: str | ArchSpec | None = None,
    *,
    targets: Mapping[str, Override] | None = None,
) -> tuple[list[Entry], Report]:
    """Find the weight of every adapter module.

    The key format is the one that names most modules of the model; modules that it misses are
    looked up in the others. Every module ends up in the report, matched or with a reason.

    Args:
        adapter: tensors by key; an :class:`Adapter` also brings metadata and peft's config.
        index: the model: a :class:`ModelIndex`, a state dict, or name -> shape.
        architecture: id or entry; found out from ``index`` by default.
        targets: stem -> module name in ``index``, or (module, axis, offset, length); goes before
            matching by name.

    Raises:
        AdapterLabError: a malformed module, a key that is not text, a tensor given twice, an
            unusable peft config, or targets that the file or the model does not have.
    """
    source = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    index = index if isinstance(index, ModelIndex) else ModelIndex(index)
    spec = ARCHITECTURES[architecture] if isinstance(architecture, str) else architecture
    matcher = _Matcher(source, Names(index, spec or detect(index)), targets or {})
    entries = [entry for stem in matcher.stems.values() if (entry := matcher.place(stem))]
    matcher.conclude(entries)
    return entries, matcher.report


class _Matcher:
    """One run of ``resolve``: the file's modules, what each format makes of them, the report."""

    def __init__(self, source: Adapter, names: Names, targets: Mapping[str, Override]) -> None:
        self.source, self.names = source, names
        self.stems = read_stems(source)
        strange = [stem for stem in targets if stem not in self.stems]
        if strange:
            raise AdapterLabError(
                f"targets names '{strange[0]}', which is no module of the adapter"
            )
        self.targets = {stem: names.at(to) for stem, to in targets.items()}
        self.owned = {s for a in ALGORITHMS.values() for s in a.suffixes} | {"alpha"}
        spec = names.spec
        self.report = Report(name=source.name, architecture=spec.id if spec else None)
        self.hits = {form.id: self._hits(form) for form in FORMATS.values()}
        self.form = self._choose()
        self.others: dict[str, list[str]] = {}
        self.doubtful: list[str] = []

    def place(self, stem: Stem) -> Entry | None:
        """The entry of one module; None, and a reason in the report, where it can't be applied."""
        form, targets = self._targets(stem)
        foreign = [s for s in stem.tensors if s not in self.owned] + stem.unknown
        algorithm = None if foreign else self._load(stem, form)
        if not targets and stem.tensors:
            reason = self._unknown(stem)
        elif algorithm is None:
            named, verb = ", ".join(foreign), "is" if len(foreign) == 1 else "are"
            mixed = f"no algorithm has just these tensors: {', '.join(stem.tensors)}"
            reason = f"{named} {verb} not supported" if foreign else mixed
        else:
            misfits = {target: self._misfit(algorithm, target) for target in targets}
            fitting = [target for target, misfit in misfits.items() if not misfit]
            reason = next((misfit for misfit in misfits.values() if misfit), "")
            if fitting:
                return self._entry(stem, algorithm, fitting, len(targets) > 1)
        self.report.unmatched[stem.name] = reason
        return None

    def conclude(self, entries: list[Entry]) -> None:
        """Fill in what only the whole file tells."""
        report, spec = self.report, self.names.spec
        if spec and 2 * len(report.matched) >= report.total > 0:
            report.file_architecture = spec.id
        else:
            found = detect_stems(self._bodies(), self.source.metadata)
            report.file_architecture = found.id if found else None
            if spec and found and found is not spec and report.matched:
                report.warnings.append(f"The file is for {found.title}, the model is {spec.title}")
        for form, stems in self.others.items():
            report.warnings.append(
                f"{len(stems)} modules have {FORMATS[form].title} names and the others "
                f"{self.form.title} names, '{stems[0]}' for one"
            )
        if self.doubtful:
            report.warnings.append(_some(self.doubtful, "names are ambiguous"))
        shared = _shared(entries)
        if shared:
            report.warnings.append(_some(shared, "weights are changed by more than one module"))

    def _hits(self, form: KeyFormat) -> _Hits:
        found = {
            name: [
                target
                for part, body in form.read(stem.clean)
                for target in self.names.find(part, body, form.separator)
            ]
            for name, stem in self.stems.items()
        }
        return {name: targets for name, targets in found.items() if targets}

    def _choose(self) -> KeyFormat:
        """The format with most hits; among those without any, with most of its own prefixes."""
        order = sorted(FORMATS.values(), key=lambda form: -len(self.hits[form.id]))
        first, second = order[:2]
        if self.hits[second.id]:
            self.report.runner_up = (second.id, len(self.hits[second.id]))
        if not self.hits[first.id]:
            seen = {form: self._readable(form) for form in order if form.hint}
            first = max(seen, key=lambda form: seen[form])
            if not seen[first]:
                return FORMATS["bare"]
        self.report.format = first.id
        return first

    def _readable(self, form: KeyFormat) -> int:
        return sum(any(True for _ in form.read(stem.clean)) for stem in self.stems.values())

    def _targets(self, stem: Stem) -> tuple[KeyFormat, list[Target]]:
        if stem.name in self.targets:
            return self.form, [self.targets[stem.name]]
        for form in (self.form, *FORMATS.values()):
            targets = self.hits[form.id].get(stem.name)
            if targets:
                if form is not self.form:
                    self.others.setdefault(form.id, []).append(stem.name)
                return form, targets
        return self.form, []

    def _load(self, stem: Stem, form: KeyFormat) -> Algorithm | None:
        """The algorithm of one module, unless its tensors belong to several."""
        try:
            scale = None
            if self.source.config and "alpha" not in stem.tensors:
                path = next((body for _, body in form.read(stem.clean)), stem.clean)
                scale = config_scale(self.source.config, path)
            algorithm = load(stem.tensors, scale)
        except AdapterLabError as error:
            file = f"'{self.source.name}', " if self.source.name else ""
            raise error.about(f"{file}module '{stem.name}'") from error
        if algorithm is None or stem.tensors.keys() - {*algorithm.suffixes, "alpha"}:
            return None
        self.report.algorithms[algorithm.name] += 1
        return algorithm

    def _unknown(self, stem: Stem) -> str:
        """Why nothing in the model is called like ``stem``."""
        forms = (self.form, *(form for form in FORMATS.values() if form.hint), FORMATS["bare"])
        form, places = next((f, read) for f in forms if (read := list(f.read(stem.clean))))
        if not any(self.names.index.part(part) for part, _ in places):
            part = places[0][0]
            whose = "the diffusion model" if part == "model" else f"the text encoder {part}"
            return f"for {whose}, which is not among the given weights"
        near = self.names.nearest(*places[0], form.separator)
        if near and wildcard(near)[0] == wildcard(places[0][1])[0]:
            return "the model has no block of this number"
        return "no module of this name" + (f"; the nearest is {near}" if near else "")

    def _misfit(self, algorithm: Algorithm, target: Target) -> str:
        if target.refuse:
            return f"{target.path}: {target.refuse}"
        misfit = algorithm.misfit(target.shape)
        return f"does not fit {target.path}: {misfit}" if misfit else ""

    def _entry(
        self, stem: Stem, algorithm: Algorithm, fitting: list[Target], ambiguous: bool
    ) -> Entry:
        target = fitting[0]
        if ambiguous:
            by = "by its shape" if len(fitting) == 1 else "although others fit"
            self.doubtful.append(f"{stem.name} went to {target.path} {by}")
        self.report.matched[stem.name] = Match(
            target.key, target.slice, algorithm.name, algorithm.rank, algorithm.scale
        )
        return Entry(stem.name, target.key, target.slice, algorithm, target.path, target.part)

    def _bodies(self) -> list[str]:
        places = (place for stem in self.stems.values() for place in self.form.read(stem.clean))
        return [body for part, body in places if part == "model"]


def _shared(entries: list[Entry]) -> list[str]:
    """Descriptions of weights whose ranges overlap between two modules."""
    by_key: dict[str, list[Entry]] = {}
    shared: list[str] = []
    for entry in entries:
        for other in by_key.setdefault(entry.key, []):
            if _overlap(entry.slice, other.slice):
                shared.append(f"{other.stem} and {entry.stem} on {entry.key}, both applied")
        by_key[entry.key].append(entry)
    return shared


def _overlap(one: Slice | None, two: Slice | None) -> bool:
    if one is None or two is None or one[0] != two[0]:
        return True
    return one[1] < two[1] + two[2] and two[1] < one[1] + one[2]


def _some(items: list[str], what: str) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{len(items)} {what}: {'; '.join(items[:3])}{more}"
