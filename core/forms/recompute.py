"""A function of tensors of which only the arguments are kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        pairs = zip(ctx.saved_tensors, wanted, strict=True)
        given = [t.detach().requires_grad_(want) for t, want in pairs]
        with torch.enable_grad():
            result = ctx.run(*given)
        leaves = [t for t in given if t.requires_grad]
        found = iter(torch.autograd.grad(result, leaves, grads, allow_unused=True))
        return (None, *(next(found) if want else None for want in wanted))


def recomputed(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``run(*tensors)``, run once more in the backward pass instead of keeping what it made.

    ``run`` must reach every tensor that wants a gradient by its arguments, use each of them and
    draw nothing at random.
    """
    return _Recomputed.apply(run, *tensors)
