"""The parameters that two model files have in common, and what is different about them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..archs import ArchSpec, likely
from ..errors import AdapterLabError
from ..files import is_finite
from ..header import DTYPES
from ..keys import ModelIndex
from ..keys.base import ANY_ENCODER, OTHER
from ..keys.encoders import locate
from ..stored import helpers, read_weight, stored
from ..streams import PathLike, Reader, raw
from ..tensors import length
from .model_names import Place, places
from .noise import units

_PIECE = 1 << 18  # numbers that are read and compared at once
_WIDTHS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}  # of CLIP's text encoders


class Name(NamedTuple):
    """A parameter of a model.

    Attributes:
        part: "model" or which text encoder. path: of its module, or its own where ``kind`` is
            "value". kind: "weight", "bias", or "value" for a parameter of another name.
    """

    part: str
    path: str
    kind: str


class ModelFile:
    """An open model file and the parameters of its diffusion model and text encoders.

    Args:
        dequantise: read quantised weights as numbers; they are refused otherwise.

    Attributes:
        places: by name. spec: the architecture, if it is known. diffusers: whether the names are
            diffusers'. other: tensors of other parts, a VAE's for example. quantised: keys.

    Raises:
        AdapterLabError: malformed file, or quantised weights.
    """

    def __init__(self, path: PathLike, *, dequantise: bool = False) -> None:
        self.reader = Reader(path)
        shapes = self._shapes(dequantise)
        held = places(shapes)
        index = ModelIndex({name: place.shape for name, place in held.items()})
        self.spec: ArchSpec | None = index.architecture
        alone = self._encoder(index) if self.spec is None and not index.encoders else ""
        self.places: dict[Name, Place] = {}
        for part, modules in index.parts.items():
            for path, module in modules.items() if part != OTHER else ():
                kind = "weight" if module.key.endswith(".weight") else "value"
                self.places[Name(alone or part, path, kind)] = held[module.key]
                if bias := index.bias(module.key):
                    self.places[Name(alone or part, path, "bias")] = held[bias.key]
        self.other = [module.key for module in index.part(OTHER).values()]
        self.diffusers = False
        if self.spec is None and not alone:
            self.spec, self.diffusers = _by_names(index)

    def dtype(self, key: str) -> torch.dtype | None:
        """In which the tensor ``key`` is stored; None where it is quantised."""
        return None if key in self.quantised else DTYPES[self.reader.header.tensors[key].dtype]

    def pieces(self, place: Place) -> Iterator[Tensor]:
        """The numbers of a parameter in order, at most ``_PIECE`` at once, float32; a quantised
        weight is read whole."""
        first, count = _offset(place), math.prod(place.shape)
        if place.key in self.quantised:
            weight = read_weight(self.reader, place.key).reshape(-1)
            yield from torch.split(weight[first : first + count], _PIECE)
            return
        info = self.reader.header.tensors[place.key]
        dtype = DTYPES[info.dtype]
        for start in range(0, count, _PIECE):
            values = torch.empty(min(_PIECE, count - start), dtype=dtype)
            self.reader.fill(raw(values), info.start + (first + start) * dtype.itemsize)
            yield values.float()

    def whole(self, place: Place) -> Tensor:
        """All of a parameter, float32."""
        made = torch.empty(place.shape)
        parts = torch.split(made.view(-1), _PIECE)
        for into, values in zip(parts, self.pieces(place), strict=True):
            into.copy_(values)
        return made

    def _shapes(self, dequantise: bool) -> dict[str, tuple[int, ...]]:
        """Of all parameters that hold real numbers."""
        header, aside = self.reader.header, helpers(self.reader.header)
        shapes: dict[str, tuple[int, ...]] = {}
        self.quantised: set[str] = set()
        for key, info in header.tensors.items():
            how = stored(self.reader, key)
            if how is not None:
                self.quantised.add(key)
                shapes[key] = how.shape
            elif key not in aside and DTYPES[info.dtype].is_floating_point:
                shapes[key] = info.shape
        if self.quantised and not dequantise:
            key = next(iter(self.quantised))
            raise AdapterLabError(
                f"'{self.reader.path}' is quantised", found=f"'{key}' and more",
                expected="bf16, fp16 or fp32 weights",
                fix="Take the unquantised file, or choose 'dequantise'",
            )  # fmt: skip
        return shapes

    @staticmethod
    def _encoder(index: ModelIndex) -> str:
        """The part that a text encoder's own file is; "" where it is none."""
        found = [(place, shape) for path, shape in index.items()
                 if (place := locate((ANY_ENCODER,), path))]  # fmt: skip
        if 2 * len(found) < sum(len(shape) > 1 for shape in index.values()) or not found:
            return ""
        (part, _), shape = found[0]
        return _WIDTHS.get(shape[-1], part) if part == "clip_l" else part


class Change(NamedTuple):
    """What became of a parameter.

    Attributes:
        delta: tuned - base, float32. norm: ||delta||. weight: ||base||. units: the largest change
            in units in the last place, or some number above the limit asked for; 0 where a weight
            is quantised.
    """

    delta: Tensor
    norm: float
    weight: float
    units: float


@dataclass(frozen=True)
class Pair:
    """The same parameter of the base and of the tuned model."""

    base: ModelFile
    tuned: ModelFile
    before: Place
    after: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.after.shape

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those it is stored in; none of a quantised one."""
        found = self.base.dtype(self.before.key), self.tuned.dtype(self.after.key)
        return [] if None in found else [dtype for dtype in found if dtype is not None]

    def change(self, limit: float) -> Change:
        """tuned - base, read piece by piece.

        Args:
            limit: units in the last place up to which they are counted.

        Raises:
            AdapterLabError: NaN or infinity in either; names the file and the tensor.
        """
        delta, dtypes = torch.empty(self.shape), self.dtypes
        found = norm = weight = 0.0
        sides = self.base.pieces(self.before), self.tuned.pieces(self.after)
        for part, base, tuned in zip(torch.split(delta.view(-1), _PIECE), *sides, strict=True):
            self._check(base, tuned)
            change = length(torch.sub(tuned, base, out=part))
            norm, weight = math.hypot(norm, change), math.hypot(weight, length(base))
            if change and found <= limit and dtypes:
                found = max(found, units(base, tuned, dtypes))
        return Change(delta, norm, weight, found)

    def _check(self, base: Tensor, tuned: Tensor) -> None:
        sides = (self.base, self.before, base), (self.tuned, self.after, tuned)
        for file, place, values in sides:
            if not is_finite(values):
                raise AdapterLabError(
                    f"'{file.reader.path}' is damaged", found=f"NaN or infinity in '{place.key}'",
                    fix="Use an earlier or another copy of it.",
                )  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A module of both models: its parameters by kind."""

    part: str
    path: str
    pairs: Mapping[str, Pair]


class Models:
    """Two model files side by side.

    Attributes:
        units: the modules that both have in the same sizes, in the order of the tuned file.
        strangers: module -> why it is not among them.

    Raises:
        AdapterLabError: a malformed or quantised file, different architectures, nothing in common.
    """

    def __init__(self, base: PathLike, tuned: PathLike, *, dequantise: bool = False) -> None:
        self.base, self.tuned = (ModelFile(p, dequantise=dequantise) for p in (base, tuned))
        specs = self.base.spec, self.tuned.spec
        if specs[0] is not None and specs[1] is not None and specs[0] is not specs[1]:
            raise AdapterLabError(
                "The two models are of different architectures",
                found=f"{specs[0].title} and {specs[1].title}",
                expected="a model and its fine-tune",
            )  # fmt: skip
        if self.base.diffusers != self.tuned.diffusers:
            theirs, own = sorted((self.base, self.tuned), key=lambda file: not file.diffusers)
            raise AdapterLabError(
                "The two models name their layers differently",
                found=f"diffusers' names in '{theirs.reader.path}', not in '{own.reader.path}'",
                expected="both in one layout",
                fix="Take the file of the same model in the other's layout",
            )
        self.spec = specs[1] or specs[0]
        self.strangers = dict(self._strangers())
        self.units = self._units()
        if not self.units:
            raise AdapterLabError(
                "The two models have no weights in common",
                found=f"'{_first(self.base)}' and '{_first(self.tuned)}', for example",
                expected="a model and its fine-tune",
            )

    def _units(self) -> list[Unit]:
        infos = self.tuned.reader.header.tensors
        modules: dict[tuple[str, str], dict[str, Pair]] = {}
        both = self.base.places
        for name, after in sorted(
            self.tuned.places.items(), key=lambda i: (infos[i[1].key].start, _offset(i[1]))
        ):
            before = both.get(name)
            if before is not None and before.shape == after.shape and math.prod(after.shape):
                pair = Pair(self.base, self.tuned, before, after)
                modules.setdefault((name.part, name.path), {})[name.kind] = pair
        return [Unit(part, path, pairs) for (part, path), pairs in modules.items()]

    def _strangers(self) -> Iterator[tuple[str, str]]:
        ours, theirs = self.base.places, self.tuned.places
        parts = {name.part for name in ours} & {name.part for name in theirs}
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            if name.part not in parts:
                continue
            label = titled(name.part, name.path) + (".bias" if name.kind == "bias" else "")
            if name not in ours or name not in theirs:
                yield label, f"not in the {'base' if name not in ours else 'tuned'} model"
            elif ours[name].shape != theirs[name].shape:
                yield label, f"{ours[name].shape} in the base, {theirs[name].shape} when tuned"


def _by_names(index: ModelIndex) -> tuple[ArchSpec | None, bool]:
    """The architecture that has most of these names, and whether they are diffusers' for it."""
    spec = next(iter(likely(index, {})), None)
    own = sum(any(True for _ in spec.own.find(path)) for path in index) if spec else 0
    theirs = sum(any(True for _ in spec.theirs.find(path)) for path in index) if spec else 0
    return spec, theirs > own


def titled(part: str, path: str) -> str:
    """A module as reports name it."""
    return path if part == "model" else f"{part}.{path}"


def _offset(place: Place) -> int:
    """Numbers of the stored tensor before the parameter."""
    return place.rows[1] * math.prod(place.shape[1:]) if place.rows else 0


def _first(file: ModelFile) -> str:
    return next(iter(file.reader.header.tensors), "no tensors")
