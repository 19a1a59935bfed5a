"""What adapters draw: one for each pass of a batch, the same in forward pass and recomputation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import encoders
import pytest
import samples
import sessions
import torch
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.adapters.training import make, with_leaves
from adapter_lab.core.train.random import generator
from adapter_lab.core.train.targets import Targets
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import Session, layers
from adapter_lab.nodes.host.targets import chosen
from adapter_lab.nodes.host.text import TextEncoder

NORM = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"
CHANCE = AdapterConfig(rank=4, alpha=4.0, dropout=0.3, rank_dropout=0.3, module_dropout=0.3)
RANKS = AdapterConfig(rank=4, alpha=4.0, rank_dropout=0.5)
T = torch.tensor([0.2, 0.5, 0.8])


def moved(shapes, config, model):
    """Adapters of these shapes by path, away from their start."""
    made = {}
    for path, shape in shapes.items():
        rng = generator(0, path)
        algorithm = make(shape, config, rng)
        if algorithm.needs_weight_to_start:
            algorithm = algorithm.started(model.model.get_submodule(path).weight.clone())
        algorithm = with_leaves(algorithm, torch.device("cpu"))
        with torch.no_grad():
            for tensor in algorithm.trained.values():
                tensor += 0.1 * torch.randn(tensor.shape, generator=rng)
        made[path] = algorithm
    return made


def chancy(model, config=CHANCE, inside=""):
    """An adapter on a norm and on every layer, or on those ``inside`` alone."""
    every = {f"diffusion_model.{n}": tuple(m.weight.shape) for n, m in layers(model).items()}
    every[NORM] = tuple(model.model.get_submodule(NORM).weight.shape)
    return moved({path: s for path, s in every.items() if inside in path}, config, model)


def of_lengths(*lengths):
    """Items with texts of so many tokens."""
    items = samples.items("flux", len(lengths))
    texts = (torch.randn(n, 64, generator=generator(0, "text", i)) for i, n in enumerate(lengths))
    return [replace(item, cond=text) for item, text in zip(items, texts, strict=True)]


def trained(made):
    return [t for a in made.values() for t in a.trained.values()]


def batch(model, made, items, number, options, clip=None):
    """Loss and gradients of the batch ``number``."""
    with (
        torch.inference_mode(),
        Session(model, made, options, clip) as session,
        TextEncoder(clip, session) if clip else nullcontext() as encoder,
    ):
        process = HostProcess(session, encode=encoder and encoder.encode)
        x, t = process.latents(items), T[: len(items)]
        value = process.predict(x, t, items, t, number).square().mean()
        return value.item(), torch.autograd.grad(value, trained(made), allow_unused=True)


def test_chance_is_that_of_the_batch(load):
    """Alike in forward pass, recomputation and a second run; another in the next batch."""
    model, items = load("flux"), samples.items("flux", 2)
    made = chancy(model)
    plain = batch(model, made, items, 3, sessions.OFF)
    again = batch(model, made, items, 3, sessions.BLOCKS)
    assert again[0] == plain[0]
    sessions.check_same(again[1], plain[1], rtol=1e-4, atol=1e-6)
    assert batch(model, made, items, 4, sessions.OFF)[0] != plain[0]
    without = batch(model, made, items, None, sessions.OFF)
    assert without[0] != plain[0]
    assert all(g is not None for g in without[1][:4])


@pytest.mark.parametrize(
    "config",
    [CHANCE, RANKS, AdapterConfig("dylora", 4, 4.0), AdapterConfig("tlora", 4, 4.0)],
    ids=["dropout", "ranks", "dylora", "tlora"],
)
def test_several_passes_of_one_batch(load, config):
    """Texts of several lengths: each pass is computed again with what it drew itself."""
    model, items = load("flux"), of_lengths(4, 9, 4)
    made = chancy(model, config, inside="blocks.0.linear" if config.algorithm == "tlora" else "")
    plain = batch(model, made, items, 3, sessions.OFF)
    again = batch(model, made, items, 3, sessions.BLOCKS)
    assert again[0] == plain[0]
    sessions.check_same(again[1], plain[1], rtol=1e-4, atol=1e-6)


def test_each_caption_draws_for_itself(load):
    """Two items with one caption: text of its own each, and gradients that know it."""
    model, clip = load("flux"), encoders.make("flux")
    items = [replace(i, cond=None, extra={}, caption="a cat") for i in samples.items("flux", 2)]
    shapes = chosen(Targets(train="text encoder"), model, clip, None)
    made = moved(shapes, RANKS, model)
    with torch.inference_mode(), Session(model, made, sessions.OFF, clip) as session:
        encode, found = TextEncoder(clip, session).encode, []
        process = HostProcess(session, encode=lambda i: found.append(encode(i)) or found[-1])
        process.predict(process.latents(items), T[:2], items, T[:2], 3)
        process.predict(process.latents(items), T[:2], items, T[:2], None)
    (one, _), (two, _), (three, _), (four, _) = found
    assert not torch.allclose(one, two, atol=1e-3) and torch.equal(three, four)
    plain = batch(model, made, items, 3, sessions.OFF, clip)
    again = batch(model, made, items, 3, sessions.BLOCKS, clip)
    assert again[0] == plain[0]
    sessions.check_same(again[1], plain[1], rtol=1e-4, atol=1e-6)
