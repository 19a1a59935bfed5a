"""Extracted adapters give the tuned model back in ComfyUI, with our loader and with its own."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import comfy.utils
import encoders
import folder_paths
import made
import pytest
import samples
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import write_adapter
from adapter_lab.core.merge.bake import bake
from adapter_lab.nodes.extract import ExtractAdapter
from adapter_lab.nodes.host import paths
from safetensors.torch import load_file, save_file

LAYERS = {
    "flux": ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "final_layer.linear"],
    "wan": ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.cross_attn.o"],
    "sd15": ["input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in", "out.2"],
}  # fmt: skip
RANK = 4
PLAIN = ("lora", RANK, "fixed", 0.0, 0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of diffusion models that ComfyUI lists."""
    root = tmp_path / "models"
    root.mkdir()
    for kind in ("diffusion_models", "checkpoints"):
        table = ([str(root), str(paths.output(kind))], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return root


def patched(model, file, tmp_path, kind):
    """What the model gives with the file on, put there by ComfyUI's own loader."""
    write_adapter(tmp_path / "file.safetensors", file)
    state = comfy.utils.load_torch_file(str(tmp_path / "file.safetensors"), safe_load=True)
    return samples.run(comfy.sd.load_lora_for_models(model, None, state, 1.0, 1.0)[0], kind)


@pytest.mark.parametrize("kind", LAYERS)
def test_gives_back_what_was_baked(load, checkpoints, folder, tmp_path, kind):
    model = load(kind)
    shapes = {path: samples.shape(model, path) for path in LAYERS[kind]}
    given = made.adapter({p: made.factors("lora", s, 1) for p, s in shapes.items()})
    (folder / "base.safetensors").write_bytes(checkpoints(kind).read_bytes())
    bake(folder / "base.safetensors", folder / "tuned.safetensors", [(given, 1.0)])
    assert ExtractAdapter.validate_inputs("base.safetensors", "tuned.safetensors") is True
    adapter, report = ExtractAdapter.execute("base.safetensors", "tuned.safetensors", *PLAIN).result
    assert report.startswith("extracted 3 LoRA: 100.00% of the squared change")
    assert sorted(k for k in adapter if k.endswith("alpha")) == sorted(
        f"diffusion_model.{path}.alpha" for path in LAYERS[kind]
    )
    for path in LAYERS[kind]:
        stem = f"diffusion_model.{path}"
        up, down = (adapter[f"{stem}.lora_{x}.weight"].flatten(1) for x in ("up", "down"))
        theirs = [given[f"{stem}.lora_{x}.weight"].flatten(1) for x in ("up", "down")]
        scale = float(given[f"{stem}.alpha"]) / RANK
        samples.close(up @ down, scale * theirs[0] @ theirs[1], 1e-3)
    with torch.inference_mode():
        plain = samples.run(model, kind)
        tuned = samples.run(comfy.sd.load_diffusion_model(str(folder / "tuned.safetensors")), kind)
        samples.differs(tuned, plain)
        samples.close(samples.run(samples.apply(model, adapter), kind), tuned, 1e-3)
        samples.close(patched(model, adapter, tmp_path, kind), tuned, 1e-3)


def test_norms_and_biases_load_everywhere(load, checkpoints, folder, tmp_path):
    """Of Flux files, whose norms ComfyUI renames."""
    state = load_file(checkpoints("flux"))
    norms = [key for key in state if "img_attn.norm" in key]
    assert len(norms) == 2
    for key in (*norms, "double_blocks.0.txt_mlp.0.bias", "img_in.bias"):
        state[key] = state[key] * 1.5 + 0.1
    save_file(state, folder / "tuned.safetensors")
    (folder / "base.safetensors").write_bytes(checkpoints("flux").read_bytes())
    adapter, report = ExtractAdapter.execute("base.safetensors", "tuned.safetensors", *PLAIN).result
    assert report.startswith("extracted 2 Norm, 2 Bias: 100.00%") or "2 Bias, 2 Norm" in report
    model = load("flux")
    with torch.inference_mode():
        tuned = samples.run(
            comfy.sd.load_diffusion_model(str(folder / "tuned.safetensors")), "flux"
        )
        samples.differs(tuned, samples.run(model, "flux"))
        samples.close(samples.run(samples.apply(model, adapter), "flux"), tuned)
        samples.close(patched(model, adapter, tmp_path, "flux"), tuned)


@pytest.mark.parametrize("kind, axis", [("flux", 1), ("sd15", 1), ("flux", 0)])
def test_dora_is_nearer_than_lora(load, checkpoints, folder, tmp_path, kind, axis):
    """Of a model whose inputs, or outputs, have other lengths; ComfyUI's own loader does inputs."""
    base, rng = load_file(checkpoints(kind)), torch.Generator().manual_seed(5)
    tuned = dict(base)
    for path in LAYERS[kind]:
        weight = base[f"{path}.weight"]
        units = [1] * weight.ndim
        units[axis] = -1
        gain = 1 + 0.2 * torch.rand(weight.shape[axis], generator=rng).reshape(units)
        up, down = (torch.randn(n, RANK, generator=rng) * 0.02
                    for n in (len(weight), weight[0].numel()))  # fmt: skip
        tuned[f"{path}.weight"] = gain * (weight + (up @ down.T).reshape(weight.shape))
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    names, on = ("base.safetensors", "tuned.safetensors"), ["output", "input"][axis]
    dora = ExtractAdapter.execute(*names, "dora", *PLAIN[1:], dora_on=on).result[0]
    lora = ExtractAdapter.execute(*names, *PLAIN).result[0]
    exact = kind == "sd15"  # its last layer has four outputs: a LoRA of rank 4 is all of it
    assert sum(key.endswith("dora_scale") for key in dora) == 3 - exact
    model = load(kind)
    with torch.inference_mode():
        wanted = samples.run(comfy.sd.load_diffusion_model(str(folder / "tuned.safetensors")), kind)
        plain = samples.run(samples.apply(model, lora), kind)
        assert float((plain - wanted).norm() / wanted.norm()) > 5e-3
        samples.close(samples.run(samples.apply(model, dora), kind), wanted, 1e-3)
        if axis:
            samples.close(patched(model, dora, tmp_path, kind), wanted, 1e-3)


def test_checkpoint_with_its_text_encoder(checkpoints, folder):
    """A checkpoint against another: U-Net and CLIP; without the second where it is alike."""
    state = {f"model.diffusion_model.{k}": t for k, t in load_file(checkpoints("sd15")).items()}
    clip = encoders.make("sd15").cond_stage_model.clip_l.transformer.state_dict()
    prefix = "cond_stage_model.transformer."
    state |= {prefix + k: t.contiguous() for k, t in clip.items()
              if "layers.0.self_attn" in k or "final_layer" in k}  # fmt: skip
    state["first_stage_model.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3)
    unet = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    encoder = f"{prefix}text_model.encoder.layers.0.self_attn.q_proj.weight"
    rng = torch.Generator().manual_seed(1)
    tuned = dict(state)
    for key in (unet, encoder):
        out, width = tuned[key].shape[:2]
        change = torch.randn(out, RANK, generator=rng) @ torch.randn(RANK, width, generator=rng)
        tuned[key] = tuned[key] + change.reshape(tuned[key].shape) * 1e-3
    save_file(state, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    names = ("base.safetensors", "tuned.safetensors")
    adapter, report = ExtractAdapter.execute(*names, *PLAIN).result
    assert {key.rsplit(".", 2)[0] for key in adapter if "lora" in key} == {
        "diffusion_model.input_blocks.1.1.proj_in",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    }
    assert "not compared: 1 tensors of a VAE or other parts" in report
    with torch.inference_mode():
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
            str(folder / names[0]), output_vae=False
        )
        done = comfy.sd.load_lora_for_models(model, clip, dict(adapter), 1.0, 1.0)
    assert [len(part.patches) for part in (done[0], done[1].patcher)] == [1, 1]
    less = ExtractAdapter.execute(*names, *PLAIN, min_diff=0.5).result[0]
    assert not any("text_encoders" in key for key in less)


def test_files_of_other_nodes_and_none_from_elsewhere(checkpoints, folder, tmp_path):
    (folder / "base.safetensors").write_bytes(checkpoints("wan").read_bytes())
    given = made.adapter({"blocks.0.self_attn.q": made.factors("lora", (128, 128), 1)})
    baked = paths.output("diffusion_models", "baked_00001_.safetensors")
    bake(folder / "base.safetensors", baked, [(given, 1.0)])
    adapter = ExtractAdapter.execute("base.safetensors", str(baked), *PLAIN).result[0]
    assert len(adapter) == 3
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(baked.read_bytes())
    with pytest.raises(AdapterLabError, match="outside of ComfyUI's folders"):
        ExtractAdapter.execute("base.safetensors", str(elsewhere), *PLAIN)
    assert "outside" in ExtractAdapter.validate_inputs("base.safetensors", str(elsewhere))
    assert "no model file" in ExtractAdapter.validate_inputs("base.safetensors", "gone.safetensors")
    gone = str(paths.output("gone.safetensors"))
    assert "no model file" in ExtractAdapter.validate_inputs("base.safetensors", gone)
    assert ExtractAdapter.validate_inputs("base.safetensors", None) is True  # over a link
    before = ExtractAdapter.fingerprint_inputs("base.safetensors", str(baked), rank=4)
    assert before == ExtractAdapter.fingerprint_inputs("base.safetensors", str(baked), rank=4)
    baked.write_bytes(baked.read_bytes() + b"")
    assert before != ExtractAdapter.fingerprint_inputs("base.safetensors", str(baked), rank=4)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ExtractAdapter.execute("base.safetensors", str(baked), *PLAIN)
