"""The safetensors header: validated without touching tensor data, laid out, and written.

A file is the header's length n (8 bytes, little-endian), n bytes of JSON padded with spaces to a
multiple of 8, and the tensors' bytes without holes. Offsets count from the end of the header.

Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

import torch

from .errors import AdapterLabError

# In the order in which the reference serialiser puts tensors into a file (safetensors 0.8.0, by
# experiment): hashes over the data and over the header's length depend on it.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}
_MAX_HEADER = 100_000_000  # the reference reader refuses more
_AGAIN = "Download or copy the file again."
_CONVERT = "Convert it to safetensors first."
_FOREIGN = (
    ((b"PK\x03\x04",), "a zip archive or PyTorch checkpoint", _CONVERT),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle (.pt)", _CONVERT),
    ((b"GGUF",), "a GGUF file", "Load it with a GGUF loader."),
    ((b"version https://git-lfs",), "a Git LFS pointer", "Run 'git lfs pull' to get the file."),
    ((b"<",), "a web page", "The download went wrong: log in and download the file again."),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes [``start``, ``end``) of the data; ``dtype``: safetensors' name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself; ``tensors`` are in the order of their bytes.

    ``data_offset``: length of the header, where the tensors' bytes begin; ``size``: of the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int
    size: int


def parse(file: BinaryIO, size: int) -> Header:
    """Header of the open safetensors ``file`` of ``size`` bytes; reads nothing behind it.

    Raises:
        AdapterLabError: whatever the file is instead, or the first contradiction found.
    """
    if size == 0:
        raise AdapterLabError("the file is empty", expected="a safetensors file", fix=_AGAIN)
    head = file.read(64)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length > _MAX_HEADER:
        raise _foreign(head, length)
    if 8 + length > size:
        found, expected = f"{size} bytes", f"at least {8 + length}"
        raise AdapterLabError(
            "the header is longer than the file", found=found, expected=expected, fix=_AGAIN
        )
    entries = _entries((head + file.read(max(0, length - 56)))[8 : 8 + length])
    metadata = _metadata(entries.pop("__metadata__", {}))
    infos = [(name, _info(name, raw)) for name, raw in entries.items()]
    infos.sort(key=lambda item: (item[1].start, item[1].end))
    _check_coverage(infos, size - 8 - length)
    return Header(dict(infos), metadata, 8 + length, size)


def layout(
    infos: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]],
) -> dict[str, TensorInfo]:
    """Offsets of tensors given as name -> (dtype, shape), in the reference serialiser's order."""
    for name in cast("Mapping[object, object]", infos):
        if not isinstance(name, str) or name == "__metadata__":
            raise AdapterLabError("not a name for a tensor", found=_short(name))
    named = {name: (_dtype_name(name, dtype), tuple(s)) for name, (dtype, s) in infos.items()}
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name in sorted(named, key=lambda name: (_RANK[named[name][0]], name)):
        dtype, shape = named[name]
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        tensors[name] = TensorInfo(dtype, shape, start, end)
    return tensors


def encode(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and header as bytes, byte for byte as the reference serialiser writes them.

    (Apart from the order of the metadata, which is random there.)
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, info in tensors.items():
        offsets = [info.start, info.end]
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        failed = "a name or metadata value is not valid Unicode"
        raise AdapterLabError(failed, found=_short(error.object)) from None
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        found, expected = f"{len(text)} bytes", f"at most {_MAX_HEADER}"
        raise AdapterLabError("names and metadata are too long", found=found, expected=expected)
    return len(text).to_bytes(8, "little") + text


def _dtype_name(name: str, dtype: torch.dtype | str) -> str:
    found = NAMES.get(dtype) if isinstance(dtype, torch.dtype) else dtype
    if found not in DTYPES:
        raise AdapterLabError(
            f"tensor {_short(name)} cannot be stored", found=f"{dtype}", expected=_known()
        )
    return found


def _foreign(head: bytes, length: int) -> AdapterLabError:
    failed = "the file is not in safetensors format"
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            return AdapterLabError(failed, found=what, fix=fix)
    text = head.decode(errors="replace").rstrip("\ufffd")  # the last character may be cut
    if text and "\ufffd" not in text and all(c.isprintable() or c.isspace() for c in text):
        return AdapterLabError(failed, found="a text file")
    found = f"a header of {length} bytes" if len(head) > 8 else f"{len(head)} bytes"
    return AdapterLabError("the header is damaged or missing", found=found, fix=_AGAIN)


def _entries(text: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise AdapterLabError(f"the header holds {_short(twice)} twice", fix=_AGAIN)
        return entries

    try:
        entries: object = json.loads(text.decode(), object_pairs_hook=unique)
        if b"\\u" in text:  # an escaped lone surrogate parses but can be neither shown nor saved
            json.dumps(entries, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        failed = "the header is not valid JSON"
        raise AdapterLabError(failed, found=str(error), fix=_AGAIN) from None
    return cast("dict[str, object]", entries)


def _metadata(raw: object) -> dict[str, str]:
    entries = cast("dict[str, object]", raw) if isinstance(raw, dict) else {"": raw}
    for name, value in entries.items():
        if not isinstance(value, str):
            at = f" value {_short(name)}" if name else ""
            raise AdapterLabError(f"the metadata{at} is not text", found=_short(value))
    return cast("dict[str, str]", entries)


def _sizes(raw: object) -> tuple[int, ...] | None:
    if not isinstance(raw, list):
        return None
    for value in cast("list[object]", raw):
        if not isinstance(value, int) or value is True or value is False or value < 0:
            return None
    return tuple(cast("list[int]", raw))


def _info(name: str, raw: object) -> TensorInfo:
    if not isinstance(raw, dict):
        raise _wrong(name, _short(raw), "an object")
    entry = cast("dict[str, object]", raw)
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _wrong(name, f"dtype {_short(dtype)}", _known())
    sizes, offsets = _sizes(shape), _sizes(span)
    itemsize = DTYPES[dtype].itemsize
    if sizes is None or (0 in sizes and math.prod(n or 1 for n in sizes) * itemsize >= 2**63):
        raise _wrong(name, f"shape {_short(shape)}", "")
    size = math.prod(sizes) * itemsize
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        expected = f"{size} bytes for {dtype} of shape {list(sizes)}"
        raise _wrong(name, f"data_offsets {_short(span)}", expected)
    return TensorInfo(dtype, sizes, offsets[0], offsets[1])


def _wrong(name: str, found: str, expected: str) -> AdapterLabError:
    failed = f"the header's entry of tensor {_short(name)} is wrong"
    return AdapterLabError(failed, found=found, expected=expected, fix=_AGAIN)


def _check_coverage(infos: list[tuple[str, TensorInfo]], held: int) -> None:
    claimed = max((info.end for _, info in infos), default=0)
    if claimed > held:
        found, expected = f"{held} bytes of tensors", f"{claimed}"
        raise AdapterLabError("the file is cut off", found=found, expected=expected, fix=_AGAIN)
    position = 0
    for name, info in infos:
        if info.start != position:
            kind = "overlaps the one before" if info.start < position else "follows a hole"
            found, expected = f"offset {info.start}", f"{position}"
            raise AdapterLabError(
                f"tensor {_short(name)} {kind}", found=found, expected=expected, fix=_AGAIN
            )
        position = info.end
    if position < held:
        found = f"{held - position} bytes behind the last tensor"
        raise AdapterLabError("the file is too long for its header", found=found, fix=_AGAIN)


def _known() -> str:
    return f"one of {', '.join(DTYPES)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
