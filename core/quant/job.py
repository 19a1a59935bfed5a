"""A model file on its way into a format, tensor by tensor: read, merged, quantised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..archs import ARCHITECTURES
from ..checks import require_choice, require_range
from ..files import is_finite
from ..lazy import AdapterFile
from ..merge.bake import Given, Work, require_strengths
from ..merge.bake_plan import Plan
from ..merge.modules import Tick
from ..merge.outcome import Outcome, counted
from ..streams import Reader
from .choose import choose
from .encode import Quality, encode, largest
from .formats import FORMATS, MARKER
from .report import Layer, Report, progress
from .source import model_keys, settle

Info = tuple[torch.dtype, tuple[int, ...]]
Follow = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """How to quantise.

    Attributes:
        format: of ``FORMATS``. architecture: id; found out from the names by default.
        keep: regexes (full match on a layer's path) of layers to leave as they are.
        adapters: (tensors or path of a file, strength) each, merged before.
        worst: how many layers to keep, those with the largest errors.
        most: keep layers with a larger relative error. 0: whatever it is.
        full_precision: mark layers to be multiplied in the model's precision on any hardware,
            where their format allows it.
        device: to work on, with a few MiB at a time.

    Raises:
        AdapterLabError: an unknown format or architecture, a number that is none or out of range.
    """

    format: str = "fp8_e4m3"
    architecture: str | None = None
    keep: Sequence[str] = ()
    adapters: Sequence[Given] = ()
    worst: int = 0
    most: float = 0.0
    full_precision: bool = False
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        require_choice("format", self.format, FORMATS)
        if self.architecture is not None:
            require_choice("architecture", self.architecture, ARCHITECTURES)
        require_range("keep_worst", self.worst, 0)  # as users know it
        require_range("max_error", self.most, 0)
        require_strengths(self.adapters)


class Job:
    """A model file to quantise; ``stack`` closes what it opens.

    Attributes:
        report: complete when all tensors were taken. infos: dtype and shape of the result's.

    Raises:
        AdapterLabError: a bad regex, a file that is quantised already or no model, an adapter of
            which nothing fits, no layer to quantise, NaN or infinity in a weight.
    """

    def __init__(self, reader: Reader, settings: Settings, stack: ExitStack, tick: Tick) -> None:
        self.reader, self.settings = reader, settings
        self.form = FORMATS[settings.format]
        outcome = Outcome()
        self.plan = plan = Plan(reader, outcome, None)
        self.inside = model_keys(plan)
        facts = [*settle(plan, self.inside), *self._add(stack)]
        self.work = Work(plan)
        known = settings.architecture
        spec = ARCHITECTURES[known] if known else plan.index.architecture
        self.choice = choose(plan, self.form, spec, settings.keep)
        self._measured = len(self.choice.chosen) if settings.worst or settings.most else 0
        if self._measured:
            self._budget(tick)
        title = spec.title if spec else "unknown architecture"
        self.report = Report(self.form.title, title, kept=self.choice.kept)
        multiplied = self.form.multiplied(full_precision=settings.full_precision)
        self.report.facts += [*outcome.facts, *facts, ("multiplied", multiplied)]
        self.report.warnings += [*self.choice.warnings, *outcome.warnings]
        if outcome.left_out:
            name, why = next(iter(outcome.left_out.items()))
            left = f"{counted(len(outcome.left_out), 'module')} of the adapters left out"
            self.report.warnings.append(f"{left}, such as {name}: {why}")

    def _add(self, stack: ExitStack) -> Iterator[tuple[str, str]]:
        """Plan what the adapters do; (name, value) of those that do nothing."""
        for number, (given, strength) in enumerate(self.settings.adapters, 1):
            opened = isinstance(given, Mapping)
            adapter = given if opened else stack.enter_context(AdapterFile(given))
            if strength:
                self.plan.add(adapter, strength, self.settings.architecture)
            else:
                yield getattr(adapter, "name", "") or f"adapter {number}", "strength 0, not merged"

    @cached_property
    def infos(self) -> dict[str, Info]:
        """dtype and shape of every tensor of the result."""
        infos: dict[str, Info] = {}
        for key, info in self._own.items():
            if key not in self.choice.chosen:
                infos[key] = info
                continue
            layer, shape = key.removesuffix("weight"), info[1]
            infos |= {layer + part: one for part, one in self.form.layout(shape).items()}
            mark = self._marker(shape)
            infos[layer + MARKER] = (mark.dtype, tuple(mark.shape))
        return infos

    @cached_property
    def _own(self) -> dict[str, Info]:
        """The same if nothing were quantised, in the order of the file."""
        return self.plan.infos()

    @property
    def steps(self) -> int:
        """Tensors to take, and before that to measure."""
        return self._measured + len(self._own)

    def tensors(
        self, tick: Tick, follow: Follow | None = None, *, model_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the result, in the order in which the file is read.

        Args:
            follow: told up to which byte the file was read.
            model_only: without the other parts of a checkpoint.
        """
        infos, base = self.reader.header.tensors, self.reader.header.data_offset
        keys = [key for key in self._own if not model_only or key in self.inside]
        sizes = [self._size(key) for key in keys]
        total, done, before = sum(sizes), 0, self._measured
        for count, (key, size) in enumerate(zip(keys, sizes, strict=True), before):
            tick(count, before + len(keys), f"quantising, {progress(done, total)}: {key}")
            self.report.before += size
            yield from self._tensors(key, size)
            done += size
            if follow:
                follow(base + infos[key].end)

    def _size(self, key: str) -> int:
        """Bytes of a tensor of the file, and of what is beside it if that goes."""
        how, infos = self.plan.plain.get(key), self.reader.header.tensors
        found = (infos[one] for one in (key, *(how.helpers.values() if how else ())))
        return sum(info.end - info.start for info in found)

    def _tensors(self, key: str, size: int) -> Iterator[tuple[str, Tensor]]:
        path = self.choice.chosen.get(key)
        if path is None:
            tensor = self.work.made(key)
            if key in self.inside and not is_finite(tensor):
                raise self.work.strange(key)
            self.report.after += tensor.nbytes
            yield key, tensor
            return
        layer, shape = key.removesuffix("weight"), self._own[key][1]
        made, quality = self._encoded(key)
        made[MARKER] = self._marker(shape)
        after = sum(part.nbytes for part in made.values())
        self.report.after += after
        self.report.layers[path] = Layer(
            **vars(quality), before=size, after=after, numbers=math.prod(shape)
        )
        for part in list(made):
            yield layer + part, made.pop(part)

    def _encoded(self, key: str) -> tuple[dict[str, Tensor], Quality]:
        weight = self.work.weight(key)
        peak = largest(weight)
        if not math.isfinite(peak):
            del weight
            raise self.work.strange(key)
        return encode(self.form, weight, peak, self.settings.device)

    def _marker(self, shape: tuple[int, ...]) -> Tensor:
        return self.form.marker(shape, full_precision=self.settings.full_precision)

    def _budget(self, tick: Tick) -> None:
        """Keep what loses most: everything is quantised once to know."""
        errors: dict[str, float] = {}
        for count, (key, path) in enumerate(self.choice.chosen.items()):
            tick(count, self.steps, f"measuring {path}")
            errors[key] = self._encoded(key)[1].error
        self.choice.spend(errors, self.settings.worst, self.settings.most)
