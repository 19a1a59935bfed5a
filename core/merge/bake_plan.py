"""What becomes of a model file into which adapters go: settled before a tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..adapters import Algorithm, Ordered
from ..adapters.padded import RESHAPE
from ..archs import ARCHITECTURES
from ..errors import AdapterLabError
from ..header import DTYPES
from ..keys import Entry, ModelIndex, resolve
from ..keys.shared import LAMBDA_D, complete
from ..lazy import AdapterFile
from ..stored import Stored, dequantised, helpers, stored
from ..streams import Reader
from .bake_report import QUANTISED, tell_matches
from .model_names import Place, places
from .modules import Source
from .outcome import Outcome

_WIDE = (torch.float32, torch.float16, torch.bfloat16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Part:
    """What one module of an adapter does to a range of a stored tensor.

    Attributes:
        place: where the tensor is. beside: that of a layer's weight, for what acts on its bias.
    """

    entry: Entry
    source: Source
    strength: float
    place: Place
    beside: Place | None

    def algorithm(self) -> Algorithm:
        """At its strength, with its tensors, which of an open file are read now."""
        known = self.entry.algorithm
        if isinstance(self.source.adapter, AdapterFile):
            parts = self.source.module(self.entry.stem).parts
            loaded = parts["bias" if self.beside else "weight"]
            known = Ordered(loaded, known.order) if isinstance(known, Ordered) else loaded
        return known.at(self.strength)


class Plan:
    """What becomes of a model file.

    Args:
        dtype: to save floating point tensors of more than one number in; None: each in its own.

    Attributes:
        parts: key -> what is done to the tensor, in order. told: (name, strength) of each adapter.
        coded: how quantised weights are stored. plain: those that will be plain numbers.
        shapes: of all tensors but those that only say how others are stored.
        metadata: of the file without what is no longer true of how its weights are stored.
    """

    def __init__(self, reader: Reader, outcome: Outcome, dtype: torch.dtype | None) -> None:
        self.reader, self.outcome, self.dtype = reader, outcome, dtype
        self.parts: dict[str, list[Part]] = {}
        self.told: list[tuple[str, float]] = []
        self._marks: set[str | int] = set()
        self.plain: dict[str, Stored] = {}
        self._gone: set[str] = set()
        self.metadata = dict(reader.header.metadata)
        infos, beside = reader.header.tensors, helpers(reader.header)
        ours = {
            key: (info, stored(reader, key)) for key, info in infos.items() if key not in beside
        }
        self.coded = {key: how for key, (_, how) in ours.items() if how}
        self.shapes = {key: how.shape if how else info.shape for key, (info, how) in ours.items()}
        self.places = places(self.shapes)
        self.index = ModelIndex({name: place.shape for name, place in self.places.items()})

    def add(self, adapter: Mapping[str, Tensor], strength: float, architecture: str | None) -> None:
        """One adapter more; raises where nothing of it fits."""
        source = Source(adapter)
        known = source.adapter
        shell = known.shell() if isinstance(known, AdapterFile) else known
        spec = ARCHITECTURES[architecture] if architecture else None
        entries, report = resolve(shell, self.index, spec)
        if not report.matched:
            raise report.error()
        if any(LAMBDA_D in stem.tensors for stem in source.stems.values()):
            weights = (e.key for e in entries if e.key.endswith(".weight"))
            width = max((self.places[key].shape[-1] for key in weights), default=0)
            complete(source.stems, known.config, width)
        for entry in entries:
            place, name = self.places[entry.key], entry.key.removesuffix(".bias")
            beside = None if name == entry.key else self.places.get(f"{name}.weight")
            part = Part(entry, source, strength, place, beside)
            self.parts.setdefault(place.key, []).append(part)
        number = len(self.told) + 1
        name = known.name or f"adapter {number}"
        mark = getattr(adapter, "path", None) or id(adapter)
        if mark in self._marks:
            self.outcome.warnings.append(f"'{name}' is baked more than once")
        self._marks.add(mark)
        # Results of other nodes share names such as "merged".
        label = f"{name}, adapter {number}" if name in dict(self.told) else name
        tell_matches(self.outcome, report, self.places, label, strength, again=bool(self.told))
        self.told.append((name, strength))

    def settle(self, dequantise: bool) -> None:
        """Decide about quantised weights and what goes with them."""
        changed = {key: how for key, how in self.coded.items() if key in self.parts}
        if changed and not dequantise:
            first, how = next(iter(changed.items()))
            raise AdapterLabError(
                f"{len(changed)} weights to change are stored quantised",
                found=f"'{first}' in {how.title}",
                expected="bf16, fp16 or fp32 weights",
                fix="Bake into the unquantised model, or choose 'dequantise'.",
            )
        if dequantise:
            self.dequantise(self.coded if self.dtype else changed)
        self._warn()

    def dequantise(self, coded: dict[str, Stored]) -> None:
        """Make plain numbers of these weights."""
        self.plain = coded
        self._gone, self.metadata = dequantised(self.reader.header, coded)
        if coded and len(coded) == len(self.coded):
            self.metadata.pop(QUANTISED, None)

    def infos(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor of the result."""
        keys = (key for key in self.reader.header.tensors if key not in self._gone)
        return {key: self.infos_of(key) for key in keys}

    def infos_of(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of one tensor of the result."""
        return self.saved(key), self._size(key)

    def is_copied(self, key: str) -> bool:
        """Whether a tensor is saved as it is."""
        changed = key in self.parts or key in self.plain
        return not changed and self.saved(key) == self.own(key)

    def own(self, key: str) -> torch.dtype:
        """What a tensor is in now."""
        return DTYPES[self.reader.header.tensors[key].dtype]

    def saved(self, key: str) -> torch.dtype:
        """What a tensor is saved in."""
        if key in self.plain:
            return self.dtype or self._usual
        own = self.own(key)
        many = math.prod(self.reader.header.tensors[key].shape) > 1
        cast = own.is_floating_point and many and key in self.shapes and key not in self.coded
        return self.dtype if self.dtype and cast else own

    @cached_property
    def _usual(self) -> torch.dtype:
        """What most plain numbers of the file are in; bf16 where there are none."""
        counts = Counter[torch.dtype]()
        for key, shape in self.shapes.items():
            if key not in self.coded and self.own(key) in _WIDE:
                counts[self.own(key)] += math.prod(shape)
        return next((dtype for dtype, _ in counts.most_common(1)), torch.bfloat16)

    def _size(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor of the result; adapters of control models make weights larger."""
        sizes = [part.entry.algorithm.tensors.get(RESHAPE) for part in self.parts.get(key, ())]
        larger = [tuple(int(n) for n in size) for size in sizes if size is not None]
        if larger:
            return larger[-1]
        return self.plain[key].shape if key in self.plain else self.reader.header.tensors[key].shape

    def _warn(self) -> None:
        small = [key for key in self.parts if self.saved(key) in _FP8]
        if small:
            self.outcome.warnings.append(
                f"{len(small)} changed weights are saved in 8 bits, which keep little of a small "
                "change: choose bf16 as dtype"
            )
        left = len(self.coded) - len(self.plain)
        if self.plain:
            bits = str(self.saved(next(iter(self.plain)))).removeprefix("torch.")
            more = f", {left} stay quantised" if left else ""
            said = f"{len(self.plain)} quantised weights are {bits} now{more}"
            self.outcome.warnings.append(said)
        elif left and self.dtype:
            self.outcome.warnings.append(f"{left} quantised weights stay as they are")
