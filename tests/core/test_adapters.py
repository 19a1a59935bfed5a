"""Conformance: what holds for every registered algorithm on every kind of layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, WRAPPERS, AdapterConfig, Algorithm, load
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

# name: weight shape, the layer without its weight, input shape
LAYERS = {
    "linear": ((16, 12), Op(), (2, 3, 12)),
    "narrowing": ((8, 96), Op(), (2, 96)),
    "conv1d": ((8, 6, 3), Op(1, (2,), (1,), (1,)), (2, 6, 9)),
    "conv2d 1x1": ((16, 12, 1, 1), Op(2), (2, 12, 4, 3)),
    "conv2d 3x3": ((22, 12, 3, 3), Op(2, (2, 1), (1, 2), (1, 2)), (2, 12, 9, 8)),
    "conv2d same": ((8, 6, 1, 3), Op(2, padding="same"), (2, 6, 5, 6)),
    "grouped": ((16, 6, 3, 3), Op(2, (1, 1), (1, 1), (1, 1), groups=2), (3, 12, 5, 5)),
    "depthwise": ((8, 1, 3), Op(1, padding=1, groups=8), (2, 8, 7)),
    "conv3d": ((8, 6, 1, 3, 3), Op(3, (1, 2, 2), (0, 1, 1), (1, 1, 1)), (2, 6, 2, 5, 5)),
}
OPTIONS = {
    "rank 1": {"rank": 1},
    "rank 2 alpha 0.5": {"rank": 2, "alpha": 0.5},
    "rank 4": {"rank": 4},
    "rank above dims": {"rank": 40},
    "tucker": {"rank": 1, "tucker": True},
    "tucker rank 3": {"rank": 3, "tucker": True},
    "decompose_both": {"rank": 1, "decompose_both": True},
    "full_matrix": {"rank": 1, "full_matrix": True},
    "factor 2": {"rank": 2, "factor": 2, "decompose_both": True, "tucker": True},
}
FACTORED = ["lora", "loha", "lokr"]  # a delta that is a product of factors and nothing else
PLAIN = ["rank 2 alpha 0.5", "rank 4"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(algorithm: str, layer: str, options: str, seed: int = 0) -> Algorithm:
    config = AdapterConfig(algorithm, **{"alpha": 3.0, **OPTIONS[options]})
    return ALGORITHMS[algorithm].init(LAYERS[layer][0], config, rng(seed))


def trained(algorithm: str, layer: str, options: str, dtype: torch.dtype = torch.float32):
    adapter = fresh(algorithm, layer, options)
    generator = rng(1)
    for name, t in adapter.tensors.items():
        if t.is_floating_point():
            adapter.tensors[name] = torch.randn(t.shape, generator=generator, dtype=dtype)
    return adapter


def layer_of(layer: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Op, Tensor]:
    shape, op, x = LAYERS[layer]
    generator = rng(2)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    return weight, op, torch.randn(x, generator=generator, dtype=dtype)


def error(ours: Tensor, theirs: Tensor) -> float:
    # A rotation in one dimension is none: what it should not do it must not do at all.
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def has_start(algorithm: str, layer: str, options: str) -> bool:
    """Whether the algorithm can be made for this layer: some are read only, some have no such
    block size, T-LoRA needs a weight to begin with."""
    if ALGORITHMS[algorithm].parameter != "weight" or algorithm == "tlora":
        return False
    try:
        fresh(algorithm, layer, options)
    except AdapterLabError:
        return False
    return True


FACTORED_CASES = list(itertools.product(FACTORED, LAYERS, OPTIONS))
CASES = [
    *FACTORED_CASES,
    *(
        case
        for case in itertools.product(ALGORITHMS, LAYERS, PLAIN)
        if case[0] not in FACTORED and has_start(*case)
    ),
]
each_case = pytest.mark.parametrize("algorithm, layer, options", CASES)
each_factored_case = pytest.mark.parametrize("algorithm, layer, options", FACTORED_CASES)


# The equations again, without a thought for speed.


def positions(core: Tensor) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(n) for n in core.shape[2:]))


def dense_tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for k in positions(core):
        for p, q in itertools.product(range(core.shape[0]), range(core.shape[1])):
            out[(..., *k)] += core[(p, q, *k)] * torch.outer(a[p], b[q])
    return out


def dense_lora(t: dict[str, Tensor]) -> Tensor:
    up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"].flatten(1)
    if "lora_mid.weight" in t:
        return dense_tucker(t["lora_mid.weight"], up.T, down)
    return sum(torch.outer(up[:, i], down[i]) for i in range(len(down)))


def dense_loha(t: dict[str, Tensor]) -> Tensor:
    if "hada_t1" in t:
        halves = [dense_tucker(t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]) for i in "12"]
    else:
        halves = [t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in "12"]
    return halves[0] * halves[1]


def dense_lokr(t: dict[str, Tensor]) -> Tensor:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = dense_tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    out = torch.zeros(len(w1) * len(w2), w1.shape[1] * w2.shape[1], *w2.shape[2:]).double()
    for k in positions(w2):
        out[(..., *k)] = torch.kron(w1, w2[(..., *k)].contiguous())
    return out


DENSE = {"lora": dense_lora, "loha": dense_loha, "lokr": dense_lokr}


# Every algorithm


def test_factors_can_be_made_for_every_layer() -> None:
    assert all(has_start(*case) for case in FACTORED_CASES)


@each_case
def test_fresh_factors_change_nothing(algorithm: str, layer: str, options: str) -> None:
    before = torch.get_rng_state()
    adapter, again = (fresh(algorithm, layer, options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    weight, op, x = layer_of(layer)
    delta = adapter.delta(weight)
    assert delta.dtype == torch.float32 and not delta.any()
    assert torch.equal(weight + delta, weight)
    assert torch.equal(op(x, weight) + adapter.bypass(x, op, weight), op(x, weight))
    same = [torch.equal(t, again.tensors[name]) for name, t in adapter.tensors.items()]
    assert all(same)


@each_factored_case
def test_the_seed_decides(algorithm: str, layer: str, options: str) -> None:
    one, other = (fresh(algorithm, layer, options, seed).tensors for seed in (0, 1))
    assert not all(torch.equal(t, other[name]) for name, t in one.items())


@each_factored_case
def test_delta_is_the_equation(algorithm: str, layer: str, options: str) -> None:
    adapter, (weight, _, _) = trained(algorithm, layer, options), layer_of(layer)
    assert adapter.misfit(weight.shape) is None
    factors = {name: t.double() for name, t in adapter.tensors.items()}
    dense = DENSE[algorithm](factors).reshape(weight.shape) * adapter.scale
    delta = adapter.delta(weight)
    assert delta.shape == weight.shape
    assert error(delta, dense) < 2e-6


@each_case
def test_bypass_equals_merged(algorithm: str, layer: str, options: str) -> None:
    adapter, (weight, op, x) = trained(algorithm, layer, options), layer_of(layer)
    effect = op(x.double(), adapter.delta(weight).double())
    y = op(x, weight)
    for h in (adapter.bypass(x, op, weight), adapter.bypass(x, op, weight, y)):
        assert h.shape == y.shape
        assert error(h, effect) < (5e-6 if algorithm in FACTORED else 1e-4)
    half = adapter.bypass(x.bfloat16(), op, weight)
    assert half.dtype == torch.bfloat16
    assert error(half.double(), effect) < 0.05


@each_case
def test_merging_adds_the_delta_in_place(algorithm: str, layer: str, options: str) -> None:
    adapter, (weight, _, _) = trained(algorithm, layer, options), layer_of(layer)
    delta, kept = adapter.delta(weight), weight.clone()
    merged = adapter.merge(weight)
    assert merged is weight
    assert (merged - kept - delta).norm() < 1e-6 * (kept.norm() + delta.norm())
    assert torch.equal(adapter.at(0.0).merge(kept.clone()), kept)


@each_factored_case
def test_merging_into_memory_of_any_layout(algorithm: str, layer: str, options: str) -> None:
    adapter, (weight, _, _) = trained(algorithm, layer, options), layer_of(layer)
    want = adapter.merge(weight.clone())
    # rows of a larger weight, columns of one, outputs last, channels last
    tall = torch.cat([weight, weight, weight])
    broad = torch.cat([weight, weight], 1)
    last = torch.stack(list(weight), -1).movedim(-1, 0)
    channels = torch.stack(weight.unbind(1), -1).movedim(-1, 1)
    for whole, part in (
        (tall, tall.narrow(0, len(weight), len(weight))),
        (broad, broad.narrow(1, weight.shape[1], weight.shape[1])),
        (last, last),
        (channels, channels),
    ):
        other = whole.clone()
        adapter.merge(part)
        assert torch.allclose(part, want, rtol=1e-5, atol=1e-5)
        part.copy_(weight)
        assert torch.equal(whole, other), "something outside the part has changed"


@each_case
def test_strength_scales_or_blends(algorithm: str, layer: str, options: str) -> None:
    adapter, (weight, op, x) = trained(algorithm, layer, options), layer_of(layer)
    assert torch.equal(adapter.at(1.0).delta(weight), adapter.delta(weight))
    half = adapter.at(0.5)
    effect = op(x, half.delta(weight))
    assert error(half.bypass(x, op, weight), effect) < (5e-6 if algorithm in FACTORED else 1e-4)
    if algorithm in FACTORED:
        assert error(half.delta(weight), 0.5 * adapter.delta(weight)) < 1e-6


@each_case
def test_save_and_load_is_exact(algorithm: str, layer: str, options: str) -> None:
    adapter, (weight, _, _) = trained(algorithm, layer, options), layer_of(layer)
    state = load_bytes(save_bytes({k: t.contiguous() for k, t in adapter.state().items()}))
    assert all(type(adapter).owns(name) or name == "alpha" for name in state)
    claims = [a.load(state) for a in ALGORITHMS.values()]
    (loaded,) = (claim for claim in claims if claim is not None)
    assert type(loaded) is type(adapter)
    assert loaded.misfit(weight.shape) is None
    if algorithm in FACTORED:
        assert (loaded.scale, loaded.rank) == (adapter.scale, adapter.rank)
        assert loaded.shape == adapter.shape
    assert torch.equal(loaded.delta(weight), adapter.delta(weight))
    assert loaded.state().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in loaded.state().items())


@pytest.mark.parametrize(
    "algorithm, layer, options", [case for case in FACTORED_CASES if "above" not in case[2]]
)
def test_gradients(algorithm: str, layer: str, options: str) -> None:
    adapter = trained(algorithm, layer, options, torch.float64)
    weight, op, x = layer_of(layer, torch.float64)
    names = list(adapter.tensors)
    probe = torch.randn(op(x, weight).shape, generator=rng(3), dtype=torch.float64)
    scale = adapter.scale

    def rebuilt(*factors: Tensor) -> Tensor:
        copy = type(adapter)(dict(zip(names, factors, strict=True)), scale)
        return (op(x, weight + copy.delta(weight)) * probe).sum()

    def bypassed(*factors: Tensor) -> Tensor:
        copy = type(adapter)(dict(zip(names, factors, strict=True)), scale)
        return ((op(x, weight) + copy.bypass(x, op, weight)) * probe).sum()

    factors = [t.requires_grad_() for t in adapter.tensors.values()]
    torch.autograd.gradcheck(rebuilt, factors, fast_mode=True)
    ours, others = (torch.autograd.grad(f(*factors), factors) for f in (rebuilt, bypassed))
    assert all(error(a, b) < 1e-10 for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("algorithm", FACTORED)
def test_narrow_factors_are_computed_in_float32(algorithm: str, dtype: torch.dtype) -> None:
    for layer in ("linear", "conv2d 3x3"):
        adapter, (weight, op, x) = trained(algorithm, layer, "tucker rank 3"), layer_of(layer)
        narrow = {name: t.to(dtype) for name, t in adapter.state().items()}
        loaded = load(narrow)
        wide = load({name: t.float() for name, t in narrow.items()})
        assert loaded is not None and wide is not None
        delta = loaded.delta(weight.bfloat16())
        assert delta.dtype == torch.float32
        assert torch.equal(delta, wide.delta(weight))
        assert error(loaded.bypass(x, op, weight), op(x, delta)) < 5e-6


@pytest.mark.parametrize("algorithm", FACTORED)
def test_a_weight_of_another_shape_is_a_misfit(algorithm: str) -> None:
    linear = trained(algorithm, "linear", "rank 1")
    assert linear.misfit((16, 12, 1, 1)) is None
    for shape in ((12, 16), (16, 13), (15, 12), (8, 24), (16, 12, 3, 3)):
        found = linear.misfit(shape)
        assert found is not None and str(tuple(shape)) in found and "(16, 12" in found
    conv = trained(algorithm, "conv2d 3x3", "full_matrix")
    assert conv.misfit((22, 6, 3, 3)) is not None
    assert trained(algorithm, "conv2d same", "tucker rank 3").misfit((8, 6, 3, 1)) is not None
    assert trained(algorithm, "conv2d 3x3", "tucker").misfit((22, 12, 3, 1)) is not None


@pytest.mark.parametrize("layer", ["linear", "conv2d 1x1"])
@pytest.mark.parametrize("algorithm", FACTORED)
def test_linear_and_pointwise_adapters_are_interchangeable(algorithm: str, layer: str) -> None:
    weight, op, x = layer_of(layer)
    for source, options in itertools.product(("linear", "conv2d 1x1"), ("rank 1", "full_matrix")):
        adapter = trained(algorithm, source, options)
        assert adapter.misfit(weight.shape) is None
        effect = op(x, adapter.delta(weight))
        assert error(adapter.bypass(x, op, weight), effect) < 5e-6


def test_names_of_tensors() -> None:
    """Algorithms may share a name and differ in shapes; a wrapper's is asked for by name alone."""
    for owner in (*ALGORITHMS.values(), *WRAPPERS.values()):
        assert owner.suffixes and len(owner.suffixes) == len(set(owner.suffixes))
        assert not {"alpha", "scalar"} & set(owner.suffixes)
    wrapping = [name for wrapper in WRAPPERS.values() for name in wrapper.suffixes]
    taken = {name for algorithm in ALGORITHMS.values() for name in algorithm.suffixes}
    assert len(wrapping) == len(set(wrapping)) and not taken & set(wrapping)


def test_what_is_no_algorithm_is_none() -> None:
    foreign = {"to_q": torch.zeros(2, 2), "dora_scale": torch.ones(2, 1), "alpha": torch.tensor(1)}
    assert load(foreign) is None
    assert load({}) is None
    adapter = trained("lora", "linear", "rank 1")
    mixed = load({**adapter.state(), "to_q": torch.ones(16, 1)})
    assert mixed is not None and set(mixed.state()) == set(adapter.state())
