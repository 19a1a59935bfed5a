"""What to train, as plain values that validate themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..checks import require_choice, require_range, require_rate

PRECISIONS = ("fp32", "bf16")
FORWARDS = ("auto", "bypass", "rebuild")
DORA_AXES = ("output", "input")

_LEAST = {
    "rank": 1, "factor": -1, "conv_rank": 0, "unit": 1,
    "alpha": 0, "conv_alpha": 0, "constraint": 0,
}  # fmt: skip
_RATES = ("dropout", "rank_dropout", "module_dropout")
_CHOICES = {"precision": PRECISIONS, "forward": FORWARDS, "dora_on": DORA_AXES}


@dataclass(frozen=True)
class AdapterConfig:
    """What to train. Options an algorithm does not know are ignored by it.

    Args:
        algorithm: a trainable algorithm of the registry, or a key of ``VARIANTS``.
        rank: r, at least 1; of OFT and BOFT the block size that is aimed at.
        alpha: scale is alpha / rank; 0 means alpha = rank.
        factor: LoKr's and GLoKr's factor, -1 for the most balanced factorisation.
        decompose_both: LoKr, GLoKr: low-rank first factor as well.
        full_matrix: LoKr, GLoKr: no low-rank factors at all.
        tucker: Tucker decomposition of k x k convolutions.
        conv_rank, conv_alpha: rank and alpha of k x k convolutions, 0 for the ones of the rest.
        unit: DyLoRA: ranks that are trained together.
        constraint: OFT, BOFT: largest ||Q||_F as a share of out (COFT), 0 for none.
        rescale: OFT, BOFT: a learned factor of each output row.
        dora: learned lengths of rows or columns, of any additive algorithm.
        dora_on: the axis that keeps its own lengths, "output" or "input".
        rs_lora: scale is alpha / sqrt(rank).
        scalar: a learned factor of the delta that starts at 0, in the place of a factor of zeros.
        on_input: (IA)^3: scale input channels.
        dropout, rank_dropout, module_dropout: probabilities, 0 to below 1; see ``dropout.py``.
        bias: train the bias of the layer too.
        precision: of the factors, "fp32" or "bf16".
        forward: "bypass" beside the layer, "rebuild" of its weight, or "auto" by cost.

    Raises:
        AdapterLabError: a value out of its range.

    Reference: rs-LoRA: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning
    with LoRA", section 3.
    """

    algorithm: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    tucker: bool = False
    conv_rank: int = 0
    conv_alpha: float = 0.0
    unit: int = 1
    constraint: float = 0.0
    rescale: bool = False
    dora: bool = False
    dora_on: str = "output"
    rs_lora: bool = False
    scalar: bool = False
    on_input: bool = False
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    bias: bool = False
    precision: str = "fp32"
    forward: str = "auto"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            require_range(name, getattr(self, name), least)
        for name in _RATES:
            require_rate(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            require_choice(name, getattr(self, name), choices)

    @property
    def scale(self) -> float:
        """alpha / rank, with rs-LoRA alpha / sqrt(rank)."""
        return (self.alpha or self.rank) / (math.sqrt(self.rank) if self.rs_lora else self.rank)


class Variant(NamedTuple):
    """An algorithm under settings that make it another one in training, but not in a file.

    Attributes:
        algorithm: name in the registry.
        purpose: what it is for.
    """

    algorithm: str
    title: str
    purpose: str


VARIANTS = {
    "lora_fa": Variant(
        "lora", "LoRA-FA", "LoRA with a frozen random first factor: half of the factors to train"
    ),
    "dylora": Variant(
        "lora", "DyLoRA", "LoRA whose leading ranks are of use alone, so that it can be cut later"
    ),
    "coft": Variant("oft", "COFT", "OFT that keeps every rotation small"),
}
