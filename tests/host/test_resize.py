"""Resize Adapter: what it makes acts in ComfyUI as the best approximation of what it was given."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import made
import pytest
import samples
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.core.merge.menus import NESTED
from adapter_lab.nodes.host.model import shapes
from adapter_lab.nodes.resize import ResizeAdapter

PATHS = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2")
UNET = ("middle_block.0.in_layers.2", "middle_block.1.transformer_blocks.0.attn1.to_q")


def resize(file, rank, rule="fixed", parameter=0.9, **more):
    """The adapter and the text of the node."""
    done = ResizeAdapter.execute(file, rank, rule, parameter, **more)
    adapter, text = done.args
    assert done.ui["text"] == [text] and "rows" in done.ui["adapter_lab"][0]
    return adapter, text


def merged(model, file):
    """Module path -> W' - W, as ComfyUI's own LoRA loader makes it."""
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(file), 1.0, 0.0)
    changes = {}
    for key in patched.patches:
        weight = comfy.utils.get_attr(model.model, key).detach().float()
        new = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key)
        changes[key.removeprefix("diffusion_model.").removesuffix(".weight")] = new - weight
    return changes


def size(model, path):
    return shapes(model.model)[f"diffusion_model.{path}.weight"]


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "glora", "oft", "full"])
@pytest.mark.parametrize("kind", ["flux", "sd15"])
def test_native_loader_gets_the_best_of_the_rank(load, kind, algorithm):
    """Eckart and Young's error for the change that ComfyUI itself makes of the original."""
    model = load(kind)
    paths = PATHS if kind == "flux" else UNET
    file = made.adapter(
        {p: made.factors(algorithm, size(model, p), n) for n, p in enumerate(paths)}
    )
    # Two ranks fewer than a made LoRA has.
    resized, text = resize(file, 2, model=model, exact=True)
    before, after = merged(model, file), merged(model, resized)
    assert set(before) == set(after) == set(paths)
    for path, change in before.items():
        s = torch.linalg.svdvals(change.flatten(1).double())
        lost = float((after[path] - change).norm() / change.norm())
        assert lost == pytest.approx(float(s[2:].norm() / s.norm()), rel=2e-3, abs=2e-4)
        assert f"{path}: LoRA 2, error {lost:.2%}"[:-3] in text
    assert all("lora_" in key or key.endswith("alpha") for key in resized)


@pytest.mark.parametrize("dora", [False, True])
def test_without_a_limit_the_picture_is_the_same(load, dora):
    """Every rank that the change has, through the pack's own loader."""
    model = load("flux")
    file = made.adapter({
        path: (made.dora if dora else made.factors)("lokr", size(model, path), n)
        for n, path in enumerate(PATHS)
    })  # fmt: skip
    resized, _ = resize(file, 0, model=model)
    plain = samples.run(model, "flux")
    wanted = samples.run(samples.apply(model, file), "flux")
    samples.differs(plain, wanted)
    samples.close(samples.run(samples.apply(model, resized), "flux"), wanted, 1e-3)


def test_the_model_is_asked_for(load):
    model = load("flux")
    file = made.adapter({PATHS[0]: made.factors("oft", size(model, PATHS[0]))})
    with pytest.raises(AdapterLabError, match=r"\(Diag-OFT\)\. Give the model"):
        resize(file, 1)
    strange = Adapter({k.replace("double_blocks.0", "double_blocks.7"): t for k, t in file.items()})
    with pytest.raises(AdapterLabError, match="no weight that '.*double_blocks.7"):
        resize(strange, 1, model=model)


def test_options_reach_the_core(load):
    file = made.adapter(
        {"a": made.factors("lora", (64, 48)), "b": made.factors("lora", (8, 8, 3, 3))}
    )
    resized, _ = resize(file, 3, conv_rank=1, dtype="bf16")
    down = {key[16]: t for key, t in resized.items() if "lora_down" in key}
    assert (len(down["a"]), len(down["b"])) == (3, 1) and down["a"].dtype == torch.bfloat16
    _, text = resize(file, 0, "error", 0.2)
    assert "error of all modules together" in text
    nested, _ = resize(file, 2, NESTED)
    key = "diffusion_model.a.lora_down.weight"
    assert torch.equal(nested[key], file[key][:2])
    with pytest.raises(AdapterLabError, match="does not suit the rule sv_ratio: found 0.9"):
        resize(file, 4, "sv_ratio", 0.9)


def test_cancelling_ends_it(load):
    file = made.adapter({f"a{n}": made.factors("lora", (64, 48), n) for n in range(3)})
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        resize(file, 2)
