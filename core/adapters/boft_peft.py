"""BOFT as peft has it: a butterfly of rotations on the input, and a factor of each output row."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..orthogonal import Blocks, Butterfly, cayley, exact, eye, skew
from .base import Tensors
from .boft import butterfly, check_butterfly
from .rotation import Rotation

ROTATION, DIAG, GAINS = "boft_R", "boft_diag", "boft_s"


class PeftBOFT(Rotation):
    """W' = s W (B_(m-1) .. B_0)^T on the columns, (in * prod(k)).

    ``boft_R`` (m, n, b, b): Q = (B - B^T) / 2, R = (I - Q)(I + Q)^-1; ``boft_s`` s is (out, 1),
    of a convolution (1, out). Stage i mixes b / 2 columns with those 2^i b / 2 further, the two
    halves one after the other within a block. With one stage (peft without its CUDA kernel) it is
    OFT. ``boft_diag`` (m, n, b, b) is R itself. Strength m: R_i becomes m R_i + (1 - m) I before
    the product, s 1 + m (s - 1).

    Reference: Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly
    Factorization", section 4; peft 0.21.2.
    """

    name = "boft_peft"
    title = "BOFT (peft)"
    untrained = "BOFT trains such rotations in files that tell their settings by themselves"
    suffixes = (ROTATION, DIAG, GAINS)
    on_input = True
    finished_name = DIAG
    gains_name = GAINS

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        names = [name for name in (ROTATION, DIAG) if name in factors]
        if factors and len(names) != 1:
            expected = f"one of {ROTATION} and {DIAG}"
            raise AdapterLabError("Which rotation?", found=", ".join(factors), expected=expected)
        if not factors:
            return None
        check_butterfly(cls.title, factors[names[0]])
        return cls(factors)

    @property
    def rank(self) -> int:
        return self._blocks.shape[-1]

    @property
    def size(self) -> int:
        return self._blocks.shape[1] * self.rank

    def changes(self, like: Tensor) -> list[Tensor]:
        blocks = exact(self._blocks, like)
        return [blocks - eye(blocks) if DIAG in self.tensors else cayley(skew(blocks) / -2)]

    def turn(self, changes: list[Tensor], size: int) -> Blocks | Butterfly:
        return butterfly(changes[0])

    @property
    def _blocks(self) -> Tensor:
        return self.tensors[ROTATION if ROTATION in self.tensors else DIAG]
