"""An algorithm of ours as a patch that ComfyUI applies to a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...core.adapters import ALGORITHMS, Algorithm


class AdapterPatch(WeightAdapterBase):
    """Weight patch of one adapter module.

    Dynamic VRAM rebuilds a patch as ``type(patch)(loaded_keys, moved_weights)`` and moves only
    tensors in nested tuples, so all state lives in ``weights`` = (algorithm, scale, ((suffix,
    tensor), ...)) and nothing on the instance.
    """

    name = "adapter_lab"

    weights: tuple[str, float, tuple[tuple[str, Tensor], ...]]  # pyright: ignore

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, algorithm: Algorithm) -> AdapterPatch:
        """The patch that adds ``algorithm``'s delta."""
        tensors = tuple(algorithm.tensors.items())
        return cls(set(algorithm.tensors), (algorithm.name, algorithm.scale, tensors))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple[int, int, int] | None,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """``weight`` (private to this call, already narrowed to the row slice), changed in place:
        for a slice the host ignores what is returned."""
        name, scale, tensors = self.weights
        moved = {suffix: t.to(weight.device, non_blocking=True) for suffix, t in tensors}
        delta = ALGORITHMS[name](moved, scale).delta(weight)
        return weight.add_(function(delta), alpha=strength)
