"""Modules under the names of one family: renamed, put in order, cut and joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..adapters import Tensors, load_parts
from ..archs import Alias, ArchSpec
from . import fuse
from .base import KeyFormat
from .places import Families, Place, modules_by_own

How = Literal["", "cut", "joined", "kept"]


@dataclass(frozen=True)
class Piece:
    """What is written under one name.

    Attributes:
        stem: module of the file that it comes from, the first of several.
        how: what had to be done; "kept": nothing could, the name is of the other family.
        error: ||dW' - dW|| / ||dW|| of what was made anew; None where it is exact.
    """

    stem: str
    place: Place
    tensors: Tensors
    how: How = ""
    error: float | None = None


class Approximate(Protocol):
    """Makes a module anew where its tensors can't be cut or joined."""

    def __call__(
        self, pieces: Sequence[tuple[Tensors | None, int]], rows: Tensor | None
    ) -> tuple[dict[str, Tensor], float] | None:
        """Tensors and error of the ``rows`` of ``pieces`` one below the other; None: it can't.

        Args:
            pieces: tensors and number of rows of each; None for rows that stay as they are.
        """
        ...


class Writer:
    """Modules of the files of one format and architecture.

    Args:
        approximate: for what can't be exact; without it such modules keep their name.
    """

    def __init__(
        self, form: KeyFormat, spec: ArchSpec | None, approximate: Approximate | None = None
    ) -> None:
        self.families = Families(spec)
        self.family = spec.families.get(form.id, form.family) if spec else form.family
        mixed = spec is not None and spec.id in form.mixed
        self.approximate = None if mixed else approximate

    def pieces(self, read: Iterable[Piece]) -> Iterator[Piece]:
        """What to write for ``read``, which holds all names of each weight in it."""
        known = {piece.stem: piece for piece in map(self._turned, read)}
        for path, family, stems in modules_by_own((p.stem, p.place) for p in known.values()):
            if family == self.family:
                continue
            pieces = [known[stem] for stem in stems]
            renamed = [self._renamed(piece) for piece in pieces]
            joined = None if all(renamed) else self._joined(pieces)
            if joined:
                for stem in stems:
                    del known[stem]
                known[path] = joined
            else:
                known |= {p.stem: p for p in renamed if p}
                lost = [p for p, found in zip(pieces, renamed, strict=True) if not found]
                known |= {p.stem: replace(p, how="kept") for p in lost}
        for piece in known.values():
            yield from ([piece] if self.family == "own" else self._cut(piece))

    def _renamed(self, piece: Piece) -> Piece | None:
        """The same rows by the family's name of them, if it has one."""
        place = piece.place
        alias = place.alias and self.families.same(place.alias, self.family)
        if not alias:
            return None
        path = alias.theirs.format(*place.numbers)
        return replace(piece, place=replace(place, path=path, alias=alias))

    def _turned(self, piece: Piece) -> Piece:
        """With the rows in the model's order and, of a whole weight, its own name."""
        place, alias = piece.place, piece.place.alias
        if alias is None:
            return piece
        turned: Piece | None = piece
        if alias.order is not None:
            rows = rows_of(piece.tensors)
            inverse = torch.argsort(alias.order(rows)) if rows else None
            turned = None if inverse is None else self._taken(piece, inverse)
        if turned is None:
            return replace(piece, how="kept") if self.family != alias.family else piece
        if alias.rows is None:
            own = replace(place, alias=None, path=place.own_path)
            return replace(turned, place=own)
        plain = alias if alias.order is None else replace(alias, order=None)
        return replace(turned, place=replace(place, alias=plain))

    def _taken(self, piece: Piece, rows: Tensor) -> Piece | None:
        """Only ``rows`` of it, in their order."""
        taken = fuse.take(piece.tensors, rows)
        if taken is not None:
            return replace(piece, tensors=taken)
        total = rows_of(piece.tensors)
        if self.approximate is None or not total:
            return None
        made = self.approximate([(piece.tensors, total)], rows)
        return replace(piece, tensors=made[0], error=made[1]) if made else None

    def _joined(self, pieces: list[Piece]) -> Piece | None:
        lengths = {p.place.alias: rows_of(p.tensors) for p in pieces if p.place.alias}
        sizes = {alias: rows for alias, rows in lengths.items() if rows}
        hidden = columns_of(pieces[0].tensors)
        if len(sizes) < len(pieces) or not hidden:
            return None
        parts = self._parts(pieces, sizes, hidden)
        if parts is None:
            return None
        place = replace(pieces[0].place, alias=None, path=pieces[0].place.own_path)
        error = max((p.error for p in pieces if p.error is not None), default=None)
        joined = Piece(pieces[0].stem, place, {}, "joined", error)
        tensors = fuse.join(parts)
        if tensors is not None:
            return replace(joined, tensors=tensors)
        made = self.approximate(parts, None) if self.approximate else None
        return replace(joined, tensors=made[0], error=made[1]) if made else None

    def _parts(
        self, pieces: list[Piece], sizes: Mapping[Alias, int], hidden: int
    ) -> list[tuple[Tensors | None, int]] | None:
        """The ranges of the whole weight and who has them; None where that is open."""
        own = pieces[0].place.own
        total = self.families.total(own, sizes, hidden)
        if total is None:
            return None
        starts = {a.span(total, hidden)[0]: p.tensors for p in pieces if (a := p.place.alias)}
        if len(starts) < len(pieces):
            return None  # two names of one range
        spans = self.families.spans(own, next(iter(sizes)).family, total, hidden)
        return [(starts.get(span.offset), span.length) for span in spans]

    def _cut(self, piece: Piece) -> Iterator[Piece]:
        place = piece.place
        if place.part != "model" or place.alias is not None or not place.own:
            yield piece
            return
        whole = self.families.whole(place.own, self.family)
        rows, columns = rows_of(piece.tensors), columns_of(piece.tensors)
        if whole:
            order = whole.order(rows) if whole.order and rows else None
            taken = piece if order is None else self._taken(piece, order)
            if taken is not None and (order is not None or whole.order is None):
                path = whole.theirs.format(*place.numbers)
                yield replace(taken, place=replace(place, path=path))
                return
        spans = self.families.spans(place.own, self.family, rows, columns) if rows else []
        cut = [(span, self._taken(piece, span.rows)) for span in spans]
        pieces = [(span, taken) for span, taken in cut if taken is not None]
        if not pieces or len(pieces) < len(spans):
            yield replace(piece, how="kept") if whole or spans else piece
            return
        for span, taken in pieces:
            path = span.alias.theirs.format(*place.numbers)
            yield replace(taken, place=replace(place, path=path), how="cut")


def rows_of(tensors: Tensors) -> int | None:
    """Output rows of a module; None where no algorithm has its tensors."""
    parts = load_parts(tensors)
    shapes = [parts[name].shape for name in ("weight", "bias") if name in parts]
    return shapes[0][0] if shapes and shapes[0] else None


def columns_of(tensors: Tensors) -> int:
    """Its inputs, 0 where it has none."""
    weight = load_parts(tensors).get("weight")
    return weight.shape[1] if weight is not None and len(weight.shape) > 1 else 0
