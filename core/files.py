"""Adapter files whole; with the streams and headers under them, all that others need of files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .atomic import telling
from .errors import AdapterLabError
from .header import DTYPES, Header, TensorInfo, layout
from .streams import PathLike, Reader, raw, read_header, stream, write_stream

__all__ = [
    "Adapter", "Header", "Reader", "TensorInfo", "config_beside", "config_for", "is_finite",
    "layout", "read_adapter", "read_header", "stream", "write_adapter", "write_stream",
]  # fmt: skip

# itemsize and bit pattern of infinity: every pattern at or above it, sign apart, is inf or NaN.
# e4m3fn has no infinity; its only NaN takes that place.
_INFINITY = {
    torch.float64: (8, 0x7FF0_0000_0000_0000),
    torch.complex64: (4, 0x7F80_0000),
    torch.float32: (4, 0x7F80_0000),
    torch.bfloat16: (2, 0x7F80),
    torch.float16: (2, 0x7C00),
    torch.float8_e4m3fn: (1, 0x7F),
    torch.float8_e5m2: (1, 0x7C),
}


_PIECE = 1 << 19  # bytes, a multiple of every item size


class Adapter(dict[str, Tensor]):
    """Tensors of an adapter file by name: a plain dict to ComfyUI's own nodes.

    Attributes:
        metadata: the file's metadata.
        config: peft's ``adapter_config.json``, which holds the scale that such files lack.
        name: name of the file, for messages; "" if there is none.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (),
        metadata: Mapping[str, str] | None = None,
        config: dict[str, Any] | None = None,
        name: str = "",
    ) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.config = config
        self.name = name

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Adapter:
        """``tensors`` itself if it is an adapter; a plain dict (of a native node) as one, or all
        of an open file."""
        if isinstance(tensors, Adapter):
            return tensors
        told = [getattr(tensors, name, None) for name in ("metadata", "config", "name")]
        return cls(tensors, told[0], told[1], told[2] or "")

    def cast(self, dtype: torch.dtype | None) -> Adapter:
        """Copy with its floating point tensors in ``dtype``; None: as they are.

        Scalars stay: an alpha of 10000 is 9984 in bfloat16. Raises ``AdapterLabError`` for a
        value that ``dtype`` can't hold.
        """
        result = self.copy()
        for name, tensor in self.items():
            if dtype is not None and tensor.is_floating_point() and tensor.numel() > 1:
                result[name] = tensor.to("cpu", dtype)
                if not is_finite(result[name]):
                    failed = f"'{name}' does not fit into {dtype}"
                    raise AdapterLabError(failed, fix="Choose another dtype.")
        return result

    def copy(self) -> Adapter:
        """Shallow copy with its own metadata."""
        return Adapter(self, self.metadata, self.config, self.name)


def read_adapter(path: PathLike, config: PathLike | Mapping[str, Any] | None = None) -> Adapter:
    """Read an adapter file whole.

    ``config``: peft's ``adapter_config.json``, as a path or its content. By default the one beside
    the file, if the file is ``adapter_model.safetensors`` (peft's name) or the only safetensors
    file of its folder: a stray config in a folder of many adapters belongs to none of them.

    Raises:
        AdapterLabError: malformed file or config; NaN or infinity in a tensor.
    """
    path = os.fspath(path)
    with Reader(path) as reader:
        tensors = _read_all(reader)
    found = config_for(path, config)
    return Adapter(tensors, reader.header.metadata, found, os.path.basename(path))


def config_for(
    path: str, config: PathLike | Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The config that goes with the adapter file ``path``: see :func:`read_adapter`."""
    source = config_beside(path) if config is None else config
    if source is None:
        return None
    return dict(source) if isinstance(source, Mapping) else _read_config(source)


def is_finite(tensor: Tensor) -> bool:
    """Whether a CPU tensor of any dtype is free of NaN and infinity."""
    return tensor.numel() == 0 or _is_finite(raw(tensor), tensor.dtype)


def _read_all(reader: Reader) -> dict[str, Tensor]:
    """All tensors, cut out of one memory: files have hundreds, most of them small.

    Each piece is tested while it is still in the processor's cache.
    """
    infos = reader.header.tensors
    # numpy asks for huge pages, torch does not: a third less time for a file of 100 MB.
    memory = np.empty(reader.header.size - reader.header.data_offset, np.uint8).data
    for dtype, run in groupby(infos.items(), key=lambda item: item[1].dtype):
        pieces = list(run)
        end = pieces[-1][1].end
        for start in range(pieces[0][1].start, end, _PIECE):
            piece = memory[start : min(start + _PIECE, end)]
            reader.fill(piece, start)
            if not _is_finite(piece, DTYPES[dtype]):
                raise AdapterLabError(
                    f"'{reader.path}' is damaged", fix="Use an earlier or another copy of it.",
                    found=f"NaN or infinity in '{_culprit(pieces, piece, start)}'",
                )  # fmt: skip
    return {name: _cut(memory, info) for name, info in infos.items()}


def _culprit(run: list[tuple[str, TensorInfo]], piece: memoryview, start: int) -> str:
    """The first tensor with a bad value in ``piece`` of the data, which begins at ``start``."""
    spans = ((name, max(info.start - start, 0), max(info.end - start, 0)) for name, info in run)
    parts = ((name, piece[first:last]) for name, first, last in spans)
    dtype = DTYPES[run[0][1].dtype]
    return next(name for name, part in parts if part and not _is_finite(part, dtype))


def _cut(memory: memoryview, info: TensorInfo) -> Tensor:
    dtype = DTYPES[info.dtype]
    if info.start == info.end:
        return torch.empty(info.shape, dtype=dtype)
    if info.start % dtype.itemsize:  # a foreign writer's; torch wants its numbers aligned
        memory = memoryview(bytearray(memory[info.start : info.end]))
        return torch.frombuffer(memory, dtype=dtype).view(info.shape)
    count = (info.end - info.start) // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=info.start).view(info.shape)


def _is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Compares bit patterns in numpy: one thread and no temporary, so that the cost stays near
    that of reading the memory however busy torch's threads are."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return True
    if dtype not in _INFINITY:
        return bool(torch.frombuffer(data, dtype=dtype).float().isfinite().all())
    size, infinity = _INFINITY[dtype]
    sign = 1 << (8 * size - 1)
    positive, negative = np.frombuffer(data, f"i{size}"), np.frombuffer(data, f"u{size}")
    return int(positive.max()) < infinity and int(negative.max()) < (infinity | sign)


def write_adapter(
    path: PathLike, adapter: Mapping[str, Tensor], *, overwrite: bool = True
) -> dict[str, str]:
    """Write ``adapter``, with its ``metadata`` if it has any, as :func:`write_stream` does.

    Its ``config`` is not written: fold the scale into the tensors first.
    """
    with telling(f"Cannot write '{os.fspath(path)}'"):
        for name, tensor in cast("Mapping[str, object]", adapter).items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                found = f"{name!r} of type {type(tensor).__name__}"
                raise AdapterLabError("not a dense tensor with data", found=found)
        infos = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in adapter.items()}
        in_order = ((name, adapter[name]) for name in layout(infos))
    metadata = getattr(adapter, "metadata", None)
    return write_stream(path, infos, in_order, metadata, overwrite=overwrite)


def config_beside(path: str) -> str | None:
    """Path of the config that :func:`read_adapter` takes for the file ``path``; None for none."""
    folder, file = os.path.split(path)
    config = os.path.join(folder, "adapter_config.json")
    if not os.path.isfile(config):
        return None
    if file == "adapter_model.safetensors":
        return config
    others = [name for name in os.listdir(folder or ".") if name.endswith(".safetensors")]
    return config if others == [file] else None


def _read_config(path: PathLike) -> dict[str, Any]:
    with telling(f"Cannot read '{os.fspath(path)}'"):
        try:
            with open(path, encoding="utf-8") as file:
                config: object = json.load(file)
        except (ValueError, RecursionError) as error:
            raise AdapterLabError("not valid JSON", found=str(error)) from None
        if not isinstance(config, dict):
            raise AdapterLabError("not a JSON object", expected="peft's adapter_config.json")
        return cast("dict[str, Any]", config)
