"""Dense differences, norms, replaced and enlarged weights."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from adapter_lab.core.adapters import Algorithm, load, load_parts
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op
from hypothesis import given
from hypothesis import strategies as st
from lycoris.modules.full import FullModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 24)),
    "no bias": (lambda: nn.Linear(24, 40, bias=False), (3, 24)),
    "conv1d": (lambda: nn.Conv1d(12, 20, 3, stride=2), (2, 12, 9)),
    "conv2d": (lambda: nn.Conv2d(12, 20, 3, padding=1, groups=2), (2, 12, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(12, 20, (1, 3, 3)), (2, 12, 2, 5, 4)),
}
NORMS = {
    "layer norm": (lambda: nn.LayerNorm(12), (3, 12)),
    "group norm": (lambda: nn.GroupNorm(3, 12), (2, 12, 4, 4)),
}


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))


def patched(layer: nn.Module, parts: dict[str, Algorithm], m: float) -> dict[str, Tensor]:
    """The layer's own tensors with ``parts`` merged at strength m."""
    own = {name: p.detach().clone() for name, p in layer.named_parameters()}
    assert set(parts) == set(own)
    for name, part in parts.items():
        assert part.misfit(own[name].shape) is None
        assert part.at(m).merge(own[name]) is own[name]
    return own


@pytest.mark.parametrize(
    "name, kind", [*((n, FullModule) for n in LAYERS), *((n, NormModule) for n in NORMS)]
)
def test_lycoris_forward(name: str, kind: type) -> None:
    torch.manual_seed(0)
    make, x_shape = {**LAYERS, **NORMS}[name]
    layer, x = make().requires_grad_(False), torch.randn(x_shape)
    module = kind("", layer)
    if kind is FullModule:
        module.apply_to()  # its file is what training added to the layer since then
        base = module.org_weight
        randomise(module)
        state = {k: t.detach().clone() for k, t in module.state_dict().items()}
        forward = module(x).detach()
        module.restore()
        assert torch.equal(layer.weight, base)
    else:
        randomise(module)
        state = {k: t.detach().clone() for k, t in module.state_dict().items()}
        forward = module(x).detach()
    ours = patched(layer, load_parts(state), 1.0)
    merged = torch.func.functional_call(layer, ours, (x,))
    assert (merged - forward).norm() < 1e-5 * (forward - layer(x)).norm()
    half = patched(layer, load_parts(state), 0.5)
    for key, p in layer.named_parameters():
        assert torch.allclose(half[key], (p + ours[key]) / 2, atol=1e-6)
    for algorithm in load_parts(state).values():
        (suffix,) = algorithm.state()
        assert torch.equal(algorithm.state()[suffix], state[suffix])


@pytest.mark.parametrize("shape", [(), (5,), (5, 4), (1, 6, 5), (4, 3, 2, 2)])
def test_a_difference_of_any_shape(shape: tuple[int, ...]) -> None:
    diff, weight = torch.randn(shape).bfloat16(), torch.randn(shape)
    full = load({"diff": diff, "alpha": torch.tensor(4.0)})
    assert full is not None and full.shape == shape and full.rank >= 1
    assert torch.equal(full.delta(weight), diff.float()), "alpha has no meaning here"
    assert torch.equal(full.at(0.5).state()["diff"], diff / 2)
    for other in ((7,), (*shape, 7)):
        assert full.misfit(other) is not None


def test_a_difference_acts_on_a_layer() -> None:
    weight, diff, x = torch.randn(8, 6, 3), torch.randn(8, 6, 3), torch.randn(2, 6, 9)
    full, op = load({"diff": diff}), Op(1, padding=1)
    assert full is not None
    assert torch.allclose(full.bypass(x, op, weight), F.conv1d(x, diff, padding=1))


def test_a_replaced_weight_is_a_blend() -> None:
    weight, new = torch.randn(128), torch.randn(128).bfloat16()
    replaced = load({"set_weight": new})
    assert replaced is not None and replaced.reads_weight
    assert torch.equal(replaced.merge(weight.clone()), new.float())
    assert torch.equal(replaced.at(0.0).merge(weight.clone()), weight)
    for m in (0.25, 0.5, 1.5):
        want = (1 - m) * weight + m * new.float()
        assert torch.allclose(replaced.at(m).merge(weight.clone()), want, atol=1e-6)
        assert torch.allclose(weight + replaced.at(m).delta(weight), want, atol=1e-6)
    assert torch.equal(replaced.state()["set_weight"], new)
    with pytest.raises(AdapterLabError, match="no strength"):
        replaced.at(0.5).state()


# Enlarged weights


def control(out: int, width: int, sizes: tuple[int, ...], **more: Tensor) -> Algorithm:
    torch.manual_seed(out * width)
    factors = {
        "lora_up.weight": torch.randn(sizes[0], 2),
        "lora_down.weight": torch.randn(2, *sizes[1:]),
    }
    found = load({**factors, "reshape_weight": torch.tensor(sizes), **more})
    assert found is not None
    return found


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from((0, 0.5, 1)),
)
def test_a_weight_is_padded_with_zeros(
    out: int, width: int, below: int, right: int, m: float
) -> None:
    sizes = (out + below, width + right)
    padded, weight = control(out, width, sizes), torch.randn(out, width)
    assert padded.misfit(weight.shape) is None and padded.shape == sizes and padded.whole
    large, before = F.pad(weight, (0, right, 0, below)), weight.clone()
    up, down = padded.tensors["lora_up.weight"], padded.tensors["lora_down.weight"]
    merged = padded.at(m).merge(weight)
    assert merged.shape == sizes
    assert torch.allclose(merged, large + m * (up @ down), atol=1e-5)
    if weight.shape == sizes:
        assert merged is weight
    else:
        assert torch.equal(weight, before)
        with pytest.raises(AdapterLabError, match="Merge it"):
            padded.bypass(torch.randn(2, width), Op(), weight)
    x = torch.randn(2, sizes[1])
    assert torch.allclose(padded.at(m).bypass(x, Op(), large), m * x @ (up @ down).T, atol=1e-4)


def test_what_cannot_be_padded_is_a_misfit() -> None:
    padded = control(6, 4, (6, 8))
    for shape in ((7, 8), (6, 9), (6, 8, 1, 1), (6,)):
        found = padded.misfit(shape)
        assert found is not None and str(shape) in found and "(6, 8)" in found


def test_a_padded_weight_with_dora_and_bias() -> None:
    """The lengths are of the enlarged weight."""
    lengths = torch.rand(6, 1) + 1
    padded = control(6, 4, (6, 8), dora_scale=lengths, **{"lora_up.bias": torch.ones(6)})
    merged = padded.merge(torch.randn(6, 4))
    assert merged.shape == (6, 8)
    assert torch.allclose(merged.norm(dim=1, keepdim=True), lengths)
    given = {"lora_up.weight", "lora_down.weight", "lora_up.bias", "dora_scale", "reshape_weight"}
    assert padded.state().keys() == {*given, "alpha"}
    again = load(padded.state())
    assert again is not None and again.traits == padded.traits
    bias = padded.bias
    assert bias is not None and torch.equal(bias.merge(torch.zeros(6)), torch.ones(6))


def test_every_pair_of_dense_tensors_is_one_too_many() -> None:
    names = ("diff", "w_norm", "set_weight")
    for pair in itertools.combinations(names, 2):
        with pytest.raises(AdapterLabError, match="Two algorithms"):
            load({name: torch.zeros(4) for name in pair})
