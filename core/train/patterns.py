"""Regular expressions matched in bounded time.

``re`` tries one way after another through a pattern and takes exponential time over some
("(a+)+b"); it cannot be stopped meanwhile, and holds every other thread up. Here a pattern is
followed through all its ways at once, as a set of positions (Thompson 1968, "Regular expression
search algorithm"), which decides ``fullmatch`` alike, in time that grows with a power of the length
of the name only. ``re``, a hundred times as fast, is asked where it has few ways to try.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from ..errors import AdapterLabError

if sys.version_info >= (3, 11):
    # The parser of the standard library, so that what a pattern means is never another here.
    from re import _parser as parser  # pyright: ignore
else:
    import sre_parse as parser  # pyright: ignore

_LONGEST = 1000  # characters
_FEW = 50_000  # ways through a pattern
_PLACES = 100  # where a repetition may end in a long name
_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
Node = tuple[Any, Any]


def _is_letter(text: str) -> bool:
    return len(text) == 1


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": _is_word,
}


class Pattern:
    """A regular expression over whole names.

    Raises:
        AdapterLabError: ``text`` is none, is longer than 1,000 characters, or refers to what it
            matched before, which no bound on time holds for.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > _LONGEST:
            raise _unusable(text[:40] + " ...", f"{len(text)} characters, {_LONGEST} at most")
        try:
            self._compiled = re.compile(text)
            tree: Any = parser.parse(text)  # pyright: ignore
        except (re.error, RecursionError, OverflowError) as err:
            raise _unusable(text, str(err) or type(err).__name__) from None
        self._nodes: list[Node] = list(tree)  # pyright: ignore
        self._folds = bool(tree.state.flags & re.IGNORECASE)  # pyright: ignore
        Match("", self._folds, text).run(self._nodes, 1)
        self._is_easy = _ways(self._nodes) <= _FEW

    def fullmatch(self, name: str) -> bool:
        """Whether the pattern matches all of ``name``."""
        if self._is_easy and len(name) <= 2 * _PLACES:
            return self._compiled.fullmatch(name) is not None
        return bool(Match(name, self._folds, self.text).run(self._nodes, 1) >> len(name) & 1)


@lru_cache(maxsize=1 << 10)
def pattern(text: str) -> Pattern:
    """The pattern that ``text`` spells, kept for the next time."""
    return Pattern(text)


def _unusable(text: str, why: str) -> AdapterLabError:
    return AdapterLabError(f"The pattern '{text}' is not a regular expression", found=why)


def _ways(nodes: Iterable[Node]) -> float:
    """How many ways through ``nodes`` backtracking may have to try on one name, at most."""
    found = 1.0
    for kind, value in ((str(kind), value) for kind, value in nodes):
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            is_single = len(value[2]) == 1 and str(value[2][0][0]) in _SINGLE
            found *= min(int(value[1]) - int(value[0]) + 1, _PLACES) if is_single else math.inf
        elif kind == "BRANCH":
            found *= sum(map(_ways, value[1]))
        elif kind == "SUBPATTERN":
            found *= _ways(value[-1])
        elif kind in ("ASSERT", "ASSERT_NOT"):
            found *= _ways(value[1])
    return found


class Match:
    """One name under one pattern. Bit i of an integer stands for the position before letter i."""

    def __init__(self, name: str, folds: bool, text: str) -> None:
        self.name, self.folds, self.text = name, folds, text
        self.all = (1 << len(name) + 1) - 1
        self._steps: dict[tuple[int, int, bool], int] = {}
        self._masks: dict[tuple[int, bool], int] = {}

    def run(self, nodes: Iterable[Node], starts: int) -> int:
        """Where the ways through ``nodes`` end that begin at ``starts``."""
        for node in nodes:
            starts = self._through(node, starts)
        return starts

    def _through(self, node: Node, starts: int) -> int:
        kind, value = str(node[0]), node[1]
        if kind in _SINGLE:
            return (starts & self._mask(node, kind)) << 1
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = value
            return self._repeated(body, starts, int(least), int(most))
        if kind == "BRANCH":
            ends = 0
            for branch in value[1]:
                ends |= self.run(branch, starts)
            return ends
        if kind == "SUBPATTERN":
            _, add, remove, body = value
            before, self.folds = self.folds, self._fold(add, remove)
            ends = self.run(body, starts)
            self.folds = before
            return ends
        if kind in ("ASSERT", "ASSERT_NOT"):
            return self._looking(value, starts, kind == "ASSERT")
        if kind == "AT":
            return self._at(str(value), starts)
        raise _unusable(self.text, f"'{kind.lower()}', which cannot be bounded in time")

    def _fold(self, add: int, remove: int) -> bool:
        return (self.folds or bool(add & re.IGNORECASE)) and not remove & re.IGNORECASE

    def _repeated(self, body: Sequence[Node], starts: int, least: int, most: int) -> int:
        step = self._stepper(body)
        for _ in range(least):
            after = step(starts)
            if after == starts:  # nothing left, or nothing that further rounds would move
                break
            starts = after
        ends, rounds = starts, least
        while starts and rounds < most:
            starts = step(starts) & ~ends
            ends, rounds = ends | starts, rounds + 1
        return ends

    def _stepper(self, body: Sequence[Node]) -> Callable[[int], int]:
        """One round of ``body``; what it does at a position is found once."""
        known = list(body)
        if len(known) == 1 and str(known[0][0]) in _SINGLE:
            mask = self._mask(known[0], str(known[0][0]))
            return lambda starts: (starts & mask) << 1

        def step(starts: int) -> int:
            ends = 0
            for at in _bits(starts):
                key = (id(body), at, self.folds)
                if key not in self._steps:
                    self._steps[key] = self.run(known, 1 << at)
                ends |= self._steps[key]
            return ends

        return step

    def _looking(self, value: tuple[int, Sequence[Node]], starts: int, wanted: bool) -> int:
        direction, body = value
        step, kept = self._stepper(body), 0
        for at in _bits(starts):
            if direction > 0:
                seen = step(1 << at) != 0
            else:
                seen = any(step(1 << begin) >> at & 1 for begin in range(at + 1))
            kept |= (seen == wanted) << at
        return kept

    def _at(self, where: str, starts: int) -> int:
        length = len(self.name)
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return starts & 1
        if where in ("AT_END", "AT_END_STRING"):
            return starts & 1 << length
        edges = sum((self._word(i - 1) != self._word(i)) << i for i in range(length + 1))
        return starts & (edges if where == "AT_BOUNDARY" else self.all & ~edges)

    def _word(self, at: int) -> bool:
        return 0 <= at < len(self.name) and _is_word(self.name[at])

    def _mask(self, node: Node, kind: str) -> int:
        """The positions whose letter ``node`` matches."""
        key = (id(node), self.folds)
        if key not in self._masks:
            letters = (self._letter(kind, node[1], letter) for letter in self.name)
            self._masks[key] = sum(hit << i for i, hit in enumerate(letters))
        return self._masks[key]

    def _letter(self, kind: str, value: Any, letter: str) -> bool:
        # The other case of some letters is two of them, which no node for one letter matches.
        cases = {letter, *filter(_is_letter, (letter.lower(), letter.upper()))}
        same = [_matches(kind, value, case) for case in (cases if self.folds else (letter,))]
        # What is left out is left out in both cases.
        negated = kind == "NOT_LITERAL" or kind == "IN" and str(value[0][0]) == "NEGATE"
        return all(same) if negated else any(same)


def _matches(kind: str, value: Any, letter: str) -> bool:
    """Whether a node for one letter matches ``letter``."""
    if kind == "ANY":
        return letter != "\n"
    if kind == "LITERAL":
        return ord(letter) == value
    if kind == "NOT_LITERAL":
        return ord(letter) != value
    if kind == "RANGE":
        return value[0] <= ord(letter) <= value[1]
    if kind == "CATEGORY":
        name = str(value)
        return _CATEGORIES[name.replace("_NOT_", "_")](letter) != ("_NOT_" in name)
    negated = str(value[0][0]) == "NEGATE"
    return any(_matches(str(k), v, letter) for k, v in value[negated:]) != negated


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
