"""The tensors of one module as a result keeps them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapters import ALGORITHMS, Algorithm, load_parts
from ..adapters.dora import MAGNITUDE, SCALE, DoRA
from ..adapters.full import Bias, Full, Replaced
from ..adapters.lora import EMBEDDING, UP_BIAS, LoRA
from ..adapters.padded import RESHAPE
from ..keys.shared import A, B
from .modules import Module

_SHARED = (A, B)  # VeRA's matrices, which every module of a file holds after reading


def stays(module: Module) -> str:
    """Why no LoRA can take the place of what a module does; "" where one can."""
    weight, bias = module.weight, module.parts.get("bias")
    if weight is None:
        return "acts on a bias only"
    if any(name in module.stem.tensors for name in EMBEDDING):
        return "acts on an embedding"
    if isinstance(weight, (Full, Replaced)) and len(weight.shape) < 2:
        return "acts on a norm"
    if bias is not None and not isinstance(bias, (Bias, Replaced)):
        return "changes the bias together with the weight"
    return ""


def as_stored(module: Module) -> dict[str, Tensor]:
    """A module's own tensors by suffix, or those that say by themselves what it does where
    something outside them tells its scale."""
    tensors, told = module.stem.tensors, module.weight
    here = load_parts(tensors).get("weight")
    if told is None or here is None or here.scale == told.scale:
        return dict(tensors)
    if any(name in tensors for name in EMBEDDING):
        return {**tensors, "alpha": torch.tensor(told.alpha)}
    return {**of_bias(module), **told.state()}


def beside(module: Module) -> dict[str, Tensor]:
    """What stays of a module whose weight gets a LoRA of the same scale, if it had one."""
    tensors = module.stem.tensors
    kept = {n: tensors[n] for n in (UP_BIAS, RESHAPE, SCALE, MAGNITUDE) if n in tensors}
    return {**of_bias(module), **kept}


def of_bias(module: Module) -> dict[str, Tensor]:
    """The tensors of a module that act on the bias by themselves."""
    owners = [a for a in ALGORITHMS.values() if a.parameter == "bias"]
    return {s: t for s, t in module.stem.tensors.items() if any(a.owns(s) for a in owners)}


def unturned(algorithm: Algorithm) -> Algorithm:
    """The algorithm whose delta DoRA turns, where the weight decides nothing else about it; else
    ``algorithm``."""
    if isinstance(algorithm, DoRA) and not algorithm.inner.reads_weight:
        return algorithm.inner
    return algorithm


def plain(algorithm: Algorithm) -> LoRA | None:
    """The LoRA that an algorithm is, a Tucker core and an enlarged weight included."""
    inner = getattr(algorithm, "inner", algorithm) if RESHAPE in algorithm.tensors else algorithm
    return inner if isinstance(inner, LoRA) else None


def widest(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that holds the factors among ``tensors`` best; float32 where there are none."""
    found = [t.dtype for n, t in tensors.items() if _is_factor(n, t)]
    made = max(found, key=lambda d: (d.itemsize, -torch.finfo(d).eps), default=torch.float32)
    mixed = {torch.float16, torch.bfloat16} <= set(found) and made.itemsize == 2
    return torch.float32 if mixed else made


def titled(algorithm: Algorithm) -> str:
    """Its title with what is done to it: "LoRA with DoRA"."""
    return " with ".join((algorithm.title, *algorithm.traits))


def _is_factor(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 0 and name not in _SHARED
