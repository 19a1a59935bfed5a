"""What autograd keeps between forward and backward, exactly, by its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept(run: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Bytes that ``run`` keeps, each storage once; ``own`` are there without it and get gradients
    where they are trained."""
    leaves = list(own)
    known = {t.untyped_storage().data_ptr() for t in leaves}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    y.sum().backward()
    assert all(t.grad is not None for t in leaves if t.requires_grad)
    return sum(found.values())
