"""What the tools of the command line have in common: arguments, paths, results."""

from __future__ import annotations

import glob
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import AdapterLabError
from ..merge.menus import DTYPES, RULES
from ..merge.modules import Tick
from ..merge.ranks import RankRule

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Argument:
    """One argument of a tool, as ``argparse`` takes it."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


def argument(*names: str, **options: Any) -> Argument:
    """``add_argument`` as data."""
    return Argument(names, options)


@dataclass(frozen=True)
class Result:
    """What a tool has to say: to people, and as JSON."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Told(Protocol):
    """What a job has to say of its result."""

    def to_text(self) -> str:
        """For people."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """In plain types."""
        ...


class Tool(Protocol):
    """A module of this package that is a tool."""

    ABOUT: str
    EXAMPLES: str

    def arguments(self) -> Sequence[Argument]:
        """All arguments, the shared ones included."""
        ...

    def run(self, args: Namespace, tick: Tick) -> Result:
        """Do it. Raises ``AdapterLabError``."""
        ...


TELLING = (
    argument("--json", action="store_true", help="print one JSON object instead of text"),
    argument("-q", "--quiet", action="store_true", help="no progress on stderr"),
)
WRITING = (
    argument("-o", "--out", required=True, metavar="FILE", help="file to write (.safetensors)"),
    argument("--overwrite", action="store_true", help="replace FILE if it exists"),
    *TELLING,
)
SEED = argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
EXACT = argument("--exact", action="store_true", help="whole SVDs, no random sketches")
MODEL = argument("--model", metavar="FILE", help="model file, where dW depends on its weights")
DTYPE = argument("--dtype", choices=tuple(DTYPES), default="keep", help="of the result (keep)")


def choice(name: str, menu: Iterable[str], help: str, **options: Any) -> Argument:
    """An argument out of ``menu``, whose names are written with dashes for their spaces."""
    known = tuple(menu)
    plain = {one.replace(" ", "-"): one for one in known}
    listed = ", ".join(plain)

    def read(text: str) -> str:
        return plain.get(text, text)

    return argument(
        name, type=read, choices=known,
        metavar=name.strip("-").upper(), help=f"{help}: {listed}", **options,
    )  # fmt: skip


RULES_SAID = """Rules of the rank: fixed: RANK. sv_ratio: singular values above 1/PARAMETER of the
largest. sv_fro, sv_cumulative: PARAMETER of their norm or sum. error: the smallest rank within a
relative error of PARAMETER."""


def ranking(rank: int, *more: str) -> tuple[Argument, ...]:
    """The arguments of a :class:`RankRule`: its rank if none is given, and rules beside its own."""
    return (
        argument("--rank", type=int, default=rank, metavar="N",
                 help=f"the rank, or the most that a rule may take; 0: no limit ({rank})"),
        argument("--conv-rank", type=int, default=0, metavar="N",
                 help="the same of convolutions (as --rank)"),
        choice("--rule", (*RULES, *more), "what chooses the rank (fixed)", default="fixed"),
        argument("--parameter", type=float, default=0.0, metavar="NUMBER", help="of the rule"),
    )  # fmt: skip


def rule_of(args: Namespace) -> RankRule:
    """The rule that these arguments mean; any that is none of its own as "fixed"."""
    rule = args.rule if args.rule in RULES else "fixed"
    return RankRule(rule, args.parameter, args.rank, args.conv_rank)


def paths(patterns: Iterable[str]) -> list[str]:
    """The files that paths and globs name, each glob's in the order of their names.

    Raises:
        AdapterLabError: a glob that matches no file, a path that does not exist.
    """
    found: list[str] = []
    for pattern in patterns:
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            what = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise AdapterLabError(f"'{pattern}' {what}", fix="Check the path.")
        found += names
    return found


def one(pattern: str) -> str:
    """The one file that a path or glob names. Raises as :func:`paths`, or where it names more."""
    found = paths([pattern])
    if len(found) > 1:
        raise AdapterLabError(f"'{pattern}' matches {len(found)} files", expected="one")
    return found[0]


def weighed(adapters: Sequence[str], strengths: Sequence[float] | None) -> list[tuple[str, float]]:
    """(path, strength) of each adapter. Raises ``AdapterLabError`` where their numbers differ."""
    given = list(strengths or [1.0] * len(adapters))
    if len(given) == 1 and adapters:
        given *= len(adapters)
    if len(given) != len(adapters):
        found = f"{len(given)} strengths for {len(adapters)} adapters"
        raise AdapterLabError("The strengths do not fit", found=found, expected="one for each")
    return list(zip(adapters, given, strict=True))


def check_out(args: Namespace, inputs: Iterable[str]) -> None:
    """Refuse what can't be written before the work is done.

    Raises:
        AdapterLabError: the output is an input, exists, is a folder or no safetensors file.
    """
    out: str = args.out
    subject = f"Cannot write '{out}'"
    if any(os.path.realpath(out) == os.path.realpath(path) for path in inputs):
        raise AdapterLabError(f"{subject}: it is an input", fix="Choose another name.")
    if os.path.isdir(out):
        raise AdapterLabError(f"{subject}: it is a folder", fix="Add a file name.")
    above = next(p for p in Path(out).absolute().parents if p.exists())
    if not above.is_dir():
        raise AdapterLabError(f"{subject}: '{above}' is no folder", fix="Choose another name.")
    if not out.endswith(SUFFIX):
        raise AdapterLabError(f"{subject}: not a safetensors file", expected=f"a name in {SUFFIX}")
    if os.path.exists(out) and not args.overwrite:
        raise AdapterLabError(f"{subject}: it exists already", fix="Use --overwrite to replace it.")


def written(
    args: Namespace, inputs: Sequence[str], outcome: Told, metadata: Mapping[str, str]
) -> Result:
    """What is said of a file written: the outcome, the paths and its metadata."""
    data = {"inputs": list(inputs), "out": args.out, "metadata": dict(metadata)}
    return Result(f"{outcome.to_text()}\nsaved: {args.out}", {**outcome.to_dict(), **data})
