"""What tells one model from another: a few of its weights, and what was put on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.adapters import Algorithm
from .bypass import KEY
from .layers import bare, submodules
from .parts import Part

_WEIGHTS, _VALUES = 16, 256  # how many weights, and how many values of each tensor
_PLACES = (0.1, 0.5, 0.9)  # of the schedule of noise levels


def fingerprint(model: Any) -> str:
    """The same for the same MODEL after a restart; another where weights, their patches, adapters
    on activations or the sampling of noise levels are others.

    Reads a few thousand values, from wherever ComfyUI keeps them, and loads nothing.
    """
    digest = hashlib.sha256()
    for part in _told(model):
        digest.update(part)
    return digest.hexdigest()[:16]


def tensor_fingerprint(tensors: dict[str, Tensor]) -> str:
    """Of named tensors, an adapter's."""
    digest = hashlib.sha256()
    for part in _parts(dict(sorted(tensors.items()))):
        digest.update(part)
    return digest.hexdigest()[:16]


def _told(model: Any) -> Iterator[bytes]:
    yield type(model.model).__name__.encode()
    weights = [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in submodules(model.model).items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    for name, parameter in weights[:: max(1, len(weights) // _WEIGHTS)]:
        yield name.encode()
        yield from _parts(bare(model, name, parameter))
    for key, patches in sorted(model.patches.items()):
        yield key.encode()
        for strength, patch, strength_model, *_ in patches:
            yield from _parts((strength, patch, strength_model))
    acting = model.get_attachment(KEY)
    for part in (*(f.part for f in acting.layers), *acting.values) if acting else ():
        yield from _parts(part)
    sampling = model.get_model_object("model_sampling")
    yield type(sampling).__name__.encode()
    yield from _parts([float(sampling.percent_to_sigma(place)) for place in _PLACES])


def _parts(value: Any) -> Iterator[bytes]:
    """``value`` piece by piece; of a tensor its shape and some values, of an object its tensors."""
    if isinstance(value, Tensor):
        yield _sampled(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key).encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, Part):
        yield f"{value.key} {value.slice} {value.schedule}".encode()
        yield from _parts((value.strength, value.algorithm))
    elif isinstance(value, Algorithm):
        yield f"{value.name} {value.scale}".encode()
        yield from _parts(value.tensors)
    elif hasattr(value, "weights"):  # an adapter of ComfyUI's
        yield type(value).__name__.encode()
        yield from _parts(value.weights)
    elif value is None or isinstance(value, (str, int, float)):
        yield repr(value).encode()


@torch.no_grad()
def _sampled(tensor: Tensor) -> bytes:
    described = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    stored: Tensor = getattr(tensor, "_qdata", tensor)  # of a quantised one
    if stored.is_meta or not stored.numel():
        return described
    flat = stored.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].cpu().contiguous()
    return described + some.view(torch.uint8).numpy().tobytes()
