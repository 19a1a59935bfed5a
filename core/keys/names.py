"""What a body can mean in one model: its own module names and the aliases of its architecture."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..archs import Alias, ArchSpec, Order, wildcard
from ..errors import AdapterLabError
from .base import ANY_ENCODER, Parts
from .index import ModelIndex

_SEARCHES = 20  # a similarity search costs milliseconds; a file of nonsense must not cost minutes
Slice = tuple[int, int, int]  # axis, offset, length
Override = str | tuple[str, int, int, int]  # module, or module and slice


class Target(NamedTuple):
    """A weight, or a range of its rows.

    Attributes:
        path: module path in own names. key: the weight's name in the given index.
        shape: of the part that is meant. order: the file's order of these rows, see ``Alias``.
        refuse: why no delta can go there.
    """

    part: str
    path: str
    key: str
    shape: tuple[int, ...]
    slice: Slice | None = None
    order: Order | None = None
    refuse: str = ""


class Names:
    """Looks bodies up; underscores are never split, whole known names are compared instead."""

    def __init__(self, index: ModelIndex, spec: ArchSpec | None) -> None:
        self.index, self.spec = index, spec
        self._aliases = index.aliases(spec) if spec else None
        self._patterns: dict[tuple[str, str], list[str]] = {}
        self._similar: dict[tuple[str, str, str], str | None] = {}

    def parts(self, parts: Parts) -> Iterator[str]:
        """The parts that the model has of ``parts``, each once, best first."""
        seen: set[str] = set()
        for part in parts:
            for one in self.index.encoders if part == ANY_ENCODER else (part,):
                if one not in seen and self.index.part(one):
                    seen.add(one)
                    yield one

    def find(self, parts: Parts, body: str, separator: str) -> list[Target]:
        """Every weight that ``body`` names, of the model's own names, else of the aliases.

        Of several parts the best comes first; a name in another part is a way out for what does
        not fit there.
        """
        found: list[Target] = []
        for part in self.parts(parts):
            modules = self.index.part(part)
            own = self.index.find(part, body, separator)
            found += [Target(part, path, *modules[path]) for path in own]
            if part == "model" and found:
                break
            if part == "model" and self._aliases is not None:
                for alias, numbers in self._aliases.find(body):
                    path = alias.own.format(*numbers)
                    if path in modules:
                        found.append(self._alias(path, alias))
        return found

    def at(self, to: Override) -> Target:
        """What ``to`` says in the names of the given index.

        Raises:
            AdapterLabError: the model does not have it.
        """
        name, rows = (to, ()) if isinstance(to, str) else (to[0], to[1:])
        found = self.index.locate(name)
        if found is None:
            raise AdapterLabError(f"targets names '{name}', which is no module of the model")
        part, path, (key, shape) = found
        if not rows:
            return Target(part, path, key, shape)
        axis, offset, length = rows
        if not (0 <= axis < len(shape) and 0 <= offset < offset + length <= shape[axis]):
            raise AdapterLabError(
                f"targets names a range that '{name}' lacks",
                found=f"axis {axis}, offset {offset}, length {length}",
                expected=f"inside {shape}",
            )
        cut = (*shape[:axis], length, *shape[axis + 1 :])
        return Target(part, path, key, cut, (axis, offset, length))

    def nearest(self, part: str, body: str, separator: str) -> str | None:
        """The known name most like ``body``, in the same spelling and with its numbers."""
        pattern, numbers = wildcard(body)
        asked = (part, separator, pattern)
        if asked not in self._similar and len(self._similar) < _SEARCHES:
            known = difflib.get_close_matches(pattern, self._known(part, separator), 1, 0.75)
            self._similar[asked] = known[0] if known else None
        near = self._similar.get(asked)
        if near is None:
            return None
        name = near
        for number in (*numbers, *"0" * near.count("*")):
            name = name.replace("*", number, 1)
        return name if self.find((part,), name, separator) else near

    def _alias(self, path: str, alias: Alias) -> Target:
        key, shape = self.index.part("model")[path]
        if alias.rows is None:
            return Target("model", path, key, shape, None, alias.order, alias.refuse)
        # In a file that holds only some weights, the input width of this one is the hidden size.
        hidden = self.index.get(self.spec.hidden if self.spec else "", shape[-1:])[0]
        offset, length = alias.span(shape[0], hidden)
        refuse = alias.refuse
        if not offset < offset + length <= shape[0]:
            refuse = f"rows {offset} to {offset + length} are not in its weight, {shape}"
        span = (0, offset, length)
        return Target("model", path, key, (length, *shape[1:]), span, alias.order, refuse)

    def _known(self, part: str, separator: str) -> list[str]:
        """Known names with their numbers as ``*``, so that a block counts once."""
        if (part, separator) not in self._patterns:
            own: Iterable[str] = self.index.part(part)
            names = own if separator == "." else self.index.underscored(part)
            known = [wildcard(name)[0] for name in names]
            if part == "model" and self._aliases is not None:
                known += [name for name in self._aliases if "." not in name or separator == "."]
            self._patterns[part, separator] = list(dict.fromkeys(known))
        return self._patterns[part, separator]
