"""OFT of sd-scripts: Diag-OFT under a constraint that is always on, per range of a fused weight."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..orthogonal import Blocks, cayley, exact, eye, frobenius, skew
from .base import Tensors, numbered
from .oft import BLOCKS as LYCORIS_BLOCKS
from .oft import DIAG as LYCORIS_DIAG
from .reading import read_number
from .rotation import Rotation, check_blocks

BLOCKS, DIAG = "kohya_oft_blocks", "kohya_oft_diag"
_ALPHA = 1e-3  # sd-scripts' default


class KohyaOFT(Rotation):
    """W'_k = R_k^T W_k as Diag-OFT, with Q scaled by (min(||Q||, c) + 1e-8) / (||Q|| + 1e-8).

    ``kohya_oft_blocks`` (n, b, b), c = alpha * out; alpha 0 allows no rotation. Of a fused weight
    ``kohya_oft_blocks.0``, ``.1``, .. are for consecutive ranges of rows, each with its own c and
    norm. sd-scripts calls them ``oft_blocks``; they have another name here because alpha means
    something else in the LyCORIS tensor of that name.

    Saved as Diag-OFT, the constraint worked into the blocks, where all ranges have blocks of one
    size. (LyCORIS' own loader takes no blocks that are larger than their number.)

    Reference: as Diag-OFT; sd-scripts, networks/oft.py and networks/oft_flux.py.
    """

    name = "oft_kohya"
    title = "OFT (kohya)"
    untrained = "Diag-OFT with a constraint trains the same"
    suffixes = (BLOCKS, BLOCKS + ".*", DIAG, DIAG + ".*")
    finished_name = DIAG

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        names = sorted(factors, key=_number)
        for name in names:
            check_blocks(cls.title, factors[name], 3)
        heads = {numbered(name) for name in names}
        whole = [_number(name) for name in names] == list(range(len(names)))
        if len(heads) > 1 or not whole:
            found, expected = ", ".join(factors), f"{BLOCKS}.0, .1, .. or {BLOCKS} alone"
            raise AdapterLabError("OFT ranges are incomplete", found=found, expected=expected)
        if not factors:
            return None
        alpha = read_number(tensors, "alpha", _ALPHA)
        if alpha < 0:
            raise AdapterLabError("alpha is a constraint and below 0", found=str(alpha))
        return cls({name: factors[name] for name in names}, constraint=alpha)

    @property
    def rank(self) -> int:
        return max(blocks.shape[-1] for blocks in self.tensors.values())

    @property
    def size(self) -> int:
        return sum(len(blocks) * blocks.shape[-1] for blocks in self.tensors.values())

    @property
    def traits(self) -> tuple[str, ...]:
        return ("fused",) if len(self.tensors) > 1 else ()

    def changes(self, like: Tensor) -> list[Tensor]:
        tensors = [exact(blocks, like) for blocks in self.tensors.values()]
        if self._done:
            return [rotation - eye(rotation) for rotation in tensors]
        return [cayley(skew(blocks * self._ratio(blocks))) for blocks in tensors]

    def turn(self, changes: list[Tensor], size: int) -> Blocks:
        return Blocks(tuple(e.mT for e in changes))

    def state(self) -> dict[str, Tensor]:
        if not self.told or len({blocks.shape[-1] for blocks in self.tensors.values()}) > 1:
            return super().state()
        name = LYCORIS_DIAG if self._done else LYCORIS_BLOCKS
        parts = [t if self._done else self._folded(t) for t in self.tensors.values()]
        return {name: torch.cat(parts), "alpha": torch.tensor(0.0)}

    @property
    def _done(self) -> bool:
        return next(iter(self.tensors)).startswith(DIAG)

    def _ratio(self, blocks: Tensor) -> Tensor:
        limit = self.constraint * len(blocks) * blocks.shape[-1]
        norm = frobenius(skew(blocks))
        return (norm.clamp(max=limit) + 1e-8) / (norm + 1e-8)

    def _folded(self, blocks: Tensor) -> Tensor:
        wide = exact(blocks, blocks)
        ratio = self._ratio(wide)
        return blocks if ratio == 1 else (wide * ratio).to(blocks.device, torch.float32)


def _number(name: str) -> int:
    number = name.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0
