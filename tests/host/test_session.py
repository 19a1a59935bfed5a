"""Gradients through ComfyUI's models: right, with and without checkpointing, and without traces."""

from __future__ import annotations

import comfy.model_management
import made as made_factors
import pytest
import samples
import torch
import torch.nn as nn
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.nodes.host import session as host
from adapter_lab.nodes.host.model import apply, architecture
from adapter_lab.nodes.host.plain import plain_tensors
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import layers
from sessions import BLOCKS, OFF, adapters, check_same, check_slope, gradients, loss

KINDS = ("flux", "wan", "sd15")
FAMILIES = (*KINDS, "sd3", "hunyuan_video")


@pytest.mark.parametrize("options", [OFF, BLOCKS], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_gradient_is_the_slope_of_the_loss(load, kind, options):
    model = load(kind)
    assert host.blocks(model, architecture(model))
    check_slope(model, kind, adapters(model), options)


@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpointing_changes_no_gradient(load, kind):
    model = load(kind)
    made = adapters(model)
    _, plain = gradients(model, kind, made)
    _, again = gradients(model, kind, made, BLOCKS)
    check_same(again, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_session_leaves_no_trace(load, kind):
    model = load(kind)
    network = model.model.diffusion_model
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    before = {n: (p, p.clone()) for n, p in model.model.named_parameters()}
    hooks = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in network.modules()]
    attributes = [set(vars(m)) for m in network.modules()]
    made = adapters(model)
    with (
        pytest.raises(ZeroDivisionError),
        torch.inference_mode(),
        host.Session(model, made, BLOCKS),
    ):
        assert comfy.model_management.in_training
        assert not any(p.is_inference() for p in model.model.parameters())
        raise ZeroDivisionError
    assert not comfy.model_management.in_training
    for name, parameter in model.model.named_parameters():
        original, value = before[name]
        assert parameter is original and torch.equal(parameter, value)
    assert hooks == [(m._forward_hooks, m._forward_pre_hooks) for m in network.modules()]
    assert attributes == [set(vars(m)) for m in network.modules()]


def test_batch_equals_its_items(load):
    """Each item is predicted with its own conditioning, also when they cannot be stacked."""
    model = load("flux")
    items = samples.items("flux", 3)
    long = samples.TrainItem(items[0].latent, torch.randn(9, 64), items[0].extra)
    items.insert(1, long)
    with torch.inference_mode(), host.Session(model, {}) as session:
        process = HostProcess(session)
        x = process.latents(items)
        sigma = torch.tensor([0.2, 0.5, 0.7, 0.9])
        together = process.predict(x, sigma, items, sigma)
        for i, item in enumerate(items):
            alone = process.predict(x[i : i + 1], sigma[i : i + 1], [item], sigma[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_recomputation_sees_the_options_of_its_block(load):
    """The UNet writes the current block into its options; patches read it there."""
    model = load("sd15").clone()
    seen = []
    model.set_model_attn1_patch(
        lambda q, k, v, options: (seen.append(options["block"]), (q, k, v))[1]
    )
    made = adapters(model)
    with torch.inference_mode(), host.Session(model, made, BLOCKS) as session:
        value = loss(HostProcess(session), "sd15")
        forward, seen[:] = list(seen), []
        value.backward()
    assert len(set(forward)) > 2 and seen == forward[::-1]


def test_checkpointing_keeps_less(load):
    """Bytes that autograd holds after the forward pass."""
    model = load("flux")
    made, kept = adapters(model), []
    for options in (OFF, BLOCKS):
        held = {}
        pack = torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=held: held.setdefault(t.data_ptr(), t), lambda t: t
        )
        with torch.inference_mode(), host.Session(model, made, options) as session, pack:
            loss(HostProcess(session), "flux")
        kept.append(sum(t.nbytes for t in held.values()))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_levels_stay_inside_the_schedule(load, kind):
    with torch.inference_mode(), host.Session(load(kind), {}) as session:
        process = HostProcess(session)
        margin = process.noise.margin
        t = process.noise.scheduled(torch.tensor([0.0, 0.5, 1.0])).clamp(margin, 1 - margin)
        first, *_, last = process.noise.sigma(t).flip(0).tolist()
        assert 1e-4 < last < first <= float(process.sampling.sigma_max)


@pytest.mark.parametrize("kind", KINDS)
def test_target_is_what_the_network_was_trained_to_say(load, kind):
    """Velocity, noise - latent, for flow models; the noise itself for SD1.5."""
    rng = torch.Generator().manual_seed(0)
    with torch.inference_mode(), host.Session(load(kind), {}) as session:
        process = HostProcess(session)
        x0 = process.latents(samples.items(kind, 2))
        noise = torch.randn(x0.shape, generator=rng)
        sigma = process.noise.sigma(torch.tensor([0.2, 0.7]))
        target = process.target(x0, process.corrupt(x0, noise, sigma), sigma)
        expected = noise if kind == "sd15" else noise - x0
    torch.testing.assert_close(target, expected, rtol=1e-3, atol=1e-3)


def adapted(model, algorithm, **how):
    """The model with an adapter on that was read, as ComfyUI runs nodes, in inference mode."""
    path = "double_blocks.0.img_attn.qkv"
    size = tuple(layers(model)[path].weight.shape)
    dora = algorithm == "dora"
    factors = made_factors.dora("lora", size) if dora else made_factors.factors(algorithm, size)
    with torch.inference_mode():
        file = made_factors.adapter({path: {n: t.clone() for n, t in factors.items()}})
        return apply(model, None, file, **how).model


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("algorithm", ["lora", "oft", "glora", "dora"])
def test_gradients_on_top_of_an_adapter(load, algorithm, sampled):
    """Beside the weights they are those of the merged model, also where it was sampled before."""
    model, found = load("flux"), {}
    trained = adapters(model, ["img_in", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"])
    for mode in ("merge", "bypass"):
        chosen = adapted(model, algorithm, mode=mode)
        if sampled:
            with torch.inference_mode():
                samples.run(chosen, "flux")
        found[mode] = gradients(chosen, "flux", trained)
    bare = gradients(model, "flux", trained)
    assert found["bypass"][0] == pytest.approx(found["merge"][0], rel=1e-4)
    assert found["bypass"][0] != pytest.approx(bare[0], rel=1e-4)
    for merged, beside in zip(found["merge"][1], found["bypass"][1], strict=True):
        samples.close(beside, merged, 1e-3)


def test_factors_that_are_no_inference_tensors(load):
    """Of an adapter that was just trained: what sampling computed from them is of no use here."""
    model, path = load("flux"), "double_blocks.0.img_attn.qkv"
    factors = made_factors.factors("oft", tuple(layers(model)[path].weight.shape))
    beside = apply(model, None, made_factors.adapter({path: factors}), mode="bypass").model
    trained = adapters(model, ["img_in"])
    with torch.inference_mode():
        before = samples.run(beside, "flux")
    assert gradients(beside, "flux", trained)[1][0].norm() > 0
    with torch.inference_mode():
        assert torch.equal(samples.run(beside, "flux"), before)


def test_factors_are_loaded_with_the_model(load):
    beside = adapted(load("flux"), "lora", mode="bypass")
    (held,) = beside.get_nested_additional_models()
    comfy.model_management.unload_all_models()
    with torch.inference_mode(), host.Session(beside, {}):
        assert held in [loaded.model for loaded in comfy.model_management.current_loaded_models]


class Rope(nn.Module):
    """Keeps its angles for the next time, as attribute and as buffer, until they are too few."""

    def __init__(self):
        super().__init__()
        self.length = 0

    def forward(self, x):
        if len(x) > self.length:
            self.length, self.cos = len(x), torch.full((len(x),), 0.5)
            self.register_buffer("sin", torch.full((len(x),), 2.0), persistent=False)
        return x * self.cos[: len(x)] * self.sin[: len(x)]


def test_what_sampling_left_in_the_model_can_be_trained_on():
    with torch.inference_mode():
        rope = Rope()
        rope(torch.ones(3))
    before = rope.cos, rope.sin
    for length in (3, 5):
        with plain_tensors(rope, torch.device("cpu")):
            x = torch.ones(length, requires_grad=True)
            rope(x).sum().backward()
            assert torch.equal(x.grad, torch.ones(length))
        assert (rope.cos is before[0] and rope.sin is before[1]) == (length == 3)
        with torch.inference_mode():
            assert torch.equal(rope(torch.ones(length)), torch.ones(length))


def test_a_schedule_cannot_be_trained_on(load):
    model = adapted(load("flux"), "lora", schedule="0@0, 1@1")
    with pytest.raises(AdapterLabError, match="schedule"):
        host.Session(model, {})
    host.Session(adapted(load("flux"), "lora", schedule="0.5"), {})
