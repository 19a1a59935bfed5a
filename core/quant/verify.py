"""A written file, read back before it takes its place."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import AdapterLabError
from ..merge.modules import Tick
from ..stored import read_weight, stored
from ..streams import PathLike, Reader
from .encode import encode, largest
from .job import Job

_EDGE = 1 << 12  # bytes of each end of a tensor
_LAYERS = 3  # whose numbers are compared
_ROWS = 128  # of them: block scales lie in tiles of so many
_AGREE = 1e-4  # difference of two relative errors
_FIX = "Check the disk, and try again."


class Sums:
    """Checksums of both ends of tensors that were written.

    What is read back comes from the memory of the system rather than from the disk: it tells
    whether every tensor is where the header says, which its ends tell as well as all of it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def add(self, name: str, data: memoryview) -> None:
        """Take the bytes of a tensor."""
        self._sums[name] = hash((bytes(data[:_EDGE]), bytes(data[-_EDGE:])))

    def compare(self, reader: Reader, tick: Tick, steps: int) -> None:
        """Raises ``AdapterLabError`` where the file holds anything else."""
        for key, info in reader.header.tensors.items():
            tick(steps, steps, f"checking {key}")
            size = min(_EDGE, info.end - info.start)
            ends = [bytearray(size), bytearray(size)]
            for memory, start in zip(ends, (info.start, info.end - size), strict=True):
                reader.fill(memoryview(memory), start)
            if hash(tuple(map(bytes, ends))) != self._sums.pop(key, None):
                raise AdapterLabError(f"'{key}' does not read back as it was written", fix=_FIX)
        if self._sums:
            raise AdapterLabError(f"'{next(iter(self._sums))}' was not written", fix=_FIX)


class _Top(Reader):
    """A file of which the first rows are read."""

    def tensor(self, name: str) -> Tensor:
        """A matrix in part, anything else whole."""
        tensor = super().tensor(name)
        return tensor[:_ROWS] if tensor.ndim > 1 else tensor


def verify(path: PathLike, job: Job, sums: Sums, tick: Tick) -> None:
    """Read back the ends of all tensors, and numbers of the layers with the largest errors.

    Raises:
        AdapterLabError: they are not what was written, or do not mean what was to be written.
    """
    with _Top(path) as reader:
        sums.compare(reader, tick, job.steps)
        worst = {path for path, _ in job.report.worst[:_LAYERS]}
        for key, layer in job.choice.chosen.items():
            if layer in worst:
                _compare(reader, job, key)


def _compare(reader: Reader, job: Job, key: str) -> None:
    """The first rows of one weight, quantised again."""
    weight = job.work.weight(key)
    exact, peak = weight[:_ROWS].clone(), largest(weight)
    del weight
    told = encode(job.form, exact, peak, job.settings.device)[1].error
    how, found = stored(reader, key), read_weight(reader, key)
    total = _norm(exact)
    error = _norm(found.sub_(exact)) / total if total else 0.0
    if how is None or how.format != job.form.native or not abs(error - told) <= _AGREE:
        raise AdapterLabError(
            f"'{key}' does not read back as it was written",
            found=f"an error of {error:.3%}", expected=f"{told:.3%}", fix=_FIX,
        )  # fmt: skip


def _norm(piece: Tensor) -> float:
    return math.sqrt(float(piece.double().square().sum()))
