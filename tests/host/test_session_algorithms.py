"""Every algorithm that can be trained, in a model of ComfyUI."""

from __future__ import annotations

import comfy.sd
import made as factors
import pytest
import samples
import sessions
import tiny
import torch
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.adapters.training import choices, make
from adapter_lab.core.files import Adapter
from adapter_lab.core.train.random import generator
from adapter_lab.nodes.host import session
from adapter_lab.nodes.host.session import SessionOptions, layers

# Layers of both widths, one that is fed by a small vector and one whose input needs no gradient.
LAYERS = [
    "img_in", "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2",
    "single_blocks.0.linear1", "single_blocks.0.modulation.lin", "final_layer.linear",
]  # fmt: skip
FORMS = [*(name for name in choices() if name != "norm"), "dora"]


def config_of(name):
    """BOFT needs blocks that 896 rows, 7 * 128, are made of."""
    dora, rank = name == "dora", 14 if name == "boft" else 4
    return AdapterConfig("lora" if dora else name, rank=rank, alpha=4.0, dora=dora)


def trained(model, name):
    """The algorithm on some layers and away from its start."""
    config, made = config_of(name), {}
    for path in LAYERS:
        rng = generator(0, path)
        weight = model.model.diffusion_model.get_submodule(path).weight
        with torch.inference_mode(False):
            algorithm = make(tuple(weight.shape), config, rng)
            if algorithm.needs_weight_to_start:
                algorithm = algorithm.started(weight.clone())
            moved = {}
            for suffix, tensor in algorithm.tensors.items():
                noise = torch.randn(tensor.shape, generator=rng) * 0.05
                if suffix in algorithm.trained:
                    tensor = (tensor + noise).requires_grad_()
                moved[suffix] = tensor
            made[f"diffusion_model.{path}"] = algorithm.on(moved)
    return made


def values(made):
    """Copies of what is trained."""
    return [t for a in made.values() for t in a.trained.values()]


def slope(model, made, options):
    """(length of the gradient, central difference along it)."""
    _, grads = sessions.gradients(model, "flux", made, options, values)
    norm = sum(g.square().sum() for g in grads).sqrt()
    found = []
    for sign in (1e-2, -1e-2):
        with torch.no_grad():
            for tensor, grad in zip(values(made), grads, strict=True):
                tensor += sign * grad / norm
            found.append(sessions.gradients(model, "flux", made, options, values)[0])
            for tensor, grad in zip(values(made), grads, strict=True):
                tensor -= sign * grad / norm
    return norm.item(), (found[0] - found[1]) / 2e-2


@pytest.mark.parametrize("name", FORMS)
def test_gradient_is_the_slope(model, name):
    """In one mode, with which the others agree below."""
    flux = model("flux")
    options = SessionOptions(checkpointing="blocks", forward="bypass")
    norm, difference = slope(flux, trained(flux, name), options)
    assert norm > 0 and difference == pytest.approx(norm, rel=3e-2)


@pytest.fixture(scope="module")
def low(checkpoints, tmp_path_factory):
    """Flux in fp8, and the same dequantised."""
    source = checkpoints("flux")
    with torch.inference_mode():
        path = tmp_path_factory.mktemp("fp8") / "fp8.safetensors"
        file = tiny.quantise(source, path, "float8_e4m3fn")
        low = comfy.sd.load_diffusion_model(str(file))
        plain = comfy.sd.load_diffusion_model(str(source))
    for name, module in layers(plain).items():
        weight = layers(low)[name].weight
        if hasattr(weight, "dequantize"):
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    return low, plain


@pytest.mark.parametrize("name", FORMS)
def test_on_quantised_layers(low, name):
    """The loss and gradients are those on the dequantised weights."""
    quantised, plain = low
    made = trained(plain, name)
    expected = sessions.gradients(plain, "flux", made, sessions.OFF, values)
    found = sessions.gradients(quantised, "flux", made, sessions.OFF, values)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert sessions.cosine(found[1], expected[1]) > 0.9999


@pytest.mark.parametrize("name", FORMS)
def test_modes_agree(model, name):
    flux = model("flux")
    made = trained(flux, name)
    modes = [SessionOptions(checkpointing="off", forward=f) for f in ("bypass", "rebuild", "auto")]
    found = [sessions.gradients(flux, "flux", made, mode, values) for mode in modes]
    for value, grads in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-4)
        assert sessions.cosine(grads, found[0][1]) > 0.9999


@pytest.mark.parametrize("name", FORMS)
def test_on_top_of_an_adapter_beside_the_layers(model, name):
    """What is trained is what its file gives on the same model."""
    flux, path = model("flux"), "double_blocks.0.img_attn.qkv"
    made = {key: a for key, a in trained(flux, name).items() if key.endswith(path)}
    lora = factors.factors("lora", samples.shape(flux, path))
    with torch.inference_mode():
        below = samples.apply(flux, factors.adapter({path: lora}), mode="bypass")
        without = samples.run(below, "flux")
        with session.Session(below, made, sessions.OFF), torch.no_grad():
            found = samples.prediction(below, "flux")
        ((key, algorithm),) = made.items()
        file = {f"{key}.{n}": t.detach().clone() for n, t in algorithm.state().items()}
        applied = samples.run(samples.apply(below, Adapter(file), mode="bypass"), "flux")
    samples.differs(applied, without)
    samples.close(applied - without, found - without, 1e-3)


def test_every_algorithm_is_the_identity_at_its_start(model):
    flux = model("flux")
    with torch.inference_mode():
        bare = sessions.gradients(flux, "flux", {})[0]
    for name in FORMS:
        made = {}
        for path in LAYERS:
            weight = layers(flux)[path].weight.clone()
            fresh = make(tuple(weight.shape), config_of(name), generator(0, path))
            made[f"diffusion_model.{path}"] = fresh.started(weight)
        assert sessions.gradients(flux, "flux", made, sessions.OFF, lambda _: [])[0] == bare, name
