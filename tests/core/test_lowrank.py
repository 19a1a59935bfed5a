"""Low-rank approximations against Eckart and Young, and against torch's own SVD."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.lowrank import dense, factored, until


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(out, width, values, seed=0):
    """With the given singular values, float32."""
    g, k = rng(seed), len(values)
    u = torch.linalg.qr(torch.randn(out, k, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(width, k, generator=g, dtype=torch.float64))[0]
    return ((u * torch.as_tensor(values, dtype=torch.float64)) @ v.T).float()


def product(found, rank=None):
    found = found if rank is None else found.cut(rank)
    return (found.u.double() * found.s.double()) @ found.vh.double()


def off(found, m):
    return float((product(found) - m.double()).norm() / m.double().norm())


SPECTRA = {
    "1/i": lambda n: 1 / torch.arange(1, n + 1),
    "flat": lambda n: torch.ones(n),
    "slow": lambda n: torch.arange(1, n + 1) ** -0.75,  # as slow as two iterations may do
    "slower": lambda n: torch.arange(1, n + 1) ** -0.3,
    "steep": lambda n: 0.7 ** torch.arange(n),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(340, 340), (256, 600), (600, 330)])
def test_sketch_is_within_a_thousandth_of_the_best(shape, spectrum):
    """Eckart and Young: no matrix of rank r is nearer than sqrt(sum of the other S^2)."""
    values = SPECTRA[spectrum](min(shape)).double()
    m, rank = matrix(*shape, values), 32
    best = float(values[rank:].norm() / values.norm())
    found = dense(m, rank).cut(rank)
    assert found.s.shape == (rank,) and not found.whole
    assert best - 1e-6 <= off(found, m) <= 1.001 * best + 1e-6
    assert found.error(rank) == pytest.approx(off(found, m), rel=1e-3, abs=1e-6)
    assert found.total == pytest.approx(float(values.norm()), rel=1e-5)
    torch.testing.assert_close(found.s.double(), values[:rank], rtol=6e-2, atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (5, 400), (1, 7), (64, 64)])
def test_exact_is_the_svd(shape):
    m = torch.randn(*shape, generator=rng())
    found, s = dense(m, 0, exact=True), torch.linalg.svdvals(m.double())
    torch.testing.assert_close(found.s.double(), s, rtol=1e-6, atol=1e-7 * float(s[0]))
    assert found.nuclear == pytest.approx(float(s.sum()), rel=1e-6)
    assert found.whole and off(found, m) < 1e-6
    for factor in (found.u.T, found.vh):
        unit = torch.eye(len(factor))
        torch.testing.assert_close(factor @ factor.T, unit, rtol=0, atol=1e-5)


def test_exact_of_a_thin_matrix_has_its_rank():
    """Singular values of zero leave no NaN and no false rank."""
    m = matrix(200, 260, [3.0, 2.0, 1.0])
    found = dense(m, 0, exact=True)
    assert found.rank == 3 and off(found, m) < 1e-6
    assert torch.isfinite(found.vh).all()


def test_tiny_numbers_are_as_good_as_others():
    """Squares of 1e-30 are zero in float32."""
    m = matrix(300, 280, 1 / torch.arange(1, 281)) * 1e-30
    for found in (dense(m, 16), dense(m, 0, exact=True).cut(16)):
        assert off(found, m) == pytest.approx(found.error(16), rel=1e-3)
        assert 0 < found.error(16) < 0.3


def test_the_same_seed_gives_the_same_bits():
    m = torch.randn(300, 280, generator=rng())
    first, again, other = (dense(m, 8, seed=seed).u for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.random.get_rng_state()
    dense(m, 8)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("exact", [False, True])
def test_zeros(exact):
    found = dense(torch.zeros(300, 200), 8, exact=exact)
    assert found.total == found.error(1) == 0.0 and found.rank == 1 and found.whole
    assert not product(found).any() and product(found).shape == (300, 200)


@pytest.mark.parametrize(
    ("out", "width", "ranks"), [(40, 30, [8]), (40, 30, [3, 5, 2]), (12, 50, [8, 9]), (6, 5, [40])]
)
def test_factors_are_decomposed_without_their_product(out, width, ranks):
    """Also where they are wider than the matrix they make."""
    g = rng()
    pairs = [(torch.randn(out, r, generator=g), torch.randn(r, width, generator=g)) for r in ranks]
    whole = sum(u.double() @ d.double() for u, d in pairs)
    found, s = factored(pairs), torch.linalg.svdvals(whole)
    assert off(found, whole) < 1e-6
    k = min(out, width, sum(ranks))
    assert found.s.shape == (k,) and found.whole
    torch.testing.assert_close(found.s.double(), s[:k], rtol=1e-5, atol=1e-5)
    for rank in range(1, k):
        best = float(s[rank:].norm() / s.norm())
        assert found.error(rank) == pytest.approx(best, rel=1e-4, abs=1e-7)


def test_factors_that_cancel_are_of_low_rank():
    up, down = torch.randn(40, 6, generator=rng()), torch.randn(6, 30, generator=rng(1))
    assert factored([(up, down), (up, down)]).rank == 6
    gone, there = factored([(up, down), (-up, down)]), factored([(up, down)])
    assert gone.total < 1e-6 * there.total


def test_factors_of_mixed_dtypes():
    up, down = torch.randn(20, 4, generator=rng()), torch.randn(4, 10, generator=rng(1))
    found = factored([(up.half(), down.bfloat16()), (up.double(), down.double())])
    whole = up.half().double() @ down.bfloat16().double() + up.double() @ down.double()
    assert found.u.dtype == found.s.dtype == found.vh.dtype == torch.float32
    assert off(found, whole) < 1e-6


def test_until_it_is_enough():
    m = matrix(400, 420, 1 / torch.arange(1, 401))
    asked = []

    def enough(found):
        asked.append(len(found.s))
        return found.error(len(found.s)) < 0.1

    found = until(m, enough, start=8)
    assert asked == [8, 16, 32, 64] and len(found.s) == 64
    assert until(m, lambda _: False, start=8).whole


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    m = torch.ones(300, 200)
    m[3, 4] = bad
    with pytest.raises(AdapterLabError, match="not finite: found NaN or infinity"):
        dense(m, 4)
    with pytest.raises(AdapterLabError, match="not finite"):
        factored([(m, torch.ones(200, 5))])
