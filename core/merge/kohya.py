"""The numbers of sd-scripts' merging tools, for those who need files to come out the same.

None of them is the sum of the deltas. ``merge_lora`` adds factors, which adds products of one
file's up with another's down, and multiplies both factors by the ratio, which squares it. With
``--concat`` only the square is left, at a scale that falls as ranks are added up.
``svd_merge_lora`` adds deltas and then cuts off the largest hundredth of the factors' values.

Reference: kohya-ss/sd-scripts 48d368fa, ``networks/merge_lora.py``, ``networks/svd_merge_lora.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.lora import DOWN, MID, UP, LoRA
from ..errors import AdapterLabError
from .modules import Module

CLAMP_QUANTILE = 0.99
FAULTS = {
    "kohya": "The numbers are those of sd-scripts' merge_lora, not the sum of the adapters: each "
    "ratio acts squared, and ups of one adapter meet downs of another",
    "kohya concat": "The numbers are those of sd-scripts' merge_lora --concat, not the sum of the "
    "adapters: each ratio acts squared, at a scale that falls with the number of adapters",
    "kohya svd": "The numbers are those of sd-scripts' svd_merge_lora: the largest values of the "
    "factors are cut off, which costs accuracy",
}
Member = tuple[Module, float]


def check_lora(module: Module) -> None:
    """Raise AdapterLabError for what sd-scripts' tools do not merge."""
    if type(module.weight) is not LoRA or len(module.parts) > 1:
        title = next((part.title for part in module.parts.values()), "nothing")
        traits = module.weight.traits if module.weight else ()
        raise AdapterLabError(
            f"sd-scripts merges plain LoRA only, '{module.name}' is something else",
            found=" with ".join((title, *traits)), fix="Choose another method",
        )  # fmt: skip


def added(members: Sequence[Member], *, concat: bool) -> dict[str, Tensor]:
    """Factors times c = ratio sqrt(alpha / base alpha), up times \\|c\\|, added or side by side.

    Base alpha is that of the first adapter with the module, and of the result.

    Raises:
        AdapterLabError: no LoRA, ranks that differ, alphas without a square root.
    """
    base = _alpha(members[0][0])
    found: dict[str, Tensor] = {}
    for module, ratio in members:
        check_lora(module)
        alpha = _alpha(module)
        if not base or alpha / base < 0:
            raise AdapterLabError(
                "sd-scripts cannot merge these alphas", found=f"{alpha:g} and {base:g}"
            )
        scale = math.sqrt(alpha / base) * ratio
        for suffix in (UP, DOWN, MID):
            if suffix not in module.stem.tensors:
                continue
            tensor = module.stem.tensors[suffix].float()
            scaled = tensor * (abs(scale) if suffix == UP else scale)
            found[suffix] = _joined(found.get(suffix), scaled, suffix, concat=concat)
    return {**found, "alpha": torch.tensor(base)}


def _joined(known: Tensor | None, more: Tensor, suffix: str, *, concat: bool) -> Tensor:
    if known is None:
        return more
    if concat and suffix != MID:
        return torch.cat([known, more], 1 if suffix == UP else 0)
    if known.shape != more.shape:
        raise AdapterLabError(
            "sd-scripts adds factors of one shape only",
            found=f"{suffix} {tuple(known.shape)} and {tuple(more.shape)}",
            fix="Choose another method",
        )
    return known + more


def decomposed(
    members: Sequence[Member], rank: int, conv_rank: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Factors U S and V^T of the sum of the deltas, clamped; and the sum (out, in * prod(k)).

    Both are cut to +/- q, q being the 0.99 quantile of all their values, signs included. Those
    depend on the signs that LAPACK gives singular vectors, so the decomposition is the same one.

    Args:
        conv_rank: of convolutions of k x k; 0: as ``rank``.
    """
    total = _sum(members)
    out, width, *k = total.shape
    kernel = math.prod(k) > 1
    matrix = total.flatten(1)
    kept = min((kernel and conv_rank) or rank, width, out)
    linalg: Any = torch.linalg  # torch's stubs leave it open
    found: tuple[Tensor, Tensor, Tensor] = linalg.svd(matrix, full_matrices=False)
    u, s, vh = found
    up, down = u[:, :kept] @ torch.diag(s[:kept]), vh[:kept]
    edge = torch.quantile(torch.cat([up.flatten(), down.flatten()]), CLAMP_QUANTILE)
    up, down = up.clamp(-edge, edge), down.clamp(-edge, edge)
    made = {
        UP: up.reshape(out, kept, *(1 for _ in k)), DOWN: down.reshape(kept, width, *k),
        "alpha": torch.tensor(float(kept)),
    }  # fmt: skip
    return made, matrix


def _sum(members: Sequence[Member]) -> Tensor:
    total: Tensor | None = None
    for module, ratio in members:
        check_lora(module)
        tensors = module.stem.tensors
        up, down = tensors[UP].float(), tensors[DOWN].float()
        scale = torch.tensor(_alpha(module)) / len(down)
        if down.ndim == 2:
            delta = ratio * (up @ down) * scale
        elif math.prod(down.shape[2:]) == 1:
            delta = (ratio * (up.flatten(1) @ down.flatten(1))).reshape(-1, *down.shape[1:]) * scale
        else:
            across = F.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
            delta = ratio * across * scale
        if total is not None and total.shape != delta.shape:
            found = f"{tuple(total.shape)} and {tuple(delta.shape)}"
            raise AdapterLabError("Deltas of different shapes cannot be added", found=found)
        total = delta if total is None else total + delta
    assert total is not None
    return total


def _alpha(module: Module) -> float:
    """As the file has it, else the rank."""
    alpha = module.stem.tensors.get("alpha")
    return float(len(module.stem.tensors[DOWN])) if alpha is None else float(alpha.item())
