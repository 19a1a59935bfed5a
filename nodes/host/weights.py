"""The weights of a MODEL and CLIP, for tools that take a base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.merge.base import Base
from .layers import bare, full, submodules
from .model import index


class _Weights(Mapping[str, Tensor]):
    """As the unpatched model acts, float32 on the CPU, one at each look-up."""

    def __init__(self, model: Any, clip: Any) -> None:
        patchers = [model, *([clip.patcher] if clip is not None else [])]
        self._found = {
            f"{path}.{name}" if path else name: (patcher, module, name)
            for patcher in patchers
            for path, module in submodules(patcher.model).items()
            for name, live in module._parameters.items()
            if live is not None
        }

    def __getitem__(self, key: str) -> Tensor:
        patcher, module, name = self._found[key]
        live = bare(patcher, key, module._parameters[name])
        return full(live, module, torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def base(model: Any, clip: Any = None) -> Base | None:
    """What the tools of the core take for a base model; None without a MODEL."""
    return None if model is None else Base(_Weights(model, clip), index(model, clip))
