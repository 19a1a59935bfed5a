"""Adapter files whose tensors are read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterLabError
from .files import Adapter, config_for, is_finite
from .header import DTYPES
from .streams import PathLike, Reader

_SMALL = 4096  # bytes of a tensor that a shell holds with its values: alphas, sizes


class AdapterFile(Mapping[str, Tensor]):
    """An open adapter file as a mapping; every look-up reads one tensor from disk.

    Stands where an :class:`Adapter` does for whatever takes its tensors one module at a time.

    Attributes:
        metadata, config, name: as of :class:`Adapter`. path: of the file.

    Raises:
        AdapterLabError: malformed file or config; on look-up NaN or infinity in the tensor.
    """

    def __init__(self, path: PathLike, config: PathLike | Mapping[str, Any] | None = None) -> None:
        self.path = os.fspath(path)
        self._reader = Reader(path)
        self.metadata = dict(self._reader.header.metadata)
        self.config = config_for(self.path, config)
        self.name = os.path.basename(self.path)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._reader.header.tensors:
            raise KeyError(key)
        tensor = self._reader.tensor(key)
        if not is_finite(tensor):
            raise AdapterLabError(
                f"'{self.path}' is damaged", found=f"NaN or infinity in '{key}'",
                fix="Use an earlier or another copy of it.",
            )  # fmt: skip
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.header.tensors)

    def __len__(self) -> int:
        return len(self._reader.header.tensors)

    def shell(self) -> Adapter:
        """The same names with tensors on the meta device, but for those of a few numbers."""
        infos = self._reader.header.tensors
        tensors = {
            name: self[name]
            if info.end - info.start <= _SMALL
            else torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
            for name, info in infos.items()
        }
        return Adapter(tensors, self.metadata, self.config, self.name)

    def close(self) -> None:
        """Close the file; tensors already read live on."""
        self._reader.close()

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
