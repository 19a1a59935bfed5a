"""How the residual of one model changes over the noise levels: measured once, kept as a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import replacing, telling, write_all
from ..errors import AdapterLabError
from .published import BRANCHES

VERSION = 1
LEVELS = ("blocks", "network")
_FORMAT = "adapter_lab.magcache"
_LARGEST = 1 << 20  # bytes of a file; 1000 steps need 120 kB
_STEEPEST = 200.0  # |log ratio| of one step, so that what is extrapolated stays a number
_LEAST = 2  # noise levels; one has no ratio
_TINY, _HUGE = 1e-9, 1e30  # a ratio, any number in a file
_ENTRIES, _LONGEST = 64, 200  # of ``about``, and letters of a text

_KINDS: dict[type, str] = {
    dict: "an object", list: "a list of numbers", str: "a text", int: "a whole number",
}  # fmt: skip
# Of the lists of a curve: what their numbers are at least and at most.
_BOUNDS = {
    "sigmas": (0.0, _HUGE), "ratios": (_TINY, 1 / _TINY), "spread": (0.0, _HUGE),
    "cosine": (0.0, 2.01), "bends": (0.0, _HUGE),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One branch: a number for each distinct noise level, in the order of falling ``sigmas``.

    Attributes:
        ratios: mean over batch and tokens of ||r_t|| / ||r_(t-1)||; the first is 1.
        spread: the standard deviation of the same.
        cosine: mean of 1 - cos(r_t, r_(t-1)).
        bends: relative error of a residual extrapolated from those at s_a and s_b, divided by
            |s - s_a| |s - s_b|; empty where less than three levels were measured in a row.

    Raises:
        AdapterLabError: these are no such numbers.
    """

    sigmas: tuple[float, ...]
    ratios: tuple[float, ...]
    spread: tuple[float, ...]
    cosine: tuple[float, ...]
    bends: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            values: tuple[float, ...] = getattr(self, name)
            if len(values) != len(self.sigmas) and (values or name != "bends"):
                raise _odd(f"{name} has {len(values)} numbers", f"{len(self.sigmas)}")
            for place, value in enumerate(values, 1):
                if not least <= value <= most:
                    raise _odd(f"{value:g} at place {place} of {name}", "a number in range")
        if len(self.sigmas) < _LEAST:
            raise _odd(f"{len(self.sigmas)} noise levels", f"{_LEAST} or more")
        if any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise _odd("rising noise levels", "falling ones")
        if self.ratios[0] != 1:
            raise _odd(f"{self.ratios[0]:g} as the first ratio", "1")

    def magnitudes(self, sigmas: Sequence[float]) -> list[float]:
        """log ||r|| at ``sigmas``, that at the highest calibrated one being 0.

        Linear in sigma between the calibrated ones; beyond them the slope goes on as at the edge.
        """
        known, logs = self.sigmas, list(accumulate(map(math.log, self.ratios)))
        made: list[float] = []
        for sigma, value in zip(sigmas, _interpolated(sigmas, known, logs), strict=True):
            edge = 0 if sigma > known[0] else len(known) - 2 if sigma < known[-1] else None
            if edge is not None:
                slope = (logs[edge] - logs[edge + 1]) / (known[edge] - known[edge + 1])
                value += slope * (sigma - known[0 if sigma > known[0] else -1])
            made.append(value)
        return made


@dataclass(frozen=True)
class Calibration:
    """What was measured on one model.

    Attributes:
        fingerprint: of the model. level: "blocks" or "network", what the residual is that of.
        architecture: registry id, "" where it has none. steps: of the schedule measured on.
        curves: by branch, "cond" and "uncond" or one of them.
        about: what else people may want to know of the measurement.

    Raises:
        AdapterLabError: an unknown level or branch, no curve, or texts that are long or odd.
    """

    fingerprint: str
    level: str
    architecture: str
    steps: int
    curves: dict[str, Curve]
    about: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise _odd(f"level {_shown(self.level)}", f"one of {', '.join(LEVELS)}")
        if not self.curves or not set(self.curves) <= set(BRANCHES):
            found = ", ".join(map(_shown, self.curves)) or "none"
            raise _odd(f"curves: {found}", f"one for {' or '.join(BRANCHES)}")
        if not 0 < self.steps < _HUGE:
            raise _odd(f"{_shown(self.steps)} steps", "a whole number above 0")
        if len(self.about) > _ENTRIES:
            raise _odd(f"{len(self.about)} entries in 'about'", f"{_ENTRIES} at most")
        for text in (self.fingerprint, self.architecture, *self.about, *self.about.values()):
            if plain(text) != text:
                raise _odd(_shown(text), f"a line of at most {_LONGEST} letters")

    def curve(self, branch: str) -> Curve:
        """Of "cond" or "uncond"; that of the other where only that was measured."""
        return self.curves.get(branch) or next(iter(self.curves.values()))

    def ratios(self, branch: str, sigmas: Sequence[float]) -> list[float]:
        """The ratio of each step of another schedule to the one before; the first is 1.

        Args:
            sigmas: where its steps start, falling.
        """
        logs = self.curve(branch).magnitudes(sigmas)
        steps = (b - a for a, b in zip(logs, logs[1:], strict=False))
        return [1.0, *(math.exp(min(max(x, -_STEEPEST), _STEEPEST)) for x in steps)][: len(logs)]

    def bends(self, branch: str, sigmas: Sequence[float]) -> list[float]:
        """The bend at each of ``sigmas``, at the edges' beyond them; empty where none is known."""
        curve = self.curve(branch)
        return _interpolated(sigmas, curve.sigmas, curve.bends) if curve.bends else []


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """The calibration in a file that anybody may have written.

    Raises:
        AdapterLabError: it can't be read or is none.
    """
    with telling(f"Cannot read the calibration '{Path(path).name}'"):
        return _calibration(_parsed(Path(path)))


def write_calibration(path: str | os.PathLike[str], calibration: Calibration) -> None:
    """A small text file, whole or not at all; numbers are rounded to 6 digits, sigmas to 9.

    Raises:
        AdapterLabError: it can't be written.
    """
    head = {
        "format": _FORMAT, "version": VERSION, "fingerprint": calibration.fingerprint,
        "level": calibration.level, "architecture": calibration.architecture,
        "steps": calibration.steps, "about": calibration.about,
    }  # fmt: skip
    rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    curves = [f"  {json.dumps(b)}: {{\n{_lines(c)}\n  }}" for b, c in calibration.curves.items()]
    rows.append(' "curves": {\n' + ",\n".join(curves) + "\n }")
    data = ("{\n" + ",\n".join(rows) + "\n}\n").encode()
    with replacing(path, size=len(data)) as file:
        write_all(file, data)


def _lines(curve: Curve) -> str:
    """The lists of a curve, one a line."""
    rows: list[str] = []
    for name in _BOUNDS:
        digits = 9 if name == "sigmas" else 6  # two levels of a long schedule stay apart
        rounded = [float(f"{value:.{digits}g}") for value in getattr(curve, name)]
        rows.append(f'   "{name}": {json.dumps(rounded)}')
    return ",\n".join(rows)


def _parsed(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise AdapterLabError("it is no file")
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise AdapterLabError("it is too large", expected=f"{_LARGEST >> 20} MB at most")
    try:
        made = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterLabError("it is no JSON", found=str(error)[:_LONGEST]) from error
    return _field({"file": made}, "file", dict)


def _calibration(given: dict[str, Any]) -> Calibration:
    if given.get("format") != _FORMAT:
        raise _odd("another kind of file", f'"format": "{_FORMAT}"')
    version = given.get("version")
    if type(version) is not int or version != VERSION:
        raise AdapterLabError(
            "it is of another version", found=f"version {_shown(version)}",
            expected=f"version {VERSION}", fix="Calibrate again, or update Adapter Lab",
        )  # fmt: skip
    about: dict[str, Any] = _field(given, "about", dict)
    curves: dict[str, Any] = _field(given, "curves", dict)
    return Calibration(
        *(_field(given, name, str) for name in ("fingerprint", "level", "architecture")),
        steps=_field(given, "steps", int),
        curves={branch: _curve(_field(curves, branch, dict)) for branch in curves},
        about={name: _field(about, name, str) for name in about},
    )


def _curve(given: dict[str, Any]) -> Curve:
    return Curve(**{name: _numbers(_field(given, name, list), name) for name in _BOUNDS})


def _field(given: dict[str, Any], name: str, kind: type) -> Any:
    value = given.get(name)
    if type(value) is not kind:
        raise _odd(f"{_shown(value)} as {_shown(name)}", _KINDS[kind])
    return value


def _numbers(given: list[Any], name: str) -> tuple[float, ...]:
    for place, value in enumerate(given, 1):
        # A whole number can be too large for a float.
        if type(value) not in (int, float) or not abs(value) <= _HUGE:
            raise _odd(f"{_shown(value)} at place {place} of {name}", "a number in range")
    return tuple(map(float, given))


def _interpolated(
    at: Sequence[float], falling: Sequence[float], values: Sequence[float]
) -> list[float]:
    """Linear between the known, held beyond them."""
    return np.interp(at, falling[::-1], values[::-1]).tolist()


def plain(text: str) -> str:
    """``text`` as a line that a file takes."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST])


def _shown(value: object) -> str:
    """For a message: short, and on one line."""
    if value is None:
        return "nothing"
    return ascii(value if isinstance(value, (str, float, int)) else type(value).__name__)[:_LONGEST]


def _odd(found: str, expected: str) -> AdapterLabError:
    return AdapterLabError("it is no calibration", found=found, expected=expected)
