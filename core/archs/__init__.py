"""One entry per architecture, found by discovery; all of it data, none of it host classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

from ..registry import Registry
from .base import Alias, ArchSpec, Order, Shapes, Templates, wildcard
from .sizes import SIZES, Shape, evidence

__all__ = [
    "ARCHITECTURES", "Alias", "ArchSpec", "Order", "Shapes", "Templates",
    "detect", "detect_metadata", "detect_stems", "likely", "wildcard",
]  # fmt: skip

ARCHITECTURES: Registry[ArchSpec] = Registry("architecture")
ARCHITECTURES.discover(
    __name__, __path__, lambda item: item.id if isinstance(item, ArchSpec) else None
)


def detect(index: Shapes) -> ArchSpec | None:
    """The architecture of a model, from the names and weight shapes of its modules."""
    return next((spec for spec in _models() if spec.detect(index)), None)


def detect_stems(
    bodies: Iterable[str], metadata: Mapping[str, str] | None = None, shape: Shape | None = None
) -> ArchSpec | None:
    """The architecture a file is for: the first of :func:`likely`."""
    return next(iter(likely(bodies, metadata, shape)), None)


def likely(
    bodies: Iterable[str], metadata: Mapping[str, str] | None = None, shape: Shape | None = None
) -> list[ArchSpec]:
    """The architectures that a file can be for, in the order of the registry.

    The entry that can name the most of ``bodies`` (dotted or underscored) wins, if it can name at
    least half of them; one that ``metadata`` names wins over it on the same condition, and alone
    where none can. Of several with as many names, those whose published models have layers of the
    file's sizes are left.

    Args:
        shape: of the delta of one of ``bodies``, () where it is not known.
    """
    names = list(dict.fromkeys(bodies))
    scores = {spec: sum(map(spec.names, names)) for spec in _candidates(names)}
    able = [spec for spec, score in scores.items() if 2 * score >= len(names) > 0]
    said = detect_metadata(metadata or {})
    if said in able or not able:
        return [said] if said else []
    best = max(scores[spec] for spec in able)
    tied = [spec for spec in able if scores[spec] == best]
    if len(tied) > 1 and shape:
        grades = {spec: evidence(spec, names, shape) for spec in tied}
        tied = [spec for spec in tied if grades[spec] == max(grades.values())]
    # Where nothing but names is known of an entry, they are the diffusers' names of others too.
    return [spec for spec in tied if spec.aliases or spec.id in SIZES] or tied


def detect_metadata(metadata: Mapping[str, str]) -> ArchSpec | None:
    """The architecture that a file's ``ss_base_model_version`` or modelspec metadata names."""
    version = metadata.get("ss_base_model_version", "")
    modelspec = metadata.get("modelspec.architecture", "").split("/")[0]
    for spec in _models():
        if version in spec.base_versions or modelspec in spec.modelspec:
            return spec
    return None


def _models() -> Iterable[ArchSpec]:
    return (spec for spec in ARCHITECTURES.values() if "model" in spec.parts)


def _candidates(names: list[str]) -> list[ArchSpec]:
    """The entries that know at least half of ``names``, whatever numbers are in them."""
    patterns = Counter(wildcard(name)[0] for name in names)
    known: Counter[ArchSpec] = Counter()
    for pattern, count in patterns.items():
        known.update(dict.fromkeys(_by_pattern().get(pattern, ()), count))
    return [spec for spec in _models() if 2 * known[spec] >= len(names)]


@lru_cache(1)
def _by_pattern() -> dict[str, list[ArchSpec]]:
    """Name with its numbers as ``*`` -> the entries that have one such."""
    table: dict[str, list[ArchSpec]] = {}
    for spec in _models():
        for pattern in {*spec.own, *spec.theirs}:
            table.setdefault(pattern, []).append(spec)
    return table
