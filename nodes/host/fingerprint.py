"""What tells one model from another: a few of its weights, with or without what was put on them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...core.adapters import Algorithm
from ...core.archs import detect
from ...core.keys import ModelIndex
from .bypass import KEY
from .layers import bare, submodules
from .parts import Part
from .values import is_patchable

_WEIGHTS, _VALUES = 16, 256  # how many weights, and how many values of each tensor
_BASE_WEIGHTS, _BASE_VALUES = 64, 64
_DIFFUSION = "diffusion_model."
_COMPILED = "_orig_mod."  # what torch.compile puts into the paths of a model's weights
_LEAST = 2.0**-16  # below, float16 has fewer digits than bfloat16
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


class Identity(NamedTuple):
    """What a model is, whatever is patched into it.

    Attributes:
        fingerprint: of its own weights.
        architecture: id in the registry; ComfyUI's name where it has none.
        shapes: of all weights, by name.
    """

    fingerprint: str
    architecture: str
    shapes: dict[str, tuple[int, ...]]


# Told anew for each run, these would take as long as a step of a small model.
_identities: WeakKeyDictionary[Any, Identity] = WeakKeyDictionary()


def identity(model: Any) -> Identity:
    """Of a MODEL; remembered for as long as its network exists, for all clones."""
    network = model.model.diffusion_model
    if network not in _identities:
        shapes = base_shapes(model)
        found = detect(ModelIndex(shapes))
        name = found.id if found else type(model.model).__name__.lower()
        _identities[network] = Identity(base_fingerprint(model), name, shapes)
    return _identities[network]


def base_fingerprint(model: Any) -> str:
    """Of the diffusion model alone: the same with and without adapters, whatever is patched into
    its weights at the moment, and loaded as float32 or bfloat16; as float16 where its file has 16
    bits a value. Another for a fine-tune and for a quantised copy.

    Reads 64 values of each of 64 weights, from wherever ComfyUI keeps them, and loads nothing.
    """
    digest = hashlib.sha256()
    for key, weight in _base_weights(model):
        digest.update(f"{key.replace(_COMPILED, '')} {tuple(weight.shape)} ".encode())
        digest.update(_rounded(_original(model, key, weight)))
    return digest.hexdigest()[:12]


def base_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Weight name -> shape, compiled or not, without what some clone has merged."""
    return {
        key.replace(_COMPILED, ""): tuple(_original(model, key, parameter).shape)
        for path, module in submodules(model.model).items()
        for name, parameter in module._parameters.items()
        if parameter is not None
        for key in (f"{path}.{name}" if path else name,)
    }


def _base_weights(model: Any) -> list[tuple[str, Any]]:
    """Those that are taken, by the hash of their names: another parameter hardly changes which.

    Only what ComfyUI patches itself: with the rest a scheduled adapter may be in place.
    """
    found = {
        f"{path}.weight": module._parameters.get("weight")
        for path, module in submodules(model.model).items()
        if path.startswith(_DIFFUSION) and is_patchable(module, "weight")
    }
    weights = [(key, weight) for key, weight in found.items() if weight is not None]
    matrices = [(key, weight) for key, weight in weights if len(weight.shape) > 1]
    ranked = sorted(matrices, key=lambda item: zlib.crc32(item[0].replace(_COMPILED, "").encode()))
    return ranked[:_BASE_WEIGHTS]


def _original(model: Any, key: str, live: Any) -> Any:
    """The parameter ``live`` without what is merged into it, for a clone or a conditioning."""
    hooked = model.hook_backup.get(key)
    return bare(model, key, live if hooked is None else hooked[0])


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


@torch.no_grad()
def _rounded(tensor: Any) -> bytes:
    """Some values, to the digits that bfloat16 has; of quantised ones the stored bytes."""
    stored = getattr(tensor, "_qdata", tensor).detach().as_subclass(Tensor)
    if stored.is_meta or not stored.numel():
        return b""
    flat = stored.reshape(-1)
    some = flat[:: max(1, flat.numel() // _BASE_VALUES)][:_BASE_VALUES].cpu().contiguous()
    if some.is_floating_point():
        wide = some.float()
        some = wide.where(wide.abs() >= _LEAST, 0.0).to(torch.bfloat16)
    return some.view(torch.uint8).numpy().tobytes()
