"""What an architecture is: data about the names and shapes of its modules.

Own names are those of ComfyUI, most often of the original code ("double_blocks.0.img_attn.qkv");
their names are those of diffusers and of other tools. ``{}`` in a template stands for one whole
number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]  # path of a module in its own names -> shape of its weight
Condition = Callable[[Shapes], bool]

# A component of its own, or what counts Cosmos' blocks: "blocks.block0".
_NUMBER = re.compile(r"(?:(?<![^._])|(?<=[._]block))(\d+|\{\})(?![^._])")


@lru_cache(maxsize=1 << 12)  # one file's names are asked of every architecture
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


# (first, count) in multiples of the hidden size, count None: up to the last row; or, for layouts
# that no multiple describes, a function of (rows of the own weight, hidden size) that gives
# (offset, length).
Rows = tuple[int, int | None] | Callable[[int, int], tuple[int, int]]
Order = Callable[[int], Tensor]  # number of rows -> p with theirs[i] = own[p[i]]
Family = Literal["own", "diffusers", "original", "other"]


@dataclass(frozen=True)
class Alias:
    """Another name of a module, and where its weight is in the own names.

    Args:
        theirs, own: templates with the same number of ``{}``, in the same order.
        rows: the range of own's rows that theirs is, where own is a fused weight. None: all.
        order: their order of these rows, where it is another.
        refuse: why a delta for theirs can't simply be added to own; empty where it can.
        family: whose name it is: ComfyUI's for a range of rows, diffusers', that of the code the
            model was released with (where ComfyUI's is another), or of one tool alone, which is
            read and never written.
    """

    theirs: str
    own: str
    rows: Rows | None = None
    order: Order | None = None
    refuse: str = ""
    family: Family = "diffusers"

    def span(self, rows: int, hidden: int) -> tuple[int, int]:
        """(offset, length) of theirs in an own weight of so many rows."""
        if self.rows is None:
            return 0, rows
        if callable(self.rows):
            return self.rows(rows, hidden)
        first, count = self.rows
        offset = first * hidden
        return offset, rows - offset if count is None else count * hidden


Leaf = str | tuple[str, int, int | None] | tuple[str, Rows]


def aliases(
    theirs: str, own: str, leaves: Mapping[str, Leaf], *,
    order: Order | None = None, family: Family = "diffusers",
) -> tuple[Alias, ...]:  # fmt: skip
    """Aliases below one pair of prefixes.

    ``leaves``: their leaf -> own leaf, (own leaf, first, count) or (own leaf, rows).
    """
    found: list[Alias] = []
    for leaf, target in leaves.items():
        name, *span = (target,) if isinstance(target, str) else target
        rows: Any = span[0] if len(span) == 1 else tuple(span) or None
        found.append(Alias(theirs + leaf, own + str(name), rows, order, family=family))
    return tuple(found)


def swapped(rows: int) -> Tensor:
    """The order of two halves the other way round: scale and shift, or gate and value."""
    return torch.arange(rows).roll(rows // 2)


@cache
def share(part: int, of: int) -> Rows:
    """The ``part``-th of ``of`` equal ranges: q, k and v of a fused weight of any width."""
    return lambda rows, hidden: (part * (rows // of), rows // of)


def same(*leaves: str) -> dict[str, str]:
    """Leaves that both sides call alike, for ``aliases``."""
    return {leaf: leaf for leaf in leaves}


def grouped(index: int) -> Rows:
    """The rows of q, k or v (0, 1, 2) of a fused weight whose q has hidden-size rows.

    k and v share the rest: as many rows as q has, or fewer where heads share them.
    """

    def span(rows: int, hidden: int) -> tuple[int, int]:
        narrow = (rows - hidden) // 2
        return ((0, hidden), (hidden, narrow), (hidden + narrow, narrow))[index]

    return span


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
        aliases: other names. Where they depend on the model: those of the published one.
        excludes: regexes (full match) of modules inside the blocks not trained by default.
        also: regexes (full match) of modules outside the blocks that are.
        hidden: a module whose weight has hidden-size rows; the unit of ``Alias.rows``.
        layout: aliases of a model whose block table differs from the published one.
        parts: components of a model this describes; text encoders have their own entries.
        base_versions: ``ss_base_model_version`` values, the one to write first.
        modelspec: ``modelspec.architecture`` values without "/lora", the one to write first.
        prefixes: key format -> part -> prefix, where it is not the format's first one.
        families: key format -> "own", "diffusers" or "original", whose names its files of this
            architecture spell, where that is not the format's usual.
        keep: regexes (full match) of modules that lose too much when quantised.
        groups: name -> glob patterns of module paths, for strengths by part of the model.
    """

    id: str
    title: str
    detect: Condition
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    aliases: tuple[Alias, ...] = ()
    excludes: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    hidden: str = ""
    layout: Callable[[Shapes], tuple[Alias, ...]] | None = None
    parts: tuple[str, ...] = ("model",)
    base_versions: tuple[str, ...] = ()
    modelspec: tuple[str, ...] = ()
    prefixes: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    families: Mapping[str, str] = field(default_factory=dict[str, str])
    keep: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @cached_property
    def own(self) -> Templates[str]:
        """Templates of layers, and of norms that have an alias, by own name."""
        return Templates((t, t) for t in dict.fromkeys((*self.layers, *own_names(self.aliases))))

    @cached_property
    def theirs(self) -> Templates[Alias]:
        """Aliases of the published model by their name."""
        return Templates((alias.theirs, alias) for alias in self.aliases)

    def theirs_in(self, shapes: Shapes) -> Templates[Alias]:
        """Aliases of this very model by their name."""
        if self.layout is None or not self.detect(shapes):
            return self.theirs
        return Templates((alias.theirs, alias) for alias in self.layout(shapes))

    def names(self, name: str) -> bool:
        """Whether ``name`` (dotted or underscored) can be a layer of the published model."""
        return any(True for _ in self.own.find(name)) or any(True for _ in self.theirs.find(name))
