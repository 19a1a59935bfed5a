"""What else is done with quantised models: training, caching, files of other quantisers."""

from __future__ import annotations

import json

import cached
import comfy.model_management
import comfy.sd
import encoders
import pytest
import samples
import tiny
import torch
import ways
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter
from adapter_lab.core.merge.modules import quiet
from adapter_lab.core.quant import Quantised, Settings, quantize_file
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host import paths
from adapter_lab.nodes.host import quantised as quant
from adapter_lab.nodes.host.fingerprint import base_fingerprint, identity
from adapter_lab.nodes.host.session import layers
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file
from test_quantize_file import FORMATS, ROUNDING, loss
from test_trainer import output, run

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


def low(file, form="fp8_e4m3", **settings):
    """A model of our loader, and its report."""
    with torch.inference_mode():
        return quant.load(file, Settings(form, **settings), quiet)


def quantises(key, tensor):
    """Whether other quantisers of Flux take a tensor."""
    return tensor.ndim == 2 and "blocks." in key and key.endswith(".weight") and "mod" not in key


# Training


@pytest.mark.parametrize("form", ["fp8_e4m3", "int8_convrot"])
def test_training_learns_on_it_and_leaves_it_alone(checkpoints, form):
    """The adapter acts on it, on the same file loaded again, and on the exact model."""
    model, _ = low(checkpoints("flux"), form)
    before = output(model, "flux")
    result = run(
        model, "flux", steps=60, config={"save_every": 60}, validation=samples.dataset("flux")
    )
    (_, first), *_, (_, last) = result.progress.validation
    assert last < 0.97 * first
    assert torch.equal(output(model, "flux"), before)
    stored = read_adapter(paths.run("run").folder / "run-step00000060.safetensors")
    applied = host.apply(model, None, stored, 1.0, 1.0, "error")
    assert applied.mode.chosen == "bypass"
    y = output(applied.model, "flux")
    samples.differs(y, before)
    assert torch.equal(output(result.model, "flux"), y)
    again, _ = low(checkpoints("flux"), form)
    assert torch.equal(output(samples.apply(again, stored), "flux"), y)


@pytest.mark.parametrize("form", ["fp8_e4m3", "int8_row"])
def test_a_run_goes_on_with_the_model_loaded_again(checkpoints, form):
    whole = run(low(checkpoints("flux"), form)[0], "flux", steps=4, name="whole")
    run(low(checkpoints("flux"), form)[0], "flux", steps=2)
    resumed = run(low(checkpoints("flux"), form)[0], "flux", steps=4)
    assert resumed.progress.losses == whole.progress.losses
    assert all(torch.equal(resumed.adapter[k], t) for k, t in whole.adapter.items())


# Caching


def test_fingerprints_are_of_the_format_and_the_file(checkpoints, tmp_path, load):
    """Not of who loaded it."""
    source, seen = checkpoints("flux"), {base_fingerprint(load("flux"))}
    for form in FORMATS:
        file = tmp_path / f"{form}.safetensors"
        quantize_file(source, file, format=form)
        with torch.inference_mode():
            native = comfy.sd.load_diffusion_model(str(file))
        model, _ = low(source, form)
        own = base_fingerprint(model)
        assert own == base_fingerprint(native) == base_fingerprint(low(source, form)[0])
        assert identity(model).architecture == "flux"
        assert identity(model).shapes == identity(load("flux")).shapes
        seen.add(own)
    assert len(seen) == 1 + len(FORMATS)


@pytest.mark.parametrize("form", ["fp8_e4m3", "int8_convrot"])
def test_magcache_skips_the_same_steps(checkpoints, form):
    model, _ = low(checkpoints("flux"), form)
    plain = cached.sample(model, "flux")
    with cached.seen(cached.cached(model), "flux") as (clone, watch):
        y = cached.sample(clone, "flux")
    assert watch.skipped() == cached.SKIPPED
    assert torch.isfinite(y).all() and not torch.equal(y, plain)
    assert torch.equal(cached.sample(model, "flux"), plain)


# What else ComfyUI does with a model


@pytest.mark.parametrize("form", FORMATS)
def test_little_memory(checkpoints, tmp_path, form):
    """Layers stay where they are stored, and ComfyUI puts adapters on them at each use."""
    source, file = checkpoints("flux"), tmp_path / "small.safetensors"
    quantize_file(source, file, format=form)
    with torch.inference_mode():
        models = comfy.sd.load_diffusion_model(str(file)), low(source, form)[0]
        plain = comfy.sd.load_diffusion_model(str(source))
        given, outputs = dict(ways.adapter(plain, "lora", 0.3)), []
        for model in models:
            before = samples.run(model, "flux")
            comfy.model_management.unload_all_models()
            clone = comfy.sd.load_lora_for_models(model, None, given, 1.0, 0.0)[0]
            clone.patch_model(torch.device("cpu"), lowvram_model_memory=1)
            assert clone.lowvram_patch_counter() == len(ways.LAYERS)
            outputs.append(samples.prediction(clone, "flux"))
            clone.unpatch_model()
            assert torch.equal(samples.run(model, "flux"), before)
        exact = samples.run(samples.apply(plain, ways.adapter(plain, "lora", 0.3)), "flux")
    assert torch.equal(*outputs)
    assert loss(outputs[0], exact) < 3 * FORMATS[form][1]
    samples.differs(outputs[0], before)


def test_checkpoint_with_its_text_encoder(checkpoints, tmp_path):
    """Which has the weights of the file, and a U-Net with every layer in its place."""
    source, file = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    state = {f"model.diffusion_model.{k}": t for k, t in load_file(checkpoints("sd15")).items()}
    clip = encoders.make("sd15").cond_stage_model.clip_l.transformer.state_dict()
    kept = {k: t for k, t in clip.items() if ".layers.0.self_attn" in k or "final_layer" in k}
    names = {f"cond_stage_model.transformer.{k}": t.half().contiguous() for k, t in kept.items()}
    save_file(state | names, source)
    report = quantize_file(source, file, format="int8_row")
    with torch.inference_mode():
        whole, given = (
            comfy.sd.load_checkpoint_guess_config(str(f), output_vae=False)[:2]
            for f in (source, file)
        )
        found = {n for n, m in layers(given[0]).items() if isinstance(m.weight, QuantizedTensor)}
        assert found == set(report.layers)
        y, expected = (samples.run(model, "sd15") for model in (given[0], whole[0]))
        ours = samples.run(low(source, "int8_row")[0], "sd15")
        encoders_ = (given[1].cond_stage_model, whole[1].cond_stage_model)
        text, wanted = (encoder.clip_l.transformer.state_dict() for encoder in encoders_)
    assert torch.equal(ours, y) and 0 < loss(y, expected) < 0.03
    assert kept.keys() <= wanted.keys()
    assert all(torch.equal(text[key], wanted[key]) for key in kept)


# Files of other quantisers


def scaled(weight, size):
    """(e4m3 codes, scales) of a bfloat16 weight with a scale for each row, or each ``size`` numbers
    of it: s = max |w| / 448 in the weight's dtype, q = w / s in float32, rounded to nearest."""
    out, columns = weight.shape
    blocks = weight.view(out, -1, size or columns)
    scale = (blocks.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(1e-8)
    codes = (blocks.float() / scale.float()).clamp(-LARGEST, LARGEST).to(FP8)
    return codes.view(out, columns), scale if size else scale[:, 0]


@pytest.mark.parametrize("size", [64, 0], ids=["blocks", "rows"])
@pytest.mark.parametrize("form", ["fp8_e4m3", "int8_convrot", "nvfp4"])
def test_layouts_that_comfyui_cannot_run(checkpoints, load, tmp_path, form, size):
    """musubi-tuner's: quantised again, with the errors of both roundings."""
    state = load_file(str(checkpoints("flux")))
    for key in [key for key, tensor in state.items() if quantises(key, tensor)]:
        near = key.replace(".weight", ".scale_weight")
        state[key], state[near] = scaled(state[key].bfloat16(), size)
    source, file = tmp_path / "source.safetensors", tmp_path / "small.safetensors"
    save_file(state, source)
    report = quantize_file(source, file, format=form)
    assert "was quantised before" in dict(report.facts)
    assert not any(key.endswith("scale_weight") for key in load_file(file))
    with torch.inference_mode():
        y = samples.run(comfy.sd.load_diffusion_model(str(file)), "flux")
        expected = samples.run(load("flux"), "flux")
        ours, told = low(source, form)
        assert torch.equal(samples.run(ours, "flux"), y)
        once = samples.run(low(checkpoints("flux"), form)[0], "flux")
    assert told.layers == report.layers and "was quantised before" in dict(told.facts)
    both = (ROUNDING**2 + loss(once, expected) ** 2) ** 0.5
    assert 0.6 * both < loss(y, expected) < 1.6 * both


def legacy(state, metadata):
    """Scaled fp8 as its first spelling has it."""
    for key in [key for key, tensor in state.items() if quantises(key, tensor)]:
        scale = state[key].abs().amax() / LARGEST
        state[key] = (state[key] / scale).to(FP8)
        state[key.replace(".weight", ".scale_weight")] = scale
    state["scaled_fp8"] = torch.zeros(0, dtype=FP8)


def listed(state, metadata):
    """As its second spelling, with a table in the metadata."""
    legacy(state, metadata)
    del state["scaled_fp8"]
    names = [key for key in state if key.endswith(".scale_weight")]
    for key in names:
        state[key.replace("scale_weight", "weight_scale")] = state.pop(key)
    table = {key.removesuffix(".scale_weight"): {"format": "float8_e4m3fn"} for key in names}
    metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": table})


def cast(state, metadata):
    """Cast to fp8 without scales."""
    for key in [key for key, tensor in state.items() if quantises(key, tensor)]:
        state[key] = state[key].to(FP8)


@pytest.mark.parametrize("write", [legacy, listed, cast])
def test_what_comfyui_runs_quantised_is_left_as_it_is(checkpoints, tmp_path, write):
    state, metadata = load_file(str(checkpoints("flux"))), {}
    write(state, metadata)
    source, file = tmp_path / "source.safetensors", tmp_path / "small.safetensors"
    save_file(state, source, metadata)
    with pytest.raises(Quantised, match="is quantised already"):
        quantize_file(source, file)
    assert not list(tmp_path.glob("small*"))
    with torch.inference_mode():
        expected = samples.run(comfy.sd.load_diffusion_model(str(source)), "flux")
    model, report = low(source, "int8_row")
    assert "quantised already" in report.verdict and "as it is" in report.verdict
    with torch.inference_mode():
        assert torch.equal(samples.run(model, "flux"), expected)
    with pytest.raises(AdapterLabError, match="can't go into it"):
        low(source, adapters=[({}, 1.0)])


@pytest.mark.parametrize("form", ["float8_e4m3fn", "int8_tensorwise", "nvfp4"])
def test_files_of_comfyuis_own_quantiser_are_left_as_they_are(checkpoints, tmp_path, form):
    source = tiny.quantise(checkpoints("flux"), tmp_path / "source.safetensors", form)
    with pytest.raises(Quantised, match=form):
        quantize_file(source, tmp_path / "small.safetensors")
    model, report = low(source)
    assert form in report.verdict
    with torch.inference_mode():
        native = comfy.sd.load_diffusion_model(str(source))
        assert torch.equal(samples.run(model, "flux"), samples.run(native, "flux"))
