"""Layers in training: all ways through one give the values and gradients of op(x, W + dW)."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_lab.core.adapters import AdapterConfig, Algorithm
from adapter_lab.core.adapters.training import choices, make
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.forms import Dense, Hadamard, Kronecker, NarrowKronecker, Thin
from adapter_lab.core.orthogonal import cayley, skew
from adapter_lab.core.tensors import Op
from adapter_lab.core.train.layer import adapted
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OUT, WIDTH = 32, 24
LAYERS = {
    "linear": ((OUT, WIDTH), Op(), (2, 3, WIDTH)),
    "conv1d": ((OUT, WIDTH, 3), Op(1, padding=1), (2, WIDTH, 5)),
    "conv2d": ((OUT, WIDTH, 3, 3), Op(2, stride=2, padding=1), (2, WIDTH, 5, 4)),
    "conv2d 1x1": ((OUT, WIDTH, 1, 1), Op(2), (2, WIDTH, 3, 4)),
    "grouped": ((OUT, WIDTH // 2, 3, 3), Op(2, padding=1, groups=2), (2, WIDTH, 5, 4)),
}
CONFIGS = {name: AdapterConfig(name, 4, 3.0) for name in choices() if name != "norm"} | {
    "loha, dense": AdapterConfig("loha", 9),
    "lokr, full": AdapterConfig("lokr", full_matrix=True),
    "lokr, narrow": AdapterConfig("lokr", 2, 3.0, factor=2),
    "lokr, both": AdapterConfig("lokr", 1, factor=4, decompose_both=True),
    "loha, tucker": AdapterConfig("loha", 3, tucker=True),
    "lokr, tucker": AdapterConfig("lokr", 2, factor=4, tucker=True),
    "lora, tucker": AdapterConfig("lora", 4, tucker=True),
    "lora, scalar": AdapterConfig("lora", 4, scalar=True),
    "oft, rescale": AdapterConfig("oft", 8, rescale=True, constraint=0.01),
    "boft, rescale": AdapterConfig("boft", 8, rescale=True, constraint=0.01),
    "dora": AdapterConfig("lora", 4, 2.0, dora=True),
    "dora on inputs": AdapterConfig("lora", 4, 2.0, dora=True, dora_on="input"),
    "dora of loha": AdapterConfig("loha", 2, dora=True),
}
WAYS = [
    (plain, biased, mode)
    for plain, biased in itertools.product((True, False), repeat=2)
    for mode in ("auto", "bypass", "rebuild")
]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Frozen:
    def __init__(self, matrix: Tensor, op: Op, bias: Tensor | None, plain: bool = True) -> None:
        self.matrix, self.op, self.bias, self.plain = matrix, op, bias, plain

    def base(self, x: Tensor) -> Tensor:
        return self.with_bias(self.op(x, self.matrix))

    def with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.reshape(-1, *(1,) * self.op.dims)

    def weight(self) -> Tensor:
        return self.matrix


def fresh(config: AdapterConfig, weight: Tensor) -> Algorithm | None:
    """None where the layer has no such adapter."""
    try:
        made = make(weight.shape, config, torch.Generator().manual_seed(0))
    except AdapterLabError as error:
        assert config.algorithm == "tlora" and weight[0, 0].numel() > 1, error
        return None
    return made.started(weight) if made.needs_weight_to_start else made


def trained(algorithm: Algorithm, dtype: torch.dtype = torch.float64) -> Algorithm:
    """As in the midst of training."""
    names = algorithm.trained
    moved = {
        name: t + 0.1 * noise(*t.shape, seed=i) if name in names else t
        for i, (name, t) in enumerate(algorithm.tensors.items())
    }
    return algorithm.on(
        {
            name: t.to(dtype).detach().requires_grad_(name in names)
            if t.is_floating_point() else t
            for name, t in moved.items()
        }
    )  # fmt: skip


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-9)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients(layer: str, name: str) -> None:
    shape, op, size = LAYERS[layer]
    weight, x = noise(*shape), noise(*size).requires_grad_()
    adapter = fresh(CONFIGS[name], weight)
    if adapter is None:
        return
    adapter = trained(adapter)
    factors = list(adapter.trained.values())
    dense = op(x, weight + adapter.delta(weight))
    g = noise(*dense.shape, seed=1)
    want = torch.autograd.grad(dense, [x, *factors], g)
    for plain, biased, mode in WAYS:
        frozen = Frozen(weight, op, noise(OUT) if biased else None, plain)
        y = adapted(adapter, frozen, x, mode)
        assert close(y, frozen.with_bias(dense), 1e-6)
        found = torch.autograd.grad(y, [x, *factors], g)
        assert all(close(a, b, 1e-6) for a, b in zip(found, want, strict=True)), (plain, mode)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_one_changes_no_bit(name: str) -> None:
    for (shape, op, size), biased in itertools.product(LAYERS.values(), (True, False)):
        weight, x = noise(*shape, dtype=torch.float32), noise(*size, dtype=torch.float32)
        bias = noise(OUT, dtype=torch.float32) if biased else None
        adapter = fresh(CONFIGS[name], weight)
        frozen = Frozen(weight, op, bias)
        if adapter is not None:
            assert torch.equal(adapted(adapter, frozen, x, "bypass"), frozen.base(x))


@pytest.mark.parametrize("mode", ("bypass", "rebuild"))
@pytest.mark.parametrize("name", CONFIGS)
def test_its_output_may_be_changed_in_place(name: str, mode: str) -> None:
    """As models do with their residuals."""
    for shape, op, size in LAYERS.values():
        weight, x = noise(*shape), noise(*size).requires_grad_()
        adapter = fresh(CONFIGS[name], weight)
        if adapter is None:
            continue
        adapter, frozen = trained(adapter), Frozen(weight, op, noise(OUT))
        leaves = [x, *adapter.trained.values()]
        for plain in (True, False):
            frozen.plain = plain
            want = torch.autograd.grad((adapted(adapter, frozen, x, mode) * 2).sum(), leaves)
            found = torch.autograd.grad(adapted(adapter, frozen, x, mode).mul_(2).sum(), leaves)
            assert all(close(a, b, 1e-12) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_sixteen_bits(name: str) -> None:
    """As exact as the dtype of the layer, also where dW is too small to be seen in W + dW."""
    shape, op, size = LAYERS["linear"]
    weight, half = noise(*shape), torch.bfloat16
    adapter = trained(fresh(CONFIGS[name], weight), torch.float32)
    x = noise(*size).to(half).requires_grad_()
    frozen = Frozen(weight.to(half), op, None)
    y = adapted(adapter, frozen, x)
    g = noise(*y.shape, seed=1)
    factors = list(adapter.trained.values())
    found = torch.autograd.grad(y, [x, *factors], g.to(half))
    assert y.dtype == found[0].dtype == half
    assert all(t.dtype == torch.float32 for t in found[1:])
    given = x.detach().double().requires_grad_()
    exact = adapter.on({n: t.double() for n, t in adapter.tensors.items()})
    wide = weight.to(half).double()
    dense = op(given, wide + exact.delta(wide))
    leaves = [exact.tensors[n] for n in adapter.trained]
    want = torch.autograd.grad(dense, [given, *leaves], g)
    assert close(y.double(), dense, 0.02)
    assert all(close(a.double(), b, 0.03) for a, b in zip(found, want, strict=True))


def test_small_deltas_are_not_rounded_away_in_sixteen_bits() -> None:
    matrix = torch.ones(64, 64, dtype=torch.bfloat16)
    x = torch.zeros(4096, 64, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1, -1  # W x is 0
    delta = torch.zeros(64, 64)
    delta[:, 0] = 1e-3  # less than half a bit of W
    adapter = trained(fresh(AdapterConfig("full"), matrix), torch.float32)
    adapter = adapter.on({"diff": delta.requires_grad_()})
    frozen = Frozen(matrix, Op(), None)
    assert close(adapted(adapter, frozen, x), torch.full((4096, 64), 1e-3), 0.01)
    assert not adapted(adapter, frozen, x, "rebuild").any()


@pytest.mark.parametrize("name", CONFIGS)
def test_under_checkpointing_and_without_gradients(name: str) -> None:
    shape, op, size = LAYERS["linear"]
    weight, x = noise(*shape), noise(*size).requires_grad_()
    adapter = trained(fresh(CONFIGS[name], weight))
    frozen = Frozen(weight, op, noise(OUT))
    leaves = [x, *adapter.trained.values()]

    def run(x: Tensor) -> Tensor:
        return adapted(adapter, frozen, x).tanh()

    y = run(x)
    want = torch.autograd.grad(y.sum(), leaves)
    again = checkpoint(run, x, use_reentrant=False)
    found = torch.autograd.grad(again.sum(), leaves)
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with torch.no_grad():
        assert close(run(x), y, 1e-9)
    # The first layer of a model: nothing before it wants a gradient.
    first = torch.autograd.grad(run(x.detach()).sum(), leaves[1:])
    assert all(torch.equal(a, b) for a, b in zip(first, want[1:], strict=True))


@pytest.mark.parametrize(
    "form, sizes",
    [
        (Thin, ((6, 2), (2, 5))),
        (Dense, ((6, 5),)),
        (Hadamard, ((6, 1), (1, 5), (6, 2), (2, 5))),
        (Hadamard, ((6, 3), (3, 5), (6, 3), (3, 5))),
        (Kronecker, ((3, 2), (2, 4))),
        (Kronecker, ((6, 2), (1, 4))),
        (NarrowKronecker, ((3, 2), (2, 1), (1, 4))),
    ],
)
@pytest.mark.parametrize("mode", ("bypass", "rebuild", "beside"))
def test_gradients_by_central_differences(form: type, sizes: tuple, mode: str) -> None:
    tensors = [noise(*size, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    out, width = form(*tensors).shape
    x, frozen = noise(3, width).requires_grad_(), Frozen(noise(out, width), Op(), noise(out))

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        made = form(*tensors, scale=0.7)
        return made.beside(x) if mode == "beside" else made.adapted(frozen, x, mode)

    assert torch.autograd.gradcheck(run, (x, *tensors))


def test_rebuilds_where_that_is_cheaper() -> None:
    def cheaper(form, tokens: int) -> str:
        bypass, rebuild = form.cost(tokens)
        return "bypass" if bypass <= rebuild else "rebuild"

    n = 1024
    thin = Thin(torch.empty(n, 16, device="meta"), torch.empty(16, n, device="meta"))
    assert cheaper(thin, 256) == "bypass"
    halves = [torch.empty(s, device="meta") for s in ((n, 64), (64, n)) * 2]
    assert cheaper(Hadamard(*halves), 256) == cheaper(Hadamard(*halves), 4096) == "rebuild"
    narrow = [torch.empty(s, device="meta") for s in ((n, 4), (4, n)) * 2]
    assert cheaper(Hadamard(*narrow), 256) == "bypass"
    kron = Kronecker(*torch.empty(2, 32, 32, device="meta"))
    assert cheaper(kron, 64) == "bypass" and cheaper(kron, 4096) == "rebuild"
    assert cheaper(Dense(torch.empty(n, n, device="meta")), 4096) == "rebuild"


@pytest.mark.parametrize("size", (1e-3, 0.01, 0.05, 0.3, 3.0))
def test_small_rotations_in_float32_are_those_of_a_solver(size: float) -> None:
    q = skew(noise(2, 5, 16, 16) * size)
    eye = torch.eye(16, dtype=torch.float64)
    want = torch.linalg.solve(eye - q, eye + q) - eye
    assert (cayley(q.float()) - want).abs().max() <= 2e-6 * want.abs().max()
    small = skew(noise(2, 4, 4) * size).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: cayley(skew(b)), (small,))
