"""Safetensors files of tensors whose sizes are not known before the last is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from tempfile import TemporaryFile

import torch
from torch import Tensor

from .atomic import telling, write_all
from .errors import AdapterLabError
from .header import layout
from .streams import PathLike, raw, write_stream


def write_spooled(
    path: PathLike,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write tensors as they come, one in memory at a time; returns the metadata written.

    They wait in a nameless file beside ``path`` until the header can be laid out. ``metadata`` is
    read after the last tensor: whoever makes them may still fill it in.

    Raises:
        AdapterLabError: as :func:`.streams.write_stream`; what ``tensors`` raises. A failure
            leaves an existing file as it was.
    """
    folder = os.path.dirname(os.path.realpath(path))
    subject = f"Cannot write '{os.fspath(path)}'"
    if not overwrite and os.path.exists(path):
        raise AdapterLabError("it exists already", fix="Choose another name.").about(subject)
    with telling(subject):
        os.makedirs(folder, exist_ok=True)
        opened = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by the with below
    with opened as file:
        infos: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        places: dict[str, int] = {}
        for name, tensor in tensors:
            with telling(subject):
                if name in infos:
                    raise AdapterLabError(f"tensor '{name}' came twice")
                places[name] = file.tell()
                infos[name] = (tensor.dtype, tuple(tensor.shape))
                write_all(file, raw(tensor.cpu().contiguous()))
            del tensor
        in_order = _read_back(file, infos, places)
        return write_stream(path, infos, in_order, metadata, overwrite=overwrite)


def _read_back(
    file: FileIO,
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    places: Mapping[str, int],
) -> Iterator[tuple[str, Tensor]]:
    for name in layout(infos):
        dtype, shape = infos[name]
        tensor = torch.empty(shape, dtype=dtype)
        data = raw(tensor)
        file.seek(places[name])
        if file.readinto(data) < len(data):
            raise AdapterLabError("the temporary file was cut off")
        yield name, tensor
        del tensor, data
