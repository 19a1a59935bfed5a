"""Rewrites an adapter's keys in another format, without a model to look names up in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters import ALGORITHMS, load_parts
from ..archs import ARCHITECTURES, ArchSpec
from ..errors import AdapterLabError
from ..files import Adapter
from ..tensors import wide
from . import encoders, fuse
from .base import FORMATS, KeyFormat
from .places import Families, Place, find_specs, locate, modules_by_own
from .scale import Scales, network_args
from .shared import read_modules
from .stems import Stem

_SCALE_METADATA = ("lora_adapter_metadata",)  # its names are those of the old keys


@dataclass(frozen=True)
class _Module:
    """What is written under one name."""

    stem: str
    place: Place
    tensors: Mapping[str, Tensor]


def convert(
    adapter: Mapping[str, Tensor], format_id: str, architecture: str | None = None
) -> Adapter:
    """The same adapter with its keys in another format; tensors are shared where they stay.

    Names go over through the layers and aliases of the architecture. By default it is the one
    that the file's metadata names, if that has at least half of the file's names; else the one
    that has most of them, among several the one whose published models have layers of the file's
    sizes. Where that leaves several and they would be written differently, the file does not say
    what it is for.

    Modules of fused weights are cut into the ranges that the format names apart, or joined, where
    that is exact; others, and those whose rows can't be put in another order, keep the name that
    they have in the other family, which readers of both understand. A scale from outside the
    tensors becomes an ``alpha``.

    Raises:
        AdapterLabError: modules that can't be placed or have no name in the format, malformed
            ones, or names of several architectures.
    """
    source = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    form, stems = FORMATS[format_id], read_modules(source)
    modules = {name: stem for name, stem in stems.items() if not stem.embedding}
    _refuse((s.name for s in modules.values() if s.unknown), form, "hold tensors unknown to it")
    if architecture:
        return _converted(source, modules, form, ARCHITECTURES[architecture])
    specs = find_specs(modules.values(), source.metadata)
    written = _converted(source, modules, form, specs[0] if specs else None)
    rivals = [spec for spec in specs[1:] if _differs(written, source, modules, form, spec)]
    if rivals:
        raise AdapterLabError(
            "The names fit several architectures",
            found=", ".join(spec.title for spec in (specs[0], *rivals)),
            fix="Choose one as the architecture",
        )
    return written


def _converted(
    source: Adapter, modules: Mapping[str, Stem], form: KeyFormat, spec: ArchSpec | None
) -> Adapter:
    """The same modules by the names of one architecture."""
    places = {name: locate(stem, form, spec) for name, stem in modules.items()}
    _refuse((s for s, place in places.items() if not place), form, "match no known architecture")
    metadata = _metadata(source.metadata)
    written = Adapter({}, metadata, None, source.name)
    scales = Scales(source)
    read = [_Module(n, p, _tensors(modules[n], scales)) for n, p in places.items() if p]
    for module in _Writer(form, spec).modules(read):
        _write(written, module, form, spec)
    kept = {key: t for key, t in source.items() if key.startswith("bundle_emb.")}
    written.update(kept)
    return written


def _differs(
    written: Adapter, source: Adapter, modules: Mapping[str, Stem], form: KeyFormat,
    spec: ArchSpec,
) -> bool:  # fmt: skip
    """Whether the names of ``spec`` would give other keys than ``written``."""
    try:
        return set(_converted(source, modules, form, spec)) != set(written)
    except AdapterLabError:  # it can't be the file's
        return False


class _Writer:
    """Modules under the names of one family."""

    def __init__(self, form: KeyFormat, spec: ArchSpec | None) -> None:
        self.families = Families(spec)
        self.family = spec.families.get(form.id, form.family) if spec else form.family

    def modules(self, read: list[_Module]) -> Iterator[_Module]:
        """What to write for ``read``: renamed, put in order, cut and joined."""
        known = {module.stem: module for module in map(self._turned, read)}
        for path, family, stems in modules_by_own((m.stem, m.place) for m in known.values()):
            if family == self.family:
                continue
            pieces = [known[stem] for stem in stems]
            renamed = [self._renamed(piece) for piece in pieces]
            joined = None if all(renamed) else self._joined(pieces)
            if joined:
                for stem in stems:
                    del known[stem]
                known[path] = joined
            known |= {m.stem: m for m in renamed if m and not joined}
        for module in known.values():
            yield from ([module] if self.family == "own" else self._cut(module))

    def _renamed(self, module: _Module) -> _Module | None:
        """The same rows by the family's name of them, if it has one."""
        place = module.place
        alias = place.alias and self.families.same(place.alias, self.family)
        if not alias:
            return None
        path = alias.theirs.format(*place.numbers)
        return replace(module, place=replace(place, path=path, alias=alias))

    def _turned(self, module: _Module) -> _Module:
        """With the rows in the model's order and, of a whole weight, its own name."""
        place, alias = module.place, module.place.alias
        if alias is None:
            return module
        tensors: Mapping[str, Tensor] | None = module.tensors
        if alias.order is not None:
            rows = _rows(module.tensors)
            inverse = torch.argsort(alias.order(rows)) if rows else None
            tensors = None if inverse is None else fuse.take(module.tensors, inverse)
        if tensors is None:
            return module
        plain = replace(alias, order=None)
        if alias.rows is None:
            return replace(module, place=replace(place, alias=None, path=place.own_path),
                           tensors=tensors)  # fmt: skip
        return replace(module, place=replace(place, alias=alias if alias.order is None else plain),
                       tensors=tensors)  # fmt: skip

    def _joined(self, pieces: list[_Module]) -> _Module | None:
        lengths = {m.place.alias: _rows(m.tensors) for m in pieces if m.place.alias}
        sizes = {alias: rows for alias, rows in lengths.items() if rows}
        hidden = _columns(pieces[0].tensors)
        if len(sizes) < len(pieces) or not hidden:
            return None
        own = pieces[0].place.own
        total = self.families.total(own, sizes, hidden)
        if total is None:
            return None
        starts = {
            alias.span(total, hidden)[0]: m.tensors for m in pieces if (alias := m.place.alias)
        }
        if len(starts) < len(pieces):
            return None  # two names of one range
        spans = self.families.spans(own, next(iter(sizes)).family, total, hidden)
        tensors = fuse.join([(starts.get(span.offset), span.length) for span in spans])
        place = replace(pieces[0].place, alias=None, path=pieces[0].place.own_path)
        return None if tensors is None else _Module(pieces[0].stem, place, tensors)

    def _cut(self, module: _Module) -> Iterator[_Module]:
        place = module.place
        if place.part != "model" or place.alias is not None or not place.own:
            yield module
            return
        whole = self.families.whole(place.own, self.family)
        rows, columns = _rows(module.tensors), _columns(module.tensors)
        if whole:
            order = whole.order(rows) if whole.order and rows else None
            taken = module.tensors if order is None else fuse.take(module.tensors, order)
            if taken is not None and (order is not None or whole.order is None):
                path = whole.theirs.format(*place.numbers)
                yield replace(module, place=replace(place, path=path), tensors=taken)
                return
        spans = self.families.spans(place.own, self.family, rows, columns) if rows else []
        cut = [(span, fuse.take(module.tensors, span.rows)) for span in spans]
        pieces = [(span, taken) for span, taken in cut if taken is not None]
        if not pieces or len(pieces) < len(spans):
            yield module
            return
        for span, taken in pieces:
            path = span.alias.theirs.format(*place.numbers)
            yield replace(module, place=replace(place, path=path), tensors=taken)


def _write(written: Adapter, module: _Module, form: KeyFormat, spec: ArchSpec | None) -> None:
    place = module.place
    tensors = module.tensors if form.spellings else _plain(module.tensors)
    used = _form(form, tensors, place)
    for suffix, tensor in tensors.items():
        prefix = spec.prefixes.get(used.id, {}).get(place.part) if spec else None
        path = place.path if place.part == "model" else encoders.spelled(place.path, used.separator)
        key = used.write(path, suffix, place.part, prefix=prefix)
        if key in written:
            why = f"get the name '{key}', which another module has"
            _refuse([module.stem], form, why)
        written[key] = tensor


def _plain(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``tensors`` without what peft alone has, for readers that know LyCORIS' and kohya's.

    The bias of the up factor becomes a difference, the magnitudes of DoRA a column.
    """
    plain, up = dict(tensors), tensors.get("lora_up.weight")
    if up is None:
        return tensors
    if "lora_up.bias" in plain and "diff_b" not in plain:
        bias, rank = plain.pop("lora_up.bias"), up.shape[1]
        scale = float(plain["alpha"].item()) / rank if "alpha" in plain else 1.0
        plain["diff_b"] = (wide(bias, bias) * scale).to(bias.dtype)
    for name in ("dora_scale", "magnitude"):
        if name in plain and plain[name].ndim == 1 and len(plain[name]) == len(up):
            column = plain.pop(name).reshape(-1, *(1,) * (up.ndim - 1))
            plain["dora_scale"] = column
    return plain


def _form(form: KeyFormat, tensors: Mapping[str, Tensor], place: Place) -> KeyFormat:
    """The format that a module is really written in."""
    for suffix, other in form.instead.items():
        if any(name == suffix or name.startswith(suffix + ".") for name in tensors):
            return FORMATS[other]
    if form.id == "comfyui" and place.alias is not None and place.alias.family == "diffusers":
        # ComfyUI reads diffusers' names of most models below diffusers' prefix only.
        return replace(form, prefixes=(("transformer.", ("model",)), *form.prefixes))
    return form


def _metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What stays true of a file whose alphas say by themselves how its modules are scaled."""
    kept = {name: text for name, text in metadata.items() if name not in _SCALE_METADATA}
    args = network_args(metadata)
    if "rs_lora" in args:
        kept["ss_network_args"] = json.dumps({**args, "rs_lora": "False"})
    return kept


def _tensors(stem: Stem, scales: Scales) -> Mapping[str, Tensor]:
    """Tensors by canonical suffix, which say by themselves what settings outside them do."""
    path = next((r.body for r in FORMATS["peft"].read(stem.clean)), stem.clean)
    try:
        here = load_parts(stem.tensors).get("weight")
        told = scales.load(stem, path).get("weight")
    except AdapterLabError as error:
        raise error.about(f"module '{stem.name}'") from error
    if here is None or told is None:
        return stem.tensors
    same = here.scale == told.scale and not scales.configured
    if same and "lora_embedding_A" not in stem.tensors:
        return stem.tensors
    biases = [a for a in ALGORITHMS.values() if a.parameter == "bias"]
    own = {s: t for s, t in stem.tensors.items() if any(a.owns(s) for a in biases)}
    return {**own, **told.state()}


def _rows(tensors: Mapping[str, Tensor]) -> int | None:
    """Output rows of a module; None where no algorithm has its tensors."""
    parts = load_parts(tensors)
    shapes = [parts[name].shape for name in ("weight", "bias") if name in parts]
    return shapes[0][0] if shapes and shapes[0] else None


def _columns(tensors: Mapping[str, Tensor]) -> int:
    weight = load_parts(tensors).get("weight")
    return weight.shape[1] if weight is not None and len(weight.shape) > 1 else 0


def _refuse(names: Iterable[str], form: KeyFormat, why: str) -> None:
    stems = list(names)
    if stems:
        more = f" and {len(stems) - 5} more" if len(stems) > 5 else ""
        raise AdapterLabError(
            f"Cannot write {len(stems)} modules with {form.title} keys: they {why}",
            found=", ".join(f"'{stem}'" for stem in stems[:5]) + more,
        )
