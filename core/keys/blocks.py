"""Strengths by part of a model, as text: lines ``pattern = weight``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..archs import ArchSpec
from ..errors import AdapterLabError

_ENCODERS = "text_encoders."  # in front of their parts; may be left out
GROUPS = {
    "all": ("*",),
    "attention": ("*attn*", "*attention*"),
    "mlp": ("*mlp*", "*ff.*", "*ff_context.*", "*ffn*", "*feed_forward*", "*linear2"),
    "norm": ("*norm*",),
    "modulation": ("*mod.lin*", "*modulation*", "*_mod.1"),
    "text_encoder": (_ENCODERS + "*",),
}
_ROOT = re.escape(_ENCODERS)
_MODEL, _WEIGHT = "diffusion_model.", ".weight"  # around a path in a state dict; may be there
_WIDEST = 10_000
_EXAMPLE = "a line such as 'double_blocks.3 = 0.5', '*.attn.* = 0' or '@attention = 0.8'"


@dataclass(frozen=True)
class BlockWeight:
    """One line: what it says, and the paths it hits."""

    text: str
    weight: float
    hits: re.Pattern[str]


class BlockWeights:
    """Weights by module path; what no line hits has 1, of two lines the later one wins."""

    def __init__(self, lines: Iterable[BlockWeight] = ()) -> None:
        self.lines = tuple(lines)

    def __bool__(self) -> bool:
        return bool(self.lines)

    def weight_of(self, path: str, part: str = "model") -> float:
        """The factor on the strength of the module ``path``, a text encoder's below its part."""
        line = self._line(_name(path, part))
        return 1.0 if line is None else line.weight

    def unused(self, places: Iterable[tuple[str, str]]) -> list[str]:
        """The lines that hit none of ``places``, (path, part) of every module."""
        names = [_name(*place) for place in places]
        return [line.text for line in self.lines if not any(map(line.hits.fullmatch, names))]

    def _line(self, name: str) -> BlockWeight | None:
        return next((line for line in reversed(self.lines) if line.hits.fullmatch(name)), None)


def _name(path: str, part: str) -> str:
    return path if part == "model" else f"{_ENCODERS}{part}.{path}"


def parse(text: str, spec: ArchSpec | None = None) -> BlockWeights:
    """The weights that ``text`` spells.

    A pattern is a path in the model's own names or a glob over paths (``*`` any characters,
    ``{0-9}`` a number of that range) and hits everything below what it names; ``@name`` is a group
    of the architecture or one of ``GROUPS``. ``#`` starts a comment, blank lines count for nothing.

    Raises:
        AdapterLabError: a line that is none, a weight that is no number, an unknown group.
    """
    lines = ((n, raw.partition("#")[0].strip()) for n, raw in enumerate(text.splitlines(), 1))
    return BlockWeights(_parse_line(n, line, spec) for n, line in lines if line)


def groups(spec: ArchSpec | None) -> dict[str, tuple[str, ...]]:
    """The groups a model has, name -> patterns: the general ones and its architecture's."""
    return {**GROUPS, **(spec.groups if spec else {})}


def _parse_line(number: int, line: str, spec: ArchSpec | None) -> BlockWeight:
    where = f"Line {number} of the block weights"
    pattern, equals, value = (piece.strip() for piece in line.rpartition("="))
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not (pattern and equals and math.isfinite(weight)) or "=" in pattern or "_" in value:
        raise AdapterLabError(f"{where} is not understood", found=f"'{line}'", expected=_EXAMPLE)
    known = groups(spec)
    if pattern.startswith("@") and pattern[1:] not in known:
        names = ", ".join(f"@{name}" for name in known)
        raise AdapterLabError(f"{where} names no group", found=pattern, expected=names)
    path = pattern.removeprefix(_MODEL).removesuffix(_WEIGHT)
    patterns = known[pattern[1:]] if pattern.startswith("@") else (path,)
    either = "|".join(_regex(where, glob, f"g{n}") for n, glob in enumerate(patterns))
    return BlockWeight(line, weight, re.compile(rf"(?:{_ROOT})?(?:{either})(?:\..*)?", re.DOTALL))


def _regex(where: str, pattern: str, name: str) -> str:
    """A glob as a regex, its groups called ``name``; the numbers of a range one by one."""
    pieces = re.split(r"(\{\d+-\d+\})", pattern)
    return "".join(
        _numbers(where, p) if n % 2 else _glob(p, f"{name}_{n}") for n, p in enumerate(pieces)
    )


def _numbers(where: str, span: str) -> str:
    first, last = map(int, span[1:-1].split("-"))
    if not first <= last < first + _WIDEST:
        expected = f"a range such as {{0-9}}, of {_WIDEST} numbers at most"
        raise AdapterLabError(f"{where} has no such range", found=span, expected=expected)
    return "(?:" + "|".join(map(str, range(first, last + 1))) + ")"


def _glob(pattern: str, name: str) -> str:
    """Each star but the last settles for the first place where the text after it fits, which is
    as good as any other and keeps many stars from taking forever."""
    pieces = re.sub(r"\*+", "*", pattern).split("*")
    first, *rest = (re.escape(piece).replace(r"\?", ".") for piece in pieces)
    settled = (f"(?=(?P<{name}_{n}>.*?{r}))(?P={name}_{n})" for n, r in enumerate(rest[:-1]))
    return "".join((first, *settled, *(f".*{r}" for r in rest[-1:])))
