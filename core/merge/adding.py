"""One module of the result from the modules of several adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..adapters.full import Bias, Full, Replaced
from ..adapters.lora import LoRA
from ..errors import AdapterLabError
from ..keys.norms import needs_weight
from ..keys.shared import A, B
from . import kohya, ties
from .base import Base
from .factors import cast, dense_sum, lora_of, spectrum_of
from .kept import titled, widest
from .menus import KOHYA, TIES, Sign
from .modules import Module
from .outcome import Row
from .pairing import Group
from .ranks import RankRule
from .sums import (
    Terms,
    common_shape,
    concatenated,
    dense,
    folded,
    kept,
    reshaped,
    thin_parts,
    times,
    together,
)

Made = tuple[dict[str, Tensor], Row]


@dataclass
class Adder:
    """How modules are added; see :class:`~core.merge.combine.Merge` for its settings."""

    method: str
    rule: RankRule
    density: float
    sign: Sign
    seed: int
    dtype: torch.dtype | None
    base: Base | None

    @property
    def limited(self) -> bool:
        """Whether ranks have a limit."""
        return bool(self.rule.rank or self.rule.conv_rank or self.rule.rule != "fixed")

    def merged(self, group: Group, ratios: Sequence[float]) -> Made:
        """The module that a group becomes, by canonical suffix; nothing where it cancels out.

        Args:
            ratios: by file.
        """
        members = [(module, ratios[i]) for i, module in group.members]
        if self.method in KOHYA:
            return self._kohya(members)
        reading = [p for m, _ in members for p in m.parts.values() if p.reads_weight]
        if group.beside and reading:
            raise AdapterLabError(
                f"{titled(reading[0])} depends on the weight, and another adapter changes part of "
                "the same weight under a name that cannot be joined with it",
                fix="Save both with the same key format first",
            )
        if len(members) == 1 and not self._shrinks(members[0][0]):
            whole = self._kept(*members[0])
            if whole:
                return whole
        weights, biases = (
            [(m.parts[name], ratio) for m, ratio in members if name in m.parts]
            for name in ("weight", "bias")
        )
        made, row = self._weight(group, weights) if weights else ({}, Row("Bias"))
        if biases:
            made |= self._bias(group, biases)
        return made, row

    def _shrinks(self, module: Module) -> bool:
        """Whether a module that is in one adapter only has to become another."""
        weight = module.weight
        if self.method in TIES:
            return True
        if weight is None or not self.limited or len(weight.shape) < 2 or weight.reads_weight:
            return False
        small = self.rule.rule == "fixed" and weight.rank <= self.rule.cap(weight.shape)
        lora = isinstance(weight, LoRA)
        return not (lora and small) if self.method == "svd" else lora and not small

    def _kept(self, module: Module, ratio: float) -> Made | None:
        """As it is, with the ratio in its scale; None where no file can say that."""
        tensors = kept(module, ratio)
        if tensors is None:
            return None
        first = next(iter(module.parts.values()))
        rank = first.rank if first.scaled else None
        made = {name: self._cast(t, name) for name, t in tensors.items()}
        return made, Row(first.title, rank, None, ", ".join(("in one only", *first.traits)))

    def _weight(self, group: Group, terms: Terms) -> Made:
        """The sum of the deltas of one weight."""
        dtype = self._dtype(group)
        weight = self._needed(group, terms)
        if self.method in TIES:
            return self._disagreeing(group, terms, weight, dtype)
        terms = folded(terms)
        if not terms:
            return {}, Row("", note="its changes cancel out")
        shape = common_shape(terms, weight)
        if self.method == "svd" and len(shape) > 1:
            return self._decomposed(terms, shape, weight, dtype)
        if len(shape) < 2 or any(_is_difference(a) for a, _ in terms):
            made = dense(terms, shape, dtype, weight)
            return {**made, **reshaped(terms)}, Row(Full.title, note="differences added")
        return self._exact(terms, shape, weight, dtype)

    def _exact(
        self, terms: Terms, shape: tuple[int, ...], weight: Tensor | None, dtype: torch.dtype
    ) -> Made:
        """The sum in the smallest form that holds it exactly, within the limit if there is one."""
        first = terms[0][0]
        if len(terms) == 1 and not first.reads_weight and not isinstance(first, LoRA):
            state = times(*terms[0]).state()
            return {n: self._cast(t, n) for n, t in state.items()}, Row(first.title, first.rank)
        own = together(terms, dtype)
        if own is not None:
            return own, Row(first.title, None, None, "concatenated")
        parts = thin_parts(terms, weight)
        rank = sum(len(down) for _, down, scale in parts or () if scale)
        if parts and self._takes(rank, shape):
            made = concatenated(parts, shape, dtype)
            return {**made, **reshaped(terms)}, Row(LoRA.title, max(rank, 1), None, "concatenated")
        if self.method == "auto" and self.limited:
            return self._decomposed(terms, shape, weight, dtype)
        made = dense(terms, shape, dtype, weight)
        note = "smaller than the LoRA" if parts else "no thin form"
        return {**made, **reshaped(terms)}, Row(Full.title, None, None, note)

    def _takes(self, rank: int, shape: tuple[int, ...]) -> bool:
        """Whether a LoRA of this rank is what the sum becomes."""
        if self.method == "concatenate":
            return True
        if self.limited:
            return self.rule.rule == "fixed" and rank <= self.rule.cap(shape)
        out, width = shape[0], math.prod(shape[1:])
        return rank * (out + width) <= out * width

    def _decomposed(
        self, terms: Terms, shape: tuple[int, ...], weight: Tensor | None, dtype: torch.dtype
    ) -> Made:
        found = spectrum_of(terms, self.rule, shape, weight=weight, seed=self.seed)
        rank = self.rule.choose(found, shape)
        made = {**lora_of(found, rank, shape, dtype), **reshaped(terms)}
        return made, Row(LoRA.title, rank, found.error(rank))

    def _disagreeing(
        self, group: Group, terms: Terms, weight: Tensor | None, dtype: torch.dtype
    ) -> Made:
        shape = common_shape(terms, weight)
        tasks = [dense_sum([(a, math.copysign(1, r))], shape, weight=weight) for a, r in terms]
        merged = ties.disagreeing(
            self.method, tasks, [abs(r) for _, r in terms], self.density, self._chance(group),
            self.sign,
        )  # fmt: skip
        alone: Terms = [(Full({Full.suffixes[0]: merged}), 1.0)]
        if len(shape) > 1 and not any(_is_difference(a) for a, _ in terms):
            return self._decomposed(alone, shape, None, dtype)
        kind = type(terms[0][0]) if _is_difference(terms[0][0]) else Full
        name = kind.suffixes[0]
        return {name: cast(merged, dtype, name)}, Row(Full.title, note="differences merged")

    def _bias(self, group: Group, terms: Terms) -> dict[str, Tensor]:
        """The sum of the changes of one bias."""
        asking = [a for a, _ in terms if a.reads_weight or not a.reads_output]
        bias = self._base(group, asking[0], "bias") if asking else None
        if asking:  # what follows from a weight may have no bias to act on
            rows = () if bias is None else bias.shape
            terms = [(a, r) for a, r in terms if a not in asking or not a.misfit(rows)]
        if any(not a.reads_output for a in asking):
            weight = self._base(group, asking[0])
            assert weight is not None
            terms = [(a if a.reads_output else a.settled(weight), ratio) for a, ratio in terms]
        if not terms:
            return {}
        shape, dtype = common_shape(terms, bias), self._dtype(group)
        if self.method not in TIES:
            return dense(terms, shape, dtype, bias, Bias)
        tasks = [dense_sum([(a, math.copysign(1, r))], shape, weight=bias) for a, r in terms]
        merged = ties.disagreeing(
            self.method, tasks, [abs(r) for _, r in terms], self.density, self._chance(group),
            self.sign,
        )  # fmt: skip
        name = Bias.suffixes[0]
        return {name: cast(merged, dtype, name)}

    def _kohya(self, members: list[tuple[Module, float]]) -> Made:
        if self.method == "kohya svd":
            made, matrix = kohya.decomposed(members, self.rule.rank, self.rule.conv_rank)
            product = made["lora_up.weight"].flatten(1) @ made["lora_down.weight"].flatten(1)
            rest, whole = (float(m.double().square().sum()) for m in (product - matrix, matrix))
            error = math.sqrt(rest / whole) if whole else 0.0
        else:
            made, error = kohya.added(members, concat=self.method == "kohya concat"), None
        dtype = self.dtype or widest(_tensors(m for m, _ in members))
        rank = len(made["lora_down.weight"])
        made = {n: t if n == "alpha" else cast(t, dtype, n) for n, t in made.items()}
        return made, Row(LoRA.title, rank, error)

    def _needed(self, group: Group, terms: Terms) -> Tensor | None:
        """W where a term takes it to know, be it only its shape, and no other tells that."""
        asking = [a for a, _ in terms if needs_weight(a)]
        reading = [a for a in asking if a.reads_weight]
        if not asking or (self.base is None and not reading and len(asking) < len(terms)):
            return None
        return self._base(group, [*reading, *asking][0])

    def _base(self, group: Group, asking: Algorithm, parameter: str = "weight") -> Tensor | None:
        """W that a group acts on, or the layer's bias, None where it has none.

        Args:
            asking: what it is for.
        """
        if self.base is None:
            raise AdapterLabError(
                f"{titled(asking)} depends on the weight it changes, which is not known",
                fix="Give the model that the adapters are for",
            )
        found = (self.base.weight(m.stem, parameter) for _, m in group.members)
        weight = next((w for w in found if w is not None), None)
        if weight is None and parameter == "weight":
            raise AdapterLabError(
                "The model has no weight that this fits",
                fix="Give the model that the adapters are for",
            )
        return weight

    def _chance(self, group: Group) -> torch.Generator:
        """The same for a module whatever else is merged."""
        return torch.Generator().manual_seed(self.seed ^ crc32(group.name.encode()))

    def _dtype(self, group: Group) -> torch.dtype:
        return self.dtype or widest(_tensors(m for _, m in group.members))

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        if self.dtype is None or not tensor.is_floating_point() or tensor.numel() <= 1:
            return tensor.contiguous()
        return cast(tensor, self.dtype, name)


def _is_difference(algorithm: Algorithm) -> bool:
    return isinstance(algorithm, Full) and not isinstance(algorithm, Replaced)


def _tensors(modules: Iterable[Module]) -> dict[str, Tensor]:
    """All factors of some modules, as if they were of one."""
    found = ((i, name, t) for i, m in enumerate(modules) for name, t in m.stem.tensors.items())
    return {f"{i} {name}": t for i, name, t in found if name not in (A, B)}
