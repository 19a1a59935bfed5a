"""Tensors in and out of safetensors files one by one.

Tensors never keep their file mapped: each owns its memory, so a file may be replaced or even
overwritten in place while its tensors are alive (a mapped one would change or kill the process,
and on Windows could not be replaced). Reading this way costs no more than touching a mapping.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from io import FileIO, IOBase
from typing import cast

import torch
from torch import Tensor

from .atomic import replacing, telling, write_all
from .errors import AdapterLabError
from .hashes import PLACEHOLDERS, Hasher
from .header import DTYPES, NAMES, Header, TensorInfo, encode, layout, parse

PathLike = str | os.PathLike[str]
Watch = Callable[[str, memoryview], None]
_HASHES = (*PLACEHOLDERS, "modelspec.hash_sha256")


class Reader:
    """An open safetensors file: its ``header``, and its tensors by name, one read each.

    Args:
        header: of the file, if it was read before and the file has not changed since.

    Raises:
        AdapterLabError: missing, unreadable or malformed file, in one sentence with its path.
    """

    def __init__(self, path: PathLike, header: Header | None = None) -> None:
        self.path = os.fspath(path)
        with telling(f"Cannot read '{self.path}'"), ExitStack() as stack:
            mode = os.stat(self.path).st_mode  # before opening: that would wait on a pipe
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
                raise AdapterLabError(f"it is {kind}")
            self._file = stack.enter_context(open(self.path, "rb"))
            size = os.fstat(self._file.fileno()).st_size
            known = header if header is not None and header.size == size else None
            self.header = known or parse(self._file, size)
            self._open = stack.pop_all()

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, in its own memory."""
        info = self.header.tensors.get(name)
        if info is None:
            raise AdapterLabError(f"'{self.path}' holds no tensor '{name}'")
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        self.fill(raw(tensor), info.start)
        return tensor

    def fill(self, memory: memoryview, start: int) -> None:
        """Read into all of ``memory`` the tensors' bytes from ``start`` on."""
        with telling(f"Cannot read '{self.path}'"):
            self._file.seek(self.header.data_offset + start)
            if self._file.readinto(memory) < len(memory):
                raise AdapterLabError("the file was cut off while it was read")

    @property
    def stamp(self) -> tuple[int, ...]:
        """Of the open file; another one when it was changed."""
        return stamp(self._file)

    def close(self) -> None:
        """Close the file; tensors already read live on."""
        self._open.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stamp(file: IOBase) -> tuple[int, ...]:
    """Which file an open one is, its size, and when it was last written to."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_header(path: PathLike) -> Header:
    """The validated header of a safetensors file; no tensor is read."""
    with Reader(path) as reader:
        return reader.header


def stream(path: PathLike, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors or of ``names``, in the order of their bytes in the file.

    Holds no reference to a tensor it has yielded. Raises ``AdapterLabError`` as :class:`Reader`
    does, when the first item is asked for.
    """
    with Reader(path) as reader:
        tensors = reader.header.tensors
        wanted = set(tensors if names is None else names)
        if missing := sorted(wanted - tensors.keys()):
            raise AdapterLabError(f"'{reader.path}' holds no tensor '{missing[0]}'")
        for name in tensors:
            if name in wanted:
                yield name, reader.tensor(name)


def write_stream(
    path: PathLike,
    infos: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    hashes: bool = True,
    overwrite: bool = True,
    watch: Watch | None = None,
    closing: Callable[[str], Mapping[str, str]] | None = None,
) -> dict[str, str]:
    """Write tensors as they come, atomically, one in memory at a time; returns the metadata.

    Args:
        infos: name -> (dtype, as torch's or safetensors' name; shape) of every tensor to come.
        tensors: (name, tensor) on any device, in any order, the fastest that of ``layout(infos)``.
        metadata: hashes of another file in it (``sshs_*``, modelspec's) are left out.
        hashes: add ``sshs_model_hash`` and ``sshs_legacy_hash`` (see :mod:`.hashes`).
        overwrite: False refuses to replace a file.
        watch: called with the name and bytes of each tensor that was written. With it a tensor is
            written while the next one is made, which holds one more in memory.
        closing: called with the path of the written file before it is put in place; returns
            metadata that were not known before, as long as those in ``metadata``.

    Raises:
        AdapterLabError: a tensor is missing, not announced or of another dtype or shape; all
            that :func:`.atomic.replacing` raises. A failure leaves an existing file as it was.
    """
    subject = f"Cannot write '{os.fspath(path)}'"
    with telling(subject):
        plan = layout(infos)
        written = _checked_metadata(metadata or {}) | (PLACEHOLDERS if hashes else {})
        head = encode(plan, written)
        hasher = Hasher(plan, written) if hashes else None
    size = len(head) + max((info.end for info in plan.values()), default=0)
    with replacing(path, size=size, overwrite=overwrite) as file:
        with telling(subject):
            write_all(file, head)
        with _Behind() if watch else nullcontext(_now) as run:
            put = _Put(file, subject, len(head), hasher, watch, run)
            _fill(plan, tensors, subject, put)
        with telling(subject):
            late = hasher.finish(file, len(head)) if hasher else {}
        late |= closing(str(file.name)) if closing else {}
        if late:
            with telling(subject):
                written |= late
                again = encode(plan, written)
                if len(again) != len(head):  # it would run into the tensors
                    raise AdapterLabError("the late metadata have another length")
                file.seek(0)
                write_all(file, again)
    return written


@dataclass(frozen=True)
class _Put:
    """Puts the bytes of one tensor where they belong."""

    file: FileIO
    subject: str
    base: int
    hasher: Hasher | None
    watch: Watch | None
    run: Callable[[Callable[[], None]], None]

    def __call__(self, name: str, info: TensorInfo, data: memoryview) -> None:
        self.run(partial(self._put, name, info, data))

    def _put(self, name: str, info: TensorInfo, data: memoryview) -> None:
        with telling(self.subject):
            self.file.seek(self.base + info.start)
            write_all(self.file, data)
            if self.hasher:
                self.hasher.feed(info, data)
        if self.watch:
            self.watch(name, data)


def _fill(
    plan: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]], subject: str,
    put: _Put,
) -> None:  # fmt: skip
    pending = dict(plan)
    for name, tensor in tensors:
        with telling(subject):
            info = pending.pop(name, None)
            if info is None:
                kind = "came twice" if name in plan else "was not announced"
                raise AdapterLabError(f"tensor '{name}' {kind}")
            if (tensor.dtype, tensor.shape) != (DTYPES[info.dtype], info.shape):
                found = f"{NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"
                expected = f"{info.dtype} {list(info.shape)}"
                raise AdapterLabError(f"tensor '{name}' differs", found=found, expected=expected)
            plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        put(name, info, raw(plain))
        del tensor, plain  # or they live on while the next one is made
    if pending:
        names = ", ".join(f"'{name}'" for name in list(pending)[:3])
        failed = f"{len(pending)} announced tensors did not come"
        raise AdapterLabError(failed, found=f"none for {names}").about(subject)


def _now(work: Callable[[], None]) -> None:
    work()


class _Behind:
    """Runs each call while the caller prepares the next; what one raises the next one raises."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> _Behind:
        return self

    def __call__(self, work: Callable[[], None]) -> None:
        self._wait()
        self._last = self._pool.submit(work)

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in cast("Mapping[object, object]", metadata).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise AdapterLabError("metadata is not text", found=f"{key!r}: {value!r}"[:120])
    return {key: value for key, value in metadata.items() if key not in _HASHES}
