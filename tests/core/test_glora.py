"""GLoRA against LyCORIS (now and before 3.0) and peft, GLoKr against its equation."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_lab.core.adapters import (
    ALGORITHMS,
    AdapterConfig,
    Algorithm,
    Ordered,
    load,
    load_parts,
)
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op
from hypothesis import given
from hypothesis import strategies as st
from lycoris.modules.glora import GLoRAModule
from peft import GloraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "square": (lambda: nn.Linear(24, 24), (3, 24)),
    "conv1d": (lambda: nn.Conv1d(12, 20, 3, stride=2, padding=1), (2, 12, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 40, 1, stride=2), (2, 24, 4, 4)),
    "conv2d 3x3": (lambda: nn.Conv2d(12, 20, 3, padding=2, dilation=2), (2, 12, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(12, 12, (1, 3, 3), padding=(0, 1, 1)), (2, 12, 2, 5, 4)),
}
GROUPED = (lambda: nn.Conv2d(12, 20, 3, padding=1, groups=2), (2, 12, 5, 5))
OPTIONS = [
    {"alpha": 0.7},
    {"lora_dim": 1, "alpha": 3},
    {"alpha": 2, "use_scalar": True},
    {"lora_dim": 8, "alpha": 4},
]


def op_of(layer: nn.Module) -> Op:
    if isinstance(layer, nn.Linear):
        return Op()
    dims = layer.weight.ndim - 2
    return Op(dims, layer.stride, layer.padding, layer.dilation, layer.groups)


def rng(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(parameters) -> None:
    generator = rng()
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator))


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check(adapter: Algorithm, layer: nn.Module, x: Tensor, effect: Tensor) -> None:
    """Every way of using it has this effect on the layer's output."""
    op, weight = op_of(layer), layer.weight.detach()
    y, kept = op(x, weight), weight.clone()
    assert adapter.misfit(weight.shape) is None
    delta, merged = adapter.delta(weight), adapter.merge(weight.clone())
    assert torch.equal(weight, kept)
    assert error(op(x, delta), effect) < 1e-5
    assert error(merged - weight, delta) < 1e-5
    assert error(adapter.bypass(x, op, weight), effect) < 1e-5
    assert error(adapter.bypass(x, op, weight, y), effect) < 1e-5
    half = adapter.bypass(x.bfloat16(), op, weight)
    assert half.dtype == torch.bfloat16 and error(half.float(), effect) < 0.05


@pytest.mark.parametrize("name, options", list(itertools.product(LAYERS, OPTIONS)))
def test_lycoris(name: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    module = GLoRAModule("", layer, **{"lora_dim": 3, "bypass_mode": False, **options})
    randomise(module.parameters())
    adapter = load({k: t.detach() for k, t in module.custom_state_dict().items()})
    for strength in (1.0, -0.6):
        module.multiplier = strength
        effect = (module.train()(x) - layer(x)).detach()
        assert effect.norm() > 0.02 * layer(x).norm()
        check(adapter.at(strength), layer, x, effect)


def test_lycoris_on_activations_is_the_same() -> None:
    make, shape = LAYERS["conv1d"]
    layer, x = make().requires_grad_(False), torch.randn(shape, generator=rng(5))
    module = GLoRAModule("", layer, lora_dim=3, alpha=2)
    randomise(module.parameters())
    adapter = load({k: t.detach() for k, t in module.custom_state_dict().items()})
    # Their second path has stride and padding of its own; the first goes through the layer.
    with torch.no_grad():
        effect = module.bypass_forward_diff(x) - layer(torch.zeros_like(x))
    check(adapter, layer, x, effect)


def old_file(layer: nn.Module, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """What LyCORIS 2 wrote, and its delta: b2 b1 + (W a2) a1, scaled."""
    out, width, *k = layer.weight.shape
    shapes = {"a1": (rank, width), "a2": (width, rank), "b1": (rank, width), "b2": (out, rank)}
    generator = rng()
    file = {
        f"{name}.weight": torch.randn(*shape, *k, generator=generator)
        for name, shape in shapes.items()
    }
    a1, a2, b1, b2 = (t.flatten(1) for t in file.values())
    delta = b2 @ b1 + layer.weight.flatten(1) @ a2 @ a1
    file["alpha"] = torch.tensor(2.0)
    return file, delta.reshape(layer.weight.shape) * 2 / rank


@pytest.mark.parametrize("name", ["linear", "square", "conv2d 1x1"])
def test_the_order_of_old_files(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape, generator=rng(5))
    file, delta = old_file(layer, 3)
    adapter = load(file)
    assert adapter.rank == 3 and adapter.scale == 2 / 3
    check(adapter, layer, x, op_of(layer)(x, delta))
    assert adapter.state().keys() == file.keys()
    assert torch.equal(load(adapter.state()).delta(layer.weight), adapter.delta(layer.weight))


def test_a_rank_as_large_as_a_square_layer_is_read_in_the_current_order() -> None:
    layer = nn.Linear(6, 6).requires_grad_(False)
    module = GLoRAModule("", layer, lora_dim=6, alpha=6)
    randomise(module.parameters())
    adapter = load({k: t.detach() for k, t in module.custom_state_dict().items()})
    theirs = module.get_diff_weight()[0].detach()
    assert error(adapter.delta(layer.weight), theirs) < 1e-5


def test_rows_of_a_fused_weight() -> None:
    weight = torch.randn(30, 8, generator=rng(2))
    adapter = trained("glora", (10, 8), 2)
    want, rows = weight[10:20] + adapter.delta(weight[10:20]), weight.clone()
    adapter.merge(rows.narrow(0, 10, 10))
    assert torch.allclose(rows[10:20], want, atol=1e-5)
    assert torch.equal(rows[:10], weight[:10]) and torch.equal(rows[20:], weight[20:])


def test_a_grouped_layer_takes_one_a_for_every_group() -> None:
    make, shape = GROUPED
    layer, x = make().requires_grad_(False), torch.randn(shape, generator=rng(5))
    for name in ("glora", "glokr"):
        adapter = trained(name, tuple(layer.weight.shape), 2)
        check(adapter, layer, x, op_of(layer)(x, adapter.delta(layer.weight)))
    # What LyCORIS writes for such a layer spans the channels of all groups; no weight has them.
    module = GLoRAModule("", layer, lora_dim=2)
    file = load({k: t.detach() for k, t in module.custom_state_dict().items()})
    assert (
        file.misfit(layer.weight.shape)
        == "its delta is (20, 12, 3, 3), the weight is (20, 6, 3, 3)"
    )


def test_a_flattened_kernel_is_a_misfit() -> None:
    for name in ("glora", "glokr"):
        adapter = trained(name, (20, 108), 2)
        assert "108 input channels" in adapter.misfit((20, 12, 3, 3))
        assert adapter.misfit((20, 108, 1, 1)) is None


E = torch.empty
PAIRS = {"a1.weight": E(4, 2), "a2.weight": E(2, 4), "b1.weight": E(6, 2), "b2.weight": E(2, 4)}
BROKEN = {
    "one missing": ({k: t for k, t in PAIRS.items() if k[0] != "b"}, r"missing.*b1\.weight, b2"),
    "ranks": ({**PAIRS, "b2.weight": E(3, 4)}, r"multiply.*b2\.weight \(3, 4\)"),
    "inputs": ({**PAIRS, "a1.weight": E(5, 2)}, r"multiply.*a1\.weight \(5, 2\)"),
    "a kernel in A": ({**PAIRS, "a2.weight": E(2, 4, 3)}, r"multiply.*a2\.weight \(2, 4, 3\)"),
    "core": ({**PAIRS, "bm.weight": E(2, 2, 3)}, "bm.weight is not supported"),
    "peft without A and B": ({"glora_D.X": E(1)}, "missing.*expected A, B"),
    "peft zeros": (
        {"glora_A.zeros": E(4), "glora_B.X": E(4, 1)}, r"multiply.*glora_A\.zeros \(4,\)",
    ),
    "glokr with a kernel in A": (
        {
            "glokr_a_w1": E(2, 2), "glokr_a_w2": E(2, 2, 1, 1), "glokr_b_w1": E(2, 2),
            "glokr_b_w2": E(2, 2),
        },
        "do not fit together",
    ),
    "peft half": ({"glora_A.Xd": E(4, 2)}, r"missing.*expected glora_A\.Xu"),
    "peft twice": ({"glora_A.X": E(1), "glora_A.zeros": E(4, 4)}, "given twice.*glora_A.zeros"),
    "peft product": ({"glora_A.Xd": E(4, 2), "glora_A.Xu": E(3, 4)}, "multiply"),
    "peft row": ({"glora_A.X": E(1, 4)}, "multiply"),
    "peft shapes": (
        {"glora_A.X": E(4, 1), "glora_B.Xd": E(5, 1), "glora_B.Xu": E(1, 4)},
        r"differ in shape.*\(4, 0\) and \(5, 4\)",
    ),
    "peft column for a bias": ({"glora_A.X": E(1), "glora_D.X": E(4, 1)}, "multiply"),
    "glokr without B": ({"glokr_a_w1": E(2, 2), "glokr_a_w2": E(2, 2)}, "missing.*glokr_b_w1"),
    "glokr inputs": (
        {f"glokr_{n}": E(2, 3 if n == "b_w2" else 2) for n in ("a_w1", "a_w2", "b_w1", "b_w2")},
        r"do not fit together.*\(4, 4\).*\(4, 6\)",
    ),
    "glokr ranks": (
        {
            "glokr_a_w1": E(2, 2), "glokr_a_w2_a": E(2, 1), "glokr_a_w2_b": E(1, 2),
            "glokr_b_w1": E(2, 2), "glokr_b_w2_a": E(2, 2), "glokr_b_w2_b": E(2, 2),
        },
        r"differ in rank.*\[1, 2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    tensors, message = BROKEN[name]
    with pytest.raises(AdapterLabError, match=message):
        load(tensors)


# peft


PATHS = [
    {"config_A_B": a_b, "config_C": "none", "config_D_E": d_e}
    for a_b, d_e in (
        ("lora", "constant"), ("vector", "vector"), ("constant", "none"), ("none", "vector")
    )
]  # fmt: skip


def peft_module(bias: bool, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(24, 40, bias=bias)})
    wrapped = get_peft_model(model, GloraConfig(r=3, target_modules=["layer"], **options))
    randomise(p for p in wrapped.parameters() if p.requires_grad)
    state, stem = get_peft_model_state_dict(wrapped), "base_model.model.layer."
    return wrapped.base_model.model["layer"], {k.removeprefix(stem): t for k, t in state.items()}


@pytest.mark.parametrize("options", PATHS)
@pytest.mark.parametrize("bias", [False, True])
def test_peft(options: dict[str, str], bias: bool) -> None:
    module, state = peft_module(bias, **options)
    layer, x = module.base_layer, torch.randn(3, 5, 24, generator=rng(5))
    parts = load_parts(state)
    assert (parts.get("bias") is not None) == (bias and options["config_D_E"] != "none")
    adapter, start = parts["weight"], layer.bias
    assert adapter.misfit(layer.weight.shape) is None
    with torch.no_grad():
        bias_effect = parts["bias"].delta(start) if "bias" in parts else torch.zeros(40)
        effect = module(x) - layer(x) - bias_effect
        if options["config_A_B"] == "none":
            assert effect.norm() < 1e-5 and not adapter.delta(layer.weight).any()
        else:
            check(adapter, layer, x, effect)
        assert torch.allclose(adapter.at(0.5).delta(layer.weight), adapter.delta(layer.weight) / 2)
        half = load_parts(adapter.at(0.5).state())
        assert torch.allclose(half["weight"].delta(layer.weight), adapter.delta(layer.weight) / 2)
        if "bias" in parts:
            assert parts["bias"].misfit((40,)) is None
            assert torch.allclose(half["bias"].delta(start), bias_effect / 2)
    if options["config_A_B"] != "constant":
        assert adapter.misfit((41, 24)) is not None
    if options["config_A_B"] == "lora":
        assert adapter.misfit((40, 25)) is not None


@pytest.mark.parametrize("kind", ["lora", "vector"])
def test_peft_bias_from_the_weight(kind: str) -> None:
    module, state = peft_module(True, config_C=kind)
    layer, x = module.base_layer, torch.randn(3, 5, 24, generator=rng(5))
    parts = load_parts(state)
    with torch.no_grad():
        bias = parts["bias"].settled(layer.weight)
        for strength in (1.0, 0.5):
            weight = layer.weight + parts["weight"].at(strength).delta(layer.weight)
            ours = nn.functional.linear(x, weight, layer.bias + bias.at(strength).delta(layer.bias))
            theirs = layer(x) + strength * (module(x) - layer(x))
            assert (ours - theirs).norm() < 1e-5 * (theirs - layer(x)).norm()
    # without a bias peft leaves that path off
    _, state = peft_module(False, config_C=kind)
    assert "bias" not in load_parts(state)


@pytest.mark.parametrize("kind", ["lora", "vector"])
def test_peft_bias_of_rows_in_another_order(kind: str) -> None:
    """The path from the weight reads the rows that the file means, and keeps only what it needs."""
    module, state = peft_module(True, config_C=kind)
    weight, bias = (p.detach() for p in (module.base_layer.weight, module.base_layer.bias))
    part, order = load_parts(state)["bias"], torch.randperm(40, generator=rng(3))
    assert {name[6] for name in part.tensors} == {"C", "D", "E"} and not part.reads_output
    want = torch.empty(40)
    want[order] = part.settled(weight[order]).delta(bias[order])
    settled = Ordered(part, order).settled(weight)
    assert torch.equal(settled.delta(bias), want) and settled.reads_output


def test_peft_bias_from_another_width_is_a_misfit() -> None:
    adapter = load({"glora_A.X": torch.ones(6, 1), "glora_C.X": torch.ones(7, 1)})
    assert "7 input channels" in adapter.misfit((6, 4)) and adapter.misfit((6, 7)) is None
    # of a path that is off peft keeps zeros
    off = load_parts({"glora_A.X": torch.ones(6, 1), "glora_C.zeros": torch.zeros(7, 1)})
    assert off.keys() == {"weight"} and off["weight"].misfit((6, 4)) is None


# GLoKr


def trained(name: str, shape: tuple[int, ...], rank: int, **options: object) -> Algorithm:
    adapter = ALGORITHMS[name].init(shape, AdapterConfig(name, rank, 3.0, **options), rng(0))
    randomise(adapter.tensors.values())
    return adapter


def matrix(t: dict[str, Tensor], name: str) -> tuple[Tensor, bool]:
    """One Kronecker factor, dense in float64, and whether it was low-rank."""
    if name in t:
        return t[name].double(), False
    a, b = t[name + "_a"].double(), t[name + "_b"].double()
    core = t.get(name.removesuffix("w2") + "t2")
    if core is None:
        return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:]), True
    dense = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for p, q in itertools.product(range(len(a)), range(len(b))):
        outer = torch.outer(a[p], b[q]).reshape(*dense.shape[:2], *(1,) * (core.ndim - 2))
        dense += outer * core[p, q].double()
    return dense, True


def dense_glokr(t: dict[str, Tensor], weight: Tensor, alpha: float, rank: int) -> Tensor:
    """s (W (A1 (x) A2) + B1 (x) B2), position by position of the kernel."""
    a1, a2, b1, b2 = ("glokr_a_w1", "glokr_a_w2", "glokr_b_w1", "glokr_b_w2")
    (a1, low), (a2, low2), (b1, low3), (b2, low4) = (matrix(t, name) for name in (a1, a2, b1, b2))
    s_a, s_b = (alpha / rank if any(lows) else 1.0 for lows in ((low, low2), (low3, low4)))
    out = torch.zeros(weight.shape, dtype=torch.float64)
    b2 = b2.reshape(*b2.shape[:1], -1, *weight.shape[2:])
    for k in itertools.product(*(range(n) for n in weight.shape[2:])):
        at = (..., *k)
        out[at] = s_a * weight[at].double() @ torch.kron(a1, a2)
        out[at] += s_b * torch.kron(b1, b2[at].contiguous())
    return out


KRON = {
    "rank 1": {"rank": 1},
    "both low": {"rank": 1, "decompose_both": True},
    "full": {"rank": 4, "full_matrix": True},
    "factor": {"rank": 2, "factor": 2},
    "tucker": {"rank": 1, "tucker": True},
}


@pytest.mark.parametrize("name, options", list(itertools.product(LAYERS, KRON)))
def test_glokr_is_its_equation(name: str, options: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape, generator=rng(5))
    adapter, weight = trained("glokr", tuple(layer.weight.shape), **KRON[options]), layer.weight
    want = dense_glokr(adapter.tensors, weight, 3.0, adapter.rank)
    assert error(adapter.delta(weight), want.float()) < 1e-5
    for strength in (1.0, 0.5):
        at = adapter.at(strength)
        check(at, layer, x, op_of(layer)(x, strength * want.float()))
        again = load(at.state())
        assert set(at.state()) <= {*type(adapter).suffixes, "alpha"}
        assert torch.allclose(again.delta(weight), at.delta(weight), atol=1e-5)
    moved = adapter.on({k: 2 * t for k, t in adapter.tensors.items()})
    doubled = dense_glokr(moved.tensors, weight, 3.0, adapter.rank)
    assert error(moved.delta(weight), doubled.float()) < 1e-5


@pytest.mark.parametrize("name", ["glora", "glokr"])
@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3), (6, 6, 1, 1)])
def test_training_starts_from_the_weight_itself(name: str, shape: tuple[int, ...]) -> None:
    adapter = ALGORITHMS[name].init(shape, AdapterConfig(name, 2), rng())
    weight = torch.randn(shape, generator=rng(2))
    assert not adapter.delta(weight).any()
    assert torch.equal(adapter.merge(weight.clone()), weight)
    # and can leave it: one factor of each product is not zero
    starts = {k: bool(t.any()) for k, t in adapter.tensors.items()}
    assert any(starts.values()) and not all(starts.values())


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_save_and_load(out: int, width: int, k: int, rank: int, kron: bool) -> None:
    if not kron and out == width < rank:
        rank = width
    shape = (2 * out, 2 * width, k) if kron else (out, width, k)
    adapter = trained("glokr" if kron else "glora", shape, rank)
    again = load(adapter.state())
    weight = torch.randn(shape, generator=rng(2))
    assert (again.rank, again.scale) == (adapter.rank, adapter.scale)
    assert again.misfit(shape) is None
    assert torch.equal(again.delta(weight), adapter.delta(weight))
