"""Matches the modules of an adapter file with the weights of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..adapters import Algorithm, Ordered
from ..archs import ARCHITECTURES, ArchSpec
from ..errors import AdapterLabError
from ..files import Adapter
from . import reasons
from .base import FORMATS, KeyFormat, Reading, candidates, guess
from .index import ModelIndex
from .names import Names, Override, Slice, Target
from .places import find_spec
from .report import Match, Report
from .scale import Scales
from .shared import LAMBDA_D, complete
from .stems import Stem, read_stems

_EMBEDDING = "an embedding for prompts that came with the file, no part of the adapter"


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
    alpha: float | None = None,
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
        alpha: of modules whose scale nothing in the file or beside it tells; their rank by
            default.

    Raises:
        AdapterLabError: a malformed module, a key that is not text, a tensor given twice, an
            unusable peft config, or targets that the file or the model does not have.
    """
    source = Adapter.of(adapter)
    index = index if isinstance(index, ModelIndex) else ModelIndex(index)
    spec = ARCHITECTURES[architecture] if isinstance(architecture, str) else architecture
    names = Names(index, spec or index.architecture)
    matcher = _Matcher(source, names, targets or {}, Scales(source, alpha))
    entries = [entry for stem in matcher.stems.values() for entry in matcher.place(stem)]
    matcher.conclude(entries)
    return entries, matcher.report


class _Matcher:
    """One run of ``resolve``: the file's modules, what each format makes of them, the report."""

    def __init__(
        self, source: Adapter, names: Names, targets: Mapping[str, Override], scales: Scales
    ) -> None:
        self.source, self.names, self.scales = source, names, scales
        self.stems = read_stems(source)
        strange = [stem for stem in targets if stem not in self.stems]
        if strange:
            raise AdapterLabError(
                f"targets names '{strange[0]}', which is no module of the adapter"
            )
        self.targets = {stem: names.at(to) for stem, to in targets.items()}
        spec = names.spec
        self.report = Report(name=source.name, architecture=spec.id if spec else None)
        self.hits = {name: self._hits(stem) for name, stem in self.stems.items()}
        self._share()
        self.form = self._choose()
        self.others: dict[str, list[str]] = {}
        self.doubtful: list[str] = []
        self.biasless: list[str] = []

    def place(self, stem: Stem) -> list[Entry]:
        """The entries of one module; none, and a reason in the report, where it can't be applied.

        A module has one for its weight and one for its bias, whichever the file changes.
        """
        if stem.embedding:
            self.report.ignored[stem.name] = _EMBEDDING
            return []
        form, targets = self._targets(stem)
        reason, parts = reasons.unusable(stem), {}
        if not reason:
            parts = self._load(stem, form)
            reason = "" if parts else f"no algorithm has just {', '.join(stem.tensors)}"
        if not targets and stem.tensors:
            reason = reasons.unknown(self.names, self._readings(stem, form))
        elif parts:
            misfits = {target: reasons.misfit(self.names, parts, target) for target in targets}
            fitting = [target for target, wrong in misfits.items() if not wrong]
            if fitting:
                rivals = [t for t in targets if t.part == fitting[0].part]
                return self._entries(stem, parts, fitting, len(rivals) > 1)
            reason = next(iter(misfits.values()))
        self.report.unmatched[stem.name] = reason
        return []

    def conclude(self, entries: list[Entry]) -> None:
        """Fill in what only the whole file tells."""
        report, spec = self.report, self.names.spec
        found = self._architecture()
        report.file_architecture = found.id if found else None
        if spec and found and found is not spec and report.matched:
            report.warnings.append(f"The file is for {found.title}, the model is {spec.title}")
        report.warnings += self.scales.warnings
        for form, stems in self.others.items():
            report.warnings.append(
                f"{len(stems)} modules have {FORMATS[form].title} names and the others "
                f"{self.form.title} names, '{stems[0]}' for one"
            )
        if self.doubtful:
            report.warnings.append(_some(self.doubtful, "names are ambiguous"))
        if self.biasless:
            what = "biases are left out, for the layers have none"
            report.warnings.append(_some(self.biasless, what))
        shared = _shared(entries, self.stems)
        if shared:
            report.warnings.append(_some(shared, "weights are changed by more than one module"))

    def _hits(self, stem: Stem) -> dict[str, list[Target]]:
        """Format id -> what the format takes ``stem`` for, in this model."""
        found: dict[str, list[Target]] = {}
        for name in (stem.clean, f"{stem.clean}_lora") if stem.joint else (stem.clean,):
            for form in candidates(name):
                if form.id in found or (found and not form.hint):
                    continue
                for _, parts, body in form.read(name):
                    targets = self.names.find(parts, body, form.separator)
                    if targets:
                        found[form.id] = targets
                        break
        return found

    def _share(self) -> None:
        """Give the modules what the file holds once for all of them."""
        if not any(LAMBDA_D in stem.tensors for stem in self.stems.values()):
            return
        widths = [hits[0].shape[-1] for found in self.hits.values() for hits in found.values()]
        width = max(widths, default=0) if all(self.hits.values()) else 0
        complete(self.stems, self.source.config, width)
        self.hits = {name: self.hits[name] for name in self.stems}

    def _choose(self) -> KeyFormat:
        """The format with most hits; among those without any, with most of its own prefixes."""
        counts = Counter(form for hits in self.hits.values() for form in hits)
        ranked = counts.most_common(2)
        if len(ranked) > 1:
            self.report.runner_up = ranked[1]
        if ranked:
            first = FORMATS[ranked[0][0]]
        else:
            guessed = guess([stem.clean for stem in self.stems.values()])
            if guessed is None:
                return FORMATS["bare"]
            first = guessed
        self.report.format = first.id
        return first

    def _targets(self, stem: Stem) -> tuple[KeyFormat, list[Target]]:
        if stem.name in self.targets:
            return self.form, [self.targets[stem.name]]
        hits = self.hits[stem.name]
        if not hits or self.form.id in hits:
            return self.form, hits.get(self.form.id, [])
        form, targets = next(iter(hits.items()))
        # Several formats may share their names for text encoders; that is no mixture.
        if targets[0].part == "model":
            self.others.setdefault(form, []).append(stem.name)
        return FORMATS[form], targets

    def _readings(self, stem: Stem, form: KeyFormat) -> list[Reading]:
        """What ``stem`` can mean: in ``form``, else in others; a stem always is a bare path."""
        forms = (form, *candidates(stem.clean))
        return next(read for f in forms if (read := list(f.read(stem.clean))))

    def _load(self, stem: Stem, form: KeyFormat) -> dict[str, Algorithm]:
        """What the tensors of one module do to its weight and bias."""
        try:
            path = next((reading.body for reading in form.read(stem.clean)), stem.clean)
            parts = self.scales.load(stem, path)
        except AdapterLabError as error:
            file = f"'{self.source.name}', " if self.source.name else ""
            raise error.about(f"{file}module '{stem.name}'") from error
        for algorithm in list(parts.values())[:1]:
            self.report.algorithms[algorithm.name] += 1
        return parts

    def _entries(
        self, stem: Stem, parts: Mapping[str, Algorithm], fitting: list[Target], ambiguous: bool
    ) -> list[Entry]:
        target = fitting[0]
        if ambiguous:
            by = "by its shape" if len(fitting) == 1 else "although others fit"
            self.doubtful.append(f"{stem.name} went to {target.path} {by}")
        entries: list[Entry] = []
        for parameter, algorithm in parts.items():
            key = self._parameter(stem, parameter, algorithm, target)
            if target.order:
                algorithm = Ordered(algorithm, target.order(target.shape[0]))
            if key:
                # A bias has the rows of its weight, and no columns.
                across = parameter == "bias" and target.slice and target.slice[0]
                span = None if across else target.slice
                entries.append(Entry(stem.name, key, span, algorithm, target.path, target.part))
        first, *others = entries
        self.report.matched[stem.name] = Match(
            first.key, target.slice, first.algorithm.name, first.algorithm.rank,
            first.algorithm.scale,
            traits=(*first.algorithm.traits, *("bias" for _ in others)),
        )  # fmt: skip
        return entries

    def _parameter(
        self, stem: Stem, parameter: str, algorithm: Algorithm, target: Target
    ) -> str | None:
        """The name of the target's weight or bias; None for a bias that it does not have."""
        if parameter == "weight":
            return target.key
        bias = self.names.index.bias(target.key)
        if bias and not algorithm.misfit(target.shape[:1]):
            return bias.key
        if algorithm.parameter == parameter:  # the file holds one, it does not follow from others
            self.biasless.append(f"{stem.name} on {target.path}")
        return None

    def _architecture(self) -> ArchSpec | None:
        """What the file is for: the model's if all of it fits or no other has more of its names."""
        report, spec = self.report, self.names.spec
        if spec and report.matched and not report.unmatched:
            return spec
        found = find_spec(self.stems.values(), self.source.metadata)
        if spec is None or found is spec or 2 * len(report.matched) < report.total:
            return found
        readings = (r for stem in self.stems.values() for r in self.form.read(stem.clean))
        bodies = {reading.body for reading in readings if "model" in reading.parts}
        more = found and sum(map(found.names, bodies)) > sum(map(spec.names, bodies))
        return found if more else spec


def _shared(entries: list[Entry], stems: Mapping[str, Stem]) -> list[str]:
    """Descriptions of weights whose ranges overlap between two modules."""
    by_key: dict[str, list[Entry]] = {}
    shared: list[str] = []
    for entry in entries:
        for other in by_key.setdefault(entry.key, []):
            if _overlap(entry.slice, other.slice):
                same = stems[other.stem].clean == stems[entry.stem].clean
                what = "the same module twice" if same else "both applied"
                shared.append(f"{other.stem} and {entry.stem} on {entry.key}, {what}")
        by_key[entry.key].append(entry)
    return shared


def _overlap(one: Slice | None, two: Slice | None) -> bool:
    if one is None or two is None or one[0] != two[0]:
        return True
    return one[1] < two[1] + two[2] and two[1] < one[1] + one[2]


def _some(items: list[str], what: str) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{len(items)} {what}: {'; '.join(items[:3])}{more}"
