"""The checkpoints of a training: found, checked against each other, and put in order."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..atomic import telling
from ..errors import AdapterLabError
from ..files import Header, config_beside, config_for, read_header
from ..streams import PathLike
from .menus import ORDERS

SUFFIX = ".safetensors"
WIDTH, AVERAGED = "adapter_lab_ema_sigma_rel", "adapter_lab_ema_profile"  # metadata keys
_WIDTH = re.compile(r"-ema(\d?\.\d+)$")
_STEP = re.compile(r"(step|checkpoint)[-_]?\d+$", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?!.*\d)")  # the last
_STATE = "state.safetensors"  # of a run, beside its checkpoints
_SHOWN = 5  # names of a list in a message


@dataclass(frozen=True)
class Checkpoint:
    """An adapter file by its header.

    Attributes:
        stamp: modification time in ns and size when the header was read.
        config: peft's, from beside it.
    """

    path: Path
    header: Header
    stamp: tuple[int, int]
    config: dict[str, Any] | None

    @classmethod
    def of(cls, path: PathLike) -> Checkpoint:
        """Read the header of ``path``."""
        path = Path(path)
        found = stamp(path)
        return cls(path, read_header(path), found, config_for(os.fspath(path)))

    @property
    def name(self) -> str:
        """For messages: where all files are named alike, the folder tells them apart."""
        alone = self.path.stem in ("adapter_model", "pytorch_lora_weights")
        return f"{self.path.parent.name}/{self.path.name}" if alone else self.path.name

    @cached_property
    def sigma_rel(self) -> float | None:
        """Width of the average that it is, by its metadata, else by its name; None of none."""
        text = self.header.metadata.get(WIDTH)
        match = _WIDTH.search(self.path.stem)
        try:
            return float(text) if text else float(match[1]) if match else None
        except ValueError:
            return None

    @property
    def averaged(self) -> bool:
        """Whether it was made by averaging files, and is no average that training tracked."""
        return AVERAGED in self.header.metadata

    def told(self, key: str) -> int | None:
        """A positive whole number of the metadata."""
        text = self.header.metadata.get(key, "")
        return int(text) if text.isascii() and text.isdigit() and int(text) else None


@dataclass
class Course:
    """Checkpoints from the first to the last.

    Attributes:
        times: of each, on the axis that ``unit`` names: "step", "epoch", "number" (in the name) or
            "file" (its place, where nothing tells more).
        left_out: file -> why it takes no part. warnings: what the user should know.
    """

    checkpoints: list[Checkpoint]
    times: list[int]
    unit: str
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    warnings: list[str] = field(default_factory=list[str])

    def pick(self, keep: Callable[[int], bool], why: str) -> Course:
        """Those whose index ``keep`` takes; the others are left out for the reason ``why``."""
        kept = [i for i in range(len(self.times)) if keep(i)]
        left = {c.name: why for i, c in enumerate(self.checkpoints) if i not in set(kept)}
        return Course(
            [self.checkpoints[i] for i in kept], [self.times[i] for i in kept], self.unit,
            self.left_out | left, self.warnings,
        )  # fmt: skip

    def cut(self, first: int, last: int) -> Course:
        """Those from ``first`` to ``last``, both included, in the unit of the course; 0 for no
        limit, below 0 the number of a checkpoint from the end (-1: the newest).

        Raises:
            AdapterLabError: nothing is left.
        """
        known = list(dict.fromkeys(self.times))
        low, high = (_limit(known, n) for n in (first, last))
        low, high = known[0] if low is None else low, known[-1] if high is None else high
        range_ = f"outside {self.unit} {low} to {high}"
        found = self.pick(lambda i: low <= self.times[i] <= high, range_)
        if not found.checkpoints:
            raise AdapterLabError(
                f"No checkpoint lies between first = {first} and last = {last}",
                found=f"{self.unit} {known[0]} to {known[-1]}",
                fix="Set both to 0 to take all",
            )
        return found


def expand(lines: Iterable[str], folders: Sequence[Path] = (Path(),)) -> list[Path]:
    """Files of paths, globs and folders; a relative one is that of the first folder that has it.

    Raises:
        AdapterLabError: one matches nothing.
    """
    found: list[Path] = []
    for line in lines:
        line = os.path.expanduser(_unquoted(line))
        places = [Path()] if os.path.isabs(line) else folders
        # "\\" is of a graph made on Windows, unless a name has it.
        spelled = dict.fromkeys((line, line.replace("\\", "/")))
        tried = (_matches(folder / one) for one in spelled for folder in places)
        here = next(filter(None, tried), None)
        if not here:
            looked = ", ".join(f"'{folder.absolute()}'" for folder in places)
            raise AdapterLabError(
                f"Nothing matches '{line}'",
                found=f"no {SUFFIX} file" + ("" if os.path.isabs(line) else f" in {looked}"),
            )
        found += here
    return found


def read(paths: Sequence[PathLike]) -> list[Checkpoint]:
    """The headers of two or more different files.

    Raises:
        AdapterLabError: fewer, one of them twice, or one that can't be read.
    """
    found = [Checkpoint.of(path) for path in paths]
    seen: dict[tuple[int, int], Checkpoint] = {}
    for one in found:
        status = os.stat(one.path)
        other = seen.setdefault((status.st_dev, status.st_ino), one)
        if other is not one:
            raise AdapterLabError(
                "The same file is given twice", found=f"'{other.path}' and '{one.path}'",
                fix="Leave one of them out",
            )  # fmt: skip
    if len(found) < 2:
        raise AdapterLabError(
            "There is nothing to average",
            found=f"only '{found[0].path}'" if found else "no files",
            expected="two or more checkpoints of a training",
        )
    return found


def ordered(found: Sequence[Checkpoint], order: str = "step") -> Course:
    """``found`` in the ``order`` of training.

    The axis is that of the first of ``ss_steps``, ``ss_epoch`` and the last number of the name
    (else of the folder's) which tells all files apart.

    Raises:
        AdapterLabError: no such order; nothing tells the step of all files.
    """
    if order not in ORDERS:
        raise AdapterLabError(f"There is no order '{order}'", expected=", ".join(ORDERS))
    files = sorted(found, key=lambda c: c.stamp[0]) if order == "modified" else list(found)
    unit, times = _axis(files)
    if order == "step":
        if not times:
            raise AdapterLabError(
                "The steps of these files are not known", found=_unclear(files),
                fix="Rename them, or choose the order 'modified' or 'as given'",
            )  # fmt: skip
        rank = sorted(range(len(files)), key=lambda i: times[i])
        return Course([files[i] for i in rank], [times[i] for i in rank], unit, {}, _twins(files))
    # Tracked averages come in pairs of one step.
    if times and times == sorted(times):
        return Course(files, times, unit, {}, _twins(files))
    said = [f"The steps do not grow in the order '{order}': files count as equally spaced"]
    places = [*range(1, len(files) + 1)]
    return Course(files, places, "file", {}, (said if times else []) + _twins(files))


def stamp(path: Path) -> tuple[int, int]:
    """Modification time in ns, and size."""
    with telling(f"Cannot read '{path}'"):
        status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What is another when a file, or the config beside it, is another."""
    files = [p for path in paths for p in (str(path), config_beside(str(path))) if p]
    return [(path, *stamp(Path(path))) for path in files]


def some(names: Iterable[str]) -> str:
    """The first few names of a list, and how many more there are."""
    known = list(names)
    more = len(known) - _SHOWN
    return ", ".join(known[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _limit(known: Sequence[int], number: int) -> int | None:
    if number >= 0:
        return number or None
    return known[max(0, len(known) + number)]


def _unquoted(line: str) -> str:
    """Without the quotes that file managers put around a copied path."""
    quoted = len(line) > 1 and line[0] == line[-1] and line[0] in "\"'"
    return line[1:-1] if quoted else line


def _matches(path: Path) -> list[Path]:
    # os.path takes names that no file can have, too long for one, where Path raises.
    if os.path.isfile(path):
        return [path]
    pattern = os.path.join(glob.escape(str(path)), "*") if os.path.isdir(path) else str(path)
    names = sorted(glob.glob(pattern, recursive=True))
    found = [Path(name) for name in names if name.endswith(SUFFIX) and os.path.isfile(name)]
    return [path for path in found if path.name != _STATE]


def _axis(files: Sequence[Checkpoint]) -> tuple[str, list[int]]:
    """What the steps are called, and the step of each file; none where nothing tells them."""
    stepped = all(_STEP.search(_stem(c)) or _STEP.search(c.path.parent.name) for c in files)
    axes = [
        ("step", [c.told("ss_steps") for c in files]),
        ("epoch", [c.told("ss_epoch") for c in files]),
        ("step" if stepped else "number", _numbers(files)),
    ]
    widths = [c.sigma_rel for c in files]
    for unit, values in axes:
        known = [value for value in values if value is not None]
        if len(known) == len(files) == len(set(zip(known, widths, strict=True))):
            return unit, known
    return "file", []


def _numbers(files: Sequence[Checkpoint]) -> list[int | None]:
    """The last number of each name, else of its folder's.

    A name that the others only add to ("style2" beside "style2-000010") has none of its own.
    """
    stems = [_stem(c) for c in files]
    found: list[int | None] = []
    for one, stem in zip(files, stems, strict=True):
        begun = any(other != stem and other.startswith(stem) for other in stems)
        match = None if begun else _NUMBER.search(stem) or _NUMBER.search(one.path.parent.name)
        found.append(int(match[0]) if match else None)
    return found


def _stem(one: Checkpoint) -> str:
    """The name without what an average adds to it."""
    return _WIDTH.sub("", one.path.stem)


def _unclear(files: Sequence[Checkpoint]) -> str:
    """Why the steps are not known: files without one, or several of one step."""
    numbers = _numbers(files)
    none = [f"'{c.name}'" for c, number in zip(files, numbers, strict=True) if number is None]
    if none:
        return f"no step in the metadata or name of {some(none)}"
    keys = [(number, c.sigma_rel) for c, number in zip(files, numbers, strict=True)]
    most = Counter(keys).most_common(1)[0][0]
    same = [f"'{c.name}'" for c, key in zip(files, keys, strict=True) if key == most]
    return f"the same number, {most[0]}, in {some(same)}"


def _twins(files: Sequence[Checkpoint]) -> list[str]:
    """A warning of files that hold the same tensors, by the hash in their metadata."""
    names: dict[str, list[str]] = {}
    for one in files:
        if hash_ := one.header.metadata.get("sshs_model_hash"):
            names.setdefault(hash_, []).append(one.name)
    return [f"The same tensors in {some(same)}" for same in names.values() if len(same) > 1]
