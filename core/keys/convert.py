"""Rewrites an adapter's keys in another format, without a model to look names up in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..adapters import load
from ..archs import ARCHITECTURES, ArchSpec, detect_stems
from ..errors import AdapterLabError
from ..files import Adapter
from .base import FORMATS, KeyFormat
from .scale import config_scale
from .stems import Stem, read_stems


@dataclass(frozen=True)
class _Place:
    """What a stem names: one path in each family's names, "" where that family has none."""

    part: str
    own: str
    diffusers: str


def convert(
    adapter: Mapping[str, Tensor], format_id: str, architecture: str | None = None
) -> Adapter:
    """The same adapter with its keys in another format; tensors are shared, not copied.

    Underscored names are placed through the layer templates of the architecture, by default the
    one that the names belong to. A scale that peft's config holds becomes an ``alpha`` tensor.

    Raises:
        AdapterLabError: modules that can't be placed or have no name in the format (q, k and v
            apart have none where the own weight is fused), or malformed ones.
    """
    source = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    form, stems = FORMATS[format_id], read_stems(source)
    _refuse((s.name for s in stems.values() if s.unknown), form, "hold tensors unknown to it")
    spec = ARCHITECTURES[architecture] if architecture else _detect(stems.values(), source)
    known = {name: _place(stem, form, spec) for name, stem in stems.items()}
    _refuse((s for s, place in known.items() if not place), form, "match no known architecture")
    places = {name: place for name, place in known.items() if place}
    family = _family(form, spec, places.values())
    _refuse(
        (s for s, place in places.items() if not getattr(place, family)), form,
        "hold q, k and v apart where this format names them as one, or the other way round",
    )  # fmt: skip
    prefixes: Mapping[str, str] = spec.prefixes.get(form.id, {}) if spec else {}
    converted = Adapter({}, source.metadata, None, source.name)
    for name, place in places.items():
        prefix = prefixes.get(place.part)
        try:
            tensors = _tensors(stems[name], source)
        except AdapterLabError as error:
            raise error.about(f"module '{name}'") from error
        for suffix, tensor in tensors.items():
            key = form.write(getattr(place, family), suffix, place.part, prefix=prefix)
            if key in converted:
                _refuse([name], form, f"get the name '{key}', which another module has")
            converted[key] = tensor
    return converted


def _detect(stems: Iterable[Stem], source: Adapter) -> ArchSpec | None:
    read = (form.read(stem.clean) for stem in stems for form in FORMATS.values() if form.hint)
    bodies = [body for places in read for part, body in places if part == "model"]
    return detect_stems(bodies, source.metadata)


def _place(stem: Stem, form: KeyFormat, spec: ArchSpec | None) -> _Place | None:
    """Where a stem belongs: by the layers of an architecture, else by its dotted path alone."""
    read = [(f, *place) for f in FORMATS.values() for place in f.read(stem.clean)]
    for _, part, body in read:
        for entry in (spec, *ARCHITECTURES.values()):
            if entry and part in entry.parts:
                found = _known(part, body, entry, aliases=entry is spec)
                if found:
                    return found
    usable = [(part, body) for f, part, body in read if f is form]
    if not any(f.separator == "_" for f, _, _ in read):
        # The longest prefix leaves the shortest path.
        usable += sorted(((part, body) for _, part, body in read), key=lambda place: len(place[1]))
    return next((_Place(part, body, body) for part, body in usable), None)


def _known(part: str, body: str, spec: ArchSpec, *, aliases: bool) -> _Place | None:
    """``body`` in both families' names; other architectures' aliases are no evidence."""
    for template, numbers in spec.own.find(body):
        whole = (a.theirs for a in spec.aliases if a.own == template and not (a.rows or a.refuse))
        theirs = next(whole, "") if aliases else ""
        own = template.format(*numbers)
        return _Place(part, own, theirs.format(*numbers) if spec.aliases else own)
    for alias, numbers in spec.theirs.find(body) if aliases else ():
        own = "" if alias.rows or alias.refuse else alias.own.format(*numbers)
        return _Place(part, own, alias.theirs.format(*numbers))
    return None


def _family(form: KeyFormat, spec: ArchSpec | None, places: Iterable[_Place]) -> str:
    """Whose names to write: the architecture's choice for the format if all modules have one."""
    family = spec.families.get(form.id, form.family) if spec else form.family
    return family if all(getattr(place, family) for place in places) else form.family


def _tensors(stem: Stem, source: Adapter) -> Mapping[str, Tensor]:
    """Tensors by canonical suffix, with the scale of peft's config as alpha."""
    if not source.config or "alpha" in stem.tensors:
        return stem.tensors
    path = next((body for _, body in FORMATS["peft"].read(stem.clean)), stem.clean)
    scale = config_scale(source.config, path)
    algorithm = load(stem.tensors, scale) if scale is not None else None
    return algorithm.state() if algorithm else stem.tensors


def _refuse(names: Iterable[str], form: KeyFormat, why: str) -> None:
    stems = list(names)
    if stems:
        more = f" and {len(stems) - 5} more" if len(stems) > 5 else ""
        raise AdapterLabError(
            f"Cannot write {len(stems)} modules with {form.title} keys: they {why}",
            found=", ".join(f"'{stem}'" for stem in stems[:5]) + more,
        )
