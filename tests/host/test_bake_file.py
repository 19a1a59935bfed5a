"""Baked model files load in ComfyUI's own nodes and sample as the live patch does."""

from __future__ import annotations

import json
from dataclasses import replace

import comfy.model_management
import comfy.sd
import comfy.supported_models
import encoders
import folder_paths
import made
import pytest
import samples
import tiny
import torch
from adapter_lab.core.bake import merge_into
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter, read_header, write_adapter
from adapter_lab.core.merge.bake import bake
from adapter_lab.core.stored import read_weight, stored
from adapter_lab.core.streams import Reader
from adapter_lab.nodes.bake import BakeAdapter
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host import paths
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file, save_file

import nodes as comfy_nodes

# What is baked into which layers; DoRA and OFT read the weight as others left it.
LAYERS = {
    "flux": [
        "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear2",
    ],
    "wan": ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.cross_attn.o"],
    "sd15": ["input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in", "out.2"],
    "sd3": ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.1.x_block.mlp.fc1", "x_embedder.proj"],
    "hunyuan_video": [
        "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.linear",
    ],
}  # fmt: skip
ALGORITHMS = ("lora", "lokr", "oft")
QKV = "double_blocks.0.img_attn.qkv"


def adapters(model, kind):
    """Two files on the same layers, the second with DoRA."""
    shapes = {path: samples.shape(model, path) for path in LAYERS[kind]}
    pairs = zip(shapes.items(), ALGORITHMS, strict=True)
    first = {path: made.factors(name, shape, 1) for (path, shape), name in pairs}
    second = {path: made.dora("lora", shape, 2) for path, shape in shapes.items()}
    return made.adapter(first, "first.safetensors"), made.adapter(second, "second.safetensors")


@pytest.mark.parametrize("kind", LAYERS)
def test_fp32_samples_exactly_as_the_live_patch(load, checkpoints, tmp_path, kind):
    model, dst = load(kind), tmp_path / "baked.safetensors"
    first, second = adapters(model, kind)
    outcome = bake(checkpoints(kind), dst, [(first, 0.8), (second, -0.5)])
    assert len(outcome.rows) == 6 and not outcome.left_out
    with torch.inference_mode():
        plain = samples.run(model, kind)
        live = samples.run(samples.apply(samples.apply(model, first, 0.8), second, -0.5), kind)
        baked = samples.run(comfy.sd.load_diffusion_model(str(dst)), kind)
    assert torch.equal(baked, live)
    samples.differs(baked, plain)


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_bf16_samples_as_the_live_patch(load, tmp_path, kind):
    """ComfyUI rounds a weight that it patches; both round the same sum."""
    src, dst = (
        tiny.write(kind, tmp_path / "bf16.safetensors", torch.bfloat16),
        tmp_path / "baked.safetensors",
    )
    first, second = adapters(load(kind), kind)
    bake(src, dst, [(first, 0.8), (second, 0.5)])
    assert read_header(dst).tensors.keys() == read_header(src).tensors.keys()
    assert {info.dtype for info in read_header(dst).tensors.values()} == {"BF16"}
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(src))
        plain = samples.run(model, kind)
        one = samples.apply(model, first, 0.8)
        live = samples.run(samples.apply(one, second, 0.5), kind)
        baked = samples.run(comfy.sd.load_diffusion_model(str(dst)), kind)
    samples.close(baked, live, 1e-3)
    samples.differs(baked, plain)


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """An SD1.5 checkpoint: U-Net and one attention of CLIP, of the real width; that in the dtype in
    which ComfyUI holds it, so that it rounds nothing more than the file does."""
    state = {f"model.diffusion_model.{k}": t for k, t in load_file(checkpoints("sd15")).items()}
    clip = encoders.make("sd15").cond_stage_model.clip_l.transformer.state_dict()
    prefix = "cond_stage_model.transformer."
    kept = {k: t for k, t in clip.items() if ".layers.0.self_attn" in k or "final_layer" in k}
    state |= {prefix + k: t.half().contiguous() for k, t in kept.items()}
    path = tmp_path / "whole.safetensors"
    save_file(state, path)
    return path


def test_checkpoint_with_its_text_encoder(checkpoint, tmp_path):
    """Both parts are those of ComfyUI's model with the adapter on."""
    rng, stem = torch.Generator().manual_seed(3), "text_model_encoder_layers_0_self_attn_q_proj"
    names = {
        f"lora_te_{stem}": (768, 768),
        "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320),
    }
    file = Adapter(name="both.safetensors")
    for name, (out, width) in names.items():
        file[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=rng) * 0.1
        file[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=rng) * 0.1
        file[f"{name}.alpha"] = torch.tensor(2.0)
    dst = tmp_path / "baked.safetensors"
    outcome = bake(checkpoint, dst, [(file, 0.7)])
    assert dict(outcome.facts)["changes by part"] == "clip_l 1, diffusion model 1"
    with torch.inference_mode():
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
        live = host.apply(model, clip, file, 0.7, 0.7, "error")
        comfy.model_management.load_models_gpu([live.model, live.clip.patcher])
        wanted = states(live.model, live.clip)
        found = states(*comfy.sd.load_checkpoint_guess_config(str(dst), output_vae=False)[:2])
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    changed = load_file(dst)
    assert {k for k, t in load_file(checkpoint).items() if not torch.equal(t, changed[k])} == {
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
    }


def states(model, clip):
    """The weights of the U-Net and of CLIP's first attention in memory."""
    found = {k: t.clone() for k, t in model.model.diffusion_model.state_dict().items()}
    layer = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].self_attn
    return found | {f"clip.{k}": t.clone() for k, t in layer.state_dict().items()}


def test_open_clip_of_sdxl(tmp_path):
    """Against ComfyUI's own splitting of the fused weights, with the adapter on what it gives."""
    rng, width, root = torch.Generator().manual_seed(4), 16, "conditioner.embedders.1.model."
    block = f"{root}transformer.resblocks.0."
    base = {
        f"{block}attn.in_proj_weight": torch.randn(3 * width, width, generator=rng),
        f"{block}attn.in_proj_bias": torch.randn(3 * width, generator=rng),
        f"{block}attn.out_proj.weight": torch.randn(width, width, generator=rng),
        f"{block}mlp.c_fc.weight": torch.randn(4 * width, width, generator=rng),
        "model.diffusion_model.out.2.weight": torch.randn(4, 4, generator=rng),
    }
    sizes = {"self_attn_k_proj": (16, 16), "self_attn_v_proj": (16, 16), "mlp_fc1": (64, 16)}
    file = Adapter()
    for name, (out, inputs) in sizes.items():
        stem = f"lora_te2_text_model_encoder_layers_0_{name}"
        file[f"{stem}.lora_up.weight"] = torch.randn(out, 2, generator=rng)
        file[f"{stem}.lora_down.weight"] = torch.randn(2, inputs, generator=rng)
        file[f"{stem}.diff_b"] = torch.randn(out, generator=rng)
    src, dst = tmp_path / "sdxl.safetensors", tmp_path / "baked.safetensors"
    save_file(base, src)
    outcome = bake(src, dst, [(file, 0.5)])
    assert len(outcome.rows) == 3 and not outcome.left_out
    wanted, _ = merge_into(split(base), file, 0.5)
    found = split(load_file(dst))
    # The two of the three without a bias in this file have none to change.
    assert len(wanted) == 5
    assert all(torch.equal(found[key], wanted.get(key, t)) for key, t in split(base).items())


def split(state):
    """What ComfyUI makes of SDXL's text encoders."""
    config = comfy.supported_models.SDXL({})
    return config.process_clip_state_dict({k: t.clone() for k, t in state.items()})


@pytest.mark.parametrize("form", QUANT_ALGOS)
def test_quantised_weights_are_those_that_comfyui_computes_with(checkpoints, tmp_path, form):
    """Read as ComfyUI's kernels dequantise them, to the bit; native and older spellings alike."""
    with torch.inference_mode():
        file = tiny.quantise(checkpoints("flux"), tmp_path / "low.safetensors", form)
        table = dict(comfy.sd.load_diffusion_model(str(file)).model.diffusion_model.named_modules())
        module = table[QKV]
        assert isinstance(module.weight, QuantizedTensor)
        exact = dequantise(module.weight)
    with Reader(file) as reader:
        how = stored(reader, f"{QKV}.weight")
        assert how and (how.format, how.shape) == (form, tuple(exact.shape))
        assert torch.equal(read_weight(reader, f"{QKV}.weight"), exact)


@pytest.mark.parametrize("form", QUANT_ALGOS)
def test_dequantised_file_loads_and_samples(load, checkpoints, tmp_path, form):
    """The changed layers are plain, the others as they were; ComfyUI reads both in one file."""
    dst = tmp_path / "baked.safetensors"
    with torch.inference_mode():
        src = tiny.quantise(checkpoints("flux"), tmp_path / "low.safetensors", form)
    first, _ = adapters(load("flux"), "flux")
    with pytest.raises(AdapterLabError, match="3 weights to change are stored quantised"):
        bake(src, dst, [(first, 1.0)])
    assert not dst.exists()
    outcome = bake(src, dst, [(first, 1.0)], quantised="dequantise")
    assert any("3 quantised weights are float32 now" in w for w in outcome.warnings)
    keys = read_header(dst).tensors
    assert f"{QKV}.comfy_quant" not in keys and f"{QKV}.weight_scale" not in keys
    assert "double_blocks.0.img_attn.proj.comfy_quant" in keys
    with torch.inference_mode():
        table = dict(comfy.sd.load_diffusion_model(str(src)).model.diffusion_model.named_modules())
        plain = {f"{k}.weight": dequantise(table[k].weight) for k in LAYERS["flux"]}
        wanted, _ = merge_into(plain, first)
        baked = comfy.sd.load_diffusion_model(str(dst))
        found = dict(baked.model.diffusion_model.named_modules())
        for key, weight in wanted.items():
            assert torch.equal(found[key.removesuffix(".weight")].weight.float(), weight)
        assert samples.run(baked, "flux").isfinite().all()


def dequantise(weight):
    """By ComfyUI's kernels, in float32 whatever the model computes in."""
    params = replace(weight._params, orig_dtype=torch.float32)
    return QuantizedTensor(weight._qdata, weight._layout_cls, params).dequantize()


OLDER = {
    "scaled_fp8": ("scale_weight", {}),
    "metadata": ("weight_scale", {"format": "float8_e4m3fn"}),
}


@pytest.mark.parametrize("spelling", OLDER)
def test_older_spellings_of_scaled_fp8(checkpoints, tmp_path, spelling):
    """What ComfyUI turns into its own marks when it loads them, before and after."""
    suffix, conf = OLDER[spelling]
    state, chosen = load_file(checkpoints("flux")), LAYERS["flux"]
    for path in chosen:
        weight = state[f"{path}.weight"]
        scale = weight.abs().amax() / 448
        state[f"{path}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{path}.{suffix}"] = scale
    if conf:
        layers = dict.fromkeys(chosen, conf)
        metadata = {
            "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})
        }
    else:
        state["scaled_fp8"], metadata = torch.empty(0, dtype=torch.float8_e4m3fn), None
    src, dst = tmp_path / "old.safetensors", tmp_path / "baked.safetensors"
    save_file(state, src, metadata)
    first, _ = adapters_of(chosen[:2], state)
    bake(src, dst, [(first, 1.0)], quantised="dequantise", dtype="keep")
    with torch.inference_mode():
        before = dict(comfy.sd.load_diffusion_model(str(src)).model.diffusion_model.named_modules())
        plain = {f"{p}.weight": dequantise(before[p].weight) for p in chosen}
        wanted, _ = merge_into(plain, first)
        model = comfy.sd.load_diffusion_model(str(dst))
        after = dict(model.model.diffusion_model.named_modules())
        for path in chosen[:2]:
            assert torch.equal(after[path].weight.float(), wanted[f"{path}.weight"])
        assert torch.equal(dequantise(after[chosen[2]].weight), plain[f"{chosen[2]}.weight"])
    bake(src, dst, [(first, 1.0)], quantised="dequantise", dtype="bf16", overwrite=True)
    header = read_header(dst)
    assert {info.dtype for info in header.tensors.values()} == {"BF16"}
    assert "_quantization_metadata" not in header.metadata
    assert header.tensors.keys() == read_header(checkpoints("flux")).tensors.keys()


def adapters_of(names, state):
    shapes = {path: tuple(state[f"{path}.weight"].shape) for path in names}
    return tuple(
        made.adapter({path: made.factors("lora", shape, seed) for path, shape in shapes.items()})
        for seed in (1, 2)
    )


@pytest.fixture
def listed(checkpoints, checkpoint, tmp_path, monkeypatch):
    """A diffusion model and a checkpoint in folders that ComfyUI lists, as its server has them."""
    for kind, file in (("diffusion_models", checkpoints("flux")), ("checkpoints", checkpoint)):
        folders = [str(file.parent), str(paths.output(kind))]
        table = (folders, {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, table)
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})


def test_node_writes_a_file_that_loaders_list(load, listed):
    first, second = adapters(load("flux"), "flux")
    assert {"flux.safetensors", "whole.safetensors"} <= set(paths.model_files())
    arguments = ("flux.safetensors", first, 0.8, "styles/ink", "keep")
    more = {"more_adapters": {"adapter0": second, "adapter1": None}, "more_strengths": "-0.5;"}
    with torch.inference_mode():
        result = BakeAdapter.execute(*arguments, **more)
        again = BakeAdapter.execute(*arguments)
    path, report = result.result
    assert path == str(paths.output("diffusion_models", "styles", "ink_00001_.safetensors"))
    assert again.result[0].endswith("ink_00002_.safetensors")
    assert report.startswith("6 of 6 modules baked into 3 of ")
    assert len(result.ui["adapter_lab"][0]["rows"]) == 6
    metadata = read_header(path).metadata
    assert metadata["modelspec.merged_from"] == "flux, first, second"
    assert json.loads(metadata["adapter_lab.baked"]) == [
        {"name": "first.safetensors", "strength": 0.8},
        {"name": "second.safetensors", "strength": -0.5},
    ]
    listed_as = "styles/ink_00001_.safetensors"
    assert BakeAdapter.validate_inputs(listed_as) is True
    with torch.inference_mode():
        (loaded,) = comfy_nodes.UNETLoader().load_unet(listed_as, "default")
        live = samples.apply(samples.apply(load("flux"), first, 0.8), second, -0.5)
        assert torch.equal(samples.run(loaded, "flux"), samples.run(live, "flux"))


def test_node_puts_a_checkpoint_beside_checkpoints(listed):
    stem, weight = "lora_unet_input_blocks_1_1_proj_in", torch.ones(320, 2)
    file = {f"{stem}.lora_up.weight": weight, f"{stem}.lora_down.weight": weight.T.contiguous()}
    path = BakeAdapter.execute("whole.safetensors", file, 1.0, "baked", "fp16").result[0]
    assert path == str(paths.output("checkpoints", "baked_00001_.safetensors"))
    assert {info.dtype for info in read_header(path).tensors.values()} == {"F16"}
    with torch.inference_mode():
        model, clip, _ = comfy_nodes.CheckpointLoaderSimple().load_checkpoint(
            "baked_00001_.safetensors"
        )
    assert model is not None and clip is not None


def test_cancelling_leaves_nothing(load, listed):
    first, _ = adapters(load("flux"), "flux")
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        BakeAdapter.execute("flux.safetensors", first, 1.0, "gone", "keep")
    assert not list(paths.output("diffusion_models").glob("*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(model_file="none.safetensors"), "There is no model file 'none.safetensors'"),
        (dict(filename_prefix="../out"), "does not name a file inside diffusion_models"),
        (dict(strength=float("nan")), "A strength is not a number"),
        (dict(more_strengths="1, 2"), "The strengths do not fit the adapters"),
        (dict(more_strengths="much"), "The strengths are no numbers"),
        (dict(adapter={}), "Nothing in "),
    ],
)
def test_bad_settings(load, listed, more, message):
    first, _ = adapters(load("flux"), "flux")
    given = dict(
        model_file="flux.safetensors", adapter=first, strength=1.0, filename_prefix="a",
        dtype="keep",
    )  # fmt: skip
    with pytest.raises(AdapterLabError, match=message):
        BakeAdapter.execute(**(given | more))
    assert not list(paths.output().rglob("*.safetensors"))


def test_menu_tells_files_of_one_name_apart(checkpoints, listed, tmp_path):
    folder = folder_paths.folder_names_and_paths["checkpoints"][0][0]
    twin = tmp_path / "flux.safetensors"
    assert folder == str(tmp_path)
    write_adapter(twin, read_adapter(checkpoints("flux")))
    folder_paths.filename_list_cache.clear()
    names = paths.model_files()
    assert "flux.safetensors" in names and "checkpoints/flux.safetensors" in names
    assert paths.model_path("flux.safetensors") == checkpoints("flux")
    assert paths.model_path("checkpoints/flux.safetensors") == twin
    assert paths.model_kind("checkpoints/flux.safetensors") == "checkpoints"
    with pytest.raises(AdapterLabError, match="There is no model file"):
        paths.model_path("checkpoints/none.safetensors")
