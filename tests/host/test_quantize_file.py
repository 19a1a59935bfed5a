"""A quantised file loads natively and means what the file it was made of means."""

from __future__ import annotations

import logging

import comfy.sd
import pytest
import samples
import tiny
import torch
from adapter_lab.core.quant import quantize_file
from adapter_lab.nodes.host.layers import quantised
from adapter_lab.nodes.host.session import layers
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file, save_file

NATIVE = "float8_e4m3fn"
ROUNDING = 0.0266  # of a 3-bit mantissa on normal numbers, relative Frobenius
# What the architectures' lists have to spare in the tiny models, by a word in its path.
SENSITIVE = {
    "flux": "mod", "wan": "time_projection", "sd3": "adaLN_modulation", "hunyuan_video": "_in",
    "sd15": "emb_layers",
}  # fmt: skip
QUANTISED = {"flux": "img_attn.qkv", "wan": "self_attn.q", "sd3": "attn.qkv",
             "hunyuan_video": "txt_mlp.0", "sd15": "attn1.to_q"}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_loads_natively_with_every_layer_in_its_place(checkpoints, tmp_path, caplog, kind):
    source, file = checkpoints(kind), tmp_path / "small.safetensors"
    outcome = quantize_file(source, file)
    with torch.inference_mode(), caplog.at_level(logging.INFO):
        low, plain = (comfy.sd.load_diffusion_model(str(f)) for f in (file, source))
        told = [record.message for record in caplog.records]
        assert not [m for m in told if m.startswith(("unet missing", "unet unexpected", "left"))]
        assert any("mixed precision" in m for m in told)
        table = {n.removeprefix("diffusion_model."): m for n, m in layers(low).items()}
        found = {n for n, m in table.items() if isinstance(m.weight, QuantizedTensor)}
        assert found == set(outcome.rows)
        assert any(QUANTISED[kind] in name for name in found)
        assert not any(SENSITIVE[kind] in name for name in found)
        assert any(SENSITIVE[kind] in name for name in outcome.left_out)
        assert {quantised(table[n]) for n in found} == {NATIVE}
        y, expected = samples.run(low, kind), samples.run(plain, kind)
    error = float((y - expected).norm() / expected.norm())
    assert 0 < error < 3 * ROUNDING


def test_numbers_and_errors_are_those_of_comfyuis_own_quantiser(checkpoints, tmp_path):
    source, file = checkpoints("flux"), tmp_path / "small.safetensors"
    outcome = quantize_file(source, file)
    before, after = load_file(str(source)), load_file(str(file))
    layout = QUANT_ALGOS[NATIVE]["comfy_tensor_layout"]
    assert len(outcome.rows) == 10
    for path, row in outcome.rows.items():
        weight = before.pop(f"{path}.weight")
        theirs = QuantizedTensor.from_float(weight, layout, scale="recalculate")
        for name, tensor in theirs.state_dict(f"{path}.weight").items():
            ours = after.pop(name)
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(ours.view(torch.uint8) if ours.ndim else ours,
                               tensor.view(torch.uint8) if tensor.ndim else tensor)  # fmt: skip
        error = float((theirs.dequantize() - weight).norm() / weight.norm())
        assert row.error == pytest.approx(error, rel=1e-3) == pytest.approx(ROUNDING, rel=0.02)
        said = after.pop(f"{path}.comfy_quant")
        assert bytes(said.tolist()) == b'{"format": "float8_e4m3fn"}'
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_bf16_weight_is_rounded_once(tmp_path):
    """ComfyUI's quantiser works in the weight's dtype and rounds twice."""
    source = tiny.write("flux", tmp_path / "bf16.safetensors", torch.bfloat16)
    outcome = quantize_file(source, tmp_path / "small.safetensors")
    before = load_file(str(source))
    layout = QUANT_ALGOS[NATIVE]["comfy_tensor_layout"]
    for path, row in outcome.rows.items():
        weight = before[f"{path}.weight"]
        theirs = QuantizedTensor.from_float(weight, layout, scale="recalculate")
        q, scale = theirs._qdata.float(), theirs._params.scale
        twice = float((q * scale - weight.float()).norm() / weight.float().norm())
        assert row.error < twice


def test_checkpoint_keeps_its_other_parts(checkpoints, tmp_path):
    encoder, vae = "cond_stage_model.transformer.x.weight", "first_stage_model.decoder.y.weight"
    whole = {f"model.diffusion_model.{n}": t for n, t in load_file(checkpoints("flux")).items()}
    whole |= {encoder: torch.ones(64, 64), vae: torch.ones(64, 64)}
    source, file = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    save_file(whole, source)
    quantize_file(source, file)
    after = load_file(file)
    assert torch.equal(after[encoder], whole[encoder]) and torch.equal(after[vae], whole[vae])
    with torch.inference_mode():
        low = comfy.sd.load_diffusion_model(str(file))
        plain = comfy.sd.load_diffusion_model(str(checkpoints("flux")))
        y, expected = samples.run(low, "flux"), samples.run(plain, "flux")
    assert 0 < float((y - expected).norm() / expected.norm()) < 3 * ROUNDING
