"""A merged adapter on a model is all of its parts on it, one after the other."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import encoders
import made
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.merge import MergeAdapters, parse_ratios

LAYERS = {
    "flux": ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"],
    "wan": ["blocks.0.self_attn.q", "blocks.1.ffn.0"],
    "sd15": ["input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in"],
}
# ComfyUI's own names for the text encoder of SD1.5.
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
RATIOS = "0.7, -0.4 1.5"


def state(model, clip=None):
    """Every weight with the patches of ``model`` and ``clip`` in it."""
    patchers = [model, *([clip.patcher] if clip else [])]
    with torch.inference_mode():
        comfy.model_management.load_models_gpu(patchers)
        found = {k: v.clone() for p in patchers for k, v in p.model.state_dict().items()}
        comfy.model_management.unload_all_models()
    return found


def file(model, kind, algorithm, seed, clip=False):
    """Random factors for some layers, those of the text encoder as a LoRA."""
    weights, found = model.model.state_dict(), Adapter(name=f"{algorithm}.safetensors")
    for i, name in enumerate(LAYERS[kind]):
        shape = tuple(weights[f"diffusion_model.{name}.weight"].shape)
        factors = made.factors(algorithm, shape, seed + i)
        found |= {f"diffusion_model.{name}.{suffix}": t for suffix, t in (factors or {}).items()}
    if clip:
        factors = made.factors("lora", (1536, 768), seed + 9) or {}
        found |= {f"{TEXT}.{suffix}": t for suffix, t in factors.items()}
    return found


def merge(adapters, ratios=RATIOS, **options):
    given = {f"adapter{i}": adapter for i, adapter in enumerate(adapters)}
    settings = {"method": "auto", "rank": 0, **options}
    done = MergeAdapters.execute(given, ratios, **settings)
    return done.args[0], done.args[1], done.ui["adapter_lab"][0]


def native(model, clip, adapter, strength):
    return comfy.sd.load_lora_for_models(model, clip, dict(adapter), strength, strength)


def assert_same(found, wanted, base):
    """The changes agree, and there are some."""
    changed = [key for key in base if not torch.equal(wanted[key], base[key])]
    assert changed
    for key, weight in base.items():
        scale = (wanted[key] - weight).abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            (found[key] - weight) / scale, (wanted[key] - weight) / scale, rtol=0, atol=2e-5
        )
    return changed


@pytest.mark.parametrize("kind", LAYERS)
def test_comfyui_s_own_loader_gives_the_same(load, kind):
    """LoRA, LoHa and LoKr stacked by ComfyUI, and the one file of them."""
    model, clip = load(kind), encoders.make("sd15") if kind == "sd15" else None
    adapters = [
        file(model, kind, name, seed, kind == "sd15" and name != "loha")
        for seed, name in enumerate(("lora", "loha", "lokr"))
    ]
    base = state(model, clip)
    with torch.inference_mode():
        stacked, text = model, clip
        for adapter, ratio in zip(adapters, parse_ratios(RATIOS), strict=True):
            stacked, text = native(stacked, text, adapter, ratio)
        wanted = state(stacked, text)
        merged, _, shown = merge(adapters)
        found = state(*native(model, clip, merged, 1.0))
    changed = assert_same(found, wanted, base)
    assert len(changed) == len(shown["rows"]) == len(LAYERS[kind]) + (kind == "sd15")


@pytest.mark.parametrize("name", made.WEIGHTS)
def test_every_algorithm_beside_a_lora(load, name):
    """The sum of what each does to the model alone, with the model where that depends on it."""
    model = load("flux")
    one, two = file(model, "flux", name, 3), file(model, "flux", "lora", 5)
    base = state(model)
    with torch.inference_mode():
        alone = [
            state(host.apply(model, None, adapter, ratio, 1.0, "error", mode="merge").model)
            for adapter, ratio in ((one, 0.7), (two, -0.4))
        ]
        wanted = {key: alone[0][key] + alone[1][key] - weight for key, weight in base.items()}
        merged, _, _ = merge([one, two], "0.7 -0.4", model=model)
        found = state(host.apply(model, None, merged, 1.0, 1.0, "error", mode="merge").model)
    assert_same(found, wanted, base)


def test_model_is_read_without_what_is_merged_into_it(load):
    """A patched clone in memory leaves no trace in the result."""
    model = load("flux")
    dora = Adapter(file(model, "flux", "lora", 3))
    for name in LAYERS["flux"]:
        rows = len(dora[f"diffusion_model.{name}.lora_up.weight"])
        dora[f"diffusion_model.{name}.dora_scale"] = torch.rand(rows, 1) + 0.5
    other = file(model, "flux", "lora", 5)
    first, _, _ = merge([dora, other], "0.5 1", model=model)
    with torch.inference_mode():
        clone = host.apply(model, None, other, 5.0, 1.0, "error", mode="merge").model
        comfy.model_management.load_models_gpu([clone])
        second, _, _ = merge([dora, other], "0.5 1", model=clone)
        comfy.model_management.unload_all_models()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_report_names_ranks_errors_and_what_was_left_out(load):
    model = load("flux")
    one, two = file(model, "flux", "lora", 1), file(model, "flux", "lora", 2)
    merged, text, shown = merge([one, two, one], "1 1 0", method="svd", rank=3)
    rows = shown["rows"]
    assert {row["rank"] for row in rows.values()} == {3}
    assert all(0 < row["error"] < 1 for row in rows.values())
    assert "ratio 0" in text and shown["warnings"]
    assert merged.metadata["ss_network_dim"] == "3"


@pytest.mark.parametrize("text", ["1, -0.5", "1\n-0.5", " 1;-0.5 ", "1 -0.5"])
def test_ratios_are_read_however_they_are_parted(text):
    assert parse_ratios(text) == [1.0, -0.5]


def test_bad_ratios():
    assert parse_ratios("  ") == [1.0]
    for text in ("1, x", "nan", "inf"):
        with pytest.raises(AdapterLabError, match="not a number"):
            parse_ratios(text)
