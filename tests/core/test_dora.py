"""DoRA around any algorithm: against LyCORIS and peft as they train, and its own promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_lab.core.adapters import Algorithm, load
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op
from hypothesis import given
from hypothesis import strategies as st
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

TOLERANCE = 1e-5

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "square": (lambda: nn.Linear(24, 24), (3, 24)),
    "conv1d": (lambda: nn.Conv1d(12, 20, 3, stride=2, padding=1), (2, 12, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 40, 1), (2, 24, 4, 4)),
    "conv2d 3x3": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=2, dilation=2), (2, 12, 9, 8)),
    "square conv": (lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 5, 4)),
    "grouped": (lambda: nn.Conv2d(24, 40, 3, padding=1, groups=2), (2, 24, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(12, 20, (1, 3, 3), padding=(0, 1, 1)), (2, 12, 2, 5, 4)),
    "one output": (lambda: nn.Linear(24, 1), (3, 24)),
    "one input": (lambda: nn.Linear(1, 24), (3, 1)),
}


def op_of(layer: nn.Module) -> Op:
    if isinstance(layer, nn.Linear):
        return Op()
    return Op(
        layer.weight.ndim - 2, layer.stride, layer.padding, layer.dilation, layer.groups
    )  # fmt: skip


def randomise(module: nn.Module) -> None:
    """Factors at random; the lengths stay near those of the layer, as in training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            magnitude = "dora_scale" in name or "magnitude" in name
            p.copy_(p * (1 + 0.3 * noise) if magnitude else noise)


def check(adapter: Algorithm, layer: nn.Module, x: Tensor, forward: Tensor) -> None:
    """Strength 1 is ``forward``, others are on the line between it and the layer as it was."""
    weight, op, base = layer.weight, op_of(layer), layer(x)
    effect = forward - base
    assert effect.norm() > 0.02 * forward.norm(), "an effect too small to judge by"
    for m in (1.0, 0.6, 0.0, -0.5, 1.4):
        part, want = adapter.at(m), base + m * effect
        y = op(x, weight)
        for ours in (
            op(x, part.merge(weight.clone())) + base - y,
            op(x, weight + part.delta(weight)) + base - y,
            base + part.bypass(x, op, weight),
            base + part.bypass(x, op, weight, y),
        ):
            assert (ours - want).norm() < TOLERANCE * effect.norm()
    assert torch.equal(adapter.at(0.0).merge(weight.clone()), weight)


LYCORIS = [
    pytest.param(kind, name, options, id=f"{kind.name}-{name}-{options}")
    for kind, name, options in itertools.product(
        (LoConModule, LohaModule, LokrModule),
        LAYERS,
        (
            {"wd_on_out": True},
            {"wd_on_out": False},
            {"wd_on_out": True, "use_tucker": True, "alpha": 3},
            {"wd_on_out": False, "use_tucker": True, "use_scalar": True},
        ),
    )
]


@pytest.mark.parametrize("kind, name, options", LYCORIS)
@torch.no_grad()
def test_lycoris_forward(kind: type[LycorisBaseModule], name: str, options: dict) -> None:
    torch.manual_seed(0)
    make, x_shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(x_shape)
    keywords = {"lora_dim": 3, "alpha": 1, "weight_decompose": True, "bypass_mode": False}
    module = kind("", layer, **{**keywords, **options})
    randomise(module)
    adapter = load({name: t.clone() for name, t in module.train().state_dict().items()})
    assert adapter is not None and adapter.misfit(layer.weight.shape) is None
    assert bool(adapter.whole) != options["wd_on_out"]
    check(adapter, layer, x, module(x))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square = nn.Linear(24, 40), nn.Linear(24, 24, bias=False)
        self.conv1d = nn.Conv1d(12, 20, 3, stride=2, padding=1)
        self.conv2d = nn.Conv2d(12, 20, 3, stride=2, padding=1)
        self.both = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3d = nn.Conv3d(12, 20, (1, 3, 3), padding=(0, 1, 1))
        self.embedding = nn.Embedding(30, 12)


INPUTS = {
    "linear": (3, 5, 24),
    "square": (2, 24),
    "conv1d": (2, 12, 9),
    "conv2d": (2, 12, 9, 8),
    "both": (2, 16, 5, 4),
    "conv3d": (2, 12, 2, 5, 4),
}
SUFFIXES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "magnitude",
}


def of_peft(name: str) -> tuple[nn.Module, Algorithm]:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=[*INPUTS, "embedding"])
    model = get_peft_model(Layers(), config)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            randomise(module)
    stem = f"base_model.model.{name}."
    state = get_peft_model_state_dict(model)
    own = {k.removeprefix(stem): t for k, t in state.items() if k.startswith(stem)}
    adapter = load({SUFFIXES.get(k, k): t.detach() for k, t in own.items()}, scale=3 / 4)
    assert adapter is not None
    return model.base_model.model.get_submodule(name), adapter


@pytest.mark.parametrize("name", INPUTS)
def test_peft_forward(name: str) -> None:
    wrapped, adapter = of_peft(name)
    with torch.no_grad():
        x = torch.randn(INPUTS[name])
        check(adapter, wrapped.base_layer, x, wrapped(x))
    assert not adapter.whole


@torch.no_grad()
def test_peft_embedding() -> None:
    """peft scales the columns of an embedding, whose rows are the tokens."""
    wrapped, adapter = of_peft("embedding")
    weight, tokens = wrapped.base_layer.weight, torch.arange(30)
    ours, theirs = adapter.merge(weight.clone()), wrapped(tokens)
    assert (ours - theirs).norm() < TOLERANCE * (theirs - weight).norm()


# Its own promises


def small(shape: tuple[int, ...], lengths: Tensor, name: str = "dora_scale") -> Algorithm:
    torch.manual_seed(0)
    out, width, *k = shape
    up, down = torch.randn(out, 2), torch.randn(2, width, *k)
    found = load({"lora_up.weight": up, "lora_down.weight": down, name: lengths})
    assert found is not None
    return found


def test_shapes_tell_the_axis() -> None:
    """Whatever is scaled on an axis has the lengths that the file says, at strength 1."""
    for shape, lengths, name, axis in (
        ((6, 4), (6, 1), "dora_scale", 0),
        ((6, 4), (1, 4), "dora_scale", 1),
        ((6, 4), (6,), "dora_scale", 0),
        ((6, 4), (6,), "magnitude", 0),
        ((6, 4), (4,), "magnitude", 1),
        ((4, 4), (4,), "magnitude", 0),
        ((4, 4), (1, 4), "dora_scale", 1),
        ((1, 4), (1, 1), "dora_scale", 0),
        ((1, 4), (1, 4), "dora_scale", 1),
        ((6, 1), (1, 1), "dora_scale", 1),
        ((6, 1), (6, 1), "dora_scale", 0),
        ((6, 4, 3, 3), (1, 6, 1, 1), "magnitude", 0),
        ((6, 4, 3, 3), (1, 6, 1, 1), "dora_scale", 0),
        ((4, 4, 3, 3), (1, 4, 1, 1), "magnitude", 0),
        ((4, 4, 3, 3), (1, 4, 1, 1), "dora_scale", 1),
        ((6, 4, 3, 3), (1, 4, 1, 1), "dora_scale", 1),
        ((6, 4), (6, 1, 1, 1), "dora_scale", 0),
    ):
        want = torch.rand(lengths) + 1
        adapter, weight = small(shape, want, name), torch.randn(shape)
        assert adapter.misfit(shape) is None
        merged = adapter.merge(weight).movedim(axis, 0).flatten(1).norm(dim=1)
        assert torch.allclose(merged, want.flatten(), rtol=1e-5), (shape, lengths, name)
        again = load(adapter.state())
        assert again is not None and again.whole == adapter.whole
        assert adapter.state()["dora_scale"].ndim == max(len(shape), len(lengths))


def test_lengths_that_fit_another_weight_are_a_misfit() -> None:
    flat = {f"hada_w{i}_{s}": torch.randn(6, 2) for i in "12" for s in "a"}
    flat |= {f"hada_w{i}_b": torch.randn(2, 36) for i in "12"}
    inputs = load({**flat, "dora_scale": torch.ones(1, 4, 1, 1)})
    assert inputs is not None and inputs.misfit((6, 4, 3, 3)) is None
    found = inputs.misfit((6, 9, 2, 2))
    assert found is not None and "4 lengths" in found and "(6, 9, 2, 2)" in found


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 8))
def test_rows_of_a_fused_weight(above: int, rows: int, below: int, seed: int) -> None:
    """On the output axis a range of rows is what it would be as a weight of its own."""
    torch.manual_seed(seed)
    fused, lengths = torch.randn(above + rows + below, 5), torch.rand(rows, 1) + 1
    adapter, before = small((rows, 5), lengths), fused.clone()
    assert not adapter.whole
    alone = adapter.at(0.7).merge(fused[above : above + rows].clone())
    adapter.at(0.7).merge(fused.narrow(0, above, rows))
    assert torch.equal(fused[above : above + rows], alone)
    assert torch.equal(fused[:above], before[:above])
    assert torch.equal(fused[above + rows :], before[above + rows :])


def test_strength_1_is_exact_and_the_delta_inside_keeps_its_own() -> None:
    weight, lengths = torch.randn(6, 4), torch.rand(6, 1) + 1
    adapter = small((6, 4), lengths)
    full = adapter.merge(weight.clone())
    assert torch.equal(adapter.at(0.25).at(4.0).merge(weight.clone()), full)
    v = weight + adapter.inner.delta(weight)
    assert torch.allclose(full, v / v.norm(dim=1, keepdim=True) * lengths, rtol=1e-5)
    assert "DoRA" in adapter.traits and adapter.reads_weight and adapter.name == "lora"
    assert torch.equal(load(adapter.at(0.5).at(2.0).state()).merge(weight.clone()), full)
    with pytest.raises(AdapterLabError, match="no strength that a file could hold"):
        adapter.at(0.5).state()


def test_around_any_algorithm() -> None:
    """LyCORIS and peft have no such files; the equation holds all the same."""
    weight, lengths = torch.randn(6, 4), torch.rand(6, 1) + 1
    for tensors in ({"diff": torch.randn(6, 4)}, {"set_weight": torch.randn(6, 4)}):
        adapter, inner = load({**tensors, "dora_scale": lengths}), load(tensors)
        assert adapter is not None and inner is not None
        v = inner.merge(weight.clone())
        want = v / v.norm(dim=1, keepdim=True) * lengths
        assert torch.allclose(adapter.merge(weight.clone()), want, rtol=1e-5)
    norm = load({"w_norm": torch.randn(6), "dora_scale": lengths.flatten()})
    assert norm is not None and norm.misfit((6,)) is None
    assert torch.allclose(norm.merge(weight[:, 0].clone()).abs(), lengths.flatten(), rtol=1e-5)


def test_its_tensors_can_be_moved() -> None:
    adapter, weight = small((6, 4), torch.rand(6, 1) + 1), torch.randn(6, 4)
    moved = adapter.on({name: t.clone() for name, t in adapter.tensors.items()}).at(0.5)
    assert torch.equal(moved.merge(weight.clone()), adapter.at(0.5).merge(weight.clone()))
    doubled = adapter.on({**adapter.tensors, "dora_scale": adapter.tensors["dora_scale"] * 2})
    assert torch.allclose(doubled.merge(weight.clone()), 2 * adapter.merge(weight.clone()))


def test_lengths_are_worked_out_once() -> None:
    """Settled on its weight it needs none of its values again, until its factors change."""
    adapter, weight, x = small((6, 4), torch.rand(6, 1) + 1), torch.randn(6, 4), torch.randn(3, 4)
    settled, nothing = adapter.settled(weight), torch.full((6, 4), torch.nan)
    y, want = x @ weight.T, x @ adapter.at(0.7).delta(weight).T
    assert settled.reads_output and not adapter.reads_output
    assert torch.allclose(settled.at(0.7).bypass(x, Op(), nothing, y), want, atol=1e-5)
    doubled = {**settled.tensors, "dora_scale": settled.tensors["dora_scale"] * 2}
    changed = settled.on(doubled)
    assert not changed.reads_output
    want = x @ adapter.on(doubled).delta(weight).T
    assert torch.allclose(changed.bypass(x, Op(), weight, y), want, atol=1e-5)
    inputs = small((6, 4), torch.rand(1, 4) + 1).settled(weight)
    assert not inputs.reads_output
