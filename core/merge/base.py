"""The weights of a model that modules of adapters act on, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..adapters import Ordered
from ..bake import refuse_scaled
from ..files import Adapter
from ..header import DTYPES
from ..keys import Entry, ModelIndex, resolve
from ..keys.stems import Stem
from ..stored import helpers, read_weight, stored
from ..streams import PathLike, Reader

Weights = Mapping[str, Tensor]


class _File(Weights):
    """An open model file, which reads a weight at each look-up, quantised ones included."""

    def __init__(self, path: PathLike) -> None:
        self.reader = Reader(path)
        header = self.reader.header
        beside = helpers(header)
        self.shapes = {name: self._shape(name) for name in header.tensors if name not in beside}

    def _shape(self, name: str) -> tuple[int, ...]:
        info = self.reader.header.tensors[name]
        packed = not DTYPES[info.dtype].is_floating_point and stored(self.reader, name)
        return packed.shape if packed else info.shape

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        return read_weight(self.reader, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Base(Mapping[str, Tensor]):
    """A model: what its weights are called, and their values when they are asked for.

    Args:
        model: path of a model file, or its weights by name.
        index: names and shapes of ``model``, where looking its weights up for them is dear.

    Raises:
        AdapterLabError: malformed file.
    """

    def __init__(self, model: PathLike | Weights, index: ModelIndex | None = None) -> None:
        self._weights: Weights = model if isinstance(model, Mapping) else _File(model)
        held = self._weights
        shapes = held.shapes if isinstance(held, _File) else held
        self.index = index or ModelIndex(shapes)

    @classmethod
    def of(cls, model: Base | PathLike | Weights | None) -> Base | None:
        """``model`` as one; None for None."""
        return model if model is None or isinstance(model, Base) else cls(model)

    def weight(self, stem: Stem, parameter: str = "weight") -> Tensor | None:
        """W of the layer that a module acts on, as the module's tensors see it.

        Args:
            stem: of an adapter file; its tensors may be on the meta device.
            parameter: "weight" or "bias".

        Returns:
            float32 (out, in, *k), only the rows and in the order that the module means; None where
            the model has no such layer or the module does not fit it.

        Raises:
            AdapterLabError: a malformed module; a weight in a format that can't be read, or in a
                mapping quantised.
        """
        entry = self._entry(stem, parameter)
        if entry is None:
            return None
        weight = self[entry.key].float()
        if entry.slice:
            weight = weight.narrow(*entry.slice)
        order = entry.algorithm.order if isinstance(entry.algorithm, Ordered) else None
        return weight if order is None else weight[order]

    def _entry(self, stem: Stem, parameter: str) -> Entry | None:
        entries, _ = resolve(Adapter(keyed(stem)), self.index)
        bias = parameter == "bias"
        return next((e for e in entries if e.key.endswith(".bias") == bias), None)

    def __getitem__(self, key: str) -> Tensor:
        weight = self._weights[key]
        refuse_scaled(self._weights, key, weight)
        return weight.detach().to("cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def keyed(stem: Stem) -> dict[str, Tensor]:
    """The tensors of one module as a file holds them, what it shares with others included."""
    return {stem.keys.get(s, f"{stem.name}.{s}"): t for s, t in stem.tensors.items()}
