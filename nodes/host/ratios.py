"""Which ratios a run goes by: the user's, a calibration's, published ones, or none yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from ...core.archs import ARCHITECTURES
from ...core.cache.calibration import Calibration
from ...core.cache.known import NAMES, Found, Known, Lists, advice, listed, rule_for
from ...core.cache.magcache import Rule
from ...core.cache.published import Published, detect, published, special_of
from ...core.cache.timeline import Timeline
from ...core.cache.trace import Parts, Trace, length
from . import calibrations
from .cache_settings import Settings
from .calibrations import FEWEST, Recording, Subject
from .fingerprint import identity

AUTO, MANUAL, CALIBRATED = "auto", "manual", "calibrated: "
ALWAYS, NEVER = "always", "never"
MAGNITUDE, EXTRAPOLATION = "magnitude", "extrapolation"
_BLOCKS = "blocks"  # what published ratios are of the residual of


@dataclass
class Source:
    """What a run goes by.

    Attributes:
        name: as users read it: "published flux_dev", "calibrated: flux-1a2b", "calibrating".
        rule: with every setting resolved.
        timeline: of the run.
        known: None where nothing is, so that nothing can be skipped.
        errors: what the rule's threshold is for, "magnitude" or "extrapolation".
        recording: of a run that calibrates.
        notes: what the user should know.
        off: why nothing is skipped, if that is so.
    """

    name: str
    rule: Rule
    timeline: Timeline
    known: Known | None = None
    errors: str = MAGNITUDE
    recording: Recording | None = None
    notes: list[str] = field(default_factory=list)
    off: str = ""

    @property
    def calibrating(self) -> bool:
        """Whether every step is computed, to see how the residual changes."""
        return self.recording is not None

    @property
    def stored(self) -> bool:
        """Whether what this run measured is there for the next one."""
        return self.recording is not None and self.recording.stored

    def ratios(self, branch: str) -> Sequence[float]:
        """Of "cond" or "uncond", one a step of the whole schedule."""
        sigmas = self.timeline.sigmas
        return self.known.ratios(branch, sigmas) if self.known else [1.0] * len(sigmas)

    def bends(self, branch: str) -> Sequence[float] | None:
        """The same of the errors of extrapolation; None where the rule looks at ratios."""
        if self.known is None or self.errors == MAGNITUDE:
            return None
        return self.known.bends(branch, self.timeline.sigmas)

    def observe(self, branch: str, sigma: float, trace: Trace, parts: Parts) -> None:
        """While calibrating: a residual, before it is put into ``trace``."""
        if self.recording is not None:
            self.recording.observe(branch, sigma, trace, parts)

    def finish(self) -> str:
        """Store what a complete run measured; what to tell of that."""
        return self.recording.finish() if self.recording is not None else ""


def calibration_names() -> list[str]:
    """The stored calibrations as the menu has them."""
    return [f"{CALIBRATED}{name}" for name in calibrations.names()]


def choose(
    settings: Settings,
    level: str,
    axis: int,
    timeline: Timeline,
    patcher: Any,
    *,
    latent: Sequence[int] = (),
    uses: Collection[str] = (),
) -> Source:
    """What a run goes by, once it is known on which ``level`` its residuals are caught.

    Args:
        axis: of the residual's channels.
        patcher: the ModelPatcher that is sampled from.
        latent: its shape, batch first, where published lists are for sizes or lengths.
        uses: keys of the run's conditionings, where they are for tasks.

    Raises:
        AdapterLabError: a setting is out of range, or what the user named is no use here.
    """
    detected = _detector(patcher, timeline, latent, uses)
    choice = _Choice(settings, calibrations.subject(patcher, level), timeline, detected)
    found = choice.found() if settings.calibrate != ALWAYS else None
    made = choice.source(found) if found else choice.unknown(axis)
    made.notes = list(dict.fromkeys(made.notes))  # a file that was named is looked at twice
    return made


def _detector(
    patcher: Any, timeline: Timeline, latent: Sequence[int], uses: Collection[str]
) -> Callable[[], Published | None]:
    """What finds the published list for a model."""
    inner = [i for i in (timeline.start, timeline.stop) if 0 < i < timeline.steps]
    cut, of = timeline.sigmas[inner[0]] if inner else None, identity(patcher)
    architecture = of.architecture if of.architecture in ARCHITECTURES else ""
    return partial(
        detect, of.shapes, architecture=architecture, latent=latent, steps=timeline.steps,
        uses=uses, cut=cut,
    )  # fmt: skip


@dataclass
class _Choice:
    """What the decision depends on, and what there is to say about it."""

    settings: Settings
    of: Subject
    timeline: Timeline
    detected: Callable[[], Published | None]
    notes: list[str] = field(default_factory=list)

    def found(self) -> Found | None:
        """The ratios that the settings ask for, or the best there are; None: calibrate."""
        name = self.settings.ratios
        ways: dict[str, Callable[[], Found | None]] = {AUTO: self._auto, MANUAL: self._manual}
        if name in ways:
            return ways[name]()
        if name.startswith(CALIBRATED):
            return self._named(name.removeprefix(CALIBRATED)) or self._auto()
        return self._published(listed(published(name))) or self._auto()

    def source(self, found: Found) -> Source:
        """A run by what is known."""
        errors = self._errors(found.known)
        if errors == MAGNITUDE:
            self.notes += filter(None, [advice(self._given, found)])
        rule = self._rule(found, errors)
        return Source(found.name, rule, self.timeline, found.known, errors, notes=self.notes)

    def unknown(self, axis: int) -> Source:
        """A run that calibrates, or one that can't skip anything."""
        off, rule = self._impossible(), self._rule(None, self._errors(None))
        if off:
            return Source("none", rule, self.timeline, notes=self.notes, off=off)
        recording = Recording(self.of, axis, self.timeline.steps, self._stored)
        return Source("calibrating", rule, self.timeline, recording=recording, notes=self.notes)

    def _impossible(self) -> str:
        """Why this run can't calibrate."""
        if self.settings.calibrate == NEVER:
            return "No ratios are known for this model, and 'calibrate' is set to never"
        if len(self._run) < FEWEST:
            return f"The run has {len(self._run)} steps: too few to calibrate"
        return ""

    def _auto(self) -> Found | None:
        stored = self._stored
        is_last = self.settings.calibrate == NEVER  # whatever there is will have to do
        if stored and (self._fits(stored) or is_last):
            return Found(f"{CALIBRATED}{self.of.name}", stored)
        return self._detected() if is_last or self.settings.errors != EXTRAPOLATION else None

    def _fits(self, stored: Calibration) -> bool:
        """Whether it says what this run has to know."""
        lacking = self.settings.errors == EXTRAPOLATION and not stored.bends("cond", self._run)
        return calibrations.covered(self.of.name, stored, self._run, self.notes) and not lacking

    def _detected(self) -> Found | None:
        one = self.detected()
        made = self._published(listed(one)) if one else None
        if made and one and one.also:
            others = ", ".join(one.also)
            self.notes.append(f"Its weights fit {others} as well: choose those if it is one")
        return made

    def _manual(self) -> Found:
        lists = self.settings.manual
        count, steps = len(lists["cond"]), self.timeline.steps
        if count != steps:
            self.notes.append(f"{count} ratios for {steps} steps: each step has the nearest one's")
        return Found(MANUAL, Lists(lists), special_of(lists["cond"]))

    def _named(self, name: str) -> Found | None:
        made = calibrations.chosen(name, self.of, self.notes)
        if made is None:
            return None
        calibrations.covered(name, made, self._run, self.notes)
        return Found(f"{CALIBRATED}{name}", made)

    def _published(self, found: Found) -> Found | None:
        if self.of.level == _BLOCKS:
            return found
        self.notes.append(
            f"Not used: {found.name}, of the residual of the blocks; here it is that of the network"
        )
        return None

    def _errors(self, known: Known | None) -> str:
        """What the threshold is for; "auto" goes by what the fill does, where that was measured."""
        wanted = self.settings.errors
        if wanted == AUTO:
            wanted = EXTRAPOLATION if length(self.settings.fill) > 1 else MAGNITUDE
        if wanted != EXTRAPOLATION or known is None or known.bends("cond", self.timeline.sigmas):
            return wanted
        if self.settings.errors == EXTRAPOLATION:
            self.notes.append("Nothing is known of errors of extrapolation: 'errors' is magnitude")
        return MAGNITUDE

    def _rule(self, found: Found | None, errors: str) -> Rule:
        return rule_for(self._given, found, errors, guard_last=self.settings.guard_last)

    @cached_property
    def _stored(self) -> Calibration | None:
        return calibrations.stored(self.of, self.notes)

    @property
    def _given(self) -> dict[str, float | None]:
        return {name: getattr(self.settings, name) for name in NAMES}

    @property
    def _run(self) -> Sequence[float]:
        """Where the steps of the run start, which may be a part of its schedule."""
        return self.timeline.sigmas[self.timeline.start : self.timeline.stop]
