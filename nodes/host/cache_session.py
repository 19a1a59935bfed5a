"""One sampling run with MagCache: what is decided and remembered at each evaluation."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.cache.branch import Branch
from ...core.cache.magcache import Course
from ...core.cache.tally import Tally
from ...core.cache.timeline import Timeline
from ...core.cache.trace import Parts, filled, length
from .cache_branches import Branches
from .cache_report import tell
from .cache_settings import Settings
from .ratios import Source, choose
from .residuals import Reader
from .whole_schedule import limits

_CONTROL, _OPTIONS = 4, 5  # places in the arguments of apply_model


def nothing_allowed(threshold: float | None, k: int | None) -> str:
    """Why settings allow no skip at all; "" if they allow some."""
    for name, value in (("threshold", threshold), ("k", k)):
        if value == 0:
            return f"{name} is 0, which allows no skip"
    return ""


@dataclass(frozen=True)
class About:
    """What published lists may be for.

    Attributes:
        latent: shape of the (first) latent, batch first.
        uses: what the run goes by beside its prompt: keys of its conditionings, and "noise_mask".
    """

    latent: Sequence[int]
    uses: frozenset[str]

    @classmethod
    def of(cls, conds: Mapping[str, Any], latent: Sequence[int], masked: bool) -> About:
        """Of a run by a guider's conditionings, ``masked`` if a part of its latent is kept."""
        keys = {key for listed in conds.values() for cond in listed or () for key in cond}
        return cls(tuple(latent), frozenset(keys | ({"noise_mask"} if masked else set())))


class Session:
    """One run. Called in the place of ``apply_model`` for every evaluation of the model.

    Attributes:
        source: of the ratios; None before the first evaluation, which tells the level.
        off: why nothing is skipped any more, "" otherwise.
        branches: what is remembered of each conditioning.
    """

    def __init__(self, settings: Settings, guider: Any, timeline: Timeline, about: About) -> None:
        self.settings, self.timeline, self.about, self.off = settings, timeline, about, ""
        self.patcher = guider.model_patcher
        self.reader = Reader(settings.residual)
        self.source: Source | None = None
        self.reasons: list[str] = []
        self.branches = Branches(guider.conds)
        self.tally = Tally(timeline)
        self.lock = threading.Lock()  # with several GPUs, conditionings are evaluated in threads

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [x, t, *args]
        options = given[_OPTIONS] if len(given) > _OPTIONS else kwargs.get("transformer_options")
        if self.off or not options or not options.get("uuids") or options.get("sigmas") is None:
            return executor(*given, **kwargs)

        def call(changed: dict[str, Any]) -> Tensor:
            if len(given) > _OPTIONS:
                return executor(*given[:_OPTIONS], changed, *given[_OPTIONS + 1 :], **kwargs)
            return executor(*given, **{**kwargs, "transformer_options": changed})

        control = given[_CONTROL] if len(given) > _CONTROL else kwargs.get("control")
        model, sigma = executor.class_obj, float(options["sigmas"].flatten()[0])
        with self.lock:
            branches = self.branches.visited(model, options, x, sigma, control is not None)
            inputs = self._inputs(model, x, t, len(branches))
            skip = self._decide(branches, sigma, inputs)
            fill = self._fill(branches, sigma, x.device) if skip else None
        network = model.diffusion_model
        if fill is None:
            made, residual = self.reader.computed(call, options, network)
        else:
            made, residual = self.reader.skipped(call, options, network, fill)
        if fill is None or residual is not None:
            with self.lock:
                self._learn(branches, _rows(residual, len(x), len(branches)), inputs)
        return made

    def _inputs(self, model: Any, x: Tensor, t: Tensor, count: int) -> Sequence[Tensor]:
        """Of the network, of each conditioning; none where no guard asks for them."""
        if not self.settings.guard:
            return ()
        return model.model_sampling.calculate_input(t, x).detach().clone().chunk(count)

    def _decide(self, branches: list[Branch], sigma: float, inputs: Sequence[Tensor]) -> bool:
        place, guard = self.timeline.position(sigma), self.settings.guard
        wants = [branch.wants(sigma, place) for branch in branches]
        skip, reason = all(wants) and _alike(branches), "others of its batch"
        if not self.branches.computed.isdisjoint(branch.of for branch in branches):
            # Guidance goes by the difference of two ways: both are computed, or both filled in.
            skip, reason = False, "other ways of it"
        elif skip and inputs:
            skip = all(b.change(now) <= guard for b, now in zip(branches, inputs, strict=True))
            reason = "guard"
        for branch in branches:
            if self.source is not None and self.source.calibrating:
                branch.reason = "calibrating"
            branch.decided(skip, reason)
            self.tally.add(branch.name, sigma, skip, branch.reason)
        return skip

    def _fill(self, branches: Sequence[Branch], sigma: float, device: torch.device) -> Parts:
        """Of a batch, on the GPU that evaluates it: each may have been computed on another one."""
        name = self.settings.fill
        rows = [filled(name, b.trace, sigma, b.course.ratio if b.course else 1) for b in branches]
        streams = [[part.to(device) for part in stream] for stream in zip(*rows, strict=True)]
        return tuple(stream[0] if len(stream) == 1 else torch.cat(stream) for stream in streams)

    def _learn(
        self, branches: list[Branch], rows: Sequence[Parts], inputs: Sequence[Tensor]
    ) -> None:
        source = self.source or self._chosen()
        if self.off:
            return
        for i, branch in enumerate(branches):
            branch.decided(False)
            self.branches.computed.add(branch.of)
            branch.trace.length = self.branches.length
            if branch.course is None and not source.calibrating:
                branch.course = self._course(source, branch)
            if inputs:
                branch.input = inputs[i]
            if not rows:
                branch.trace.points.clear()
                continue
            if source.calibrating and not branch.trace.at(branch.sigma):
                source.observe(branch.name, branch.sigma, branch.trace, rows[i])
            branch.trace.put(branch.sigma, rows[i])

    def _chosen(self) -> Source:
        reader, sampling = self.reader, self.patcher.get_model_object("model_sampling")
        highest, lowest = limits(sampling, self.settings.start, self.settings.end)
        source = self.source = choose(
            self.settings, reader.level, reader.axis, self.timeline, self.patcher,
            latent=self.about.latent, uses=self.about.uses,
        )  # fmt: skip
        self.branches.longest = source.rule.k
        self.reasons = self.timeline.reasons(source.rule, highest, lowest)
        if not source.calibrating:
            self.branches.length = length(self.settings.fill)
            self.off = source.off or nothing_allowed(source.rule.threshold, source.rule.k)
        if self.off:
            self.branches.of.clear()
        return source

    def _course(self, source: Source, branch: Branch) -> Course:
        ratios, bends = source.ratios(branch.name), source.bends(branch.name)
        course = Course(source.rule, ratios, self.reasons, bends, self.timeline.sigmas)
        course.wants(branch.position)
        course.computed()
        return course

    def close(self, complete: bool) -> None:
        """Tell what was done and forget everything, however the run ended."""
        try:
            source = self.source
            if complete and source is not None and source.calibrating and not self.off:
                source.notes.extend(filter(None, [source.finish()]))
            tell(self.tally, self.settings, source, self.reader.level, self.off, not complete)
        finally:
            self.branches.of.clear()
            self.source = None


def _alike(branches: Sequence[Branch]) -> bool:
    """Whether the last residuals can be in one batch."""
    last = [branch.trace.points[-1][1] for branch in branches]
    return len({tuple((part.shape, part.dtype) for part in parts) for parts in last}) == 1


def _rows(residual: Parts | None, batch: int, count: int) -> list[Parts]:
    """That of each conditioning; none where it can't be told apart."""
    if residual is None or count == 1:
        return [] if residual is None else [residual]
    if any(len(part) != batch for part in residual):
        return []
    return list(zip(*(part.chunk(count) for part in residual), strict=True))
