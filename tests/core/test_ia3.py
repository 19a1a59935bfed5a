"""(IA)^3 against LyCORIS and peft as they train it."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_lab.core.adapters import load, load_parts
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op
from hypothesis import given
from hypothesis import strategies as st
from lycoris.modules.ia3 import IA3Module
from peft import IA3Config, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

# What LyCORIS and peft can both be asked for; LyCORIS has no grouped inputs, peft no Conv1d.
LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "conv1d": (lambda: nn.Conv1d(12, 20, 3, stride=2, padding=1), (2, 12, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 40, 1), (2, 24, 4, 4)),
    "conv2d 3x3": (lambda: nn.Conv2d(12, 20, 3, padding=2, dilation=2), (2, 12, 9, 8)),
    "grouped": (lambda: nn.Conv2d(12, 20, 3, padding=1, groups=2), (2, 12, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(12, 20, (1, 3, 3), padding=(0, 1, 1)), (2, 12, 2, 5, 4)),
    "square": (lambda: nn.Conv2d(12, 12, 3, padding=1), (2, 12, 4, 4)),
}

SIDES = list(itertools.product(LAYERS, (False, True)))


def op_of(layer: nn.Module) -> Op:
    if isinstance(layer, nn.Linear):
        return Op()
    dims = layer.weight.ndim - 2
    return Op(dims, layer.stride, layer.padding, layer.dilation, layer.groups)


def layer_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().requires_grad_(False), torch.randn(shape)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def error(ours: Tensor, theirs: Tensor, base: Tensor) -> float:
    """Relative to what the adapter does, not to the output."""
    return float((ours - theirs).norm() / (theirs - base).norm())


@pytest.mark.parametrize("name, on_input", [s for s in SIDES if s != ("grouped", True)])
def test_lycoris(name: str, on_input: bool) -> None:
    layer, x = layer_of(name)
    module = IA3Module("", layer, train_on_input=on_input, bypass_mode=False)
    module.weight.data.copy_(randn(*module.weight.shape))
    adapter = load({k: t.detach() for k, t in module.state_dict().items()})
    op, weight = op_of(layer), layer.weight
    assert adapter is not None and adapter.misfit(weight.shape) is None
    bias = layer(x) - op(x, weight)
    for strength in (1.0, 0.6, -2.0):
        module.multiplier = strength
        theirs, ours = module(x).detach(), adapter.at(strength)
        merged = op(x, ours.merge(weight.clone())) + bias
        assert error(merged, theirs, layer(x)) < 1e-5
        assert torch.allclose(ours.delta(weight) + weight, ours.merge(weight.clone()), atol=1e-6)
        for y in (None, op(x, weight)):
            bypassed = layer(x) + ours.bypass(x, op, weight, y)
            assert error(bypassed, theirs, layer(x)) < 1e-5


@pytest.mark.parametrize("name, on_input", [s for s in SIDES if s[0] != "conv1d"])
def test_peft(name: str, on_input: bool) -> None:
    layer, x = layer_of(name)
    model = nn.ModuleDict({"block": nn.ModuleDict({"layer": layer})})
    inputs = ["k.layer"] if on_input else ["layer.k"]
    config = IA3Config(target_modules=".*layer", feedforward_modules=inputs)
    wrapped = get_peft_model(model, config)
    theirs = wrapped.base_model.model["block"]["layer"]
    theirs.ia3_l["default"].data.copy_(randn(*theirs.ia3_l["default"].shape))
    state = get_peft_model_state_dict(wrapped)
    parts = load_parts({key.rpartition(".")[2]: t for key, t in state.items()})
    saved = {"feedforward_modules": inputs, "module": "block.layer"}
    adapter = parts["weight"].configured(saved)
    assert adapter.misfit(layer.weight.shape) is None
    assert (adapter.bias is None) == on_input
    op, weight, y = op_of(layer), layer.weight, layer(x).detach()
    bias = layer.bias.clone() if adapter.bias is None else adapter.bias.merge(layer.bias.clone())
    spread = bias.reshape(-1, *(1,) * op.dims)
    want = theirs(x).detach()
    assert error(op(x, adapter.merge(weight.clone())) + spread, want, y) < 1e-5
    assert error(op(x, weight) + adapter.bypass(x, op, weight) + spread, want, y) < 1e-5
    half = adapter.at(0.5)
    assert torch.allclose(half.delta(weight), adapter.delta(weight) / 2)
    again = load(half.state()).configured(saved)
    assert torch.allclose(again.delta(weight), half.delta(weight), atol=1e-6)


def test_the_channels_of_a_convolution_tell_the_side_where_they_can() -> None:
    weight = randn(20, 12, 3, 3)
    for n, axis in ((20, 0), (12, 1)):
        vector = randn(1, n, 1, 1)
        adapter = load({"ia3_l": vector})
        want = weight * vector.movedim(1, axis)
        assert torch.allclose(adapter.merge(weight.clone()), want)
        assert adapter.misfit((20, 12, 1, 1)) is None and adapter.misfit((15, 13, 1, 1))
        bias = adapter.bias
        assert bias is not None and (bias.misfit((20,)) is None) == (axis == 0)


def test_a_square_convolution_is_scaled_on_outputs_without_a_config() -> None:
    weight, vector = randn(12, 12, 3), randn(1, 12, 1)
    adapter = load({"ia3_l": vector})
    assert torch.allclose(adapter.merge(weight.clone()), weight * vector.movedim(1, 0))
    assert adapter.configured({"target_modules": ["b"], "module": "a.b"}).bias is not None
    on_input = adapter.configured({"feedforward_modules": r".*\.b", "module": "a.b"})
    assert torch.allclose(on_input.merge(weight.clone()), weight * vector)
    assert on_input.bias is None and on_input.traits == ("input channels",)
    elsewhere = adapter.configured({"feedforward_modules": r".*\.b", "module": "a.bc"})
    assert torch.allclose(elsewhere.merge(weight.clone()), weight * vector.movedim(1, 0))
    with pytest.raises(AdapterLabError, match=r"feedforward_modules.*no regex.*\(b"):
        adapter.configured({"feedforward_modules": "(b", "module": "a.b"})


@pytest.mark.parametrize("shape", [(1, 12, 1), (1, 12, 1, 1), (1, 1)])
def test_a_side_that_only_a_config_tells_is_saved(shape: tuple[int, ...]) -> None:
    n, unit = shape[1], shape[2:]
    weight, config = randn(n, n, *(3 for _ in unit)), {"feedforward_modules": ["b"]}
    file = load({"ia3_l": randn(*shape).bfloat16()})
    for module, bias in (("a.b", False), ("a.c", True)):
        adapter = file.configured({**config, "module": module})
        for m in (1.0, 0.5):
            part = adapter.at(m)
            again = load_parts(part.state())
            assert torch.allclose(again["weight"].delta(weight), part.delta(weight), atol=0.02)
            assert ("bias" in again) == bias
    told = file.configured({**config, "module": "a.b"})
    assert torch.equal(load(told.state()).delta(weight), told.delta(weight))


@pytest.mark.parametrize("listed", [5, [5], {"b": 1}, 0.5])
def test_modules_that_are_no_names(listed: object) -> None:
    with pytest.raises(AdapterLabError, match="feedforward_modules.*not usable"):
        load({"ia3_l": randn(1, 4, 1)}).configured({"feedforward_modules": listed})


def test_a_lone_weight_is_something_else() -> None:
    weight = torch.ones(4)
    assert load({"weight": weight}) is None
    assert load({"weight": weight, "on_input": torch.tensor(1)}).shape == (1, 4)
    assert load({"weight": weight, "on_input": torch.tensor([0])}).shape == (4, 1)


BROKEN = {
    "no weight": ({"on_input": torch.tensor(1)}, "missing.*weight"),
    "a matrix": ({"weight": torch.ones(2, 3), "on_input": torch.tensor(1)}, r"no vector.*\(2, 3\)"),
    "two sides": ({"weight": torch.ones(2), "on_input": torch.ones(2)}, r"not 0 or 1.*\(2,\)"),
    "integers": ({"weight": torch.ones(2).int(), "on_input": torch.tensor(1)}, "no real numbers"),
    "a matrix of peft": ({"ia3_l": torch.ones(2, 2)}, r"no vector.*ia3_l of shape \(2, 2\)"),
    "flat": ({"ia3_l": torch.ones(2)}, "not a matrix"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    tensors, message = BROKEN[name]
    with pytest.raises(AdapterLabError, match=message):
        load(tensors)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.booleans(), st.floats(-2, 2))
def test_state_keeps_the_delta(out: int, width: int, k: int, on_input: bool, m: float) -> None:
    weight, n = randn(out, width, k), width if on_input else out
    adapter = load({"weight": randn(1, n, 1), "on_input": torch.tensor(int(on_input))}).at(m)
    assert adapter.misfit(weight.shape) is None
    assert (adapter.misfit((out + 1, width + 1, k)) or "").startswith(f"it scales {n} ")
    again = load(adapter.state())
    assert again.state().keys() == {"weight", "on_input"}
    assert torch.allclose(again.delta(weight), adapter.delta(weight), atol=1e-6)


def test_channels_of_all_groups_reach_the_rows_of_their_own() -> None:
    weight, vector = randn(20, 6, 3), randn(1, 12, 1)
    adapter = load({"weight": vector, "on_input": torch.tensor(1)})
    want = weight.clone()
    want[:10] *= 1 + vector[:, :6]
    want[10:] *= 1 + vector[:, 6:]
    assert adapter.misfit(weight.shape) is None
    assert torch.allclose(adapter.merge(weight.clone()), want)
    # 12 channels are no three groups of 5, nor inputs of a linear layer that has 6
    assert adapter.misfit((20, 5, 3)) is not None and adapter.misfit((20, 6)) is not None
