"""Adapters with every module as a LoRA of a chosen rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters import load_parts
from ..adapters.lora import LoRA
from ..adapters.padded import Padded
from ..errors import AdapterLabError
from ..keys.norms import needs_weight
from ..keys.stems import EMBEDDING
from ..lowrank import Spectrum
from .base import Base
from .factors import cast, lora_of, spectrum_of
from .job import Job
from .kept import as_stored, beside, plain, stays, titled, unturned, widest
from .menus import NESTED
from .metadata import DYNAMIC, network_metadata
from .modules import Module, Source, Tick, quiet
from .outcome import Row, counted, mebibytes
from .ranks import RankRule

_NAMED = 3  # modules in a message


@dataclass(frozen=True)
class _Kept:
    """What is left of one module: its old and new rank, alpha, ||dW|| and ||dW'||."""

    old: int
    new: int
    alpha: float
    total: float
    kept: float
    changed: bool = True


class Resize(Job):
    """Every module as a LoRA of the rank that ``rule`` gives it.

    A LoRA keeps its scale alpha / rank, so that sd-scripts' numbers come out; one whose rank is
    small enough already keeps its bits. Every other algorithm becomes a LoRA of its dW at a scale
    of 1. Of DoRA the delta is resized that it turns; its lengths stay, with biases, norms and
    embeddings.

    Args:
        rule: its ``conv_rank`` counts for every convolution, as in sd-scripts.
        nested: the first ``rule.rank`` ranks of each LoRA as they are, which DyLoRA trains to be
            of use; alpha stays, as sd-scripts' ``extract_lora_from_dylora`` has it.
        base: the model, for algorithms that depend on its weights.
        dtype: of the factors; None keeps each module's. exact, seed: of
            :func:`~core.merge.factors.spectrum_of`.

    Raises:
        AdapterLabError: malformed tensors; modules that take a model, without one or with one that
            lacks them.

    Reference: sd-scripts ``networks/resize_lora.py``.
    """

    def __init__(
        self, adapter: Mapping[str, Tensor], rule: RankRule, *, nested: bool = False,
        dtype: torch.dtype | None = None, base: Any = None, exact: bool = False, seed: int = 0,
        tick: Tick = quiet,
    ) -> None:  # fmt: skip
        self.source = Source(adapter)
        super().__init__(self.source.adapter.metadata, tick)
        if not self.source.stems:
            raise AdapterLabError("The adapter has no modules", found="no tensors of one")
        if nested and not rule.rank:
            raise AdapterLabError(f"The rule {NESTED} takes a rank", found="0", expected="from 1")
        self.rule, self.nested = replace(rule, pointwise=True), nested
        self.dtype, self.exact, self.seed = dtype, exact, seed
        self.base = Base.of(base)
        self._kept: list[_Kept] = []
        self._bytes, self._turned = [0, 0], False
        if not nested:
            self._check_base()

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) by module; what is bundled with them after all."""
        for module in self.source.modules(self.tick, "resizing"):
            self._bytes[0] += sum(t.nbytes for t in module.stem.tensors.values())
            for suffix, tensor in self._resized(module).items():
                made = self._cast(tensor, suffix)
                self._bytes[1] += made.nbytes
                yield self.source.key(module.name, suffix), made
        adapter = self.source.adapter
        yield from ((key, adapter[key]) for key in adapter if key.startswith(EMBEDDING))
        self._conclude()

    def _resized(self, module: Module) -> dict[str, Tensor]:
        why = stays(module)
        if module.weight is None or why:
            return self._stay(module, why)
        weight = unturned(module.weight)
        lora = plain(weight)
        if self.nested:
            return self._first(module, lora) if lora else self._stay(module, "no LoRA")
        base = self._weight(module) if needs_weight(weight) else None
        shape = tuple(weight.shape if base is None or isinstance(weight, Padded) else base.shape)
        old = lora.rank if lora else weight.rank
        if lora and not lora.scale:
            return self._stay(module, "it changes nothing: alpha is 0", old)
        found = spectrum_of(
            [(weight, 1 / lora.scale if lora else 1.0)], self.rule, shape,
            weight=base, exact=self.exact, seed=self.seed,
        )  # fmt: skip
        rank = self.rule.choose(found, shape)
        if lora and rank >= lora.rank:
            return self._stay(module, f"rank {old} already", old, found, lora.alpha)
        dtype = self.dtype or widest(module.stem.tensors)
        made = lora_of(found, rank, shape, dtype)
        if lora:
            made["alpha"] = torch.tensor(lora.scale * rank)
        self._note(module, old, rank, found, float(made["alpha"]))
        return {**made, **beside(module)}

    def _first(self, module: Module, lora: LoRA) -> dict[str, Tensor]:
        """The first ranks, bit by bit."""
        if lora.rank <= self.rule.rank:
            return self._stay(module, f"rank {lora.rank} already", lora.rank)
        part = lora.at_rank(self.rule.rank, 1.0)
        self.outcome.rows[module.name] = Row("LoRA", part.rank, None, f"first of {lora.rank} ranks")
        self._kept.append(_Kept(lora.rank, part.rank, part.alpha, 0.0, 0.0))
        return {**part.state(), **beside(module)}

    def _stay(
        self, module: Module, why: str, rank: int | None = None, found: Spectrum | None = None,
        alpha: float = 0.0,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The module's own tensors, with the scale that something outside them tells."""
        part = next(iter(module.parts.values()), None)
        self.outcome.rows[module.name] = Row(part.title if part else "", rank, None, why)
        if rank and found:
            total = found.total * abs(alpha / rank)
            self._kept.append(_Kept(rank, rank, alpha, total, total, False))
        return as_stored(module)

    def _note(self, module: Module, old: int, rank: int, found: Spectrum, alpha: float) -> None:
        assert module.weight
        weight = unturned(module.weight)
        turned = weight is not module.weight
        self._turned |= turned
        scale, error = abs(alpha / rank), found.error(rank)
        kept = math.sqrt(max(0.0, 1 - error**2))
        share = float(found.s[:rank].sum()) / found.nuclear if found.nuclear else None
        was = f"rank {old}" if plain(weight) else f"{titled(weight)} {old}"
        shares = f"norm kept {kept:.1%}" + ("" if share is None else f", sum kept {share:.1%}")
        note = f"from {was}, {shares}{', DoRA stays' if turned else ''}"
        self.outcome.rows[module.name] = Row("LoRA", rank, error, note)
        total = found.total * scale
        self._kept.append(_Kept(old, rank, alpha, total, kept * total))

    def _conclude(self) -> None:
        """Verdict, totals and metadata."""
        done, told = self._kept, self.outcome
        changed = [k for k in done if k.changed]
        stay = len(told.rows) - len(changed)
        told.verdict = f"resized {counted(len(changed), 'module')}, kept {stay} as they were"
        if done:
            before, after = ([getattr(k, n) for k in done] for n in ("old", "new"))
            told.facts.append(("ranks", f"{_span(before)} -> {_span(after)}"))
        told.facts.append(("size", mebibytes(*self._bytes)))
        total = sum(k.total**2 for k in done)
        if total:
            lost = max(0.0, 1 - sum(k.kept**2 for k in done) / total)
            shares = [k.kept / k.total for k in done if k.total]
            told.facts.append(("error of all modules together", f"{math.sqrt(lost):.2%}"))
            told.facts.append(("norm kept, mean", f"{sum(shares) / len(shares):.2%}"))
        comment = self._comment(max(k.old for k in done)) if changed else ""
        # As sd-scripts: what was asked for, though smaller modules have less.
        asked = [k for k in done if k.new == self.rule.rank] if self.rule.rule == "fixed" else []
        dims, alphas = ([getattr(k, n) for k in asked or done] for n in ("new", "alpha"))
        made = network_metadata(self.metadata, dims, alphas, comment, dora=self._turned)
        if changed and self.rule.rule != "fixed":
            made |= {"ss_network_dim": DYNAMIC, "ss_network_alpha": DYNAMIC}
        self.describe(made)

    def _comment(self, old: int) -> str:
        rule = self.rule
        if self.nested:
            return f"split from DyLoRA, rank {old} to {rule.rank}"
        if rule.rule != "fixed":
            return f"Dynamic resize with {rule.rule}: {rule.parameter} from {old}"
        other = rule.conv_rank not in (0, rule.rank)
        conv = f" (conv: {rule.conv_rank})" if other else ""
        return f"dimension is resized from {old} to {rule.rank}{conv}"

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        if self.dtype is None or not tensor.is_floating_point() or tensor.numel() <= 1:
            return tensor.contiguous()
        return cast(tensor, self.dtype, name)

    def _weight(self, module: Module) -> Tensor:
        weight = self.base.weight(module.stem) if self.base else None
        if weight is None:
            raise AdapterLabError(
                f"The model has no weight that '{module.name}' fits",
                fix="Give the model that the adapter is for",
            )
        return weight

    def _check_base(self) -> None:
        """Refuse modules whose dW takes a model to know, before any work is done."""
        if self.base is not None:
            return
        asking: dict[str, str] = {}
        for name, stem in self.source.stems.items():
            try:
                weight = None if stem.foreign else load_parts(stem.tensors).get("weight")
            except AdapterLabError as error:
                raise error.about(f"module '{name}'") from error
            if weight is None or stays(Module(stem, {"weight": weight})):
                continue
            if needs_weight(unturned(weight)):
                asking[name] = titled(weight)
        if asking:
            named = ", ".join(f"'{n}' ({title})" for n, title in [*asking.items()][:_NAMED])
            more = f" and {len(asking) - _NAMED} more" if len(asking) > _NAMED else ""
            raise AdapterLabError(
                f"{len(asking)} modules depend on the weights that they change",
                found=named + more, fix="Give the model that the adapter is for as 'model'",
            )  # fmt: skip


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
