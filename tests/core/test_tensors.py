"""The pure tensor functions against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_lab.core.tensors import factorization, hadamard, khatri_rao, kron, tucker
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
