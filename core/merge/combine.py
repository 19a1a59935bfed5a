"""Any number of adapters as one, whose delta is the sum of theirs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.full import Full
from ..adapters.lora import LoRA
from ..errors import AdapterLabError
from ..keys.scale import network_args
from ..keys.stems import EMBEDDING
from . import kohya, ties
from .adding import Adder
from .base import Base
from .job import Job
from .menus import EXACT, METHODS, TIES, Sign
from .metadata import merged_from, network_metadata
from .modules import Tick, quiet
from .outcome import counted
from .pairing import Pairing
from .ranks import RankRule

_FULL_RANK = ("svd", *TIES, "kohya svd")  # what has to be cut to a rank
_UNTRUE = ("rs_lora", "split_qkv")  # options that change how alphas are read


class Merge(Job):
    """One adapter with dW = sum_i ratio_i dW_i, of adapters of any algorithms and spellings.

    auto: exact. Factors of LoRA and of all that is thin go side by side; what is in one adapter
    only keeps its algorithm; differences, norms and biases are added up; what fits no LoRA becomes
    a difference. Only where ``rule`` limits the rank, and the exact sum has more, it is decomposed.
    concatenate: exact, whatever rank that takes. svd: every sum as the LoRA that ``rule`` chooses.
    ties, dare, dare_ties: of dense deltas, see :mod:`.ties`, decomposed. kohya, kohya concat,
    kohya svd: the numbers of sd-scripts, see :mod:`.kohya`.

    The dW_i of rotations (OFT, BOFT) is the one at strength ratio_i, as loaders apply it.

    What depends on the weight (DoRA, OFT, ..) stays exact alone at ratio 1, else its dW on ``base``
    is added.

    Args:
        adapters: in memory or open files. ratios: one for each, or one for all; 0 leaves out.
        rule: of svd and of auto's limit; ``RankRule()`` is none.
        density, sign, seed: of ties and dare. base: the model, for what depends on its weights.
        dtype: of the result; None: of each module the widest that its adapters have.
        architecture: id, where names leave it open.

    Raises:
        AdapterLabError: nothing to merge or nothing in an adapter, ratios that are no numbers or of
            another count, settings that contradict each other, adapters of different architectures.
    """

    def __init__(
        self, adapters: Sequence[Mapping[str, Tensor]], ratios: Sequence[float], *,
        method: str = "auto", rule: RankRule | None = None, density: float = 0.5,
        sign: Sign = "total", seed: int = 0, dtype: torch.dtype | None = None,
        base: Any = None, architecture: str | None = None, tick: Tick = quiet,
    ) -> None:  # fmt: skip
        rule = rule or RankRule()
        given = _checked(adapters, ratios)
        _check_method(method, rule, density)
        used = [(adapter, ratio) for adapter, ratio in given if ratio]
        self.pairing = Pairing([adapter for adapter, _ in used], architecture)
        self.ratios = [ratio for _, ratio in used]
        super().__init__(_agreed([s.adapter.metadata for s in self.pairing.sources]), tick)
        self._adder = Adder(method, rule, density, sign, seed, dtype, Base.of(base))
        self.outcome.warnings += _said(given, method)
        self._alphas: list[float] = []

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) by module; what is bundled with them after all."""
        for group in self.pairing.groups(self.tick):
            try:
                made, row = self._adder.merged(group, self.ratios)
                _check_alpha(float(made.get("alpha", 1)))
            except AdapterLabError as error:
                raise error.about(f"module '{group.name}'") from error
            if made:
                self.outcome.rows[group.name] = row
                if row.made == LoRA.title and "alpha" in made:
                    self._alphas.append(float(f"{float(made['alpha']):.6g}"))
            else:
                self.outcome.left_out[group.name] = row.note
            yield from ((group.key(suffix), tensor) for suffix, tensor in made.items())
        bundled: dict[str, Tensor] = {}
        for source in self.pairing.sources:
            bundled |= {k: source.adapter[k] for k in source.adapter if k.startswith(EMBEDDING)}
        yield from bundled.items()
        self._conclude()

    def _conclude(self) -> None:
        """Verdict, totals and metadata."""
        outcome, sources = self.outcome, self.pairing.sources
        made = Counter(row.made for row in outcome.rows.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in made.items())
        outcome.verdict = (
            f"merged {len(sources)} adapters, modules of the result: {kinds or 'none'}"
        )
        ranks = [row.rank for row in outcome.rows.values() if row.rank]
        if ranks:
            low, high = min(ranks), max(ranks)
            outcome.facts.append(("ranks", str(low) if low == high else f"{low} to {high}"))
        exact = sum(row.error is None for row in outcome.rows.values())
        if exact and self._adder.method in (*EXACT, "svd"):
            told = counted(exact, "module")
            outcome.facts.append(("exact but for the rounding of factors", told))
        if self.pairing.converts:
            outcome.facts.append(("names", f"converted to those of {self.pairing.form.title}"))
        self._describe()

    def _describe(self) -> None:
        """What the metadata says of the result."""
        rows = self.outcome.rows.values()
        loras = [row.rank for row in rows if row.made == LoRA.title and row.rank]
        ranks = loras if all(row.made in (LoRA.title, Full.title, "Bias") for row in rows) else []
        sources = enumerate(zip(self.pairing.sources, self.ratios, strict=True), 1)
        names = [
            f"{(source.adapter.name or f'adapter {i}').removesuffix('.safetensors')} ({ratio:g})"
            for i, (source, ratio) in sources
        ]
        metadata = network_metadata(self.metadata, ranks, self._alphas)
        args = network_args(metadata)
        if any(name in args for name in _UNTRUE):
            left = {name: value for name, value in args.items() if name not in _UNTRUE}
            metadata["ss_network_args"] = json.dumps(left)
        self.describe({**metadata, "modelspec.merged_from": merged_from(names)})


def _agreed(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all files say alike."""
    first, *others = metadata
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}


def _checked(
    adapters: Sequence[Mapping[str, Tensor]], ratios: Sequence[float]
) -> list[tuple[Mapping[str, Tensor], float]]:
    """Each adapter with its ratio."""
    if not adapters:
        raise AdapterLabError("There is no adapter to merge", fix="Connect one or more")
    if len(ratios) not in (1, len(adapters)):
        raise AdapterLabError(
            "There must be one ratio for each adapter, or one for all",
            found=f"{len(ratios)} ratios for {len(adapters)} adapters",
        )
    bad = next((ratio for ratio in ratios if not math.isfinite(ratio)), None)
    if bad is not None:
        raise AdapterLabError("A ratio is not a finite number", found=str(bad))
    if not any(ratios):
        raise AdapterLabError("All ratios are 0, which leaves nothing to merge")
    each = list(ratios) * (len(adapters) if len(ratios) == 1 else 1)
    given = list(zip(adapters, each, strict=True))
    for i, (adapter, ratio) in enumerate(given, 1):
        if ratio and not adapter:
            name = getattr(adapter, "name", "") or f"adapter {i}"
            raise AdapterLabError(f"'{name}' is empty", found="no tensors", fix="Leave it out")
    return given


def _check_alpha(alpha: float) -> None:
    if not math.isfinite(alpha):
        raise AdapterLabError("its alpha does not fit into float32", fix="Choose smaller ratios")


def _check_method(method: str, rule: RankRule, density: float) -> None:
    if method not in METHODS:
        expected = ", ".join(METHODS)
        raise AdapterLabError("There is no such method", found=method, expected=expected)
    if method in _FULL_RANK and not rule.rank and rule.rule == "fixed":
        raise AdapterLabError(
            f"The method {method} needs a rank", found="rank 0, which is no limit",
            fix="Set a rank such as 32, or choose auto, which is exact",
        )  # fmt: skip
    if method == "kohya svd" and rule.rule != "fixed":
        raise AdapterLabError("The method kohya svd takes a fixed rank only", found=rule.rule)
    if method in TIES:
        ties.check_density(density)


def _said(given: Sequence[tuple[Mapping[str, Tensor], float]], method: str) -> list[str]:
    """What to tell before anything is merged."""
    zeros = sum(not ratio for _, ratio in given)
    said = [kohya.FAULTS[method]] if method in kohya.FAULTS else []
    if zeros:
        said.append(f"{counted(zeros, 'adapter')} at the ratio 0: left out")
    marks = [getattr(adapter, "path", None) or id(adapter) for adapter, ratio in given if ratio]
    if len(set(marks)) < len(marks):
        said.append("The same adapter is given more than once: its changes add up")
    if len(marks) == 1:
        said.append("There is one adapter only: the result is that adapter at its ratio")
    return said
