"""Against peft as it trains: factors from its state dict, the scale from its config."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from adapter_lab.core.adapters import Algorithm, load
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.keys.scale import config_scale
from adapter_lab.core.tensors import Op
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

TOLERANCE = 1e-5

INPUTS = {
    "linear": (3, 5, 24),
    "other": (2, 24),
    "conv1d": (2, 12, 9),
    "conv1": (2, 24, 4, 4),
    "conv2d": (2, 12, 9, 8),
    "grouped": (2, 24, 5, 5),
    "conv3d": (2, 12, 2, 5, 4),
}
SPELLINGS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_B.bias": "lora_up.bias",
}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 40)
        self.other = nn.Linear(24, 40, bias=False)
        self.conv1d = nn.Conv1d(12, 20, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(24, 40, 1)
        # LoRA of peft ignores dilation, so there is none here.
        self.conv2d = nn.Conv2d(12, 20, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(24, 40, 3, padding=1, groups=2)
        self.conv3d = nn.Conv3d(12, 20, (1, 3, 3), padding=(0, 1, 1))
        self.embedding = nn.Embedding(30, 12)


ALL = ["linear", "other", "conv1d", "conv1", "conv2d", "conv3d"]
KINDS = ["linear", "other", "conv1d", "conv1", "conv2d", "grouped"]
PATTERNS = {"rank_pattern": {"other": 2, "conv2d": 5}, "alpha_pattern": {"other": 7}}
LORA = [
    {"r": 4, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 1, **PATTERNS},
    {"r": 4, "lora_alpha": 3, "use_rslora": True, **PATTERNS},
    {"r": 64, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 3, "lora_bias": True, **PATTERNS},
]
LOHA = [
    {"r": 4, "alpha": 2},
    {"r": 2, "alpha": 3},
    {"r": 3, "alpha": 1, "use_effective_conv2d": True, **PATTERNS},
]
LOKR = [
    {"r": 2, "alpha": 1},
    {"r": 2, "alpha": 3, "use_effective_conv2d": True, "alpha_pattern": {"other": 7}},
    {"r": 1, "alpha": 0.5, "decompose_both": True, "rank_pattern": {"other": 2}},
    {"r": 2, "alpha": 1, "decompose_factor": 8},
    {"r": 64, "alpha": 16},
]
CASES = [
    pytest.param(config, names, options, id=f"{config.__name__}-{options}")
    for config, names, all_options in (
        (LoraConfig, ALL, LORA),
        (LoHaConfig, KINDS, LOHA),
        (LoKrConfig, KINDS, LOKR),
    )
    for options in all_options
]


def trained(config: type, names: list[str], options: dict) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Layers(), config(target_modules=names, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model.train()


def factors_of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    stem = f"base_model.model.{name}."
    own = {k.removeprefix(stem): t for k, t in state.items() if k.startswith(stem)}
    return {SPELLINGS.get(k, k): t for k, t in own.items()}


def scale_of(options: dict, name: str) -> float:
    r = options.get("rank_pattern", {}).get(name, options["r"])
    alpha = options["lora_alpha"] if "lora_alpha" in options else options["alpha"]
    alpha = options.get("alpha_pattern", {}).get(name, alpha)
    return alpha / (math.sqrt(r) if options.get("use_rslora") else r)


def op_of(layer: nn.Module) -> Op:
    if isinstance(layer, nn.Linear):
        return Op()
    dims = layer.weight.ndim - 2
    return Op(dims, layer.stride, layer.padding, layer.dilation, layer.groups)


def check(wrapped: nn.Module, adapter: Algorithm | None, x: Tensor) -> None:
    base = wrapped.base_layer
    op, weight = op_of(base), base.weight
    assert adapter is not None and adapter.misfit(weight.shape) is None
    delta, forward = adapter.delta(weight), wrapped(x)
    effect = op(x, delta)
    assert effect.norm() > 0.02 * forward.norm(), "an effect too small to judge by"
    merged = op(x, adapter.merge(weight.clone())) + base(x) - op(x, weight)
    bypassed = base(x) + adapter.bypass(x, op, weight)
    bias = torch.zeros(len(weight))
    if adapter.bias:
        adapter.bias.merge(bias)
        assert bias.norm() > 0.02 * effect.norm() / effect[..., 0].numel()
    for ours in (merged, bypassed):
        ours += bias.reshape(-1, *(1,) * op.dims)
        assert (ours - forward).norm() < TOLERANCE * effect.norm()


@pytest.mark.parametrize("config, names, options", CASES)
def test_forward(config: type, names: list[str], options: dict) -> None:
    model = trained(config, names, options)
    state = get_peft_model_state_dict(model)
    for name in names:
        factors = factors_of(state, name)
        if name == "conv1d" and "lokr_w2" in factors:
            continue  # see test_peft_scrambles_a_full_conv1d_lokr
        adapter = load(factors, scale=scale_of(options, name))
        with torch.no_grad():
            check(model.base_model.model.get_submodule(name), adapter, torch.randn(INPUTS[name]))


@pytest.mark.parametrize("config, names, options", [CASES[1], CASES[4], CASES[7], CASES[9]])
def test_saved_file(config: type, names: list[str], options: dict, tmp_path: Path) -> None:
    model = trained(config, names, options)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in ("linear", "conv2d", "other"):
        adapter = load(factors_of(state, name), scale=config_scale(written, name))
        with torch.no_grad():
            check(model.base_model.model.get_submodule(name), adapter, torch.randn(INPUTS[name]))


@pytest.mark.parametrize("options", [LORA[0], LORA[3], {"r": 4, "use_rslora": True}])
@torch.no_grad()
def test_embedding(options: dict) -> None:
    options = {"lora_alpha": 3, **options}
    model = trained(LoraConfig, ["embedding"], options)
    factors = factors_of(get_peft_model_state_dict(model), "embedding")
    assert set(factors) == {"lora_embedding_A", "lora_embedding_B"}
    layer = model.base_model.model.embedding
    adapter, weight = load(factors, scale=scale_of(options, "embedding")), layer.base_layer.weight
    assert adapter is not None and adapter.misfit(weight.shape) is None
    forward, ours = layer(torch.arange(30)), adapter.merge(weight.clone())
    assert (ours - forward).norm() < TOLERANCE * (forward - weight).norm()
    again = load(adapter.state())
    assert again is not None and torch.equal(again.delta(weight), adapter.delta(weight))


def test_grouped_lora_is_refused() -> None:
    # Its A sees the channels of all groups, which no weight of a grouped layer can express.
    model = trained(LoraConfig, ["grouped"], {"r": 4})
    factors = factors_of(get_peft_model_state_dict(model), "grouped")
    with pytest.raises(AdapterLabError, match="do not multiply"):
        load(factors, scale=1.0)


def test_peft_scrambles_a_full_conv1d_lokr() -> None:
    # Its torch.kron aligns W1 (a, b) with the last two axes of W2 (c, d, k), and the result is
    # reshaped. The tensors are those that LyCORIS writes for a true product, so they are read so.
    model = trained(LoKrConfig, ["conv1d"], {"r": 64, "alpha": 64})
    layer = model.base_model.model.conv1d
    w1, w2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    delta, product = layer.get_delta_weight("default"), torch.zeros(20, 12, 3)
    for k in range(3):
        product[..., k] = torch.kron(w1, w2[..., k].contiguous())
    adapter = load(factors_of(get_peft_model_state_dict(model), "conv1d"), scale=1.0)
    assert adapter is not None
    assert torch.allclose(adapter.delta(delta), product)
    assert not torch.allclose(delta, product)
