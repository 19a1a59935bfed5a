"""Models in training, and what their gradients are compared with."""

from __future__ import annotations

import made as random
import pytest
import samples
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.train.random import generator
from adapter_lab.nodes.host import session as host
from adapter_lab.nodes.host.layers import submodules
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import Session, SessionOptions

PREFIX = "diffusion_model."
QKV = "double_blocks.0.img_attn.qkv"  # of Flux
OFF = SessionOptions(checkpointing="off")
BLOCKS = SessionOptions(checkpointing="blocks")


def adapters(model, names=None, algorithm="lora", parameter="weight"):
    """Adapters with a delta that is not zero, on every layer or the modules of these names."""
    modules = submodules(model.model)
    made = {}
    for name in names or host.layers(model):
        rng = generator(0, name)
        path = PREFIX + name
        shape = tuple(getattr(modules[path], parameter).shape)
        config = AdapterConfig(rank=2, alpha=2.0)
        made[path] = ALGORITHMS[algorithm].init(shape, config, rng)
        for suffix, tensor in made[path].tensors.items():
            noise = torch.randn(tensor.shape, generator=rng) * 0.1
            made[path].tensors[suffix] = (tensor + noise).requires_grad_()
    return made


def merged(model):
    """A clone of a Flux with an adapter of another node merged."""
    size = tuple(host.layers(model)[QKV].weight.shape)
    with torch.inference_mode():
        tensors = {name: t.clone() for name, t in random.factors("lora", size).items()}
        return samples.apply(model, random.adapter({QKV: tensors}), mode="merge")


def factors(made):
    """All of them in a fixed order."""
    return [t for a in made.values() for t in a.tensors.values()]


def loss(process, kind):
    """Squared output at a fixed point, so that every layer matters."""
    items = samples.items(kind, 2)
    x0 = process.latents(items)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    t = process.noise.scheduled(torch.tensor([0.3, 0.6]))
    sigma = process.noise.sigma(t)
    x_t = process.corrupt(x0, noise, sigma)
    return process.predict(x_t, sigma, items, t).float().square().mean()


def gradients(model, kind, made, options=OFF, of=factors):
    """(loss, gradients of ``of(made)``) through a session, begun as ComfyUI runs a node."""
    with torch.inference_mode(), Session(model, made, options) as session:
        value = loss(HostProcess(session), kind)
        wanted = of(made)
        grads = torch.autograd.grad(value, wanted, allow_unused=True) if wanted else ()
    return value.item(), grads


def check_slope(model, kind, made, options=OFF, rel=1e-2, step=1e-2):
    """The gradient against a central difference, which knows nothing of autograd."""
    _, grads = gradients(model, kind, made, options)
    used = [(f, g) for f, g in zip(factors(made), grads, strict=True) if g is not None]
    assert len(used) > 0.9 * len(factors(made))
    norm = sum(g.square().sum() for _, g in used).sqrt()
    values = []
    for sign in (step, -step):
        with torch.no_grad():
            for factor, grad in used:
                factor += sign * grad / norm
            values.append(gradients(model, kind, made)[0])
            for factor, grad in used:
                factor -= sign * grad / norm
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm.item(), rel=rel)


def check_same(found, expected, rtol=1e-4, atol=1e-7):
    """Two lists of gradients agree, and have gaps at the same places."""
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def cosine(found, expected):
    """Of the angle between two lists of gradients with gaps at the same places."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    one, other = (torch.cat([t.flatten() for t in side]) for side in zip(*pairs, strict=True))
    return torch.cosine_similarity(one, other, dim=0)
