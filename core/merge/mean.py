"""Weighted means of the tensors of many open files, a block of each in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AdapterLabError
from ..files import Reader, TensorInfo, is_finite
from ..header import DTYPES
from ..power import Floats
from ..streams import raw
from .agree import ALPHA, out_dtype

Values = NDArray[np.floating]
BLOCK = 1 << 15  # elements at once: more, and torch starts threads that wait for each other
_HEAD = 1 << 12  # bytes that tell most tensors that training changed from those that it left


class Mean:
    """The tensors that ``readers`` weigh together.

    Args:
        weights: of each file. betas: if given, theta <- beta theta + (1 - beta) w in float32 from
            the first file on, in musubi-tuner's order of operations, in place of the weighted sum.
        normal: the weights stand for a mean, though those of a reconstruction do not quite sum up
            to 1: what is the same in all files stays as it is.
    """

    def __init__(
        self, readers: Sequence[Reader], weights: Floats, betas: Sequence[float] | None = None,
        *, normal: bool = True,
    ) -> None:  # fmt: skip
        self.readers, self.betas = readers, betas
        self._normal = normal and betas is None
        self.weights = [float(w) for w in weights]
        # Small terms first: what they add up to is not lost beside large ones.
        self._rank = sorted(range(len(self.weights)), key=lambda i: abs(self.weights[i]))
        self._bytes = torch.empty(BLOCK * 8, dtype=torch.uint8)
        self._memory = raw(self._bytes)
        self._sum = torch.empty(BLOCK, dtype=torch.float64)
        self._term = torch.empty(BLOCK, dtype=torch.float64)

    def dtype(self, key: str) -> torch.dtype:
        """Of the mean: the widest of the files; of a recursion that of its first."""
        infos = self._infos(key)
        return DTYPES[infos[0].dtype] if self.betas is not None else out_dtype(infos)

    def tensor(self, key: str) -> Tensor:
        """The mean of ``key``. What is no number to average, an alpha, or the same in all files
        of a normal mean comes from the first.

        Raises:
            AdapterLabError: NaN or infinity in a file; the mean does not fit the dtype.
        """
        infos, dtype = self._infos(key), self.dtype(key)
        copied = not dtype.is_floating_point or key.endswith(ALPHA)
        if copied or (self._normal and self._constant(infos)):
            first = self.readers[0].tensor(key).to(dtype)
            self._require_finite(key, first)
            return first
        result = torch.empty(infos[0].shape, dtype=dtype)
        flat = result.view(-1)
        # An average of float64 would lose half of its digits in float32.
        wide = torch.float64 if dtype == torch.float64 and self.betas is None else torch.float32
        for start in range(0, len(flat), BLOCK):
            part = flat[start : start + BLOCK]
            total, term = (t.view(wide)[: len(part)] for t in (self._sum, self._term))
            with np.errstate(over="ignore", invalid="ignore"):  # told below, by the key
                if self.betas is None:
                    self._add(infos, start, total.numpy(), term)
                else:
                    self._decay(infos, start, total.numpy(), term, self.betas)
            part.copy_(total)
        self._require_finite(key, result)
        return result

    def _add(self, infos: Sequence[TensorInfo], start: int, total: Values, term: Tensor) -> None:
        total[:] = 0
        for i in self._rank:
            value = self._read(i, infos[i], start, term)
            value *= self.weights[i]
            total += value

    def _decay(
        self, infos: Sequence[TensorInfo], start: int, total: Values, term: Tensor,
        betas: Sequence[float],
    ) -> None:  # fmt: skip
        total[:] = self._read(0, infos[0], start, term)
        for i, beta in enumerate(betas, 1):
            value = self._read(i, infos[i], start, term)
            value *= 1 - beta
            total *= beta
            total += value

    def _read(self, number: int, info: TensorInfo, start: int, term: Tensor) -> Values:
        """The numbers of one file from ``start`` on, as many and as wide as those of ``term``;
        the next call overwrites them."""
        dtype = DTYPES[info.dtype]
        size = len(term) * dtype.itemsize
        self.readers[number].fill(self._memory[:size], info.start + start * dtype.itemsize)
        values = self._bytes[:size].view(dtype)
        return (values if dtype == term.dtype else term.copy_(values)).numpy()

    def _infos(self, key: str) -> list[TensorInfo]:
        return [reader.header.tensors[key] for reader in self.readers]

    def _constant(self, infos: Sequence[TensorInfo]) -> bool:
        """Whether all files hold the same bytes."""
        size = infos[0].end - infos[0].start
        if any(info.dtype != infos[0].dtype for info in infos):
            return False
        step = self._bytes.numel() // 2
        places = [(0, min(size, _HEAD)), *((s, min(size, s + step)) for s in range(0, size, step))]
        return all(self._alike(infos, start, end) for start, end in places)

    def _alike(self, infos: Sequence[TensorInfo], start: int, end: int) -> bool:
        half = self._bytes.numel() // 2
        first, other = self._bytes[: end - start], self._bytes[half : half + end - start]
        self.readers[0].fill(raw(first), infos[0].start + start)
        for reader, info in zip(self.readers[1:], infos[1:], strict=True):
            reader.fill(raw(other), info.start + start)
            if not torch.equal(first, other):
                return False
        return True

    def _require_finite(self, key: str, result: Tensor) -> None:
        if is_finite(result):
            return
        for reader in self.readers:
            if not is_finite(reader.tensor(key)):
                raise AdapterLabError(
                    f"'{reader.path}' is damaged", found=f"NaN or infinity in '{key}'",
                    fix="Leave it out of the average.",
                )  # fmt: skip
        raise AdapterLabError(f"The average of '{key}' does not fit into {result.dtype}")
