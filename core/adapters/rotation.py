"""What all rotations of a weight share: where they act, strength, and how they are saved."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..orthogonal import Blocks, Butterfly, eye
from ..tensors import Op, wide
from .base import Algorithm, Shape, Tensors


class Rotation(Algorithm):
    """W' = g M W on the rows of a weight (LyCORIS, kohya), or g W M^T on its columns (peft).

    M is block-diagonal, or a product of such matrices, of blocks R_i = I + E_i; g is an optional
    factor of each output row. Strength m makes them I + m E_i and 1 + m (g - 1): every rotation
    is interpolated linearly, before they are multiplied. m = 0 is W, bit by bit. Columns count the
    kernel with the channels, (in * prod(k)). The bias of the layer is left as it is.

    Attributes:
        on_input: whether M is on the columns.
        finished_name: suffix of the R_i themselves. It is written where the trained tensors do not
            tell them: under a strength, or under settings that the file does not hold.
        gains_name: suffix of g.
        constraint: alpha as the file has it; it bounds the angles and is no scale.
    """

    scaled = False
    additive = False
    reads_weight = True
    on_input: ClassVar[bool] = False
    finished_name: ClassVar[str]
    gains_name: ClassVar[str] = ""

    def __init__(self, tensors: Tensors, scale: float = 1.0, constraint: float = 0.0) -> None:
        super().__init__(tensors, scale)
        self.constraint = constraint

    @abstractmethod
    def changes(self, like: Tensor) -> list[Tensor]:
        """E_i at strength 1, each (.., b, b) in float64, on the device of ``like`` if it can."""

    @abstractmethod
    def turn(self, changes: list[Tensor], size: int) -> Blocks | Butterfly:
        """M, (size, size), from the E_i."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Rows, or columns, that the blocks in the file cover."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The one axis that the file tells."""
        return (self.size,)

    @property
    def alpha(self) -> float:
        return self.constraint

    @property
    def told(self) -> bool:
        """Whether a file of the tensors and alpha alone says what they do."""
        return self.scale == 1

    def mismatch(self, shape: Shape) -> str | None:
        found, gains = f"the weight is {tuple(shape)}", self.tensors.get(self.gains_name)
        size = math.prod(shape[1:] if self.on_input else shape[:1])
        if len(shape) < 2 or not self.covers(size):
            return f"it rotates {self.size} {'columns' if self.on_input else 'rows'}, {found}"
        if gains is not None and gains.numel() != shape[0]:
            return f"it scales {gains.numel()} rows, {found}"
        return None

    def covers(self, size: int) -> bool:
        """Whether it rotates a weight of ``size`` rows, or columns."""
        return size == self.size

    def delta(self, weight: Tensor) -> Tensor:
        flat = wide(weight, weight).reshape(len(weight), -1)
        rows = flat.T if self.on_input else flat
        change = self._turn(len(rows), flat).change(rows)
        change = change.T if self.on_input else change
        return self._gained(change, flat, 0).reshape(weight.shape)

    def merge(self, weight: Tensor) -> Tensor:
        if not self.scale:
            return weight
        flat = weight.reshape(len(weight), -1)
        rows = flat.T if self.on_input else flat
        self._turn(len(rows), flat).apply_(rows)
        gains = self._gains(flat)
        if gains is not None:
            flat.mul_(1 + gains[:, None])
        # A weight that cannot be viewed as a matrix was copied.
        same = flat.data_ptr() == weight.data_ptr()
        return weight if same else weight.copy_(flat.view(weight.shape))

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """(M - I) y, and on the input side op((M^T - I) x, W).

        dW is rebuilt where no rotation of y or x does the same: M mixes the groups of a grouped
        convolution, each of which sees its own x, and on the input side a kernel of several
        elements is rotated in one with the channels.
        """
        axis = 1 if op.dims else -1
        kernel = weight.shape[2:].numel()
        if op.groups > 1 or (self.on_input and kernel > 1):
            return op(x, self.delta(weight).to(x))
        if y is None and (self.gains_name in self.tensors or not self.on_input):
            y = op(x, weight.to(x))
        if self.on_input:
            turned = _along(self._turn(x.shape[axis], x).transposed, x, axis)
            h = op(turned, weight.to(x))
        else:
            assert y is not None
            h = _along(self._turn(y.shape[axis], y), y, axis)
        return h if y is None else self._gained(h, y, axis)

    @property
    def reads_output(self) -> bool:
        return not self.on_input

    def settled(self, weight: Tensor) -> Self:
        return self.finished()

    def finished(self) -> Self:
        """The same with R_i at this strength in the place of what they are computed from.

        Tensors are float32; nothing but them is needed then, and a bypass repeats no solving.
        """
        like = next(iter(self.tensors.values()))
        changes = self._scaled(like)
        names = [self.finished_name]
        if len(changes) > 1:
            names = [f"{self.finished_name}.{i}" for i in range(len(changes))]
        rotations = [(e + eye(e)).to(like.device, torch.float32) for e in changes]
        tensors = dict(zip(names, rotations, strict=True))
        gains = self._gains(like.float())
        if gains is not None:
            shape = self.tensors[self.gains_name].shape
            tensors[self.gains_name] = (1 + gains).reshape(shape)
        return type(self)(tensors)

    def state(self) -> dict[str, Tensor]:
        if not self.told:
            return self.finished().state()
        # peft's own files hold no alpha.
        return dict(self.tensors) if self.on_input else super().state()

    def _scaled(self, like: Tensor) -> list[Tensor]:
        return [e * self.scale for e in self.changes(like)]

    def _turn(self, size: int, like: Tensor) -> Blocks | Butterfly:
        """M at this strength; a butterfly in float32 at least, for what it changes is small."""
        # More digits would not survive the product with a float32 weight.
        turn = self.turn([wide(e, like) for e in self._scaled(like)], size)
        return turn.to(like) if isinstance(turn, Blocks) else turn

    def _gains(self, like: Tensor) -> Tensor | None:
        """m (g - 1), (out,)."""
        gains = self.tensors.get(self.gains_name)
        return None if gains is None else ((wide(gains, like).flatten() - 1) * self.scale).to(like)

    def _gained(self, change: Tensor, old: Tensor, axis: int) -> Tensor:
        """g (old + change) - old, g on ``axis``."""
        gains = self._gains(change)
        if gains is None:
            return change
        shape = [1] * change.ndim
        shape[axis] = -1
        return change + (old + change) * gains.view(shape)


def _along(turn: Blocks | Butterfly, x: Tensor, axis: int) -> Tensor:
    """(M - I) x, M acting on ``axis``."""
    rows = x.movedim(axis, 0)
    flat = rows.reshape(len(rows), -1)
    flat = flat if isinstance(turn, Blocks) else wide(flat, flat)
    return turn.change(flat).to(x.dtype).reshape(rows.shape).movedim(0, axis)


def check_blocks(title: str, blocks: Tensor, axes: int) -> None:
    """Raise AdapterLabError unless ``blocks`` are square, with ``axes`` axes."""
    if blocks.ndim != axes or blocks.shape[-1] != blocks.shape[-2]:
        raise AdapterLabError(
            f"{title} blocks are not square", found=f"a tensor of shape {tuple(blocks.shape)}",
            expected=f"{axes} axes, the last two of one size",
        )  # fmt: skip
