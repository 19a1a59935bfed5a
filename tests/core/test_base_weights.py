"""The weight that a module of an adapter acts on, as its tensors see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.merge.base import Base
from adapter_lab.core.merge.modules import Source
from safetensors.torch import save_file

DATA = Path(__file__).parents[1] / "data" / "models"
FLUX = json.loads((DATA / "flux.json").read_text())["dev"]
QKV, LAST = "double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1"
SMALL = {QKV: (96, 32), LAST: (64, 32), "img_in": (32, 16)}


@pytest.fixture(scope="module")
def weights():
    """Every name of FLUX.1, a few with numbers in them."""
    rng = torch.Generator().manual_seed(0)
    made = {f"diffusion_model.{name}.weight": torch.zeros(1, 1) for name in FLUX}
    made |= {f"diffusion_model.{name}.weight": torch.randn(size, generator=rng)
             for name, size in SMALL.items()}  # fmt: skip
    return {**made, f"diffusion_model.{QKV}.bias": torch.randn(96, generator=rng)}


def stem(name, out, width=32, **more):
    tensors = {"lora_up.weight": torch.zeros(out, 2), "lora_down.weight": torch.zeros(2, width)}
    source = Source({f"{name}.{suffix}": t for suffix, t in {**tensors, **more}.items()})
    return source.stems[name]


@pytest.fixture(params=["memory", "file"])
def base(request, weights, tmp_path):
    if request.param == "memory":
        return Base(weights)
    path = tmp_path / "model.safetensors"
    save_file({key: t.bfloat16() for key, t in weights.items()}, path)
    return Base(path)


def same(found, wanted):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-6)


def test_whole_weights_by_any_spelling(base, weights):
    wanted = weights[f"diffusion_model.{QKV}.weight"]
    for name in (f"diffusion_model.{QKV}", "lora_unet_" + QKV.replace(".", "_")):
        same(base.weight(stem(name, 96)), wanted)


def test_rows_of_a_fused_weight(base, weights):
    wanted = weights[f"diffusion_model.{QKV}.weight"]
    name = "transformer.transformer_blocks.0.attn.to_k"
    same(base.weight(stem(name, 32)), wanted[32:64])


def test_rows_in_the_order_of_the_file(base, weights):
    """diffusers has scale before shift."""
    wanted = weights[f"diffusion_model.{LAST}.weight"]
    found = base.weight(stem("transformer.norm_out.linear", 64))
    same(found, torch.cat((wanted[32:], wanted[:32])))


def test_bias(base, weights):
    module = stem(f"diffusion_model.{QKV}", 96, diff_b=torch.zeros(96))
    same(base.weight(module, "bias"), weights[f"diffusion_model.{QKV}.bias"])


def test_what_the_model_has_not_is_none(base):
    assert base.weight(stem("diffusion_model.double_blocks.7.nothing", 96)) is None
    assert base.weight(stem(f"diffusion_model.{QKV}", 97)) is None


def test_quantised_weights(weights, tmp_path):
    """Read where a file says how, refused in a mapping."""
    key = f"diffusion_model.{QKV}.weight"
    stored = {**weights, key: (weights[key] / 0.5).to(torch.float8_e4m3fn),
              key + "_scale": torch.tensor(0.5)}  # fmt: skip
    module = stem(f"diffusion_model.{QKV}", 96)
    with pytest.raises(AdapterLabError, match="quantised"):
        Base(stored).weight(module)
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    found = Base(path).weight(module)
    assert found is not None
    torch.testing.assert_close(found, weights[key], rtol=2**-3, atol=1e-2)


def test_of():
    assert Base.of(None) is None
    base = Base({"layer.weight": torch.zeros(2, 2)})
    assert Base.of(base) is base and len(base) == 1 and [*base] == ["layer.weight"]
