"""Nested values with tensors in them as JSON beside named tensors, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..header import DTYPES, Header, TensorInfo
from ..streams import read_header, stream

REFERENCE, TUPLE = "$tensor", "$tuple"
_SMALL = 1 << 16  # bytes of a file that is read: mappings are counted, and end on whole pages
_LIMIT = Path("/proc/sys/vm/max_map_count")  # mappings that Linux allows a process, mostly 65,530
_SHARE = 3  # of them, a dataset takes one part: without any left, no memory can be had either


class Packing:
    """Tensors under way to a file, each once, and values that refer to them by name.

    Args:
        stored: names of tensors, by id, that lie in other files already.
        exact: tuples stay tuples, and tensors lie in memory as they did.
    """

    def __init__(self, stored: Mapping[int, str] | None = None, *, exact: bool = False) -> None:
        self.exact = exact
        self.tensors: dict[str, Tensor] = {}
        self._names = dict(stored or {})
        self._elsewhere = set(self._names)

    def name(self, tensor: Tensor | None, name: str) -> str | None:
        """The name under which ``tensor`` is stored: ``name``, or that of an earlier item."""
        if tensor is None:
            return None
        while name in self.tensors and id(tensor) not in self._names:
            name += "_"  # {"a.b": x, "a": {"b": y}}
        known = self._names.setdefault(id(tensor), name)
        if id(tensor) not in self._elsewhere:
            self.tensors.setdefault(known, tensor)
        return known

    def encode(self, value: Any, name: str) -> Any:
        """``value`` as JSON; raises on what is neither tensor, number, text nor made of them."""
        if isinstance(value, Tensor):
            # A matrix product may round otherwise when its factors lie otherwise in memory.
            strided = self.exact and not value.is_contiguous()
            return {REFERENCE: self.name(value, name)} | (
                {"stride": value.stride()} if strided else {}
            )
        if isinstance(value, dict):
            pairs = cast(dict[str, Any], value).items()
            return {k: self.encode(v, f"{name}.{k}") for k, v in pairs}
        if isinstance(value, (list, tuple)):
            entries = enumerate(cast(list[Any], value))
            packed = [self.encode(v, f"{name}.{i}") for i, v in entries]
            return {TUPLE: packed} if self.exact and isinstance(value, tuple) else packed
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        raise AdapterLabError(
            f"'{name}' cannot be stored",
            found=type(value).__name__,
            expected="tensors, numbers and text",
            fix="" if self.exact else "Train on conditioning without ControlNet, hooks or masks",
        )


def decode(value: Any, tensor: Callable[[str | None], Tensor | None]) -> Any:
    """The inverse of :meth:`Packing.encode`; ``tensor`` gives what a name stands for."""
    if isinstance(value, dict):
        table = cast(dict[str, Any], value)
        if REFERENCE in table:
            found = tensor(table[REFERENCE])
            if found is None or "stride" not in table:
                return found
            return torch.empty_strided(found.shape, table["stride"], dtype=found.dtype).copy_(found)
        if TUPLE in table:
            return tuple(decode(table[TUPLE], tensor))
        return {k: decode(v, tensor) for k, v in table.items()}
    if isinstance(value, list):
        return [decode(v, tensor) for v in cast(list[Any], value)]
    return value


class Mapper:
    """Opens the files of one dataset, of which there may be more than a process can map.

    Attributes:
        left: how many more files are mapped; later ones are read into memory.
    """

    def __init__(self) -> None:
        try:
            self.left = int(_LIMIT.read_text()) // _SHARE
        except (OSError, ValueError):  # other systems count none
            self.left = sys.maxsize

    def open(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a safetensors file whose data stays on disk until it is read.

        The system keeps what is in use in memory and drops it again when others need the room, so
        that a dataset may be larger than memory. The file must not be written in place while its
        tensors live; replacing it is fine. Writing to the tensors does not reach the file.

        Raises:
            AdapterLabError: missing, unreadable or malformed file.
        """
        header = read_header(path)
        # Tensors that are made in inference mode could never be trained on.
        with torch.inference_mode(False):
            if header.size < _SMALL or self.left < 1:
                return dict(stream(path)), header.metadata
            self.left -= 1
            return _mapped(path, header), header.metadata


def _mapped(path: Path, header: Header) -> dict[str, Tensor]:
    from_file = cast(Callable[[str, bool, int], Any], torch.UntypedStorage.from_file)  # pyright: ignore[reportUnknownMemberType]
    try:
        storage: torch.UntypedStorage = from_file(str(path), False, header.size)
    except RuntimeError:  # a file system that cannot, or other mappings of this process
        return dict(stream(path))
    return {n: _view(storage, i, header.data_offset) for n, i in header.tensors.items()}


def _view(storage: torch.UntypedStorage, info: TensorInfo, base: int) -> Tensor:
    dtype = DTYPES[info.dtype]
    offset, misplaced = divmod(base + info.start, dtype.itemsize)
    if misplaced:  # a foreign writer's
        flat = torch.empty(0, dtype=torch.uint8).set_(
            storage, base + info.start, (info.end - info.start,), (1,)
        )
        return flat.clone().view(dtype).view(info.shape)
    count = (info.end - info.start) // dtype.itemsize
    flat = torch.empty(0, dtype=dtype).set_(storage, offset, (count,), (1,))
    return flat.view(info.shape)
