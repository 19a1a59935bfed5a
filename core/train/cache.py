"""Encoded pictures and captions on disk, by what they were made from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..streams import write_stream
from .data import checksum, tensors
from .packing import Mapper, Packing, decode

FOLDER = "cache"
_VALUE, _SUMS = "value", "checksums"
_KEPT = 30 * 24 * 3600  # seconds that an entry outlives its last use


class Cache:
    """A folder with a file for each value; a value is a dict with tensors somewhere in it.

    Attributes:
        names: id of every tensor that was got -> its name in a dataset beside the folder.
        hits: values that were there.
        made: values that had to be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[int, str] = {}
        self.hits = self.made = 0
        self._values: dict[str, dict[str, Any]] = {}
        self._mapper = Mapper()

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The value of ``key`` (hexadecimal), made and written if it is not there or damaged.

        Its tensors are mapped from the file. Nothing is written when ``make`` raises.
        """
        if key in self._values:
            return self._values[key]
        value = self._read(key)
        if value is None:
            self._write(key, make())
            value = self._read(key)
            self.made += 1
        else:
            self.hits += 1
        if value is None:
            raise AdapterLabError(f"'{self._path(key)}' is damaged right after it was written")
        self._values[key] = value
        return value

    def prune(self) -> int:
        """Delete what was not used for a month; returns how many files that were.

        One that another program has open (Windows) or has just deleted is passed over.
        """
        files = [p for p in self.folder.glob("*.safetensors") if p.stem not in self._values]
        count = 0
        for path in files:
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - _KEPT:
                    path.unlink()
                    count += 1
        return count

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Any] | None:
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            found, metadata = self._mapper.open(path)
            sums: dict[str, int] = json.loads(metadata[_SUMS])
            if {name: checksum(tensor) for name, tensor in found.items()} != sums:
                return None
            value = decode(json.loads(metadata[_VALUE]), lambda name: found[name or ""])
        except (AdapterLabError, KeyError, ValueError):
            return None
        with suppress(OSError):  # of another owner, or on a file system without times
            os.utime(path)
        reference = f"{FOLDER}/{path.name}|"
        self.names |= {id(tensor): reference + name for name, tensor in found.items()}
        return value

    def _write(self, key: str, value: dict[str, Any]) -> None:
        packing = Packing()
        text = json.dumps(packing.encode(value, ""))
        plain = {n: t.detach().cpu().contiguous() for n, t in packing.tensors.items()}
        metadata = {
            _VALUE: text,
            _SUMS: json.dumps({name: checksum(tensor) for name, tensor in plain.items()}),
        }
        infos = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in plain.items()}
        write_stream(self._path(key), infos, plain.items(), metadata, hashes=False)


def first_bad(value: dict[str, Any]) -> str | None:
    """Name of the first tensor of ``value`` with NaN or infinity; None if there is none."""
    return next((n for n, t in tensors(value) if not _finite(t)), None)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
