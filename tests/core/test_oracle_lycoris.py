"""Against LyCORIS as it trains: its forward is the truth (its merge scales LoHa and LoKr twice)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from adapter_lab.core.adapters import load
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op, factorization
from hypothesis import assume, given
from hypothesis import strategies as st
from lycoris.functional import factorization as lycoris_factorization
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

TOLERANCE = 1e-5

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "conv1d": (lambda: nn.Conv1d(12, 20, 3, stride=2, padding=1), (2, 12, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 40, 1), (2, 24, 4, 4)),
    "conv2d 3x3": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=2, dilation=2), (2, 12, 9, 8)),
    "grouped": (lambda: nn.Conv2d(24, 40, 3, padding=1, groups=2), (2, 24, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(12, 20, (1, 3, 3), padding=(0, 1, 1)), (2, 12, 2, 5, 4)),
}
ANY = [
    {},
    {"alpha": 0.7},
    {"lora_dim": 2, "alpha": 3},
    {"alpha": 8, "rs_lora": True},
    {"alpha": 2, "use_scalar": True},
    {"use_tucker": True},
    {"use_tucker": True, "lora_dim": 5, "alpha": 2, "rs_lora": True, "use_scalar": True},
    {"lora_dim": 64, "alpha": 16},
]
KRON = [
    {"decompose_both": True, "lora_dim": 1, "alpha": 0.5},
    {"decompose_both": True, "lora_dim": 1, "use_tucker": True, "use_scalar": True},
    {"decompose_both": True, "lora_dim": 2, "alpha": 7, "factor": 4, "rs_lora": True},
    {"factor": 2, "alpha": 0.5},
    {"factor": 2, "alpha": 0.5, "lora_dim": 2, "use_tucker": True},
    {"full_matrix": True, "alpha": 0.5},
    {"full_matrix": True, "use_scalar": True},
    {"unbalanced_factorization": True},
]
OPTIONS = {LoConModule: ANY, LohaModule: ANY, LokrModule: ANY + KRON}
CASES = [
    pytest.param(kind, layer, options, id=f"{kind.name}-{layer}-{options}")
    for kind, all_options in OPTIONS.items()
    for layer, options in itertools.product(LAYERS, all_options)
]


def randomise(module: LycorisBaseModule) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


def op_of(layer: nn.Module) -> Op:
    if isinstance(layer, nn.Linear):
        return Op()
    dims = layer.weight.ndim - 2
    return Op(dims, layer.stride, layer.padding, layer.dilation, layer.groups)


def effect_error(forward: Tensor, layer: nn.Module, ours: Tensor, effect: Tensor) -> float:
    """Relative to what the adapter does, not to the output."""
    assert effect.norm() > 0.02 * forward.norm(), "an effect too small to judge by"
    return float((ours - forward).norm() / effect.norm())


def unstored_scale(module: LycorisBaseModule) -> float | None:
    """LyCORIS trains two full Kronecker factors with sqrt(r) under rs_lora, which no file tells."""
    full = isinstance(module, LokrModule) and module.use_w1 and module.use_w2
    return math.sqrt(module.lora_dim) if full and module.rs_lora else None


@pytest.mark.parametrize("kind, layer_name, options", CASES)
def test_forward(
    kind: type[LycorisBaseModule], layer_name: str, options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    make, x_shape = LAYERS[layer_name]
    layer, x = make().requires_grad_(False), torch.randn(x_shape)
    module = kind("", layer, **{"lora_dim": 3, "alpha": 1, "bypass_mode": False, **options})
    randomise(module)
    module.train()
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    adapter, op, weight = load(state, unstored_scale(module)), op_of(layer), layer.weight
    assert adapter is not None and adapter.misfit(weight.shape) is None
    for strength in (1.0, 0.6):
        module.multiplier = strength
        forward = module(x).detach()
        effect = strength * op(x, adapter.delta(weight))
        merged = op(x, weight + strength * adapter.delta(weight))
        bias = layer(x) - op(x, weight)
        assert effect_error(forward, layer, merged + bias, effect) < TOLERANCE
        bypassed = layer(x) + strength * adapter.bypass(x, op, weight)
        assert effect_error(forward, layer, bypassed, effect) < TOLERANCE


@pytest.mark.parametrize("layer_name", LAYERS)
def test_dylora_file(layer_name: str) -> None:
    make, _ = LAYERS[layer_name]
    layer = make()
    module = DyLoraModule("", layer, lora_dim=8, alpha=4, block_size=2)
    randomise(module)
    adapter = load({name: t.detach() for name, t in module.state_dict().items()})
    assert adapter is not None and adapter.rank == 8 and adapter.scale == 0.5
    # Its training scale is alpha / blocks; every reader of the file uses alpha / rank.
    diff, _ = module.get_diff_weight(shape=layer.weight.shape, rank=6)
    ours = adapter.delta(layer.weight) * module.block_size
    assert (ours - diff).norm() < TOLERANCE * diff.norm()
    # At a lower rank its own scale is alpha / blocks of that rank.
    for rank in (2, 4, 6, 8):
        diff, _ = module.get_diff_weight(shape=layer.weight.shape, rank=rank - module.block_size)
        part = adapter.at_rank(rank, growth=1)
        assert part.rank == rank and part.alpha == pytest.approx(4)
        ours = part.delta(layer.weight) * module.block_size
        assert (ours - diff).norm() < TOLERANCE * diff.norm()
        kept = adapter.at_rank(rank)
        assert kept.scale == adapter.scale and kept.alpha == rank / 2
        assert adapter.at_rank(rank, growth=0.5).scale == pytest.approx(0.5 * math.sqrt(8 / rank))
    for rank in (0, 9):
        with pytest.raises(AdapterLabError, match="1 to 8"):
            adapter.at_rank(rank)


@given(
    st.sampled_from([LoConModule, LohaModule, LokrModule]),
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 2),
    st.lists(st.integers(1, 3), max_size=3), st.integers(1, 9), st.booleans(),
    st.sampled_from([None, True, False]), st.integers(0, 9),
)  # fmt: skip
@torch.no_grad()
def test_layers_and_ranks_of_any_size(
    kind: type[LycorisBaseModule], out: int, width: int, groups: int, kernel: list[int],
    rank: int, tucker: bool, dora: bool | None, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    if kernel:
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        layer = make(width * groups, out * groups, tuple(kernel), groups=groups)
    else:
        layer = nn.Linear(width, out)
    module = kind(
        "", layer, lora_dim=rank, alpha=rank / 2, use_tucker=tucker, bypass_mode=False,
        weight_decompose=dora is not None, wd_on_out=bool(dora),
    )  # fmt: skip
    randomise(module)
    channels = layer.weight.shape[1] * (groups if kernel else 1)
    x = torch.randn(2, channels, *(n + 1 for n in kernel))
    try:
        forward = module.train()(x)
    except RuntimeError as error:
        assume("view size" not in str(error))  # LyCORIS itself fails on some Tucker kernels
        raise
    adapter = load(dict(module.state_dict()))
    assert adapter is not None and adapter.misfit(layer.weight.shape) is None
    merged = adapter.merge(layer.weight.clone())
    ours = torch.func.functional_call(layer, {"weight": merged}, (x,))
    assert (ours - forward).norm() < TOLERANCE * (forward - layer(x)).norm() + 1e-5
    bypassed = layer(x) + adapter.bypass(x, op_of(layer), layer.weight)
    assert (bypassed - forward).norm() < TOLERANCE * (forward - layer(x)).norm() + 1e-5


@given(st.integers(1, 8192), st.integers(-1, 600))
def test_factorization(n: int, factor: int) -> None:
    assert factorization(n, factor) == lycoris_factorization(n, factor)
