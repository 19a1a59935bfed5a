"""How much memory the algorithms that are trained take beside their weight."""

from __future__ import annotations

import weakref

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig, load
from adapter_lab.core.tensors import Op
from saved import kept
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TRAINED = ["lora", "loha", "lokr"]


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, made.numel())
        return result


@pytest.fixture
def one_thread():
    """Blocks that stay in the cache are one to a thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [{}, {"factor": 8}, {"full_matrix": True, "factor": 128}])
@pytest.mark.parametrize("algorithm", TRAINED)
def test_merging_makes_no_dense_delta(algorithm: str, options: dict) -> None:
    weight, config = torch.zeros(1024, 1024), AdapterConfig(algorithm, rank=4, **options)
    adapter = ALGORITHMS[algorithm].init(weight.shape, config, rng())
    with Largest() as merged:
        adapter.at(0.5).merge(weight)
    assert 0 < merged.numel <= 2 * 98304 < weight.numel() / 4
    with Largest() as dense:
        adapter.delta(weight)
    assert dense.numel >= weight.numel()


@pytest.mark.parametrize("algorithm", TRAINED)
def test_no_dense_delta_is_kept_for_backward(algorithm: str) -> None:
    config, weight, x = AdapterConfig(rank=2), torch.zeros(256, 256), torch.randn(4, 256)
    x.requires_grad_()  # as between layers, where a dense delta would be kept for it
    adapter = ALGORITHMS[algorithm].init(weight.shape, config, rng())
    for t in adapter.tensors.values():
        t.requires_grad_()
    dense = weight.nbytes
    own = adapter.tensors.values()
    assert kept(lambda: adapter.delta(weight), own) < dense / 8
    assert kept(lambda: adapter.bypass(x, Op(), weight), own) < dense / 8


class Dense(TorchDispatchMode):
    """How many tensors of a size or more are alive at once, among those that are made."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.most = numel, 0
        self.alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            is_new = isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known
            if is_new and made.numel() >= self.numel:
                self.alive[id(made)] = made
                self.most = max(self.most, len(self.alive))
        return result


def test_merging_glora_of_peft_makes_two_dense_matrices_at_most() -> None:
    n = 128
    paths = {f"glora_{p}.Xd": torch.randn(n, 4) for p in "AB"}
    adapter = load({**paths, **{f"glora_{p}.Xu": torch.randn(4, n) for p in "AB"}})
    weight = torch.randn(n, n)
    with Dense(n * n) as merging:
        adapter.merge(weight)
    assert 0 < merging.most <= 2
    with Dense(n * n) as dense:
        adapter.delta(weight)
    assert dense.most > merging.most
