"""Adapters on activations give what merged ones give, and leave no trace."""

from __future__ import annotations

import gc
import json

import comfy.model_management
import comfy.sd
import made
import pytest
import torch
from adapter_lab.core.adapters import load as load_algorithm
from adapter_lab.core.files import Adapter
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host.bypass import KEY
from adapter_lab.nodes.host.forward import Forward
from safetensors.torch import load_file, save_file
from samples import apply, close, differs, prediction, run, shape

LAYERS = {
    "flux": [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.txt_mlp.0",
        "single_blocks.0.linear1",
    ],
    "wan": ["patch_embedding", "blocks.0.self_attn.q", "blocks.1.ffn.0"],
    "sd15": [
        "input_blocks.1.0.in_layers.2",
        "input_blocks.1.1.proj_in",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ],
    "sd3": ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.context_block.mlp.fc1",
            "x_embedder.proj"],
    "hunyuan_video": ["img_in.proj", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"],
}  # fmt: skip
NORM = "double_blocks.0.img_attn.norm.query_norm"
QKV = "transformer.transformer_blocks.0.attn.to_"


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def forwards(model):
    """Layers whose forward is not that of their class."""
    return [n for n, m in model.model.named_modules() if "forward" in vars(m)]


def diff(model, deltas):
    """The model with dense deltas merged by ComfyUI alone."""
    clone = model.clone()
    clone.add_patches({f"diffusion_model.{key}": ("diff", (d,)) for key, d in deltas.items()})
    return clone


# 320 channels are no power of two times a block: there is no BOFT of them.
CASES = [
    (kind, algorithm)
    for kind in LAYERS
    for algorithm in (*made.WEIGHTS, "dora out", "dora in")
    if (kind, algorithm) != ("sd15", "boft")
]


@pytest.mark.parametrize("kind, algorithm", CASES)
def test_same_as_merging(model, kind, algorithm):
    base, modules = model(kind), {}
    for path in LAYERS[kind]:
        sizes = shape(base, path)
        if algorithm.startswith("dora"):
            modules[path] = made.dora("lora", sizes, axis=int(algorithm == "dora in"))
        else:
            modules[path] = made.factors(algorithm, sizes)
    before, file = run(base, kind), made.adapter(modules)
    for strength in (1.0, 0.5, -1.0):
        merged = run(apply(base, file, strength, mode="merge"), kind)
        close(run(apply(base, file, strength, mode="bypass"), kind), merged)
        differs(merged, before)
    assert torch.equal(run(apply(base, file, 0.0, mode="bypass"), kind), before)
    assert torch.equal(run(base, kind), before) and not forwards(base)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_biases_of_layers(model, kind):
    base, path = model(kind), LAYERS[kind][0]
    sizes = shape(base, path)
    rng = torch.Generator().manual_seed(0)
    bias = {"diff_b": torch.randn(sizes[0], generator=rng)}
    for modules in ({path: bias}, {path: {**made.factors("oft", sizes), **bias}}):
        file = made.adapter(modules)
        expected = run(apply(base, file, 0.7, mode="merge"), kind)
        close(run(apply(base, file, 0.7, mode="bypass"), kind), expected)
        differs(expected, run(base, kind))


def split(dora=False):
    """q, k and v of one fused weight as a diffusers file has them."""
    rng = torch.Generator().manual_seed(0)
    file = {}
    for n in "qkv":
        file[f"{QKV}{n}.lora_A.weight"] = torch.randn(4, 128, generator=rng)
        file[f"{QKV}{n}.lora_B.weight"] = torch.randn(128, 4, generator=rng) * 0.05
        if dora:
            lengths = 1 + torch.rand(128, generator=rng)
            file[f"{QKV}{n}.lora_magnitude_vector"] = lengths
    return Adapter(file, name="split.safetensors")


@pytest.mark.parametrize("dora", [False, True])
def test_ranges_of_rows(model, dora):
    base, file = model("flux"), split(dora)
    merged = run(apply(base, file, 0.8, mode="merge"), "flux")
    close(run(apply(base, file, 0.8, mode="bypass"), "flux"), merged)
    differs(merged, run(base, "flux"))


@pytest.mark.parametrize("second", ["lokr", "oft", "dora"])
def test_order_of_stacking_does_not_matter(model, second):
    """Each delta is that of the model's own weight; against their sum, merged by ComfyUI."""
    base, path = model("flux"), LAYERS["flux"][0]
    sizes = shape(base, path)
    weight = base.model.state_dict()[f"diffusion_model.{path}.weight"]
    tensors = [
        made.factors("glora", sizes, 1),
        made.dora("lora", sizes, 2) if second == "dora" else made.factors(second, sizes, 2),
    ]
    deltas = [load_algorithm(t).at(0.6).delta(weight) for t in tensors]
    expected = run(diff(base, {f"{path}.weight": sum(deltas)}), "flux")
    files = [made.adapter({path: t}, name=f"{i}.safetensors") for i, t in enumerate(tensors)]
    for order in (files, files[::-1]):
        stacked = base
        for file in order:
            stacked = apply(stacked, file, 0.6, mode="bypass")
        close(run(stacked, "flux"), expected)
    differs(expected, run(base, "flux"))


def test_clones_do_not_meet(model):
    """Whatever is loaded after whatever, each gives its own."""
    base, paths = model("flux"), LAYERS["flux"]
    one = made.adapter({paths[0]: made.factors("lora", shape(base, paths[0]))})
    norm = {NORM: {"w_norm": torch.ones(128)}}
    two = made.adapter({p: made.factors("lokr", shape(base, p), 5) for p in paths} | norm)
    first = apply(base, one, mode="bypass")
    expected = {"base": run(base, "flux"), "first": run(first, "flux")}
    second = apply(first, two, mode="bypass")  # made while the first is loaded
    expected["second"] = run(second, "flux")
    models = {"base": base, "first": first, "second": second}
    for name in ("first", "second", "base", "second", "first", "base", "first", "first"):
        assert torch.equal(run(models[name], "flux"), expected[name])
    comfy.model_management.unload_all_models()
    assert not forwards(base)
    assert torch.equal(run(base, "flux"), expected["base"])


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_clone_that_is_never_loaded(model, kind):
    """ComfyUI puts the forwards of a clone on while it adds patches to it, and off when it dies."""
    base, path = model(kind), LAYERS[kind][-1]
    modules = {path: made.factors("lora", shape(base, path))}
    if kind == "wan":
        modules["blocks.0.modulation"] = {"diff": torch.ones(1, 6, 128)}
    adapted, before = apply(base, made.adapter(modules), mode="bypass"), run(base, kind)
    expected = run(adapted, kind)
    other = diff(adapted, {f"{path}.weight": torch.zeros(shape(base, path))})
    assert torch.equal(prediction(adapted, kind), expected)
    del other
    gc.collect()
    assert torch.equal(prediction(adapted, kind), expected)
    assert torch.equal(run(base, kind), before) and not forwards(base)


def test_beside_the_bypass_of_comfyui(model):
    """ComfyUI's own takes its forwards off in the order it put them on, under which ours is."""
    base, path = model("flux"), LAYERS["flux"][0]
    made_of = made.factors("lora", shape(base, path), 1)
    ours = apply(base, made.adapter({path: made.factors("lokr", shape(base, path))}), mode="bypass")
    theirs = made.adapter({path: made_of})
    both, _ = comfy.sd.load_bypass_lora_for_models(ours, None, theirs, 1.0, 1.0)
    expected = run(apply(ours, theirs, mode="bypass"), "flux")
    before = run(base, "flux")
    for _ in range(2):
        close(run(both, "flux"), expected)
        assert torch.equal(run(base, "flux"), before)
    run(both, "flux")
    comfy.model_management.unload_all_models()
    assert torch.equal(run(base, "flux"), before)
    one = run(ours, "flux")
    close(one, run(apply(diff(base, {}), made.adapter(
        {path: made.factors("lokr", shape(base, path))}), mode="merge"), "flux"))  # fmt: skip


def test_cancelled_in_the_middle(model):
    base = model("flux")
    file = made.adapter({p: made.factors("lora", shape(base, p)) for p in LAYERS["flux"]})
    adapted, before = apply(base, file, mode="bypass"), run(base, "flux")
    expected = run(adapted, "flux")
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(adapted, "flux")
    assert torch.equal(run(base, "flux"), before)
    assert torch.equal(run(adapted, "flux"), expected)


def test_factors_are_loaded_and_counted_by_comfyui(model):
    base, path = model("flux"), LAYERS["flux"][0]
    file = made.adapter({path: made.factors("lora", shape(base, path))})
    adapted = apply(base, file, mode="bypass")
    (held,) = adapted.get_additional_models_with_key(KEY)
    assert held.model_size() == sum(t.nbytes for n, t in file.items() if not n.endswith("alpha"))
    assert held in adapted.get_nested_additional_models()
    assert len(apply(adapted, file, mode="bypass").get_additional_models_with_key(KEY)) == 2
    assert adapted.get_additional_models_with_key(KEY) == [held]
    raw = made.adapter({"blocks.0.modulation": {"diff": torch.ones(1, 6, 128)}})
    assert not apply(model("wan"), raw).get_additional_models_with_key(KEY)


def test_factors_follow_the_layer(model):
    """ComfyUI loads a text encoder alone: its factors stay where they were read."""
    base, path = model("flux"), LAYERS["flux"][0]
    file = made.adapter({path: made.factors("lora", shape(base, path))})
    adapted = apply(base, file, mode="bypass")
    before = run(adapted, "flux")
    (term,) = base.model.get_submodule(f"diffusion_model.{path}").forward.terms
    for name in ("meta", "cpu"):
        assert term.set(0.0, torch.device(name))
        assert {t.device.type for t in term.algorithm.tensors.values()} == {name}
    assert torch.equal(prediction(adapted, "flux"), before)


@pytest.fixture(scope="module")
def quantised(checkpoints, tmp_path_factory):
    """(an fp8 Flux, the same with its weights dequantised)."""
    state, plain = load_file(str(checkpoints("flux"))), {}
    for name, weight in list(state.items()):
        plain[name] = weight
        if weight.ndim == 2 and "blocks" in name:
            scale = weight.abs().max() / 448
            state[name] = (weight / scale).to(torch.float8_e4m3fn)
            stem = name.removesuffix("weight")
            state[f"{stem}weight_scale"] = scale
            layout = json.dumps({"format": "float8_e4m3fn"}).encode()
            state[f"{stem}comfy_quant"] = torch.tensor(list(layout), dtype=torch.uint8)
            plain[name] = state[name].float() * scale
    folder, models = tmp_path_factory.mktemp("fp8"), []
    for name, tensors in (("fp8", state), ("plain", plain)):
        save_file(tensors, str(folder / f"{name}.safetensors"))
        with torch.inference_mode():
            models.append(comfy.sd.load_diffusion_model(str(folder / f"{name}.safetensors")))
    return models


@pytest.mark.parametrize(
    "algorithm", ["lora", "lokr", "oft", "glora", "hra", "tlora", "dora", "split"]
)
def test_quantised_base(quantised, algorithm):
    """Against merging in float32 into the dequantised weights."""
    quant, plain = quantised
    if algorithm == "split":
        file = split(dora=True)
    else:
        sizes = {path: shape(plain, path) for path in LAYERS["flux"]}
        file = made.adapter({
            path: made.dora("lora", s) if algorithm == "dora" else made.factors(algorithm, s)
            for path, s in sizes.items()
        })  # fmt: skip
    done = host.apply(quant, None, file, 0.7, 1.0, "error")
    assert done.mode.chosen == "bypass" and "float8_e4m3fn" in done.to_text()
    before, expected = run(plain, "flux"), run(apply(plain, file, 0.7, mode="merge"), "flux")
    close(run(quant, "flux"), before)
    close(run(done.model, "flux"), expected)
    differs(expected, before)


def test_weights_that_stay_on_the_cpu(model):
    """Streamed layers patch and cast their weights at each use; theirs is what a delta is of."""
    base, path = model("flux"), LAYERS["flux"][0]
    sizes = shape(base, path)
    native = torch.randn(sizes, generator=torch.Generator().manual_seed(1)) * 0.05
    under = diff(base, {f"{path}.weight": native})
    adapted = apply(under, made.adapter({path: made.factors("oft", sizes)}), mode="bypass")
    gl = apply(under, made.adapter({path: made.factors("glora", sizes)}), mode="bypass")
    whole = [run(m, "flux") for m in (adapted, gl)]
    comfy.model_management.unload_all_models()
    for loaded, expected in zip((adapted, gl), whole, strict=True):
        loaded.partially_load(torch.device("cpu"), 1)
        module = base.model.get_submodule(f"diffusion_model.{path}")
        assert module.weight_function and isinstance(module.forward, Forward)
        close(prediction(loaded, "flux"), expected)
        loaded.detach()
    assert not forwards(base)
