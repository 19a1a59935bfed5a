"""What an algorithm may draw for one batch in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The chance of one batch on one module.

    A layer that runs twice, as gradient checkpointing has it, is given a generator in the same
    state both times.

    Args:
        generator: of this module and batch alone, on the CPU.
        t: noise level of each item of the batch, (b,), 0 clean to 1 pure noise.
    """

    generator: torch.Generator
    t: Tensor

    @property
    def items(self) -> int:
        """b."""
        return len(self.t)

    def kept(self, shape: Sequence[int], rate: float) -> Tensor:
        """1 where something stays and 0 where it is dropped, with probability ``rate``."""
        return (torch.rand(*shape, generator=self.generator) >= rate).float()

    def seed(self) -> int:
        """Of a generator on another device, for what can be drawn only beside the activations."""
        return int(torch.randint(1 << 62, (), generator=self.generator))


def along(mask: Tensor, x: Tensor, channels: int) -> Tensor:
    """``mask`` (b, n) as a factor of ``x``, whose first axis is the batch and whose axis
    ``channels`` has n elements or a multiple of them.

    Tokens folded into the first axis are taken item by item; where it is no multiple of the batch
    the first item decides.
    """
    times, rest = divmod(len(x), len(mask))
    rows = mask[:1].expand(len(x), -1) if rest else mask.repeat_interleave(times, 0)
    shape = [1] * x.ndim
    shape[0], shape[channels] = len(x), x.shape[channels]
    return rows.repeat(1, x.shape[channels] // mask.shape[1]).to(x).reshape(shape)


def thinned(x: Tensor, rate: float, seed: int) -> Tensor:
    """Dropout: elements of x set to 0 with probability ``rate``, the others divided by 1 - rate.

    Reference: Srivastava et al. 2014, "Dropout", section 10, inverted.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return x * kept.div_(1 - rate)
