"""BOFT: rotations of small blocks in the pattern of a butterfly, which together mix all rows."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..orthogonal import Blocks, Butterfly, eye
from ..tensors import wide
from .base import AdapterConfig, Shape, Tensors
from .oft import BLOCKS, DIAG, OFT, fresh_gains, no_blocks, read_constraint
from .rotation import check_blocks


class BOFT(OFT):
    """W' = B_(m-1) .. B_1 B_0 W, times ``rescale``; B_i is block-diagonal after a permutation.

    ``oft_blocks`` (m, n, b, b), b = 2 h, out = n b. B_i mixes, within spans of 2^i b rows, h rows
    with the h rows that lie 2^i h further; the rows of the two halves alternate within a block.
    Q, R and the constraint (one norm over all stages) are those of Diag-OFT, but R acts as it
    is, not transposed. Strength m: R_i becomes m R_i + (1 - m) I before the product.

    Reference: Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly
    Factorization", section 4; LyCORIS for the layout.
    """

    name = "boft"
    title = "BOFT"
    purpose = "rotations of small blocks that together mix all rows"

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors, dims=1)
        blocks = factors.get(BLOCKS, factors.get(DIAG))
        if blocks is None or blocks.ndim != 4:
            return None
        check_butterfly(cls.title, blocks)
        if blocks.shape[-1] % 2:
            found = f"{blocks.shape[-1]} rows"
            raise AdapterLabError(f"{cls.title} blocks have no halves", found=found)
        return cls(factors, constraint=read_constraint(tensors))

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """B zero, of the size and with the stages of :func:`widest`.

        Raises:
            AdapterLabError: out is odd, or the rank 1.
        """
        b, span = widest(shape[0], config.rank)
        if not b:
            expected = "an even divisor of them up to the rank"
            raise no_blocks(cls.title, shape[0], config.rank, expected)
        size = ((span // b).bit_length(), shape[0] // b, b, b)
        blocks = torch.zeros(size, device=generator.device, dtype=torch.float32)
        gains = fresh_gains(shape, config, blocks)
        return cls({BLOCKS: blocks, **gains}, constraint=config.constraint)

    @property
    def size(self) -> int:
        return self._blocks.shape[1] * self.rank

    def turn(self, changes: list[Tensor], size: int) -> Blocks | Butterfly:
        return butterfly(_halves_apart(changes[0]))

    def trained_change(self, like: Tensor) -> Tensor:
        """With the halves of each block apart: reordering is cheapest before everything else."""
        return self._change(_halves_apart(wide(self._blocks, like)))

    def trained_turn(self, change: Tensor) -> Blocks | Butterfly:
        return butterfly(change)


def widest(rows: int, rank: int) -> tuple[int, int]:
    """The even block size b up to ``rank`` that mixes most rows, of equal ones the largest, and how
    many it mixes; zeros where none divides ``rows``.

    n blocks can be mixed with each other as far as n is divisible by powers of two. Where they are
    all, b is that of LyCORIS, which has nothing for other layers and loads nothing else; ComfyUI
    does.
    """
    sizes = [b for b in range(2, rank + 1, 2) if rows % b == 0]
    spans = [(b * (n & -n), b) for b in sizes for n in (rows // b,)]
    span, b = max(spans, default=(0, 0))
    return b, span


def butterfly(changes: Tensor) -> Blocks | Butterfly:
    """M of R_i - I, (m, n, 2 h, 2 h), each on the two halves of its rows one after the other."""
    if len(changes) == 1:
        return Blocks((changes[0],))
    return Butterfly.of(changes + eye(changes))


def check_butterfly(title: str, blocks: Tensor) -> None:
    """Raise AdapterLabError unless ``blocks`` (m, n, b, b) can be the stages of a butterfly."""
    check_blocks(title, blocks, 4)
    m, n, b, _ = blocks.shape
    if m > 1 and (b % 2 or (2 * n) % (1 << m)):
        expected = "blocks of even size, and 2^(stages - 1) or a multiple of them"
        found = f"{m} stages of {n} blocks of {b} rows"
        raise AdapterLabError(f"{title} blocks make no butterfly", found=found, expected=expected)


def _halves_apart(blocks: Tensor) -> Tensor:
    """The rows and columns of each block from (h, 2), alternating, to (2, h)."""
    *lead, b, _ = blocks.shape
    pairs = blocks.reshape(*lead, b // 2, 2, b // 2, 2)
    return pairs.transpose(-4, -3).transpose(-2, -1).reshape(blocks.shape)
