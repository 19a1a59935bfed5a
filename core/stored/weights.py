"""Quantised weights of model files read back as numbers, whoever wrote them.

Reference: ComfyUI 0.30.0, ``comfy/ops.py`` and ``comfy/utils.py`` (``convert_old_quants``), for
what files hold; comfy-kitchen, ``tensor/*.py``, for the layouts of its formats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..header import DTYPES, Header
from ..streams import Reader, raw
from .layouts import LAYOUTS, PACKED

METADATA = "_quantization_metadata"
_MARKER, _LEGACY = "comfy_quant", "scaled_fp8"
_LEGACY_SCALE = "scale_weight"
_SCALES = ("weight_scale", _LEGACY_SCALE, "weight_scale_inv")
# What lies beside a weight and means nothing without it.
HELPERS = (
    _MARKER, *_SCALES, "weight_scale_2", "input_scale", "scale_input", "pre_quant_scale",
)  # fmt: skip
_BITSANDBYTES = (
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True)
class Stored:
    """How a quantised weight is stored.

    Attributes:
        format: ComfyUI's name for it; another where ComfyUI has none; "" if it can't be told.
        shape: of the weight that it stands for. helpers: suffix -> key of a tensor beside it.
    """

    key: str
    format: str
    shape: tuple[int, ...]
    helpers: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def known(self) -> bool:
        """Whether :func:`read_weight` can read it."""
        return self.format in LAYOUTS

    @property
    def title(self) -> str:
        """The format as messages name it."""
        return self.format or "an unknown format"


def is_quantised(header: Header, key: str) -> bool:
    """Whether the numbers of the tensor ``key`` mean nothing without what lies beside them."""
    info = header.tensors[key]
    if not key.endswith(".weight"):
        return False
    layer = key.removesuffix("weight")
    if any(f"{layer}{name}" in header.tensors for name in (_MARKER, *_SCALES)):
        return True
    dtype = DTYPES[info.dtype]
    return not (dtype.is_floating_point or dtype.is_complex) and len(info.shape) > 1


def helpers(header: Header) -> set[str]:
    """All tensors of a file that only say how weights are stored."""
    last = {key for key in header.tensors if key.rpartition(".")[2] in (*HELPERS, _LEGACY)}
    return last | {key for key in header.tensors if key.endswith(_BITSANDBYTES)}


def stored(reader: Reader, key: str) -> Stored | None:
    """How the weight ``key`` of an open file is stored; None where it is not quantised.

    Raises:
        AdapterLabError: what says so in the file is malformed.
    """
    header = reader.header
    if not is_quantised(header, key):
        return None
    layer = key.removesuffix("weight")
    names = ((name, f"{layer}{name}") for name in (*HELPERS, *_BITSANDBYTES))
    beside = {name: near for name, near in names if near in header.tensors}
    options = _marker(reader, beside) or _listed(header, layer.rstrip("."))
    info = header.tensors[key]
    given = options.get("format")
    form = str(given) if given else _format(info.dtype, beside)
    *rows, last = info.shape or (1,)
    shape = (*rows, last * 2) if form in PACKED else info.shape
    return Stored(key, form, shape, beside, options)


def runs(header: Header, how: Stored) -> bool:
    """Whether ComfyUI can run a weight that is stored so: marked, with scales that it takes.

    Reference: ComfyUI 0.30.0, ``_load_quantized_module`` of ``comfy/ops.py``; what its layers do
    with scales of other shapes was tried.
    """
    scale = "weight_scale" if "format" in how.options else _LEGACY_SCALE
    if not how.known or scale not in how.helpers:
        return False
    if scale == _LEGACY_SCALE and not _in_legacy(header, how.key):
        return False
    shape = header.tensors[how.helpers[scale]].shape
    if how.format in _FP8.values():
        return math.prod(shape) == 1
    rows = (how.shape[0], 1)
    return how.format != "int8_tensorwise" or math.prod(shape) == 1 or shape == rows


def _in_legacy(header: Header, key: str) -> bool:
    """Whether a tensor says that ``scale_weight`` beside the weights scales them."""
    path = key.split(".")
    return any(".".join([*path[:i], _LEGACY]) in header.tensors for i in range(len(path)))


def read_weight(reader: Reader, key: str) -> Tensor:
    """The weight ``key`` of an open file as float32, whatever its dtype or format.

    Raises:
        AdapterLabError: a format that is not known, or scales that do not fit it.
    """
    how = stored(reader, key)
    if how is None:
        return reader.tensor(key).to(torch.float32)
    if not how.known:
        raise AdapterLabError(
            f"'{key}' is stored in {how.title}, which can't be read",
            found=", ".join(how.helpers) or reader.header.tensors[key].dtype,
            expected=f"one of {', '.join(LAYOUTS)}",
        )
    beside = {name: reader.tensor(k) for name, k in how.helpers.items() if name != _MARKER}
    scale = next((beside[name] for name in _SCALES if name in beside), None)
    if scale is None:
        raise AdapterLabError(f"'{key}' is {how.title} and has no scale beside it")
    try:
        weight = LAYOUTS[how.format](reader.tensor(key), scale, beside, how.options)
    except AdapterLabError as error:
        raise error.about(f"'{key}', {how.title}") from error
    # What comes into the layer is multiplied by this first.
    smooth = beside.get("pre_quant_scale")
    return weight if smooth is None else weight.mul_(smooth.float())


def dequantised(header: Header, keys: Collection[str]) -> tuple[set[str], dict[str, str]]:
    """What is left of a file's quantisation once the weights ``keys`` are plain.

    Returns:
        Keys of the tensors that go with them; the metadata without these layers.
    """
    if not keys:
        return set(), dict(header.metadata)
    layers = {key.removesuffix("weight") for key in keys}
    beside = (f"{layer}{name}" for layer in layers for name in (*HELPERS, *_BITSANDBYTES))
    gone = {key for key in beside if key in header.tensors}
    marks = [k for k in header.tensors if k == _LEGACY or k.endswith(f".{_LEGACY}")]
    for mark in marks:
        root = mark.removesuffix(_LEGACY)
        scales = (
            k for k in header.tensors if k.startswith(root) and k.endswith(f".{_LEGACY_SCALE}")
        )
        if all(k in gone for k in scales):
            gone.add(mark)
    metadata = dict(header.metadata)
    table = _table(metadata.pop(METADATA, ""))
    named = {name for layer in layers for name in _spellings(layer.rstrip("."))}
    rest = {name: how for name, how in table.get("layers", {}).items() if name not in named}
    if rest:
        metadata[METADATA] = json.dumps({**table, "layers": rest})
    return gone, metadata


def _spellings(layer: str) -> Iterator[str]:
    """How the metadata may name a layer: as the file does, or without the model's prefix."""
    while layer:
        yield layer
        layer = layer.partition(".")[2]


def _format(dtype: str, beside: Mapping[str, str]) -> str:
    """The format where nothing names it."""
    if any(name.startswith("weight.") for name in beside):
        return "bitsandbytes"
    if not any(name in beside for name in _SCALES):
        return ""
    return "int8_tensorwise" if dtype == "I8" else _FP8.get(dtype, "")


def _marker(reader: Reader, beside: Mapping[str, str]) -> dict[str, Any]:
    if _MARKER not in beside:
        return {}
    text = bytes(raw(reader.tensor(beside[_MARKER])))
    try:
        options: object = json.loads(text)
    except ValueError as error:
        found = f"'{beside[_MARKER]}'"
        raise AdapterLabError("The mark of a quantised layer is not JSON", found=found) from error
    return _flat(options)


def _listed(header: Header, layer: str) -> dict[str, Any]:
    """What the metadata say of a layer."""
    layers = _table(header.metadata.get(METADATA, "")).get("layers", {})
    return _flat(next((layers[name] for name in _spellings(layer) if name in layers), None))


def _flat(options: object) -> dict[str, Any]:
    """Options with those below "params", where some writers put them."""
    if not isinstance(options, dict):
        return {}
    table = cast("dict[str, Any]", options)
    params = table.get("params")
    return {**(cast("dict[str, Any]", params) if isinstance(params, dict) else {}), **table}


@lru_cache(4)
def _table(text: str) -> dict[str, Any]:
    try:
        table: object = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        raise AdapterLabError(f"The metadata '{METADATA}' is not JSON") from None
    found = cast("dict[str, Any]", table) if isinstance(table, dict) else {}
    return found if isinstance(found.get("layers", {}), dict) else {}
