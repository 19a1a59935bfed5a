"""Other values for parameters that no patch of ComfyUI reaches or whose strength changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor

from .parts import Part, merged

_OWNER = "adapter_lab_owner"  # on a parameter that stands in for another: its Value


def is_patchable(module: nn.Module, name: str) -> bool:
    """Whether ComfyUI merges patches into this parameter wherever it keeps the model.

    It never does beside child modules that have parameters (Wan's ``blocks.0.modulation``) and,
    with dynamic VRAM, in modules that it does not cast.
    """
    if name not in ("weight", "bias") or not hasattr(module, "comfy_cast_weights"):
        return False
    return not any(True for child in module.children() for _ in child.parameters())


class _Kept(NamedTuple):
    """What ComfyUI wants to know of a parameter that something stands in for."""

    weight: Any
    inplace_update: bool = False


class Value:
    """The merged value of one parameter, in its place until ``remove``.

    Above that of another clone it is in its place, and gives the place back. Meanwhile the original
    is in the backup that all clones share, where those look who read a model without its patches.
    """

    def __init__(self, patcher: Any, parts: Sequence[Part]) -> None:
        self.table, self.name = parts[0].module(patcher.model)._parameters, parts[0].name
        given: Any = self.table[self.name]
        self.below: Value | None = vars(given).get(_OWNER)
        self.original: Any = original(given)
        self.value = nn.Parameter(merged(self.original, parts), requires_grad=False)
        vars(self.value)[_OWNER] = self
        self.is_active = True
        self.table[self.name] = self.value
        self.backup, self.key = patcher.backup, parts[0].key
        self.kept = self.below.kept if self.below else _Kept(self.original)
        self.backup.setdefault(self.key, self.kept)

    def remove(self) -> None:
        """Restore what was there, unless others took the place since."""
        self.is_active = False
        if self.table[self.name] is not self.value:
            return
        below = self.below
        while below and not below.is_active:
            below = below.below
        self.table[self.name] = below.value if below else self.original
        if not below and self.backup.get(self.key) is self.kept:
            del self.backup[self.key]


def original(parameter: Any) -> Any:
    """The parameter that ``parameter`` stands in for."""
    owner: Value | None = vars(parameter).get(_OWNER)
    return owner.original if owner else parameter


@contextmanager
def replaced(model: nn.Module, parts: Sequence[Part], progress: float) -> Iterator[None]:
    """One parameter at the strengths of ``progress``, whether ComfyUI casts it for use or not."""
    module, name = parts[0].module(model), parts[0].name
    if is_patchable(module, name):
        # Where the weight itself is kept elsewhere, the cast one passes through these.
        table, name = vars(module), f"{name}_function"
        functions = getattr(module, name)

        def at_use(weight: Tensor) -> Tensor:
            return merged(weight, parts, progress)

        value: Any = [*functions, at_use]
    else:
        table = module._parameters
        value = nn.Parameter(merged(original(table[name]), parts, progress), requires_grad=False)
    is_own, before = name in table, table.get(name)
    table[name] = value
    try:
        yield
    finally:
        if is_own:
            table[name] = before
        else:
            del table[name]
