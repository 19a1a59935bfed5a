"""Blocks of a model whose activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]
Bound = Callable[[Forward], Forward]


@contextmanager
def checkpointed(
    module: nn.Module, bound: Bound, run: Forward | None = None, offload: bool = False
) -> Iterator[None]:
    """Recompute ``module`` in the backward pass instead of keeping its activations.

    Args:
        bound: a function -> the same under what adapters draw now, whenever it is called.
        run: what to call for its forward (a compiled one); the module's own without it.
        offload: the inputs of the block wait in the memory of the CPU.

    Reference: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    inner: Forward = run or module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return _recomputed(bound(inner), args, kwargs, offload)

    with standing_in(module, forward):
        yield


def _recomputed(
    inner: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], offload: bool
) -> Any:
    leaves, layout = tree_flatten((*args, *kwargs.values()), is_leaf=_is_options)
    # Some models write into their options as they go; the recomputation must see them as now.
    leaves = [dict(leaf) if isinstance(leaf, dict) else leaf for leaf in leaves]
    # Only what is given as an argument of its own can wait elsewhere. What needs no gradient is
    # the same for all blocks, and stays.
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    inputs = [leaves[i] for i in moving]
    for i in moving:
        leaves[i] = None

    # The recomputation must not hold on to the inputs themselves.
    count, names = len(args), tuple(kwargs)

    def again(*tensors: Tensor) -> Any:
        given = list(leaves)
        for i, tensor in zip(moving, tensors, strict=True):
            given[i] = tensor
        values = tree_unflatten([_own(leaf) for leaf in given], layout)
        return inner(*values[:count], **dict(zip(names, values[count:], strict=True)))

    with _elsewhere() if offload else nullcontext():
        return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False)


def _own(leaf: Any) -> Any:
    """What a block may change: it may add in place to its inputs, or write into its options."""
    if isinstance(leaf, dict):
        return dict(leaf)
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _is_options(leaf: Any) -> bool:
    return isinstance(leaf, dict)


def _elsewhere() -> AbstractContextManager[Any]:
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


@contextmanager
def standing_in(module: Any, forward: Forward) -> Iterator[None]:
    """``forward`` in the place of the module's own."""
    own, before = "forward" in vars(module), vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = before
        else:
            del module.forward
