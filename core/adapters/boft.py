"""BOFT: rotations of small blocks in the pattern of a butterfly, which together mix all rows."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..orthogonal import Blocks, Butterfly, eye
from .base import AdapterConfig, Shape, Tensors
from .oft import BLOCKS, DIAG, OFT, read_constraint
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
        """B zero, all stages; b is the largest even divisor of out up to the rank whose
        cofactor is a power of two.

        Raises:
            AdapterLabError: out has no such divisor.
        """
        out = shape[0]
        sizes = (b for b in range(2, config.rank + 1, 2) if out % b == 0)
        b = max((b for b in sizes if (out // b).bit_count() == 1), default=0)
        if not b:
            raise AdapterLabError(
                "BOFT has no blocks for this layer", found=f"{out} rows, rank {config.rank}",
                expected="an even block size up to the rank that divides them 2^n times",
            )  # fmt: skip
        n = out // b
        blocks = torch.zeros(n.bit_length(), n, b, b, device=generator.device, dtype=torch.float32)
        return cls({BLOCKS: blocks})

    @property
    def size(self) -> int:
        return self._blocks.shape[1] * self.rank

    def turn(self, changes: list[Tensor], size: int) -> Blocks | Butterfly:
        return butterfly(_halves_apart(changes[0]))


def butterfly(changes: Tensor) -> Blocks | Butterfly:
    """M of R_i - I, (m, n, 2 h, 2 h), each on the two halves of its rows one after the other."""
    if len(changes) == 1:
        return Blocks((changes[0],))
    # More digits would not survive the product with a float32 weight.
    return Butterfly.of((changes + eye(changes)).float())


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
