"""What an architecture is: data about the names and shapes of its modules.

Own names are those of ComfyUI and of the original code ("double_blocks.0.img_attn.qkv"); their
names are those of diffusers. ``{}`` in a template stands for one whole number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]  # path of a module in its own names -> shape of its weight
Condition = Callable[[Shapes], bool]

_NUMBER = re.compile(r"(?<![^._])(\d+|\{\})(?![^._])")


def wildcard(name: str) -> tuple[str, tuple[str, ...]]:
    """``name`` with every whole-number component replaced by ``*``, and those numbers.

    Works on both spellings: "blocks.3.ffn.0" -> ("blocks.*.ffn.*", ("3", "0")) and
    "blocks_3_ffn_0" -> ("blocks_*_ffn_*", ("3", "0")).
    """
    pieces = _NUMBER.split(name)
    return "*".join(pieces[::2]), tuple(pieces[1::2])


class Templates(Generic[T]):
    """Items by name template, found by a dotted or an underscored name."""

    def __init__(self, rows: Iterable[tuple[str, T]]) -> None:
        self._rows: dict[str, list[tuple[tuple[str, ...], T]]] = {}
        for template, item in rows:
            for spelling in dict.fromkeys((template, template.replace(".", "_"))):
                shape, numbers = wildcard(spelling)
                self._rows.setdefault(shape, []).append((numbers, item))

    def __iter__(self) -> Iterator[str]:
        """Every template in both spellings, its numbers as ``*``."""
        return iter(self._rows)

    def find(self, name: str) -> Iterator[tuple[T, tuple[str, ...]]]:
        """Items whose template ``name`` is an instance of, with what each ``{}`` stands for."""
        shape, numbers = wildcard(name)
        for pattern, item in self._rows.get(shape, ()):
            pairs = list(zip(pattern, numbers, strict=True))
            if all(p in ("{}", n) for p, n in pairs):
                yield item, tuple(n for p, n in pairs if p == "{}")


@dataclass(frozen=True)
class Alias:
    """A diffusers module and where its weight is in the own names.

    Args:
        theirs, own: templates with the same number of ``{}``, in the same order.
        rows: (first, count) in multiples of the hidden size where own is a fused weight; count
            None means up to the last row. None: the whole weight.
        refuse: why a delta for theirs can't simply be added to own; empty where it can.
    """

    theirs: str
    own: str
    rows: tuple[int, int | None] | None = None
    refuse: str = ""


Leaf = str | tuple[str, int, int | None]


def aliases(theirs: str, own: str, leaves: Mapping[str, Leaf]) -> tuple[Alias, ...]:
    """Aliases below one pair of prefixes: their leaf -> own leaf, or (own leaf, first, count)."""
    rows: list[Alias] = []
    for leaf, target in leaves.items():
        name, *span = (target,) if isinstance(target, str) else target
        rows.append(Alias(theirs + leaf, f"{own}{name}", tuple(span) or None))  # pyright: ignore
    return tuple(rows)


def own_names(rows: Iterable[Alias]) -> tuple[str, ...]:
    """The own templates that ``rows`` reach, each once."""
    return tuple(dict.fromkeys(row.own for row in rows))


def has_all(*paths: str) -> Condition:
    """True where every module of ``paths`` is in the model."""
    return lambda shapes: all(path in shapes for path in paths)


@dataclass(frozen=True, eq=False)
class ArchSpec:
    """One architecture.

    Args:
        id: registry name. title: as users write it.
        detect: recognises the model from the names and shapes of its modules.
        blocks: regexes (full match on a module path) of its repeated blocks, the unit of
            gradient checkpointing and of default training targets.
        layers: templates of the linear and convolution layers, own names.
        aliases: diffusers names. Where they depend on the model: those of the published one.
        excludes: regexes (full match) of modules inside the blocks not trained by default.
        hidden: a module whose weight has hidden-size rows; the unit of ``Alias.rows``.
        layout: aliases of a model whose block table differs from the published one.
        parts: components of a model this describes; text encoders have their own entries.
        base_versions: ``ss_base_model_version`` values, the one to write first.
        modelspec: ``modelspec.architecture`` values without "/lora", the one to write first.
        prefixes: key format -> part -> prefix, where it is not the format's first one.
        families: key format -> "own" or "diffusers", whose names its files of this architecture
            spell, where that is not the format's usual.
    """

    id: str
    title: str
    detect: Condition
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    aliases: tuple[Alias, ...] = ()
    excludes: tuple[str, ...] = ()
    hidden: str = ""
    layout: Callable[[Shapes], tuple[Alias, ...]] | None = None
    parts: tuple[str, ...] = ("model",)
    base_versions: tuple[str, ...] = ()
    modelspec: tuple[str, ...] = ()
    prefixes: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    families: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def own(self) -> Templates[str]:
        """Templates of layers, and of norms that have an alias, by own name."""
        return Templates((t, t) for t in dict.fromkeys((*self.layers, *own_names(self.aliases))))

    @cached_property
    def theirs(self) -> Templates[Alias]:
        """Aliases of the published model by diffusers name."""
        return Templates((alias.theirs, alias) for alias in self.aliases)

    def theirs_in(self, shapes: Shapes) -> Templates[Alias]:
        """Aliases of this very model by diffusers name."""
        if self.layout is None or not self.detect(shapes):
            return self.theirs
        return Templates((alias.theirs, alias) for alias in self.layout(shapes))

    def names(self, name: str) -> bool:
        """Whether ``name`` (dotted or underscored) can be a layer of the published model."""
        return any(True for _ in self.own.find(name)) or any(True for _ in self.theirs.find(name))
