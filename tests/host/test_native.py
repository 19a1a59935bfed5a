"""What ComfyUI's own loader understands, it loads from our ComfyUI spelling with our result."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import comfy.utils
import made
import pytest
import samples
import torch
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.keys import convert
from adapter_lab.nodes.host import model as host

LAYERS = {
    "flux": [
        "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1",
    ],
    "wan": ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.cross_attn.o"],
    "sd15": [
        "input_blocks.1.0.in_layers.2",
        "input_blocks.1.1.proj_in",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ],
}  # fmt: skip
# It takes the norm of the wrong weight for DoRA on outputs, and reads biases beside LoRA alone.
ALGORITHMS = [
    "lora", "loha", "lokr", "glora", "oft", "boft", "full", "set", "norm", "bias", "dora in",
    "tucker",
]  # fmt: skip
NORMS = {"flux": "double_blocks.0.img_attn.norm.query_norm", "wan": "blocks.0.norm3",
         "sd15": "input_blocks.1.0.in_layers.0"}  # fmt: skip
# 320 channels are no power of two times a block, and only a kernel has a Tucker decomposition.
CASES = [
    (kind, algorithm)
    for kind in LAYERS
    for algorithm in ALGORITHMS
    if (kind, algorithm) != ("sd15", "boft") and (algorithm != "tucker" or kind == "sd15")
]


def modules(model, kind, algorithm):
    sizes = host.shapes(model.model)
    if algorithm == "norm":
        size = sizes[f"diffusion_model.{NORMS[kind]}.weight"]
        return {NORMS[kind]: {"w_norm": torch.linspace(-1, 1, size[0])}}
    chosen = {path: sizes[f"diffusion_model.{path}.weight"] for path in LAYERS[kind]}
    if algorithm == "bias":
        path = next(p for p in chosen if f"diffusion_model.{p}.bias" in sizes)
        return {path: {"diff_b": torch.linspace(-9, 9, chosen[path][0])}}
    if algorithm == "dora in":
        return {path: made.dora("lora", size, axis=1) for path, size in chosen.items()}
    if algorithm == "tucker":
        (path, size), rng = next(iter(chosen.items())), torch.Generator().manual_seed(0)
        shapes = {
            "lora_up.weight": (size[0], 4, 1, 1), "lora_mid.weight": (4, 4, 3, 3),
            "lora_down.weight": (4, size[1], 1, 1),
        }  # fmt: skip
        return {path: {n: torch.randn(s, generator=rng) * 0.5 for n, s in shapes.items()}}
    return {path: made.factors(algorithm, size) for path, size in chosen.items()}


def run(model, kind):
    comfy.model_management.load_models_gpu([model])
    return samples.prediction(model, kind)


@pytest.mark.parametrize("kind, algorithm", CASES)
def test_native_loader_agrees(load, tmp_path, kind, algorithm):
    model, path = load(kind), tmp_path / "adapter.safetensors"
    made_of = made.adapter(modules(model, kind, algorithm))
    kohya = {
        f"lora_unet_{stem.removeprefix('diffusion_model.').replace('.', '_')}.{suffix}": tensor
        for stem, suffix, tensor in split(made_of)
    }
    write_adapter(path, convert(Adapter(kohya, name="kohya"), "comfyui"))
    with torch.inference_mode():
        before = run(model, kind)
        ours = host.apply(model, None, read_adapter(path), 1.0, 1.0, "error", mode="merge").model
        native, _ = comfy.sd.load_lora_for_models(
            model, None, comfy.utils.load_torch_file(str(path), safe_load=True), 1.0, 1.0
        )
        assert native.patches.keys() == ours.patches.keys()
        expected = run(native, kind)
        result = run(ours, kind)
    assert float((result - expected).norm() / expected.norm()) < 1e-5
    assert float((expected - before).norm() / before.norm()) > 1e-3


def split(adapter):
    """(stem, suffix, tensor); a suffix of these files is what follows a path of a module."""
    paths = sorted({p for names in LAYERS.values() for p in names} | {*NORMS.values()}, key=len)
    for key, tensor in adapter.items():
        stem = next(
            s for p in reversed(paths) if key.startswith((s := f"diffusion_model.{p}") + ".")
        )
        yield stem, key[len(stem) + 1 :], tensor
