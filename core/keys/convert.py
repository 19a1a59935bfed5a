"""Rewrites an adapter's keys in another format, without a model to look names up in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters import ALGORITHMS, Tensors, load_parts
from ..archs import ARCHITECTURES, ArchSpec
from ..errors import AdapterLabError
from ..files import Adapter
from . import encoders
from .base import FORMATS, KeyFormat
from .dialect import loaded, worded
from .places import Place, find_specs, locate
from .scale import Scales, network_args
from .settings import Settings, packed
from .shared import read_modules
from .stems import EMBEDDING, Stem
from .writer import Approximate, Piece, Writer, rows_of

_CONFIGURED = ("diffusers", "peft")  # formats whose readers may be told ranks beside the tensors
_MANY = ("loha", "lokr")  # what a file of LoRA must not hold, and a LoRA can stand for
_SCALE_METADATA = ("lora_adapter_metadata",)  # its names are those of the old keys


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
    tensors becomes an ``alpha``, and every scale goes into the factors where the readers of the
    format know no ``alpha``.

    Raises:
        AdapterLabError: modules that can't be placed or have no name in the format, malformed
            ones, names of several architectures, or factors that the scale makes too large.
    """
    source = Adapter.of(adapter)
    conversion = Conversion(source, format_id, architecture)
    written = Adapter({}, kept_metadata(source.metadata, conversion.form), None, source.name)
    for group in conversion.groups:
        for piece in conversion.pieces([conversion.stems[name] for name in group]):
            written.update(conversion.named(piece))
    written.update({key: t for key, t in source.items() if key.startswith(EMBEDDING)})
    written.config, told = conversion.settings()
    written.metadata |= told
    return written


class Conversion:
    """How one file goes over into a format; planned from names and shapes, done group by group.

    Args:
        source: the file; tensors may be on the meta device but for those of a few numbers.
        architecture: found out from the file by default.
        approximate: see :class:`.writer.Writer`.

    Attributes:
        form: of the result. stems: its modules. spec: the architecture. groups: names of the
            modules to convert together, each of them once.

    Raises:
        AdapterLabError: as :func:`convert`.
    """

    def __init__(
        self, source: Adapter, format_id: str, architecture: str | None = None,
        approximate: Approximate | None = None,
    ) -> None:  # fmt: skip
        self.form = FORMATS[format_id]
        stems = read_modules(source).items()
        self.stems = {name: stem for name, stem in stems if not stem.embedding}
        strange = (stem.name for stem in self.stems.values() if stem.foreign)
        _refuse(strange, self.form, "hold tensors of no known algorithm")
        self.scales = Scales(source)
        self.spec = ARCHITECTURES[architecture] if architecture else self._found(source)
        self._places = self._located(self.spec)
        self._writer = Writer(self.form, self.spec, approximate)
        self._one = bool(self.form.single and approximate and self._is_mixed())
        self._keys: set[str] = set()
        self._settings: dict[str, Settings] = {}
        self._unread: Counter[str] = Counter()
        groups: dict[tuple[str, str], list[str]] = {}
        for name, place in self._places.items():
            groups.setdefault((place.part, place.own_path), []).append(name)
        self.groups = list(groups.values())

    def pieces(self, stems: Iterable[Stem]) -> Iterator[Piece]:
        """What becomes of the modules of one group, given with their tensors."""
        read = [Piece(s.name, self._places[s.name], self._tensors(s)) for s in stems]
        for piece in self._writer.pieces(read):
            yield self._lora(piece) if self._one else piece

    def named(self, piece: Piece) -> dict[str, Tensor]:
        """The tensors of a piece by key; raises where another module has such a key."""
        tensors = worded(piece.tensors, self.form)
        used, prefix, path = _name(piece.place, tensors, self.form, self.spec)
        part = piece.place.part
        named = {used.write(path, s, part, prefix=prefix): t for s, t in tensors.items()}
        twice = self._keys & named.keys()
        if twice:
            why = f"get the name '{min(twice)}', which another module has"
            _refuse([piece.stem], self.form, why)
        self._keys |= named.keys()
        algorithm = loaded(tensors)
        if algorithm is not None and algorithm.name not in self.form.loads:
            self._unread[algorithm.title] += 1
        if used.id in _CONFIGURED:
            component = (prefix or "").rstrip(".") if used.id == "diffusers" else ""
            self._settings.setdefault(component, Settings()).add(path, tensors)
        return named

    def settings(self) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """peft's config of what was written and metadata that says the same, where there are
        readers of either."""
        configs = {name: found.config() for name, found in self._settings.items()}
        if self.form.id == "diffusers":
            return None, packed(configs)
        return configs.get(""), {}

    def warnings(self) -> list[str]:
        """What the format's own tool will not load, and what had to be assumed of scales."""
        said = self.scales.warnings
        if self._one:
            what = "one algorithm a file, of sizes that it chooses: LoHa and LoKr became LoRA"
            said.append(f"{self.form.title} loads {what}")
        if self.form.loads and self._unread:
            count = sum(self._unread.values())
            said.append(
                f"{self.form.title} does not load {' or '.join(sorted(self._unread))}: {count} "
                "modules are for other readers of this file"
            )
        others = [path for found in self._settings.values() for path in found.others]
        if self.form.id == "peft" and others:
            said.append(
                f"{len(others)} modules are not in peft's config, which is for one algorithm and "
                f"sizes that peft itself would choose: '{others[0]}' for one"
            )
        return said

    def _found(self, source: Adapter) -> ArchSpec | None:
        """The file's architecture; raises where several would give other names."""
        specs = find_specs(self.stems.values(), source.metadata)
        if len(specs) < 2:
            return next(iter(specs), None)
        names = self._names(specs[0])
        rivals = [spec for spec in specs[1:] if self._differs(names, spec)]
        if rivals:
            raise AdapterLabError(
                "The names fit several architectures",
                found=", ".join(spec.title for spec in (specs[0], *rivals)),
                fix="Choose one as the architecture",
            )
        return specs[0]

    def _lora(self, piece: Piece) -> Piece:
        """A module of another algorithm as a LoRA, in a file that may hold only one."""
        algorithm, rows = loaded(piece.tensors), rows_of(piece.tensors)
        if algorithm is None or algorithm.name not in _MANY or not rows:
            return piece
        approximate = self._writer.approximate
        made = None if approximate is None else approximate([(piece.tensors, rows)], None)
        return replace(piece, tensors=made[0], error=made[1]) if made else piece

    def _is_mixed(self) -> bool:
        """Whether the readers could not load all of the result, by names and shapes alone."""
        read = (Piece(n, p, _shell(self.stems[n].tensors)) for n, p in self._places.items())
        settings, kept, names = Settings(), False, set[str]()
        for piece in Writer(self.form, self.spec).pieces(read):
            kept = kept or piece.how == "kept"
            algorithm = loaded(piece.tensors)
            names.add(algorithm.name if algorithm else "")
            settings.add(piece.place.path, piece.tensors)
        settings.config()
        return bool(names & {*_MANY}) and bool(kept or settings.others)

    def _differs(self, names: set[str], spec: ArchSpec) -> bool:
        """Whether the names of ``spec`` are others."""
        try:
            return self._names(spec) != names
        except AdapterLabError:  # it can't be the file's
            return False

    def _names(self, spec: ArchSpec) -> set[str]:
        """The keys of all that would be written for ``spec``, up to the suffix."""
        places = self._located(spec)
        read = (Piece(n, p, _shell(self.stems[n].tensors)) for n, p in places.items())
        pieces = list(Writer(self.form, spec).pieces(read))
        names: set[str] = set()
        for piece in pieces:
            used, prefix, path = _name(piece.place, piece.tensors, self.form, spec)
            names.add(used.write(path, "alpha", piece.place.part, prefix=prefix))
        if len(names) < len(pieces):
            _refuse([pieces[0].stem], self.form, "get names that others have")
        return names

    def _located(self, spec: ArchSpec | None) -> dict[str, Place]:
        places = {name: locate(stem, self.form, spec) for name, stem in self.stems.items()}
        lost = (name for name, place in places.items() if place is None)
        _refuse(lost, self.form, "match no known architecture")
        return {name: place for name, place in places.items() if place}

    def _tensors(self, stem: Stem) -> Tensors:
        """Tensors by canonical suffix, which say by themselves what settings outside them do."""
        path = next((r.body for r in FORMATS["peft"].read(stem.clean)), stem.clean)
        try:
            here = load_parts(stem.tensors).get("weight")
            told = self.scales.load(stem, path).get("weight")
        except AdapterLabError as error:
            raise error.about(f"module '{stem.name}'") from error
        if here is None or told is None:
            return stem.tensors
        same = here.scale == told.scale and not self.scales.configured
        if same and "lora_embedding_A" not in stem.tensors:
            return stem.tensors
        biases = [a for a in ALGORITHMS.values() if a.parameter == "bias"]
        own = {s: t for s, t in stem.tensors.items() if any(a.owns(s) for a in biases)}
        return {**own, **told.state()}


def _shell(tensors: Tensors) -> dict[str, Tensor]:
    """The same shapes without the numbers, but for scalars."""
    return {name: t if t.numel() == 1 else torch.empty_like(t, device="meta")
            for name, t in tensors.items()}  # fmt: skip


def _name(
    place: Place, tensors: Tensors, form: KeyFormat, spec: ArchSpec | None
) -> tuple[KeyFormat, str | None, str]:
    """(format really used, prefix, path) of a module."""
    used = _form(form, tensors, place)
    path = place.path if place.part == "model" else encoders.spelled(place.path, used.separator)
    special = spec.prefixes.get(used.id, {}).get(place.part) if spec else None
    return used, used.prefix(place.part) if special is None else special, path


def _form(form: KeyFormat, tensors: Tensors, place: Place) -> KeyFormat:
    """The format that a module is really written in."""
    for suffix, other in form.instead.items():
        if any(name == suffix or name.startswith(suffix + ".") for name in tensors):
            return FORMATS[other]
    if form.id == "comfyui" and place.alias is not None and place.alias.family == "diffusers":
        # ComfyUI reads diffusers' names of most models below diffusers' prefix only.
        return replace(form, prefixes=(("transformer.", ("model",)), *form.prefixes))
    return form


def kept_metadata(metadata: Mapping[str, str], form: KeyFormat) -> dict[str, str]:
    """What stays true of a file whose tensors say by themselves how its modules are scaled."""
    kept = {name: text for name, text in metadata.items() if name not in _SCALE_METADATA}
    args = network_args(metadata)
    changed = {"rs_lora": "False"} if "rs_lora" in args else {}
    if form.folds:  # readers that ask here divide by the rank what is divided already
        changed |= {"conv_alpha": args["conv_dim"]} if "conv_dim" in args else {}
        if "ss_network_dim" in kept:
            kept["ss_network_alpha"] = kept["ss_network_dim"]
    if changed:
        kept["ss_network_args"] = json.dumps({**args, **changed})
    return kept


def _refuse(names: Iterable[str], form: KeyFormat, why: str) -> None:
    stems = list(names)
    if stems:
        more = f" and {len(stems) - 5} more" if len(stems) > 5 else ""
        raise AdapterLabError(
            f"Cannot write {len(stems)} modules with {form.title} keys: they {why}",
            found=", ".join(f"'{stem}'" for stem in stems[:5]) + more,
        )
