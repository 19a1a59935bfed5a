"""Kernels and attention without a backward pass, in the models that call them."""

from __future__ import annotations

import comfy.ldm.flux.math
import comfy.ldm.modules.attention as attention
import comfy.ldm.wan.model
import comfy.model_management
import comfy_kitchen
import pytest
import samples
import sessions
import tiny
import torch
from adapter_lab.nodes.host import kernels
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import Session

ATTENTION = [
    f"blocks.{i}.{kind}_attn.{x}_proj" for i in (0, 1) for kind in ("self", "cross") for x in "qk"
]


def test_cosmos_needs_the_swap():
    """What the swap is for: the fused rotary embedding of Cosmos-Predict2 has no backward pass."""
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    angles = torch.eye(2).expand(1, 4, 1, 4, 2, 2)
    fused, _ = comfy_kitchen.rms_rope_split_half(q, q, angles, torch.ones(8), torch.ones(8), 1e-6)
    with pytest.raises(RuntimeError, match="autograd"):
        fused.sum().backward()


@pytest.mark.parametrize("options", [sessions.OFF, sessions.BLOCKS], ids=["kept", "checkpointed"])
def test_gradients_reach_queries_and_keys_of_cosmos(options):
    model = tiny.cosmos()
    made = sessions.adapters(model, ATTENTION)
    _, grads = sessions.gradients(model, "cosmos", made, options)
    assert all(g is not None and g.norm() > 0 for g in grads)
    sessions.check_slope(model, "cosmos", made, options)
    sessions.check_slope(model, "cosmos", sessions.adapters(model), options)


@pytest.mark.parametrize("name", kernels._FUSED)
def test_swapped_kernels_compute_the_same(name):
    fused = getattr(comfy_kitchen, name)
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 6, 3, 8, generator=rng)
    angles = torch.randn(1, 6, 1, 4, 2, 2, generator=rng)
    scale = torch.rand(8, generator=rng)
    inputs = [q] if name.endswith("1") else [q, k]
    scales = [scale] * len(inputs) if name.startswith("rms") else []
    expected = fused(*inputs, angles, *scales)
    leaves = [t.clone().requires_grad_() for t in inputs]
    with kernels.differentiable():
        found = getattr(comfy_kitchen, name)(*leaves, angles, *scales)
    assert getattr(comfy_kitchen, name) is fused
    outputs = [found] if isinstance(found, torch.Tensor) else found
    torch.testing.assert_close(found, expected)
    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    assert all(leaf.grad is not None for leaf in leaves)


class Inference(torch.autograd.Function):
    """Attention as sage and flash are in ComfyUI: no backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, heads, options):
        return attention.attention_basic(q, k, v, heads, **options)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("this attention is for inference")


@attention.wrap_attn
def inference_only(q, k, v, heads, mask=None, attn_precision=None, **kwargs):
    """Chosen by a start-up flag."""
    return Inference.apply(q, k, v, heads, {"mask": mask, **kwargs})


@pytest.fixture
def chosen(monkeypatch):
    """The attention of every model, as a start-up flag chooses it."""
    for module, name in kernels._attention_users():
        monkeypatch.setattr(module, name, inference_only)
    return inference_only


@pytest.mark.parametrize("kind", ["flux", "wan", "sd15", "sd3", "hunyuan_video"])
def test_attention_for_inference_is_swapped(load, chosen, kind):
    model = load(kind)
    made = sessions.adapters(model)
    found = sessions.gradients(model, kind, made)
    assert attention.optimized_attention is chosen
    assert comfy.ldm.flux.math.optimized_attention is chosen
    assert comfy.ldm.wan.model.optimized_attention is chosen
    assert any(g is not None and g.norm() > 0 for g in found[1])


def test_models_that_pass_no_options(chosen):
    """Ernie-Image and others call the attention of their own module and pass nothing on."""
    import comfy.ldm.ernie.model as ernie

    x = torch.randn(1, 4, 8, requires_grad=True)
    with kernels.differentiable():
        ernie.optimized_attention(x, x, x, 2).sum().backward()
    assert x.grad is not None and ernie.optimized_attention is chosen


def test_attention_of_another_node_is_swapped(load):
    model = load("flux").clone()
    calls = []

    def override(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    made = sessions.adapters(model)
    with torch.inference_mode(), Session(model, made, sessions.OFF) as session:
        sessions.loss(HostProcess(session), "flux").backward()
        assert not calls
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        options = model.model_options["transformer_options"]
        assert options["optimized_attention_override"] is override
        samples.run(model, "flux")
