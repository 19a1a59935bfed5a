"""Adapters module by module, from memory or from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..adapters import Algorithm
from ..archs import ArchSpec
from ..errors import AdapterLabError
from ..files import Adapter
from ..keys.base import FORMATS, KeyFormat, guess
from ..keys.places import find_spec
from ..keys.reasons import unusable
from ..keys.scale import Scales
from ..keys.shared import read_modules
from ..keys.stems import Stem
from ..lazy import AdapterFile

Tick = Callable[[int, int, str], None]  # (modules done, of how many, what is being done)


def quiet(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Module:
    """One module of an adapter with its tensors.

    Attributes:
        parts: what it does to the layer's "weight" and "bias", with the scale that everything
            around the tensors tells.
    """

    stem: Stem
    parts: Mapping[str, Algorithm]

    @property
    def name(self) -> str:
        """The module's name in the file."""
        return self.stem.name

    @property
    def weight(self) -> Algorithm | None:
        """What it does to the layer's weight."""
        return self.parts.get("weight")


class Source:
    """An adapter to work on: what it has is known, its tensors are read a module at a time.

    Attributes:
        stems: modules by name; of a file without the values of larger tensors.
        form: key format of most names. spec: the architecture, if it is known.
        shell: names, shapes and metadata; of a file without the values of larger tensors.
    """

    def __init__(self, adapter: Mapping[str, Tensor]) -> None:
        self.adapter = adapter if isinstance(adapter, AdapterFile) else Adapter.of(adapter)
        held = self.adapter
        self.shell = held.shell() if isinstance(held, AdapterFile) else held
        stems = read_modules(self.shell)
        self.stems = {name: stem for name, stem in stems.items() if not stem.embedding}
        self.form: KeyFormat = guess([s.clean for s in self.stems.values()]) or FORMATS["bare"]
        self._scales = Scales(self.shell)

    @property
    def spec(self) -> ArchSpec | None:
        """The architecture of the diffusion model that the file is for."""
        return find_spec(self.stems.values(), self.adapter.metadata)

    def module(self, name: str) -> Module:
        """The module ``name``, its tensors read now.

        Raises:
            AdapterLabError: malformed tensors, of an unknown algorithm, or an unusable config.
        """
        stem = self.stem(name)
        if stem.foreign:
            raise AdapterLabError(f"module '{name}' can't be used: {unusable(stem)}")
        path = next((r.body for r in FORMATS["peft"].read(stem.clean)), stem.clean)
        try:
            return Module(stem, self._scales.load(stem, path))
        except AdapterLabError as error:
            raise error.about(f"module '{name}'") from error

    def modules(self, tick: Tick = quiet, what: str = "reading") -> Iterator[Module]:
        """All of them, one after the other."""
        for done, name in enumerate(self.stems):
            tick(done, len(self.stems), f"{what} {name}")
            yield self.module(name)

    def key(self, name: str, suffix: str) -> str:
        """How the file spells, or would spell, a tensor of one of its modules."""
        stem = self.stems[name]
        return stem.keys.get(suffix) or f"{name}.{self.form.spell(suffix)}"

    def stem(self, name: str) -> Stem:
        """The names and tensors of the module ``name``, read now."""
        stem = self.stems[name]
        if not isinstance(self.adapter, AdapterFile):
            return stem
        tensors = {s: self.adapter[stem.keys[s]] if s in stem.keys else t
                   for s, t in stem.tensors.items()}  # fmt: skip
        return replace(stem, tensors=tensors)
