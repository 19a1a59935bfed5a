"""Operations of ComfyUI without a backward pass, swapped for ones that have one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy_kitchen
from comfy_kitchen.backends.eager import rope
from torch import Tensor

_ATTENTION = ("optimized_attention", "optimized_attention_masked")
# Rotary embeddings with and without the norm before them. Models check ``in_training`` before most
# of them; Cosmos-Predict2, JoyImage and, for the last, Ernie-Image do not.
_FUSED = (
    "apply_rope", "apply_rope1", "apply_rope_split_half", "apply_rope_split_half1",
    "rms_rope", "rms_rope1", "rms_rope_split_half", "rms_rope_split_half1",
)  # fmt: skip


@contextmanager
def differentiable() -> Iterator[None]:
    """Kernels that have a backward pass, in every model of ComfyUI."""
    with ExitStack() as stack:
        # ComfyUI's own switch from fused to differentiable kernels, which not all models ask.
        stack.enter_context(_swapped(comfy.model_management, "in_training", True))
        # Its backward pass in fp8 would not be the gradient of what runs forward.
        stack.enter_context(_swapped(comfy.model_management, "training_fp8_bwd", False))
        for name in _FUSED:
            if hasattr(comfy_kitchen, name) and hasattr(rope, name):
                stack.enter_context(_swapped(comfy_kitchen, name, getattr(rope, name)))
        for module, name in _attention_users():
            stack.enter_context(_swapped(module, name, attention.attention_pytorch))
        yield


def attention_override(_chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """For ``transformer_options``: in the place of an attention that another node chose."""
    return attention.attention_pytorch(*args, **kwargs)


def _attention_users() -> list[tuple[Any, str]]:
    """Modules that hold the attention function that the command line chose, and its name there."""
    chosen = [getattr(attention, name) for name in _ATTENTION]
    users: list[tuple[Any, str]] = []
    for path, module in list(sys.modules.items()):
        table = getattr(module, "__dict__", {})
        for name in _ATTENTION:
            given = table.get(name)
            own = path.startswith("comfy.") and callable(given)
            if own or any(given is one for one in chosen):
                users.append((module, name))
    return users


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
