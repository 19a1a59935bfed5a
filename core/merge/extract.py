"""The difference of two models as an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..keys.base import FORMATS
from ..streams import PathLike
from ..tensors import length
from .factors import cast
from .fits import FITS, Fit, Settings
from .job import Job
from .model_pair import Change, Models, Pair, Unit, titled
from .modules import Tick, quiet
from .noise import has_structure
from .outcome import Outcome, Row
from .ranks import RankRule
from .tally import Tally

_HALF = torch.bfloat16  # what the factors of models in 8 bits and less are stored in
_TABLES = ("shared", "relative_attention_bias")  # T5's embeddings
_ROUNDING = "nothing but the rounding of {}"


class Extract(Job):
    """tuned - base as an adapter, a module at a time.

    Weights become ``algorithm``, each at the rank that ``rule`` gives it; biases, norms and
    parameters of other names are kept as differences.

    Args:
        base, tuned: safetensors files of models: whole checkpoints, diffusion models alone with or
            without a prefix, or text encoders.
        algorithm: one of ``FITS``: lora; lokr; dora, where it is nearer than LoRA; full.
        rule, factor, dora_on, clamp, exact, seed: see :class:`.fits.Settings`.
        convolutions: whether k x k ones are among it. others: whether biases, norms, parameters of
            other names and (as ``algorithm``) embeddings are.
        min_change: a weight is left out where no number has changed by more than so many units in
            the last place of its coarser dtype and the change has no direction, and a bias or norm
            where it is so and the dtypes differ: that is rounding and no training. 0: only what is
            the same bit by bit is left out.
        min_diff: text encoders are left out unless a number of their layers has changed by more.
        dequantise: read quantised weights, whose rounding is part of the difference then.
        dtype: of the result; None: that of the models, the wider of both.

    Raises:
        AdapterLabError: as :class:`.model_pair.Models`; the same file twice; a setting out of
            range; while it runs NaN or infinity in a weight, and at the end when nothing differs.
    """

    def __init__(
        self, base: PathLike, tuned: PathLike, *, algorithm: str = "lora",
        rule: RankRule | None = None, factor: int = -1, dora_on: str = "input", clamp: float = 1.0,
        convolutions: bool = True, others: bool = True, min_change: float = 1.0,
        min_diff: float = 0.0, dequantise: bool = False, dtype: torch.dtype | None = None,
        exact: bool = False, seed: int = 0, tick: Tick = quiet,
    ) -> None:  # fmt: skip
        super().__init__(tick=tick)
        if algorithm not in FITS:
            raise AdapterLabError(
                f"'{algorithm}' can't be extracted", expected=f"one of {', '.join(FITS)}"
            )
        if not (min_change >= 0 and min_diff >= 0):
            found = f"{min(min_change, min_diff):g}"
            raise AdapterLabError("A smallest change is negative", found=found, expected="from 0")
        if os.path.realpath(base) == os.path.realpath(tuned):
            raise AdapterLabError(
                "Base and tuned model are the same file", found=f"'{os.fspath(base)}'"
            )
        self.settings = Settings(rule or RankRule(rank=16), factor, dora_on, clamp, exact, seed)
        self.models = Models(base, tuned, dequantise=dequantise)
        self.algorithm, self.dtype = algorithm, dtype
        self.convolutions, self.others = convolutions, others
        self.min_change, self.min_diff = min_change, min_diff
        names = "diffusers" if self.models.tuned.diffusers else "comfyui"
        self.form = FORMATS[names]
        self.tally = Tally(f"{os.path.basename(tuned)} - {os.path.basename(base)}")

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) by module."""
        units, unlike = self.models.units, self._encoders_differ()
        self.outcome.left_out.update(self.models.strangers)
        for done, unit in enumerate(units):
            name = titled(unit.part, unit.path)
            self.tick(done, len(units), f"extracting {name}")
            if unit.part != "model" and not unlike:
                self.outcome.left_out[name] = "the text encoders are alike"
                continue
            made = self._module(unit, name)
            for suffix in list(made):  # each gone before the next module is read
                yield self.form.write(unit.path, suffix, unit.part), made.pop(suffix)
        self.tally.conclude(self.outcome, self.models)
        self.metadata |= self.tally.metadata(self.models.spec, self.algorithm)

    def _module(self, unit: Unit, name: str) -> dict[str, Tensor]:
        """Suffix -> tensor of what has changed about a module."""
        made: dict[str, Tensor] = {}
        for kind, pair in unit.pairs.items():
            change = pair.change(self.min_change)
            if not change.norm:
                self.tally.same += 1
                continue
            self.tally.changed += change.norm**2
            label = name if kind != "bias" else f"{name}.bias"
            reason = self._reason(unit, kind, pair, change)
            if reason:
                self.tally.missed += change.norm**2
                self.outcome.left_out[label] = reason
                continue
            fit = self._fit(unit, kind, pair, change)
            self.tally.add(fit)
            made |= fit.tensors
            part = change.norm / change.weight if change.weight else math.inf
            error = fit.rest / change.norm or None
            note = f"changed by {part:.2%}, {fit.size / 1024:.1f} KiB"
            self.outcome.rows[label] = Row(fit.made, fit.rank, error, note)
        return _named(made)

    def _reason(self, unit: Unit, kind: str, pair: Pair, change: Change) -> str:
        """Why a change is left out; "" where it is not."""
        layer = kind == "weight" and len(pair.shape) > 1
        if layer and math.prod(pair.shape[2:]) > 1 and not self.convolutions:
            return "a k x k convolution"
        if not self.others and not (layer and not _is_embedding(unit)):
            return "a bias, norm or other parameter" if not layer else "an embedding"
        if not self.min_change or change.units > self.min_change:
            return ""
        dtypes = pair.dtypes
        if len(pair.shape) > 1:
            noise = not has_structure(change.delta, self.settings.seed)
        else:
            noise = len(set(dtypes)) > 1
        coarser = max(dtypes, key=lambda d: torch.finfo(d).eps) if dtypes else None
        how = str(coarser).removeprefix("torch.") if coarser else "quantised numbers"
        return _ROUNDING.format(how) if noise else ""

    def _fit(self, unit: Unit, kind: str, pair: Pair, change: Change) -> Fit:
        dtype = self.dtype or _widest(pair.dtypes)
        if kind != "weight" or len(pair.shape) < 2:
            diff = cast(change.delta, dtype, f"{unit.path} {kind}")
            rest = length(diff.float() - change.delta)
            suffix, made = _SUFFIXES[kind] if kind != "weight" else ("w_norm", "Norm")
            return Fit(made, {suffix: diff}, None, rest)
        base = lambda: pair.base.whole(pair.before)  # noqa: E731
        return FITS[self.algorithm](change.delta, base, self.settings, dtype)

    def _encoders_differ(self) -> bool:
        """sd-scripts' rule: of all text encoders one number has changed by more."""
        if not self.min_diff:
            return True
        pairs = [unit.pairs["weight"] for unit in self.models.units
                 if unit.part != "model" and "weight" in unit.pairs
                 and len(unit.pairs["weight"].shape) > 1 and not _is_embedding(unit)]  # fmt: skip
        for done, pair in enumerate(pairs):
            self.tick(done, len(pairs), "comparing text encoders")
            if float(pair.change(0).delta.abs().max()) > self.min_diff:
                return True
        return not pairs


_SUFFIXES = {"bias": ("diff_b", "Bias"), "value": ("diff", "Full")}


def _named(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the bias of a norm named as LyCORIS names it beside its weight."""
    if "w_norm" not in made:
        return dict(made)
    return {{"diff_b": "b_norm"}.get(suffix, suffix): t for suffix, t in made.items()}


def _is_embedding(unit: Unit) -> bool:
    """Of words or positions; what diffusion models call so are layers."""
    name = unit.path.rpartition(".")[2]
    return unit.part != "model" and ("embed" in name or name in _TABLES)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    wide = [dtype for dtype in dtypes if dtype.itemsize > 1]
    if not wide:
        return _HALF
    return torch.float32 if torch.float64 in wide else torch.promote_types(wide[0], wide[-1])


def extract(
    base: PathLike, tuned: PathLike, out: PathLike, *, algorithm: str = "lora", rank: int = 16,
    rule: str = "fixed", parameter: float = 0.0, conv_rank: int = 0, overwrite: bool = False,
    **options: Any,
) -> Outcome:  # fmt: skip
    """Write tuned - base as an adapter file.

    Args:
        rank, rule, parameter, conv_rank: see :class:`.ranks.RankRule`.
        options: of :class:`Extract`.

    Raises:
        AdapterLabError: as :class:`Extract`; ``out`` is one of the inputs, or exists and
            ``overwrite`` is not set.
    """
    if os.path.realpath(out) in (os.path.realpath(base), os.path.realpath(tuned)):
        raise AdapterLabError(f"'{os.fspath(out)}' is one of the inputs", fix="Choose another name")
    chosen = RankRule(rule, parameter, rank, conv_rank)
    job = Extract(base, tuned, algorithm=algorithm, rule=chosen, **options)
    job.write(out, overwrite=overwrite)
    return job.outcome
