"""Merging of dense deltas that lets them disagree: TIES and DARE.

Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models" (arXiv 2306.01708),
section 3; Yu et al. 2023, "Language Models are Super Mario" (DARE, arXiv 2311.03099), section 3.
The conventions are those of peft's ``merge_utils``, but for negative ratios: they turn the delta
before signs are elected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import AdapterLabError
from .menus import Sign


def disagreeing(
    method: str, tasks: Sequence[Tensor], ratios: Sequence[float], density: float,
    generator: torch.Generator, sign: Sign = "total",
) -> Tensor:  # fmt: skip
    """The merged delta of one weight.

    ties: of each delta the ``density`` largest values, of these those whose sign has the majority,
    their weighted mean. dare: of each delta a random ``density`` of the values, over density; their
    weighted sum. dare_ties: these random values merged as by ties.

    Args:
        tasks: dW_i, float32, all of one shape. ratios: their weights.
        density: share of values kept, in (0, 1].
        sign: majority by the sum of values ("total") or by their count ("frequency").
    """
    signed = [task if ratio >= 0 else -task for task, ratio in zip(tasks, ratios, strict=True)]
    weights = [abs(ratio) for ratio in ratios]
    if density < 1:
        signed = [
            trimmed(task, density) if method == "ties" else dropped(task, density, generator)
            for task in signed
        ]
    if method == "dare":
        return _sum(signed, weights)
    majority = torch.where(_votes(signed, sign) >= 0, 1.0, -1.0)
    agreeing = [task.sign() == majority for task in signed]
    count = _sum([mask.float() for mask in agreeing], [1.0] * len(agreeing))
    total = _sum([t * m for t, m in zip(signed, agreeing, strict=True)], weights)
    return total.div_(count.clamp_(min=1))


def trimmed(task: Tensor, density: float) -> Tensor:
    """``task`` with the int(density n) values of largest magnitude, zeros elsewhere."""
    flat = task.abs().flatten()
    k = int(density * flat.numel())
    if not k:
        return torch.zeros_like(task)
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    return torch.where(task.abs() >= threshold, task, 0.0)


def dropped(task: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """``task`` with each value kept with probability ``density`` and divided by it, else 0."""
    mask = torch.bernoulli(torch.full_like(task, density), generator=generator)
    return mask.mul_(task).div_(density)


def check_density(density: float) -> None:
    """Raise AdapterLabError unless it is a share of values above 0."""
    if not (math.isfinite(density) and 0 < density <= 1):
        raise AdapterLabError(
            "The density is no share of values", found=f"{density:g}", expected="above 0, up to 1"
        )


def _votes(tasks: Sequence[Tensor], sign: Sign) -> Tensor:
    counted = tasks if sign == "total" else [task.sign() for task in tasks]
    return _sum(counted, [1.0] * len(counted))


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total
