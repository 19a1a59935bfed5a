"""Calibrations of models: those in the user's folder, and what a run measures for the next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...core.cache.calibration import Calibration, read_calibration, write_calibration
from ...core.cache.joined import covers, joined, span
from ...core.cache.measure import Measure
from ...core.cache.trace import Parts, Trace
from ...core.errors import AdapterLabError
from . import paths
from .fingerprint import identity

_SUFFIX = ".json"
FEWEST = 3  # noise levels of a run that tell something: two have one ratio


def names() -> list[str]:
    """Of the stored ones, in alphabetical order."""
    return sorted(path.stem for path in paths.calibrations().glob(f"[!.]*{_SUFFIX}"))


@dataclass(frozen=True)
class Subject:
    """What a calibration is of: a model and which of its residuals."""

    fingerprint: str
    level: str
    architecture: str

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.fingerprint}-{self.level}"

    @property
    def path(self) -> Path:
        return _path(self.name)


def subject(patcher: Any, level: str) -> Subject:
    """Of a model in whatever state it is, and the level that its residuals are caught on."""
    of = identity(patcher)
    return Subject(of.fingerprint, level, of.architecture)


def stored(of: Subject, notes: list[str]) -> Calibration | None:
    """The user's calibration of a model; what is wrong with one that is no use into ``notes``."""
    if not os.path.exists(of.path):  # also where the folder can't be looked into
        return None
    try:
        found = read_calibration(of.path)
    except AdapterLabError as error:
        notes.append(f"Ignored. {error}")
        return None
    if (found.fingerprint, found.level) == (of.fingerprint, of.level):
        return found
    what = "model" if found.fingerprint != of.fingerprint else "level"
    notes.append(f"Ignored: the calibration '{of.path.name}' is of another {what}")
    return None


def chosen(name: str, of: Subject, notes: list[str]) -> Calibration | None:
    """The one that the user named, for whatever model it is; None for a damaged one.

    Raises:
        AdapterLabError: there is none, or it is of residuals of another level.
    """
    if name not in (known := names()):
        near = get_close_matches(name, known, 3)
        raise AdapterLabError(
            f"There is no calibration '{name}'",
            expected=f"such as {', '.join(near)}" if near else "",
            fix="Choose another, or set 'ratios' to auto",
        )
    try:
        found = read_calibration(_path(name))
    except AdapterLabError as error:
        notes.append(f"Ignored. {error}")
        return None
    if found.level != of.level:
        raise AdapterLabError(
            f"The calibration '{name}' does not fit this run",
            found=f"residuals of the {found.level}",
            expected=f"residuals of the {of.level}",
            fix=f"Set 'residual' to {found.level}, or 'ratios' to auto",
        )
    if found.fingerprint != of.fingerprint:
        notes.append(f"The calibration '{name}' is of another model")
    return found


def covered(name: str, made: Calibration, sigmas: Sequence[float], notes: list[str]) -> bool:
    """Whether a run of steps at ``sigmas`` is calibrated; into ``notes`` what is, where not."""
    if covers(made, sigmas):
        return True
    high, low = span(made)
    notes.append(f"The calibration '{name}' covers noise levels {high:.4g} to {low:.4g} only")
    return False


class Recording:
    """What a run that computes every step finds out.

    Args:
        old: what is known already, of other noise levels.

    Attributes:
        stored: whether the next run finds what this one measured.
    """

    def __init__(self, of: Subject, axis: int, steps: int, old: Calibration | None) -> None:
        self.of, self.steps, self.old = of, steps, old
        self.measure = Measure(axis)
        self.sigmas: set[float] = set()
        self.size, self.stored = "", False

    def observe(self, branch: str, sigma: float, trace: Trace, parts: Parts) -> None:
        """Take one residual; ``trace`` is what was there before it."""
        self.sigmas.add(sigma)
        self.size = self.size or " x ".join(str(n) for n in parts[0].shape[1:])
        self.measure.add(branch, sigma, trace, parts)

    def finish(self) -> str:
        """Store it beside what was known; what to tell of that. Never raises: a picture waits."""
        if len(self.sigmas) < FEWEST:
            return f"Not stored: {len(self.sigmas)} noise levels are too few to calibrate"
        try:
            made = self.measure.finish(
                fingerprint=self.of.fingerprint, level=self.of.level,
                architecture=self.of.architecture, steps=self.steps,
                date=date.today().isoformat(), residual=self.size,
            )  # fmt: skip
            made = joined(self.old, made) if self.old else made
            write_calibration(self.of.path, made)
        except AdapterLabError as error:
            return f"The calibration could not be stored. {error}"
        self.stored = True
        high, low = span(made)
        return f"Stored as '{self.of.name}', noise levels {high:.4g} to {low:.4g}"


def _path(name: str) -> Path:
    return paths.calibrations() / f"{name}{_SUFFIX}"
