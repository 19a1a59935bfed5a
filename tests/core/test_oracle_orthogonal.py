"""Rotations against the libraries that train them: LyCORIS, peft, and sd-scripts by its vectors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.tuners.boft.layer as peft_boft
import pytest
import torch
from adapter_lab.core.adapters import Algorithm, load
from adapter_lab.core.tensors import Op
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from peft import BOFTConfig, HRAConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

TOLERANCE = 1e-5
VECTORS = Path(__file__).parents[1] / "data" / "kohya_oft.json"

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 48), (3, 5, 24)),
    "large": (lambda: nn.Linear(200, 1536), (3, 200)),
    "conv1d": (lambda: nn.Conv1d(12, 24, 3, stride=2, padding=1), (2, 12, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 48, 1), (2, 24, 4, 4)),
    "conv2d 3x3": (lambda: nn.Conv2d(12, 24, 3, stride=2, padding=2, dilation=2), (2, 12, 9, 8)),
    "grouped": (lambda: nn.Conv2d(24, 48, 3, padding=1, groups=2), (2, 24, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(12, 24, (1, 3, 3), padding=(0, 1, 1)), (2, 12, 2, 5, 4)),
}
OPTIONS = [{}, {"constraint": 0.01}, {"constraint": 10}, {"rescaled": True}, {"lora_dim": 12}]
DIMS = {"large": 16}  # enough stages of BOFT for several products of them


def op_of(layer: nn.Module) -> Op:
    if isinstance(layer, nn.Linear):
        return Op()
    dims = layer.weight.ndim - 2
    return Op(dims, layer.stride, layer.padding, layer.dilation, layer.groups)


def randomise(module: nn.Module, std: float = 0.3) -> None:
    """Noise around whatever the parameters start from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)


def check(adapter: Algorithm | None, layer: nn.Module, x: Tensor, forward: Tensor) -> None:
    """Rebuilt, merged and bypassed: each error relative to what the adapter does."""
    assert adapter is not None and adapter.misfit(layer.weight.shape) is None
    op, weight, base = op_of(layer), layer.weight.detach(), layer(x).detach()
    y = op(x, weight)
    size = (forward - base).norm()
    assert size > 0.02 * base.norm(), "an effect too small to judge by"
    rebuilt = base + op(x, adapter.delta(weight))
    merged = base - y + op(x, adapter.merge(weight.clone()))
    for ours in (rebuilt, merged, base + adapter.bypass(x, op, weight, y),
                 base + adapter.bypass(x, op, weight)):  # fmt: skip
        assert (ours - forward).norm() < TOLERANCE * size


@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
@pytest.mark.parametrize("layer_name, options", list(itertools.product(LAYERS, OPTIONS)))
def test_lycoris(kind: type[Any], layer_name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    make, x_shape = LAYERS[layer_name]
    layer, x = make().requires_grad_(False), torch.randn(x_shape)
    module = kind(
        "", layer, **{"lora_dim": DIMS.get(layer_name, 6), "bypass_mode": False, **options}
    )
    randomise(module)
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    adapter = load(state)
    # At other strengths LyCORIS keeps the whole of ``rescale``; ours goes with the strength.
    for strength in (1.0,) if "rescaled" in options else (1.0, 0.6, -0.5):
        module.multiplier = strength
        check(adapter and adapter.at(strength), layer, x, module(x).detach())


@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
def test_finished_rotation_of_early_lycoris(kind: type[Any]) -> None:
    """Its files hold what get_r returns."""
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 48).requires_grad_(False), torch.randn(3, 24)
    module = kind("", layer, lora_dim=6, bypass_mode=False)
    randomise(module)
    check(load({"oft_diag": module.get_r().detach()}), layer, x, module(x).detach())


def wrapped(config: Any, layer: nn.Module) -> tuple[nn.Module, Algorithm | None]:
    """``layer`` in peft with random factors, and what we make of the state it saves."""
    config.target_modules = ["layer"]
    model = get_peft_model(nn.ModuleDict({"layer": layer}), config)
    module = model.base_model.model["layer"]
    randomise(module)
    state = get_peft_model_state_dict(model)
    prefix = "base_model.model.layer."
    tensors = {k.removeprefix(prefix): t.detach().clone() for k, t in state.items()}
    adapter = load({k: t for k, t in tensors.items() if not k.startswith("base_layer")})
    return module, adapter and adapter.configured(config.to_dict())


PEFT_LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (3, 5, 24)),
    "large": (lambda: nn.Linear(384, 20), (3, 384)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 20, 1), (2, 24, 4, 4)),
    "conv2d 3x3": (lambda: nn.Conv2d(8, 20, 3, stride=2, padding=1), (2, 8, 5, 5)),
}
PEFT = {
    "oft": lambda: OFTConfig(oft_block_size=4),
    "oft, blocks given": lambda: OFTConfig(oft_block_size=0, r=3),
    "oft, exact": lambda: OFTConfig(oft_block_size=6, use_cayley_neumann=False),
    **{f"oft, {n} terms": lambda n=n: OFTConfig(oft_block_size=4, num_cayley_neumann_terms=n)
       for n in (2, 3, 4, 6, 9)},
    "oft, shared": lambda: OFTConfig(oft_block_size=4, block_share=True),
    "coft": lambda: OFTConfig(oft_block_size=4, coft=True, eps=0.8),
    "coft, shared": lambda: OFTConfig(oft_block_size=4, coft=True, eps=0.8, block_share=True),
    "boft": lambda: BOFTConfig(boft_block_size=4),
    "hra": lambda: HRAConfig(r=6),
    "hra, odd": lambda: HRAConfig(r=3),
    "hra, orthonormal": lambda: HRAConfig(r=5, apply_GS=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft tries to build a CUDA kernel for BOFT; without it there is one stage."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: None)


@pytest.mark.parametrize("layer_name, name", list(itertools.product(PEFT_LAYERS, PEFT)))
def test_peft(layer_name: str, name: str) -> None:
    torch.manual_seed(0)
    make, x_shape = PEFT_LAYERS[layer_name]
    layer, x = make().requires_grad_(False), torch.randn(x_shape)
    module, adapter = wrapped(PEFT[name](), layer)
    plain = make()
    plain.load_state_dict(layer.state_dict())
    if layer_name == "conv2d 3x3":
        # Its OFT sums overlapping patches in forward, which no weight does; its merge is meant.
        module.merge()
    check(adapter, plain, x, module(x).detach())


@pytest.mark.parametrize(
    "layer_name, stages",
    [*itertools.product(("linear", "conv2d 1x1", "conv2d 3x3"), (2, 3)), ("large", 7)],
)
def test_peft_butterfly(layer_name: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More stages need peft's CUDA kernel, which does what torch.block_diag does."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in blocks])

    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft, "FastBlockDiag", BlockDiagonal)
    torch.manual_seed(0)
    make, x_shape = PEFT_LAYERS[layer_name]
    layer, x = make().requires_grad_(False), torch.randn(x_shape)
    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=stages)
    module, adapter = wrapped(config, layer)
    plain = make()
    plain.load_state_dict(layer.state_dict())
    check(adapter, plain, x, module(x).detach())


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text())["cases"], ids=lambda c: c["name"])
def test_sd_scripts(case: dict[str, Any]) -> None:
    def tensor(spec: dict[str, Any]) -> Tensor:
        return torch.tensor(spec["values"]).reshape(spec["shape"])

    weight, x = tensor(case["weight"]), tensor(case["x"])
    layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
    if weight.ndim == 4:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 2, stride=2, padding=1)
    layer.requires_grad_(False).load_state_dict({"weight": weight, "bias": tensor(case["bias"])})
    tensors = {f"kohya_{name}": tensor(spec) for name, spec in case["state"].items()}
    adapter = load({**tensors, "alpha": torch.tensor(case["alpha"])})
    for strength, y in case["y"].items():
        ours, forward = adapter and adapter.at(float(strength)), tensor(y)
        if case["alpha"]:
            check(ours, layer, x, forward)
        else:  # no rotation at all
            assert (layer(x) + ours.bypass(x, op_of(layer), weight) - forward).abs().max() < 1e-6
