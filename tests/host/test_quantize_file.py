"""A quantised file loads natively and means what the file it was made of means."""

from __future__ import annotations

import logging

import comfy.sd
import pytest
import samples
import tiny
import torch
from adapter_lab.core.merge.modules import quiet
from adapter_lab.core.quant import Settings, quantize_file
from adapter_lab.nodes.host import quantised as host
from adapter_lab.nodes.host.layers import quantised
from adapter_lab.nodes.host.session import layers
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file

NATIVE = "float8_e4m3fn"
ROUNDING = 0.0266  # of a 3-bit mantissa on normal numbers, relative Frobenius
# Format -> what ComfyUI calls it, what it loses of normal numbers. The CPU multiplies in int8:
# the activations are rounded with 8 bits a row as well.
FORMATS = {
    "fp8_e4m3": (NATIVE, ROUNDING), "int8_row": ("int8_tensorwise", 0.012),
    "int8_convrot": ("int8_tensorwise", 0.012), "mxfp8": ("mxfp8", ROUNDING),
    "nvfp4": ("nvfp4", 0.095),
}  # fmt: skip
# What the architectures' lists have to spare in the tiny models, by a word in its path.
SENSITIVE = {
    "flux": "mod", "wan": "time_projection", "sd3": "adaLN_modulation", "hunyuan_video": "_in",
    "sd15": "emb_layers",
}  # fmt: skip
QUANTISED = {"flux": "img_attn.qkv", "wan": "self_attn.q", "sd3": "attn.qkv",
             "hunyuan_video": "txt_mlp.0", "sd15": "attn1.to_q"}  # fmt: skip


@pytest.fixture(scope="module")
def plain(model):
    """Kind -> what the original file's model gives, and the norm of that."""
    given = {}

    def get(kind):
        if kind not in given:
            with torch.inference_mode():
                given[kind] = samples.run(model(kind), kind)
        return given[kind]

    return get


def loss(y, expected):
    """Relative error of an output."""
    assert torch.isfinite(y).all()
    return float((y - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", QUANTISED)
def test_loads_natively_and_is_what_our_loader_gives(
    checkpoints, plain, tmp_path, caplog, kind, form
):
    """With every layer in its place and no other."""
    source, file = checkpoints(kind), tmp_path / "small.safetensors"
    native, rounding = FORMATS[form]
    outcome = quantize_file(source, file, format=form)
    with torch.inference_mode(), caplog.at_level(logging.INFO):
        low = comfy.sd.load_diffusion_model(str(file))
        told = [record.message for record in caplog.records]
        assert not [m for m in told if m.startswith(("unet missing", "unet unexpected", "left"))]
        assert any("mixed precision" in m for m in told)
        table = {n.removeprefix("diffusion_model."): m for n, m in layers(low).items()}
        found = {n for n, m in table.items() if isinstance(m.weight, QuantizedTensor)}
        assert found == set(outcome.layers)
        assert any(QUANTISED[kind] in name for name in found)
        assert not any(SENSITIVE[kind] in name for name in found)
        assert any(SENSITIVE[kind] in name for name in outcome.kept)
        assert {quantised(table[n]) for n in found} == {native}
        turned = {getattr(table[n].weight._params, "convrot", False) for n in found}
        assert turned == {form == "int8_convrot"}
        y = samples.run(low, kind)
        ours, report = host.load(source, Settings(form), quiet)
        assert torch.equal(samples.run(ours, kind), y)
        assert report.layers == outcome.layers and report.kept == outcome.kept
    assert 0 < loss(y, plain(kind)) < 3 * rounding


@pytest.mark.parametrize("form", FORMATS)
def test_copies_are_the_same_model(load, checkpoints, tmp_path, form):
    """As ComfyUI makes them: for another device, without dynamic memory, of another node."""
    with torch.inference_mode():
        source = checkpoints("flux")
        low, report = host.load(source, Settings(form, keep=[r"single_blocks\..*"]), quiet)
        assert low.model_size() == pytest.approx(report.after, rel=0.01)
        y = samples.run(low, "flux")
        again, given = low.cached_patcher_init
        copies = {
            "clone": low.clone(),
            "deep copy": low.clone(force_deepcopy=True),
            "not dynamic": again(*given, disable_dynamic=True),
            "clone's": low.clone().deepclone_multigpu(),
        }
        for copy in copies.values():
            assert torch.equal(samples.run(copy, "flux"), y)
        networks = {id(copy.model.diffusion_model) for copy in (low, *copies.values())}
        assert len(networks) == 4
        assert torch.equal(samples.run(low, "flux"), y)
        samples.differs(y, samples.run(load("flux"), "flux"))


@pytest.mark.parametrize("form", FORMATS)
def test_full_precision_is_the_dequantised_weight(load, checkpoints, tmp_path, form):
    """Except in int8, which ComfyUI multiplies as such whatever a file says."""
    source, file = checkpoints("flux"), tmp_path / "small.safetensors"
    outcome = quantize_file(source, file, format=form, full_precision=True)
    model = load("flux")
    with torch.inference_mode():
        low = comfy.sd.load_diffusion_model(str(file))
        for path in outcome.layers:
            layer = layers(low)[path]
            assert layer._full_precision_mm_config
            weight = torch.nn.Parameter(layer.weight.dequantize(), False)
            layers(model)[path].weight = weight
        y = samples.run(low, "flux")
        ours = host.load(source, Settings(form, full_precision=True), quiet)[0]
        assert torch.equal(samples.run(ours, "flux"), y)
        if FORMATS[form][0] == "int8_tensorwise":
            rounds = host.load(source, Settings(form), quiet)[0]
            assert torch.equal(samples.run(rounds, "flux"), y)
        else:
            samples.close(y, samples.run(model, "flux"), 1e-5)


@pytest.mark.parametrize(
    ("form", "dtype"), [*((form, torch.bfloat16) for form in FORMATS), ("fp8_e4m3", torch.float16)]
)
def test_models_in_half_precision(tmp_path, form, dtype):
    """All else keeps its dtype, and what a layer gives has it."""
    source = tiny.write("flux", tmp_path / "half.safetensors", dtype)
    file = tmp_path / "small.safetensors"
    outcome = quantize_file(source, file, format=form)
    before, after = load_file(str(source)), load_file(str(file))
    rest = before.keys() - {f"{path}.weight" for path in outcome.layers}
    assert rest < after.keys() and all(after[name].dtype == dtype for name in rest)
    with torch.inference_mode():
        given = [comfy.sd.load_diffusion_model(str(f)) for f in (file, source)]
        y, expected = (samples.run(model, "flux") for model in given)
        path = next(path for path in outcome.layers if path.endswith("qkv"))
        one, other = (layers(model)[path] for model in given)
        assert one.weight.dequantize().dtype == other.weight.dtype
        assert one.bias.dtype == other.bias.dtype
        ours = host.load(source, Settings(form), quiet)[0]
        assert torch.equal(samples.run(ours, "flux"), y) and y.dtype == expected.dtype
    assert 0 < loss(y.float(), expected.float()) < 3 * FORMATS[form][1]


def test_checkpoints_load_through_both_loaders(checkpoints, plain, tmp_path):
    """ComfyUI's of checkpoints and of diffusion models."""
    form = "nvfp4"
    encoder, vae = "cond_stage_model.transformer.x.weight", "first_stage_model.decoder.y.weight"
    whole = {f"model.diffusion_model.{n}": t for n, t in load_file(checkpoints("flux")).items()}
    whole |= {encoder: torch.ones(64, 64), vae: torch.ones(64, 64)}
    source, file = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    save_file(whole, source)
    quantize_file(source, file, format=form)
    with torch.inference_mode():
        low = comfy.sd.load_diffusion_model(str(file))
        checkpoint = comfy.sd.load_checkpoint_guess_config(
            str(file), output_vae=False, output_clip=False
        )[0]
        y = samples.run(low, "flux")
        assert torch.equal(samples.run(checkpoint, "flux"), y)
        ours = host.load(source, Settings(form), quiet)[0]
        assert torch.equal(samples.run(ours, "flux"), y)
    assert 0 < loss(y, plain("flux")) < 3 * FORMATS[form][1]
