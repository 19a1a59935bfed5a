"""Models that do not fit, activations that wait elsewhere, and what is told of both."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import pytest
import sessions
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.nodes.host import checkpointing, memory
from adapter_lab.nodes.host.model import architecture
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import Session, SessionOptions, blocks, layers

STREAMED = SessionOptions(checkpointing="off", streaming="on")
STREAMED_BLOCKS = SessionOptions(checkpointing="blocks", streaming="on")


@pytest.mark.parametrize("options", [STREAMED, STREAMED_BLOCKS], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["flux", "wan", "sd15"])
def test_streaming_changes_no_gradient(load, kind, options):
    model = load(kind)
    adapters = sessions.adapters(model)
    expected = sessions.gradients(model, kind, adapters)
    found = sessions.gradients(model, kind, adapters, options)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    sessions.check_same(found[1], expected[1], rtol=1e-3, atol=1e-5)
    again = sessions.gradients(model, kind, adapters)
    assert again[0] == expected[0]


def test_streamed_layers_are_patched(load):
    """With an adapter of another node, at each use."""
    base = load("flux")
    model, adapters = sessions.merged(base), sessions.adapters(base)
    expected = sessions.gradients(model, "flux", adapters)
    found = sessions.gradients(model, "flux", adapters, STREAMED)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[0] != pytest.approx(sessions.gradients(base, "flux", adapters)[0], rel=1e-4)
    sessions.check_same(found[1], expected[1], rtol=1e-3, atol=1e-5)


def test_one_layer_is_resident_at_a_time(load):
    """Weights that ComfyUI made for use, alive at once, forward and backward."""
    model, alive, most = load("flux").clone(), [], []

    def watched(weight):
        fresh = weight.clone()
        alive.append(weakref.ref(fresh.untyped_storage()))
        most.append(sum(ref() is not None for ref in alive))
        return fresh

    names = [name for name in layers(model) if "blocks." in name]
    for name in names:
        model.add_weight_wrapper(f"diffusion_model.{name}.weight", watched)
    adapters = sessions.adapters(model)
    sessions.gradients(model, "flux", adapters, STREAMED)
    # Every one forward and at least once more backward, the first of the model has no need.
    assert len(most) > 1.8 * len(names)
    assert max(most) <= 2


def test_a_model_that_may_not_be_streamed(load):
    model = load("flux")
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    model.model.diffusion_model.img_in.to("meta")
    with pytest.raises(AdapterLabError, match="not loaded completely") as caught:
        memory._require_loaded(model)
    assert "streaming" in str(caught.value)


def test_offloaded_activations_are_exact(load):
    model = load("flux")
    adapters = sessions.adapters(model)
    _, expected = sessions.gradients(model, "flux", adapters, sessions.BLOCKS)
    options = SessionOptions(checkpointing="blocks", offload=True)
    _, found = sessions.gradients(model, "flux", adapters, options)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_offloaded_activations_do_not_stay(load, monkeypatch):
    """Whatever holds the input of a block goes through where it is sent; here, to a copy."""
    model, inputs, kept = load("flux"), [], []
    hooks = torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(checkpointing, "_elsewhere", lambda: hooks(torch.clone, torch.clone))
    block = model.model.diffusion_model.single_blocks[0]
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    adapters = sessions.adapters(model)
    for offload in (False, True):
        inputs.clear()
        options = SessionOptions(checkpointing="blocks", offload=offload)
        with torch.inference_mode(), Session(model, adapters, options) as session:
            value = sessions.loss(HostProcess(session), "flux")
            gc.collect()
            kept.append(inputs[0]() is not None)
            value.backward()
    handle.remove()
    assert kept == [True, False]


def test_automatic_checkpointing(load):
    """On a CPU only where the activations would fill it: latents of a size that no CPU holds."""
    model = load("flux")
    count = len(blocks(model, None))
    assert not memory.keeps_too_much(model, count, (1, 16, 8, 8))
    assert memory.keeps_too_much(model, count, (64, 16, 40000, 40000))
    kept = []
    for latent in ((1, 16, 8, 8), (64, 16, 40000, 40000)):
        with torch.inference_mode(), Session(model, {}, SessionOptions(latent=latent)):
            kept.append("forward" in vars(model.model.diffusion_model.single_blocks[0]))
    assert kept == [False, True]


@pytest.mark.parametrize("kind", ["flux", "wan", "sd3", "hunyuan_video"])
def test_blocks_of_an_architecture_that_is_not_known(load, kind):
    model = load(kind)
    assert set(blocks(model, architecture(model))) <= set(blocks(model, None))


def test_out_of_memory_is_told():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert memory.is_out_of_memory(caught.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
