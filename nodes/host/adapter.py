"""Algorithms of ours merged into the weights of a model, by ComfyUI when it loads the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...core.adapters import Algorithm, merge_part
from ...core.adapters.padded import RESHAPE
from ...core.errors import AdapterLabError
from .parts import Part


class AdapterPatch(WeightAdapterBase):
    """Weight patch of one adapter module.

    Dynamic VRAM rebuilds a patch as ``type(patch)(loaded_keys, moved_weights)`` and moves only
    tensors in nested tuples, so all state lives in ``weights`` = (algorithm, its tensors in
    order, factor on the strength) and nothing on the instance.
    """

    name = "adapter_lab"

    weights: tuple[Algorithm, tuple[Tensor, ...], float]  # pyright: ignore

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, algorithm: Algorithm, factor: float = 1.0) -> AdapterPatch:
        """The patch that adds ``algorithm``'s delta, at ``factor`` times the patch's strength."""
        return cls(set(algorithm.tensors), (algorithm, tuple(algorithm.tensors.values()), factor))

    def calculate_shape(self, key: str) -> tuple[int, ...] | None:
        """The shape of the patched weight, None where it stays."""
        sizes = self.weights[0].tensors.get(RESHAPE)
        return None if sizes is None else tuple(sizes.tolist())

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
        algorithm, tensors, factor = self.weights
        moved = (t.to(weight.device, non_blocking=True) for t in tensors)
        placed = algorithm.on(dict(zip(algorithm.tensors, moved, strict=True)))
        placed = placed.at(strength * factor)
        if weight.dtype == torch.float32:
            return merge_part(placed, weight)
        done = merge_part(placed, weight.to(torch.float32))
        return weight.copy_(done) if done.shape == weight.shape else done.to(weight.dtype)


def merge(patcher: Any, parts: Iterable[Part]) -> None:
    """Let ComfyUI merge ``parts`` into the weights of a clone; all of them patchable."""
    rounds: list[dict[Any, AdapterPatch]] = []
    for part in parts:
        key = part.key if part.slice is None else (part.key, tuple(part.slice))
        # Two modules of a file may end on the same rows: a dict holds only one patch per key.
        free = next((r for r in rounds if key not in r), None)
        if free is None:
            rounds.append(free := {})
        free[key] = AdapterPatch.of(part.algorithm, part.at(0))
    for patches in rounds:
        if missing := set(patches) - set(patcher.add_patches(patches)):
            raise AdapterLabError("ComfyUI refused patches", found=", ".join(map(str, missing)))
