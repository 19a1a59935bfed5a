"""The pure tensor functions against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_lab.core.tensors import (
    add_hadamard,
    add_kron,
    factorization,
    hadamard,
    khatri_rao,
    kron,
    rows_of,
    tucker,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    "n, factor, pair",
    [
        (128, -1, (8, 16)), (512, -1, (16, 32)), (1024, -1, (32, 32)), (1280, -1, (32, 40)),
        (3072, -1, (48, 64)), (5120, -1, (64, 80)), (127, -1, (1, 127)), (360, -1, (18, 20)),
        (512, 4, (4, 128)), (3072, 8, (8, 384)), (512, 7, (4, 128)), (512, 256, (2, 256)),
        (1, -1, (1, 1)), (6, 0, (1, 6)),
    ],
)  # fmt: skip
def test_factorization_values(n: int, factor: int, pair: tuple[int, int]) -> None:
    assert factorization(n, factor) == pair


@given(st.integers(1, 20000), st.integers(-2, 300))
def test_factorization_is_the_most_balanced_pair_allowed(n: int, factor: int) -> None:
    m, rest = factorization(n, factor)
    assert m * rest == n and m <= rest
    if factor > 0 and n % factor == 0:
        assert factor in (m, rest)
        return
    allowed = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0 and (factor < 0 or i <= factor)]
    assert m == max(allowed, default=1)


def test_tensor_functions() -> None:
    a, b, c, d = (torch.randn(s, generator=rng()) for s in ((5, 2), (2, 4), (5, 3), (3, 4)))
    assert torch.equal(hadamard(a, b, c, d), (a @ b) * (c @ d))
    assert error(khatri_rao(a, c) @ khatri_rao(b.T, d.T).T, (a @ b) * (c @ d)) < 1e-6
    assert torch.equal(kron(a, d), torch.kron(a, d))
    core = torch.randn(2, 3, 1, 2, generator=rng())
    want = torch.einsum("op,pqxy,qi->oixy", a, core, d)
    assert error(tucker(core, a, d), want) < 1e-6


sizes = st.integers(1, 40)


@given(st.integers(1, 9), st.integers(1, 9), sizes, sizes, st.integers(0, 3))
def test_adding_in_place_is_adding(a: int, b: int, c: int, d: int, beside: int) -> None:
    w1, w2 = torch.randn(a, b, generator=rng()), torch.randn(c, d, generator=rng())
    whole = torch.randn(a * c, b * d + beside, generator=rng())
    rows, before = whole[:, : b * d], whole.clone()
    product = torch.kron(w1, w2)
    add_kron(rows, w1, w2)
    assert torch.allclose(rows, before[:, : b * d] + product, atol=1e-5)
    left, right = (
        torch.randn(2, a * c, 3, generator=rng()),
        torch.randn(2, 3, b * d, generator=rng()),
    )
    whole.copy_(before)
    add_hadamard(rows, left[0], right[0], left[1], right[1])
    product = (left[0] @ right[0]) * (left[1] @ right[1])
    assert torch.allclose(rows, before[:, : b * d] + product, atol=1e-4)
    assert torch.equal(whole[:, b * d :], before[:, b * d :])


def test_a_hadamard_product_of_many_blocks() -> None:
    rows = torch.zeros(1000, 1500)
    factors = [torch.randn(s, generator=rng()) for s in ((1000, 2), (2, 1500)) * 2]
    add_hadamard(rows, *factors)
    assert error(rows, hadamard(*factors)) < 1e-6


def test_rows_share_memory_or_are_refused() -> None:
    weight = torch.zeros(6, 4, 3, 3)
    for part in (weight, weight[1:3], weight[:, 1:3], weight[::2]):
        rows = rows_of(part)
        assert rows is not None and rows.shape == (len(part), part[0].numel())
        assert rows.data_ptr() == part.data_ptr()
    last = weight.to(memory_format=torch.channels_last)
    for part in (last, weight[:, ::2], weight[..., :2], torch.zeros(3)):
        assert rows_of(part) is None
