"""Parameters of a loaded model as ordinary tensors, on the same memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...core.errors import AdapterLabError
from .frozen import cast
from .layers import dims
from .model import DIFFUSION


@contextmanager
def plain_tensors(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Replace inference tensors by ordinary ones on the same memory, of all modules: parameters,
    buffers and what forward passes keep for the next one, as rotary embeddings.

    What is neither a layer nor an embedding (the weights of norms) is brought to ``device``: it is
    small, and autograd may keep it, which it can't where the host streams it through a buffer.
    """
    swapped: list[tuple[dict[str, Any], str, Any, Any]] = []  # of a table, by name: before, now
    try:
        for path, module in model.named_modules():
            is_layer = dims(module) is not None
            small = not is_layer and not isinstance(module, nn.Embedding)
            if small and hasattr(module, "_v"):
                used = _as_used(module, device)
                swapped += [(module._parameters, n, module._parameters[n], used[n]) for n in used]
                module._parameters.update(used)
            tables: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
            for table in tables:
                for name, tensor in table.items():
                    if not isinstance(tensor, Tensor) or tensor.is_meta:
                        continue
                    if is_layer and not _is_known(tensor):
                        continue  # the layer is asked for its weight when that is needed
                    away = small and tensor.device != device and table is module._parameters
                    if away or tensor.is_inference():
                        now = _plain(tensor, f"{path}.{name}", device if away else None)
                        swapped.append((table, name, tensor, now))
                        table[name] = now
        yield
    finally:
        for table, name, before, now in reversed(swapped):
            # What a forward pass has put in its place since is of the size that it knows of.
            if table.get(name) is now:
                table[name] = before


def _as_used(module: Any, device: torch.device) -> dict[str, nn.Parameter]:
    """Copies of the parameters of a norm under dynamic VRAM, with what is merged into them."""
    if module._parameters.get("weight") is None:
        return {}
    with cast(module, module.weight.dtype, device) as pair:
        named = zip(("weight", "bias"), pair, strict=True)
        kept = {n: t.clone() for n, t in named if t is not None}
    return {n: nn.Parameter(t, requires_grad=False) for n, t in kept.items()}


def _is_known(tensor: Any) -> bool:
    plain = type(tensor.data) is Tensor or type(tensor) in (Tensor, nn.Parameter)
    return plain or isinstance(tensor, QuantizedTensor)


def _plain(tensor: Tensor, name: str, device: torch.device | None) -> Tensor:
    plain = _alias(tensor, name) if tensor.is_inference() else tensor.detach()
    plain = plain if device is None else plain.to(device)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(plain, requires_grad=False) if is_parameter else plain


def _alias(tensor: Any, name: str) -> Tensor:
    if isinstance(tensor, QuantizedTensor):
        params: Any = tensor._params
        parts = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
        aliases = {n: _alias(t, name) for n, t in parts.items() if isinstance(t, Tensor)}
        data = _alias(tensor._qdata, name)
        return QuantizedTensor(data, tensor._layout_cls, dataclasses.replace(params, **aliases))
    if not _is_known(tensor):
        raise AdapterLabError(
            f"Training on this model is not supported: '{name.removeprefix(DIFFUSION)}'",
            found=f"a {type(tensor).__name__} weight",
            expected="weights in bf16, fp16, fp32 or a quantised format of ComfyUI",
            fix="Load the model without the nodes that quantise it in a format of their own",
        )
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return plain
