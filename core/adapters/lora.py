"""LoRA: a product of two thin matrices, for linear layers and convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..forms import Thin
from ..tensors import Op, inner, kaiming_uniform, low_rank, normal, rows_of, tucker, wide
from .base import AdapterConfig, Algorithm, Shape, Tensors
from .draw import Draw
from .full import Bias
from .reading import check_product, read_scale, require

# Ahead of its kin in menus.
ORDER = -1

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
UP_BIAS = "lora_up.bias"
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
FROZEN = (DOWN, MID)  # of LoRA-FA


class LoRA(Algorithm):
    """dW = s B A, s = alpha / r.

    B is ``lora_up`` (out, r), A is ``lora_down`` (r, in). For a convolution A has the kernel,
    (r, in, *k), and B unit axes, (out, r, 1, ..). With Tucker decomposition the kernel is in
    ``lora_mid`` T (r, r, *k) and dW[o, i, *] = s sum_pq B[o, p] T[p, q, *] A[q, i].
    Unit axes that are missing or too many are accepted (DyLoRA writes B as (out, r) for any
    layer, old SD2 files write linear factors as 1 x 1 convolutions), and so is A flattened to
    (r, in * prod(k)).

    ``lora_up.bias`` (out,) adds s times itself to the layer's bias. Of an embedding, whose weight
    is (number, width), peft's ``lora_embedding_A`` (r, number) is B^T and ``lora_embedding_B``
    (width, r) is A^T.

    Attributes:
        unit: of DyLoRA in training, how many ranks learn at a time; 0 for all of them.

    Reference: Hu et al. 2021, "LoRA", section 4.1; Tucker: Yeh et al. 2023, "Navigating
    Text-To-Image Customization", section 3; DyLoRA: Valipour et al. 2022.
    """

    name = "lora"
    title = "LoRA"
    trainable = True
    purpose = "works everywhere; two thin factors"
    up = folds = (UP,)
    suffixes = (UP, DOWN, MID, UP_BIAS, *EMBEDDING)

    def __init__(self, tensors: Tensors, scale: float = 1.0, unit: int = 0) -> None:
        super().__init__(tensors, scale)
        self.unit = unit

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        found = _of_embedding(tensors) if any(n in tensors for n in EMBEDDING) else tensors
        factors = cls.own({name: t for name, t in found.items() if name != UP_BIAS})
        if not factors and UP_BIAS not in tensors:
            return None
        if UP_BIAS in tensors:
            factors |= cls.own({UP_BIAS: tensors[UP_BIAS]}, dims=1)
        up, down = require(factors, UP, DOWN)
        mid, width = factors.get(MID), up.flatten(1).shape[1]
        if mid is None:
            check_product(width == len(down), factors, UP, DOWN)
        else:
            point = down[0].numel() == down.shape[1]
            fits = point and (width, len(down)) == mid.shape[:2]
            check_product(fits, factors, UP, MID, DOWN)
        if UP_BIAS in factors:
            check_product(factors[UP_BIAS].shape == (len(up),), factors, UP, UP_BIAS)
        return cls(factors, read_scale(tensors, len(down), scale))

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """A and T kaiming-uniform, B zero, or under a scalar kaiming-uniform too."""
        (out, width, *k), r = shape, config.rank
        unit = (1,) * len(k)
        tensors = {UP: torch.zeros(out, r, *unit, device=generator.device, dtype=torch.float32)}
        if config.tucker and any(n != 1 for n in k):
            tensors[DOWN] = kaiming_uniform((r, width, *unit), generator)
            tensors[MID] = kaiming_uniform((r, r, *k), generator)
        else:
            tensors[DOWN] = kaiming_uniform((r, width, *k), generator)
        if config.scalar:
            tensors[UP] = kaiming_uniform(tensors[UP].shape, generator)
        return cls(tensors, config.scale)

    def with_frozen_down(self, generator: torch.Generator) -> Self:
        """LoRA-FA of a fresh one: A stays as it is drawn here, N(0, 2 / (in + r)).

        Reference: Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large
        Language Models Fine-tuning", section 3; the variance is that of sd-scripts.
        """
        down = self.tensors[DOWN]
        std = math.sqrt(2 / (down.shape[1] + self.rank))
        other = self.on({**self.tensors, DOWN: normal(down.shape, std, generator)})
        other.frozen = FROZEN
        return other

    def in_units(self, unit: int) -> Self:
        """DyLoRA that trains ``unit`` ranks at a time; AdapterLabError unless they divide r."""
        check_unit(self.rank, unit)
        other = self.on(self.tensors)
        other.unit = unit
        return other

    @property
    def draws(self) -> bool:
        return self.unit > 0

    def drawn(self, draw: Draw) -> LoRA:
        """DyLoRA: the first ranks up to the end of a random block of ``unit`` of them.

        Only that block learns; the ranks before it take part. The scale grows as the rank falls,
        s sqrt(r / active ranks), as in sd-scripts, which lets the ranks behind the block take part
        as well; here they are cut off as in the paper, for that is what makes the first ones of
        use alone.

        Reference: Valipour et al. 2022, "DyLoRA", section 4.1, with its frozen variant.
        """
        if not self.unit:
            return self
        blocks = self.rank // self.unit
        start = self.unit * int(torch.randint(blocks, (), generator=draw.generator))
        part = self.at_rank(start + self.unit, 0.5)
        up, down = part.tensors[UP], part.tensors[DOWN]
        part.tensors[UP] = torch.cat((up[:, :start].detach(), up[:, start:]), 1)
        part.tensors[DOWN] = torch.cat((down[:start].detach(), down[start:]))
        return part

    @property
    def rank(self) -> int:
        return len(self.tensors[DOWN])

    @property
    def shape(self) -> tuple[int, ...]:
        down, mid = self.tensors[DOWN], self.tensors.get(MID)
        rest = down.shape[1:] if mid is None else (down.shape[1], *mid.shape[2:])
        return (len(self.tensors[UP]), *rest)

    @property
    def bias(self) -> Bias | None:
        return (
            Bias({UP_BIAS: self.tensors[UP_BIAS]}, self.scale) if UP_BIAS in self.tensors else None
        )

    def at_rank(self, rank: int, growth: float = 0.0) -> Self:
        """The first ``rank`` columns of B and rows of A, at the scale s (r / rank)^growth.

        For scripts and tests; no node asks for it. DyLoRA trains them to be of use on their own.
        ``growth`` is how the trainer's scale grows as the rank falls: 0.5 in kohya's, 1 in
        LyCORIS, whose scale is alpha / rank at every rank; 0 keeps the scale, so that this is a
        part of the whole delta.

        Raises:
            AdapterLabError: a rank that is not from 1 to r.

        Reference: Valipour et al. 2022, "DyLoRA", section 4.1.
        """
        if not 1 <= rank <= self.rank:
            raise AdapterLabError(
                "No such rank in this LoRA", found=str(rank), expected=f"1 to {self.rank}"
            )
        cut = {UP: (slice(None), slice(rank)), DOWN: slice(rank), MID: (slice(rank), slice(rank))}
        part = self.on(
            {name: t[cut[name]] if name in cut else t for name, t in self.tensors.items()}
        )
        part.scale = self.scale * (self.rank / rank) ** growth
        return part

    def delta(self, weight: Tensor) -> Tensor:
        up, down, mid = self.factors(weight)
        dense = up @ down if mid is None else tucker(mid, up, down)
        return dense.reshape(weight.shape)

    def merge(self, weight: Tensor) -> Tensor:
        """One product that accumulates into the weight itself."""
        rows = rows_of(weight)
        if rows is None:
            return super().merge(weight)
        up, down, mid = self.factors(weight)
        down = down if mid is None else inner(mid, down).flatten(1)
        rows.addmm_(up.to(rows), down.to(rows))
        return weight

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """s B (A x), with A (or A, then T) in the place of the layer's own kernel."""
        up, down, mid = self.factors(x)
        if mid is None:
            down = down.reshape(len(down), *weight.shape[1:])
        else:
            mid = mid.reshape(*mid.shape[:2], *weight.shape[2:]).to(x.dtype)
        return low_rank(x, op, up.to(x.dtype), down.to(x.dtype), mid)

    def form(self, like: Tensor) -> Thin | None:
        if MID in self.tensors:
            return None
        up, down = (self.tensors[name].to(like.device).flatten(1) for name in (UP, DOWN))
        return Thin(up, down, scale=self.scale)

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """s B (out, r), A (r, in * prod(k)) and T, wide."""
        up, down, mid = self.tensors[UP], self.tensors[DOWN], self.tensors.get(MID)
        up = wide(up, like).flatten(1) * self.scale
        return up, wide(down, like).flatten(1), None if mid is None else wide(mid, like)


def check_unit(rank: int, unit: int) -> None:
    """Raise AdapterLabError unless DyLoRA can train ``rank`` ranks by blocks of ``unit``."""
    if rank % unit:
        raise AdapterLabError(
            "The rank is no multiple of DyLoRA's unit", found=f"rank {rank}, unit {unit}"
        )


def _of_embedding(tensors: Tensors) -> dict[str, Tensor]:
    """``tensors`` with peft's factors of an embedding as B and A."""
    a, b = require(tensors, *EMBEDDING)
    twice = [name for name in (UP, DOWN, MID) if name in tensors]
    if twice or a.ndim != 2 or b.ndim != 2:
        found = ", ".join(f"{n} {tuple(tensors[n].shape)}" for n in (*EMBEDDING, *twice))
        raise AdapterLabError("A LoRA of an embedding is two matrices", found=found)
    rest = {name: t for name, t in tensors.items() if name not in EMBEDDING}
    return {**rest, UP: a.T.contiguous(), DOWN: b.T.contiguous()}
