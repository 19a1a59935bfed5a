"""A model that computes in another dtype than its own, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def computing_in(dtype: torch.dtype, model: Any) -> Iterator[None]:
    """Activations of ``model``, a ``BaseModel``, in ``dtype``; its weights stay as they are.

    As ComfyUI does it for weights that a device cannot compute with: each layer casts its own.
    """
    before, casting = model.manual_cast_dtype, []
    try:
        model.manual_cast_dtype = dtype
        for module in model.diffusion_model.modules():
            if hasattr(module, "comfy_cast_weights"):
                table = vars(module)
                casting.append((table, table.get("comfy_cast_weights")))
                module.comfy_cast_weights = True
        yield
    finally:
        model.manual_cast_dtype = before
        for table, value in casting:
            if value is None:
                del table["comfy_cast_weights"]
            else:
                table["comfy_cast_weights"] = value
