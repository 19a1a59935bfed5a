"""The repeated blocks of a model: what is checkpointed and compiled one by one."""

from __future__ import annotations

import re
from typing import Any

import torch.nn as nn

from ...core.archs import ArchSpec
from .layers import dims


def blocks(model: Any, arch: ArchSpec | None) -> list[str]:
    """The repeated blocks of the model, in its order; of an architecture that is not known the
    members of its outermost lists of one class."""
    network = model.model.diffusion_model
    names = [name for name, _ in network.named_modules()]
    if arch is not None and arch.blocks:
        return [name for name in names if any(re.fullmatch(block, name) for block in arch.blocks)]
    found: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{f}.") for f in found):
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and dims(module[0]) is None and _has_weights(module):
                found += [f"{name}.{child}" for child in module._modules]
    return found


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
