"""What is particular to an algorithm: how its factors are read, scaled and started."""

from __future__ import annotations

import math
import re

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig, load, load_parts
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op, kron
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

FAMILY = ["lora", "loha", "lokr", "full", "bias", "set", "norm"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


E = torch.empty
BROKEN = {
    "no partner": ({"lora_up.weight": E(4, 2)}, "missing.*lora_down"),
    "no up": ({"lora_down.weight": E(2, 4)}, "missing.*lora_up"),
    "lora shapes": (
        {"lora_up.weight": E(4, 3), "lora_down.weight": E(2, 4)},
        r"multiply.*lora_up.weight \(4, 3\), lora_down.weight \(2, 4\)",
    ),
    "down with a kernel beside a core": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 4, 3), "lora_mid.weight": E(2, 2, 3)},
        r"multiply.*lora_down.weight \(2, 4, 3\)",
    ),
    "mid shape": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 4), "lora_mid.weight": E(3, 2, 3)},
        r"multiply.*lora_mid.weight \(3, 2, 3\)",
    ),
    "rank 0": (
        {"lora_up.weight": E(4, 0), "lora_down.weight": E(0, 4)},
        r"empty, of rank 0.*lora_up.weight, float32 of shape \(4, 0\)",
    ),
    "hada rank 0": ({f"hada_w{n}": E(0, 0) for n in ("1_a", "1_b", "2_a", "2_b")}, "empty.*rank"),
    "kron rank 0": (
        {"lokr_w1": E(2, 2), "lokr_w2_a": E(2, 0), "lokr_w2_b": E(0, 2)},
        "empty.*rank",
    ),
    "two alphas": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 4), "alpha": E(2)},
        r"alpha is not a number.*\(2,\)",
    ),
    "alpha nan": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 4), "alpha": torch.tensor(math.nan)},
        "alpha is not finite",
    ),
    "half of a LoHa": ({"hada_w1_a": E(4, 2), "hada_w1_b": E(2, 4)}, "missing.*hada_w2_a"),
    "LoHa with one core": (
        {**{f"hada_w{n}": E(2, 4) for n in ("1_a", "1_b", "2_a", "2_b")}, "hada_t1": E(2, 2, 3)},
        "missing.*hada_t2",
    ),
    "LoHa shapes": (
        {f"hada_w{n}": E(4, 2) for n in ("1_a", "1_b", "2_a", "2_b")},
        r"multiply.*hada_w1_b \(4, 2\)",
    ),
    "LoHa halves": (
        {"hada_w1_a": E(4, 2), "hada_w1_b": E(2, 3), "hada_w2_a": E(4, 2), "hada_w2_b": E(2, 5)},
        "multiply",
    ),
    "LoHa 4-D": ({f"hada_w{n}": E(4, 4, 1, 1) for n in ("1_a", "1_b", "2_a", "2_b")}, "matrices"),
    "vector": ({"lokr_w1": E(4), "lokr_w2": E(4, 4)}, r"matrix.*lokr_w1.*\(4,\)"),
    "outer factor with a kernel": ({"lokr_w1": E(2, 2, 3), "lokr_w2": E(2, 2)}, "not a matrix"),
    "half of a LoKr": ({"lokr_w1": E(2, 2)}, "missing.*lokr_w2_a"),
    "half of a pair": ({"lokr_w1_a": E(2, 2), "lokr_w2": E(2, 2)}, "missing.*lokr_w1_b"),
    "twice": ({"lokr_w1": E(2, 2), "lokr_w1_a": E(2, 2), "lokr_w2": E(2, 2)}, "given twice"),
    "core without pair": (
        {"lokr_w1": E(2, 2), "lokr_w2": E(2, 2), "lokr_t2": E(2, 2, 3)},
        "lokr_t2 needs",
    ),
    "core of a pair with kernels": (
        {
            "lokr_w1": E(2, 2),
            "lokr_w2_a": E(2, 4, 1, 1),
            "lokr_w2_b": E(2, 4, 1, 1),
            "lokr_t2": E(2, 2, 3, 3),
        },
        r"multiply.*lokr_w2_a \(2, 4, 1, 1\)",
    ),
    "two ranks": (
        {f"lokr_w{n}": E(4, 4)[:, :r] if n[-1] == "a" else E(r, 4)
         for n, r in (("1_a", 2), ("1_b", 2), ("2_a", 3), ("2_b", 3))},
        "differ in rank",
    ),
    "half of an embedding": ({"lora_embedding_A": E(2, 9)}, "missing.*lora_embedding_B"),
    "embedding with a kernel": (
        {"lora_embedding_A": E(2, 9, 1), "lora_embedding_B": E(4, 2)},
        r"two matrices.*lora_embedding_A \(2, 9, 1\)",
    ),
    "embedding beside a pair": (
        {"lora_embedding_A": E(2, 9), "lora_embedding_B": E(4, 2), "lora_up.weight": E(4, 2)},
        "two matrices.*lora_up.weight",
    ),
    "bias alone": ({"lora_up.bias": E(4)}, "missing.*found lora_up.bias, expected lora_up.weight"),
    "DoRA beside a bias": (
        {"diff_b": E(4), "dora_scale": E(4, 1)}, "'dora_scale' has no factors.*diff_b",
    ),
    "scalar beside a bias": (
        {"diff_b": E(4), "scalar": torch.tensor(2.0)}, "'scalar' has no factors",
    ),
    "padding beside a bias": (
        {"diff_b": E(4), "reshape_weight": torch.tensor([4, 6])}, "'reshape_weight' has no factors",
    ),
    "scalar of two values": ({"diff": E(4), "scalar": E(2)}, r"scalar is not a number.*\(2,\)"),
    "scalar NaN": ({"diff": E(4), "scalar": torch.tensor(math.nan)}, "scalar is not finite"),
    "complex alpha": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 4), "alpha": torch.tensor(1j)},
        "alpha is not a number.*complex64",
    ),
    "alpha of full LoKr": (
        {"lokr_w1": E(2, 2), "lokr_w2": E(2, 2), "alpha": E(3)}, r"alpha is not a number.*\(3,\)",
    ),
    "alpha NaN of full LoKr": (
        {"lokr_w1": E(2, 2), "lokr_w2": E(2, 2), "alpha": torch.tensor(math.nan)}, "not finite",
    ),
    "bias of another layer": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 4), "lora_up.bias": E(5)},
        r"multiply.*lora_up.bias \(5,\)",
    ),
    "two differences": ({"diff_b": E(4), "b_norm": E(4)}, "given twice.*diff_b, b_norm"),
    "difference and norm": ({"diff": E(4), "w_norm": E(4)}, "Two algorithms"),
    "empty difference": ({"diff": E(0, 4)}, "empty"),
    "whole numbers": ({"set_weight": torch.ones(4, dtype=torch.int32)}, "no real numbers"),
    "DoRA for another weight": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 6), "dora_scale": E(5, 1)},
        r"dora_scale fits no axis.*\(5, 1\).*\(4, 6\)",
    ),
    "DoRA of every element": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 6), "dora_scale": E(4, 6)},
        "dora_scale fits no axis",
    ),
    "DoRA twice": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 6), "dora_scale": E(4, 1),
         "magnitude": E(4)},
        "given twice.*dora_scale, magnitude",
    ),
    "padding to less": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 6),
         "reshape_weight": torch.tensor([4, 5])},
        r"reshape_weight is not the shape.*\(4, 6\)",
    ),
    "padding without whole numbers": (
        {"lora_up.weight": E(4, 2), "lora_down.weight": E(2, 6),
         "reshape_weight": torch.tensor([4.0, 6.0])},
        "reshape_weight is not a shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_modules_say_what_is_wrong(name: str) -> None:
    tensors, message = BROKEN[name]
    with pytest.raises(AdapterLabError) as caught:
        load(tensors)
    assert re.search(message, str(caught.value)), str(caught.value)


@given(st.data())
def test_what_loads_can_be_applied(data: st.DataObject) -> None:
    algorithm = ALGORITHMS[data.draw(st.sampled_from(FAMILY))]
    likely, odd = [(2, 2), (2, 2), (2, 2), (2, 2, 3)], [(2, 3), (2, 2, 1, 1), (0, 2), (2,), ()]
    shapes = st.sampled_from(likely) | st.sampled_from(odd)
    drawn = data.draw(st.dictionaries(st.sampled_from([*algorithm.suffixes, "alpha"]), shapes))
    try:
        parts = load_parts({name: torch.ones(shape) for name, shape in drawn.items()})
    except AdapterLabError:
        return
    assert parts or not drawn.keys() - {"alpha"}
    for adapter in parts.values():
        weight = torch.zeros(adapter.shape)
        assert adapter.misfit(weight.shape) is None
        assert adapter.delta(weight).shape == weight.shape and adapter.rank >= 1
        assert adapter.merge(weight) is weight


def test_rank_0_cannot_be_configured() -> None:
    with pytest.raises(AdapterLabError, match="found 0, expected 1 or more"):
        AdapterConfig(rank=0)


# Scale


def test_alpha_over_rank() -> None:
    factors = {"lora_up.weight": torch.randn(4, 2), "lora_down.weight": torch.randn(2, 4)}
    for alpha, scale in ((None, 1.0), (torch.tensor(4.0), 2.0), (torch.tensor([1]).half(), 0.5)):
        loaded = load(factors if alpha is None else {**factors, "alpha": alpha})
        assert loaded is not None and loaded.scale == scale
    outside = load({**factors, "alpha": torch.tensor(9.0)}, scale=0.7)
    assert outside is not None and outside.scale == 0.7 and outside.alpha == 1.4
    assert AdapterConfig(rank=8, alpha=0).scale == 1


def test_two_full_kron_factors_ignore_alpha_but_not_a_scale_from_outside() -> None:
    weight = torch.zeros(4, 6)
    full = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(2, 3)}
    for alpha in (1e4, 1.0, 0.0, math.inf):
        loaded = load({**full, "alpha": torch.tensor(alpha)})
        assert loaded is not None and loaded.scale == 1
        assert torch.equal(loaded.delta(weight), kron(*full.values()))
    # LyCORIS' users ask for full factors with a rank of 10000 or 10000000000.
    for asked, rank in ((1e4, 2), (1e10, 2), (math.inf, 2), (1.0, 1)):
        huge = load({**full, "alpha": torch.tensor(asked)})
        assert huge is not None and huge.rank == rank
        assert float(huge.state()["alpha"]) == (asked if math.isfinite(asked) else rank)
    outside = load(full, scale=0.5)
    assert outside is not None
    assert torch.equal(outside.delta(weight), 0.5 * kron(*full.values()))
    assert float(outside.state()["alpha"]) == outside.rank
    again = load(outside.state())
    assert again is not None and again.scale == 1
    assert torch.equal(again.delta(weight), outside.delta(weight))


# Spellings of one LoRA


def test_lora_factors_in_all_their_shapes() -> None:
    weight, op, x = torch.zeros(16, 12, 3, 3), Op(2, padding=1), torch.randn(2, 12, 5, 5)
    up, down = torch.randn(16, 4, generator=rng()), torch.randn(4, 12, 3, 3, generator=rng(1))
    want = (up @ down.flatten(1)).reshape(weight.shape)
    for u, d in (
        (up[..., None, None], down),  # kohya, LyCORIS
        (up, down),  # DyLoRA
        (up, down.flatten(1)),  # ComfyUI's own trainer
    ):
        lora = load({"lora_up.weight": u, "lora_down.weight": d})
        assert lora is not None and lora.misfit(weight.shape) is None
        assert torch.equal(lora.delta(weight), want)
        assert error(lora.bypass(x, op, weight), op(x, want)) < 5e-6


def test_a_core_on_a_linear_layer() -> None:
    weight, op, x = torch.zeros(16, 12), Op(), torch.randn(2, 12)
    names = ("lora_up.weight", "lora_mid.weight", "lora_down.weight")
    shapes = ((16, 2, 1, 1), (2, 2, 1, 1), (2, 12, 1, 1))
    lora = load({n: torch.randn(s, generator=rng()) for n, s in zip(names, shapes, strict=True)})
    assert lora is not None and lora.misfit(weight.shape) is None
    assert error(lora.bypass(x, op, weight), op(x, lora.delta(weight))) < 5e-6


# Initialisation


def test_init_distributions() -> None:
    shape = (512, 256, 3, 3)
    lora = ALGORITHMS["lora"].init(shape, AdapterConfig(rank=32), rng()).tensors
    bound = 1 / math.sqrt(256 * 9)
    down = lora["lora_down.weight"]
    assert 0.99 * bound < down.abs().max() <= bound
    assert float(down.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not lora["lora_up.weight"].any()
    loha = ALGORITHMS["loha"].init(shape, AdapterConfig(rank=32, tucker=True), rng()).tensors
    stds = {"hada_w1_a": 0.1, "hada_w1_b": 1, "hada_t1": 0.1, "hada_t2": 0.1, "hada_w2_b": 1}
    for name, std in stds.items():
        assert float(loha[name].std()) == pytest.approx(std, rel=0.03), name
        assert abs(float(loha[name].mean())) < 0.05 * std
    assert not loha["hada_w2_a"].any()
    lokr = ALGORITHMS["lokr"].init((512, 256), AdapterConfig(rank=4), rng()).tensors
    assert lokr["lokr_w1"].shape == (16, 16) and lokr["lokr_w1"].abs().max() <= 0.25
    assert lokr["lokr_w2_a"].abs().max() <= 0.5 and not lokr["lokr_w2_b"].any()


KRON_CASES = [
    ({"rank": 7}, {"w1": (16, 16), "w2_a": (32, 7), "w2_b": (7, 16)}),
    ({"rank": 16}, {"w1": (16, 16), "w2": (32, 16)}),
    ({"rank": 7, "decompose_both": True}, {"w1_a": (16, 7), "w1_b": (7, 16)}),
    ({"rank": 8, "decompose_both": True}, {"w1": (16, 16), "w2_a": (32, 8)}),
    ({"rank": 1, "decompose_both": True, "full_matrix": True}, {"w1": (16, 16), "w2": (32, 16)}),
    ({"rank": 16, "factor": 4}, {"w1": (4, 4), "w2_a": (128, 16), "w2_b": (16, 64)}),
]


@pytest.mark.parametrize("options, shapes", KRON_CASES)
def test_which_kron_factor_is_low_rank(options: dict[str, int], shapes: dict[str, tuple]) -> None:
    lokr = ALGORITHMS["lokr"].init((512, 256), AdapterConfig(alpha=1, **options), rng())
    for name, shape in shapes.items():
        assert lokr.tensors[f"lokr_{name}"].shape == shape
    assert lokr.scale == (1 if "w2" in shapes else 1 / options["rank"])
    assert lokr.rank == options["rank"]
