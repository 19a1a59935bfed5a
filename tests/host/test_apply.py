"""Adapters on ComfyUI's models give the layers that LyCORIS trained, and leave without a trace."""

from __future__ import annotations

import comfy.lora
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
import torch.nn as nn
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, write_adapter
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host.adapter import AdapterPatch
from adapter_lab.nodes.host.session import layers
from adapter_lab.nodes.load import AdapterFile, LoadAdapter
from comfy.model_patcher import LowVramPatch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.supported_models_base import ClipTarget
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

LAYERS = {
    "flux": [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.txt_mlp.0",
        "single_blocks.0.linear2",
    ],
    "wan": ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.cross_attn.o"],
    "sd15": [
        "input_blocks.1.0.in_layers.2",
        "input_blocks.1.1.proj_in",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ],
}
MODULES = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
STRENGTHS = (1.0, 0.6)


def plain(module):
    """The same layer as an ordinary torch module."""
    if hasattr(module, "in_features"):
        copy = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    else:
        copy = nn.Conv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride,
            module.padding, bias=module.bias is not None,
        )  # fmt: skip
    with torch.inference_mode(False):
        copy.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
    return copy


def trained(model, kind, algorithm, seed, multiplier=1.0):
    """LyCORIS modules with random factors on some layers, and the file they are saved as."""
    torch.manual_seed(seed)
    modules, file = {}, Adapter(name=f"{algorithm}{seed}.safetensors")
    for name in LAYERS[kind]:
        stem = "lora_unet_" + name.replace(".", "_")
        base = plain(layers(model)[name])
        modules[name] = MODULES[algorithm](stem, base, multiplier, lora_dim=4, alpha=2)
        for parameter in modules[name].parameters():
            if not any(parameter is p for p in base.parameters()):
                nn.init.normal_(parameter, std=0.2)
        file |= {f"{stem}.{k}": v.clone() for k, v in modules[name].state_dict().items()}
        modules[name].train()
        modules[name].apply_to()
    return modules, file


def inputs(module):
    rng = torch.Generator().manual_seed(2)
    is_linear = hasattr(module, "in_features")
    shape = (3, module.in_features) if is_linear else (1, module.in_channels, 6, 6)
    return torch.randn(shape, generator=rng)


def outputs(model, kind):
    """Outputs of the layers with the patches of ``model`` applied."""
    comfy.model_management.load_models_gpu([model])
    chosen = {name: layers(model)[name] for name in LAYERS[kind]}
    return {name: layer(inputs(layer)).clone() for name, layer in chosen.items()}


def close(actual, expected):
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("algorithm", MODULES)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_those_that_were_trained(load, kind, algorithm, strength):
    """Twice in one process, alone and stacked, and back to the original bits."""
    model = load(kind)
    original = {k: v.clone() for k, v in model.model.state_dict().items()}
    modules, file = trained(model, kind, algorithm, 0, strength)
    others, second = trained(model, kind, "lora", 1, strength)
    for _ in range(2):
        with torch.inference_mode():
            base = outputs(model, kind)
            once = host.apply(model, None, file, strength, 1.0, "error").model
            alone = outputs(once, kind)
            stacked = outputs(host.apply(once, None, second, strength, 1.0, "error").model, kind)
            comfy.model_management.unload_all_models()
        for name, module in modules.items():
            x = inputs(module.org_module[0])
            close(alone[name], module(x).detach())
            close(stacked[name] - alone[name] + base[name], others[name](x).detach())
            assert not torch.allclose(alone[name], base[name], atol=1e-2)
        state = model.model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in original.items())


@pytest.mark.parametrize("algorithm", MODULES)
def test_strength_zero_is_the_model_itself(load, algorithm):
    model = load("flux")
    _, file = trained(model, "flux", algorithm, 0)
    with torch.inference_mode():
        patched = host.apply(model, None, file, 0.0, 0.0, "error").model
    assert not patched.patches and not model.patches


def test_split_attention_lands_on_its_rows(load):
    """A diffusers file holds q, k and v apart, the model holds them fused."""
    model = load("flux")
    rng = torch.Generator().manual_seed(0)
    made = {n: [torch.randn(s, generator=rng) for s in ((4, 128), (128, 4))] for n in "qkv"}
    stem = "transformer.transformer_blocks.0.attn.to_"
    file = Adapter({f"{stem}{n}.lora_A.weight": down for n, (down, _) in made.items()})
    file |= {f"{stem}{n}.lora_B.weight": up for n, (_, up) in made.items()}
    delta = torch.cat([up @ down for down, up in made.values()])
    name = LAYERS["flux"][0]
    with torch.inference_mode():
        base = outputs(model, "flux")[name]
        patched = outputs(host.apply(model, None, file, 0.5, 1.0, "error").model, "flux")[name]
    close(patched, base + 0.5 * inputs(layers(model)[name]) @ delta.T)


@pytest.mark.parametrize("algorithm", MODULES)
def test_patch_survives_being_moved(load, algorithm):
    """Dynamic VRAM rebuilds a patch from its class, keys and moved weights, nothing else."""
    model = load("flux")
    _, file = trained(model, "flux", algorithm, 0)
    patches = host.apply(model, None, file, 1.0, 1.0, "error").model.patches
    for key, ((_, patch, *_),) in patches.items():
        counter = [0]
        comfy.lora.prefetch_prepared_value(patch, counter, None, None, False)
        memory = torch.zeros(counter[0], dtype=torch.uint8)
        moved = comfy.lora.prefetch_prepared_value(patch, [0], memory, None, True)
        assert type(moved) is AdapterPatch and vars(moved).keys() == vars(patch).keys()
        weight = model.model.state_dict()[key].clone()
        arguments = (key, 0.7, 1.0, None, lambda delta: delta)
        expected = patch.calculate_weight(weight.clone(), *arguments)
        assert torch.equal(moved.calculate_weight(weight.clone(), *arguments), expected)


def test_low_memory_patch_in_half_precision(load):
    """A weight that stays elsewhere is patched in its own dtype at each forward."""
    model = load("flux")
    modules, file = trained(model, "flux", "lora", 0)
    name = LAYERS["flux"][0]
    key = f"diffusion_model.{name}.weight"
    patches = host.apply(model, None, file, 1.0, 1.0, "error").model.patches
    weight = model.model.state_dict()[key].clone()
    patched = LowVramPatch(key, patches)(weight.to(torch.bfloat16))
    expected = modules[name](torch.eye(128)).detach() - modules[name].org_module[0].bias.detach()
    assert patched.dtype == torch.bfloat16
    torch.testing.assert_close(patched.float(), expected.T, rtol=1e-2, atol=1e-2)


def test_file_is_read_again_when_its_config_comes(tmp_path):
    """peft's config, which holds the scale, is put beside the file or changed."""
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    file, config = tmp_path / "fresh_peft.safetensors", tmp_path / "adapter_config.json"
    rng = torch.Generator().manual_seed(0)
    names = {"lora_A": (4, 128), "lora_B": (384, 4)}
    stem = f"base_model.model.{LAYERS['flux'][0]}"
    made = {f"{stem}.{n}.weight": torch.randn(s, generator=rng) for n, s in names.items()}
    write_adapter(file, made)
    stamps = []
    for text in ("", '{"r": 4, "lora_alpha": 32}', '{"r": 4, "lora_alpha": 8.0}'):
        if text:
            config.write_text(text)
        for node in (LoadAdapter, AdapterFile):
            stamps.append(node.fingerprint_inputs(adapter_name=file.name))
            assert node.fingerprint_inputs(adapter_name=file.name) == stamps[-1]
    assert len(set(stamps)) == 3
    write_adapter(tmp_path / "other.safetensors", made)  # whose of the two is it now?
    assert LoadAdapter.fingerprint_inputs(adapter_name=file.name) == stamps[0]


def test_model_of_another_architecture(load):
    wan, flux = load("wan"), load("flux")
    _, file = trained(wan, "wan", "lora", 0)
    with pytest.raises(AdapterLabError) as error:
        host.apply(flux, None, file, 1.0, 1.0, "report")
    assert "lora0.safetensors" in str(error.value)
    assert "Wan" in str(error.value) and "FLUX" in str(error.value)


def test_partial_match_is_reported_or_refused(load):
    model = load("flux")
    _, file = trained(model, "flux", "lora", 0)
    for suffix in ("lora_up.weight", "lora_down.weight"):
        stem = "lora_unet_double_blocks_0_img_attn_qkv."
        file[f"lora_unet_double_blocks_7_img_attn_qkv.{suffix}"] = file[stem + suffix]
    report = host.apply(model, None, file, 1.0, 1.0, "report").report
    assert len(report.matched) == 3
    reason = "the model has no block of this number"
    assert report.unmatched == {"lora_unet_double_blocks_7_img_attn_qkv": reason}
    assert "3 of 4 modules" in report.to_text()
    with pytest.raises(AdapterLabError, match="double_blocks_7"):
        host.apply(model, None, file, 1.0, 1.0, "error")


@pytest.fixture(scope="module")
def clip():
    """A tiny CLIP-L with random weights."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_hidden_layers": 2, "projection_dim": 32,
    }  # fmt: skip
    options = {"clip_l_model_config": sizes, "dtype": torch.float32}
    rng = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        made = comfy.sd.CLIP(ClipTarget(SD1Tokenizer, SD1ClipModel), model_options=options)
        for parameter in made.cond_stage_model.parameters():
            parameter.data.normal_(std=0.2, generator=rng)
    return made


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_text_encoder(load, clip, mode):
    """Against weights changed by hand; the schedule is for the diffusion model alone."""
    model, rng = load("flux"), torch.Generator().manual_seed(0)
    up, down = torch.randn(32, 4, generator=rng), torch.randn(4, 32, generator=rng) * 0.1
    stem = "lora_te_text_model_encoder_layers_1_self_attn_v_proj"
    _, file = trained(model, "flux", "lora", 0)
    file |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    schedule = "0@0, 1@1" if mode == "bypass" else ""
    with torch.inference_mode():
        before = clip.encode("a star")
        arguments = (model, clip, file, 1.0, 0.5, "error")
        done = host.apply(*arguments, mode=mode, schedule=schedule)
        result, again = done.clip.encode("a star"), clip.encode("a star")
        layer = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[1]
        weight = layer.self_attn.v_proj.weight
        weight.data.add_(up @ down, alpha=0.5)
        expected = clip.encode("a star")
        weight.data.sub_(up @ down, alpha=0.5)
    assert torch.equal(before, again) and not torch.allclose(before, expected, atol=1e-2)
    close(result, expected)
    assert bool(done.clip.patcher.patches) == (mode == "merge")


def test_strength_by_part_of_the_model(load, clip):
    """Block weights reach the text encoder under the name of its part."""
    model, stem = load("flux"), "lora_te_text_model_encoder_layers_1_self_attn_v_proj"
    _, file = trained(model, "flux", "lora", 0)
    file |= {f"{stem}.lora_up.weight": torch.ones(32, 2)}
    file |= {f"{stem}.lora_down.weight": torch.ones(2, 32)}
    done = host.apply(model, clip, file, block_weights="clip_l.* = 0")
    assert done.report.strengths == {stem: 0.0}
    assert done.model.patches and not done.clip.patcher.patches
