"""Thin factors of every algorithm against its dense delta, and LoRAs of what deltas sum to."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_lab.core.adapters import Ordered, load
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.merge import factors
from adapter_lab.core.merge.factors import cast, dense_sum, lora_of, pairs, spectrum_of
from adapter_lab.core.merge.ranks import RankRule
from adapter_samples import OUT, WIDTH, samples

SHAPES = [
    (OUT, WIDTH),
    (OUT, WIDTH, 1, 1),
    (OUT, WIDTH, 3, 3),
    (OUT, WIDTH, 3),
    (OUT, WIDTH, 1, 2, 2),
]
THIN = {"lora", "loha", "lokr", "lora, tucker", "vera", "hra", "tlora"}
ALL = RankRule("fixed")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(found):
    return sum(up.double() @ down.double() for up, down in found)


def of(tensors, shape, scale=1.0):
    """dW that LoRA tensors stand for, float64."""
    up, down = (tensors[f"lora_{x}.weight"].flatten(1).double() for x in ("up", "down"))
    return (up @ down * float(tensors["alpha"]) / len(down) * scale).reshape(shape)


def near(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= tolerance * float(wanted.double().norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thin_factors_multiply_to_the_delta(shape):
    """Of all algorithms that have some; the others have none."""
    weight, seen = rand(*shape, seed=5), set()
    for sample, tensors in samples(shape).items():
        algorithm = load(tensors)
        found = algorithm and pairs(algorithm, weight)
        if not found:
            continue
        seen.add(sample)
        near(product(found), algorithm.delta(weight).flatten(1).double())
        near(
            product(pairs(algorithm.at(-0.5), weight)), algorithm.at(-0.5).delta(weight).flatten(1)
        )
        if not (algorithm.reads_weight or sample == "vera"):
            near(product(pairs(algorithm)), algorithm.delta(weight).flatten(1).double())
    # Full factors of LoKr have 12 columns between 16 rows and 36 or 48 columns.
    expected = THIN | ({"lokr, full"} if math.prod(shape[2:]) > 1 else set())
    assert seen == expected & set(samples(shape))


def test_loha_lokr_with_cores_are_thin():
    k, r = (3, 3), 2
    cores = {f"hada_t{i}": rand(r, r, *k, seed=i) for i in (1, 2)}
    loha = {f"hada_w{i}_{e}": rand(r, n, seed=i) for i in (1, 2) for e, n in (("a", 40), ("b", 30))}
    lokr = {"lokr_w1": rand(4, 3), "lokr_w2_a": rand(r, 10), "lokr_w2_b": rand(r, 10, seed=1),
            "lokr_t2": rand(r, r, *k), "alpha": torch.tensor(3.0)}  # fmt: skip
    both = {"lokr_w1_a": rand(4, r), "lokr_w1_b": rand(r, 3), "lokr_w2_a": rand(10, r),
            "lokr_w2_b": rand(r, 10 * 9)}  # fmt: skip
    for tensors, rank in (({**loha, **cores}, 4), (lokr, 6), (both, 4)):
        algorithm = load(tensors)
        found = pairs(algorithm)
        assert sum(up.shape[1] for up, _ in found) == rank
        near(product(found), algorithm.delta(torch.zeros(40, 30, *k)).flatten(1).double())


def test_wrappers_are_seen_through():
    lora = {
        "lora_up.weight": rand(16, 2),
        "lora_down.weight": rand(2, 12),
        "alpha": torch.tensor(1.0),
    }
    weight = torch.zeros(16, 12)
    scaled = load({**lora, "scalar": torch.tensor(0.25)})
    near(product(pairs(scaled)), 0.25 * load(lora).delta(weight))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    ordered = Ordered(load(lora), order)
    near(product(pairs(ordered)), ordered.delta(weight))
    padded = load({**lora, "reshape_weight": torch.tensor([16, 12])})
    small = torch.zeros(16, 6)
    near(product(pairs(padded)), padded.delta(small))


def test_what_is_as_wide_as_the_delta_is_not_thin():
    """LoHa of rank 4 is a product of 16 columns, the delta has 12."""
    loha = {f"hada_w{i}_a": rand(16, 4, seed=i) for i in (1, 2)}
    loha |= {f"hada_w{i}_b": rand(4, 12, seed=i) for i in (3, 4)}
    loha = {n.replace("3", "1").replace("4", "2"): t for n, t in loha.items()}
    assert pairs(load(loha)) is None
    assert pairs(load({"lokr_w1": rand(4, 3), "lokr_w2": rand(4, 4)})) is None


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_spectrum_of_every_algorithm(shape):
    """Its singular values are those of the delta, of sums with ratios as well."""
    weight = rand(*shape, seed=5)
    lora = load(samples(shape)["lora"])
    for tensors in samples(shape).values():
        algorithm = load(tensors)
        if algorithm is None:
            continue
        for terms in ([(algorithm, 1.0)], [(algorithm, -0.5), (lora, 2.0)]):
            whole = sum(a.at(m).delta(weight).flatten(1) for a, m in terms).double()
            found = spectrum_of(terms, ALL, shape, weight=weight)
            s = torch.linalg.svdvals(whole)[: len(found.s)]
            torch.testing.assert_close(found.s.double(), s, rtol=1e-4, atol=1e-5 * float(s[0]))
            near((found.u * found.s).double() @ found.vh.double(), whole, 2e-6)
            assert found.nuclear == pytest.approx(float(s.sum()), rel=1e-4)
            rank = ALL.choose(found, shape)
            made = lora_of(found, rank, shape, torch.float32)
            near(of(made, shape), whole.reshape(shape), 1e-5)


@pytest.mark.parametrize("rule", [
    RankRule("fixed", rank=5), RankRule("sv_ratio", 4.5, 9), RankRule("sv_ratio", 3.5),
    RankRule("sv_fro", 0.8), RankRule("sv_fro", 0.9, 12), RankRule("sv_cumulative", 0.7),
    RankRule("error", 0.3), RankRule("error", 0.3, 7),
])  # fmt: skip
def test_a_sketch_chooses_the_rank_that_all_singular_values_choose(rule):
    shape = (300, 260)
    g = 1 / torch.arange(1, 261)
    full = load(
        {"diff": torch.linalg.qr(rand(300, 260))[0] * g @ torch.linalg.qr(rand(260, 260))[0]}
    )
    found = spectrum_of([(full, 1.0)], rule, shape)
    exact = spectrum_of([(full, 1.0)], rule, shape, exact=True)
    assert exact.whole and len(exact.s) == 260
    assert rule.choose(found, shape) == rule.choose(exact, shape)
    if rule.rule != "sv_cumulative":  # which takes the sum of all
        assert len(found.s) < 260


def test_factors_or_dense_whichever_is_cheaper(monkeypatch):
    """Rank 4 in 200 x 200 goes by its factors; a LoHa of rank 12, 144 columns, does not."""
    used: list[str] = []

    def watched(name, real):
        def run(*args, **more):
            used.append(name)
            return real(*args, **more)

        monkeypatch.setattr(factors, name, run)

    watched("factored", factors.factored)
    watched("dense", factors.dense)
    rule, shape = RankRule("fixed", rank=4), (200, 200)
    thin = load({"lora_up.weight": rand(200, 4), "lora_down.weight": rand(4, 200)})
    loha = load({f"hada_w{i}_{e}": rand(*n, seed=i) for i in (1, 2)
                 for e, n in (("a", (200, 12)), ("b", (12, 200)))})  # fmt: skip
    assert pairs(loha) is not None
    for algorithm in (thin, loha):
        spectrum_of([(algorithm, 1.0)], rule, shape)
    assert used == ["factored", "dense"]


def test_what_depends_on_the_weight_asks_for_it():
    shape = (OUT, WIDTH)
    for sample in ("oft", "glora", "ia3", "set"):
        with pytest.raises(AdapterLabError, match="depends on the weight it changes"):
            dense_sum([(load(samples(shape)[sample]), 1.0)], shape)
    dora = load({**samples(shape)["lora"], "dora_scale": torch.ones(OUT, 1)})
    with pytest.raises(AdapterLabError, match="LoRA with DoRA depends on"):
        spectrum_of([(dora, 1.0)], ALL, shape)


@pytest.mark.parametrize("alpha", [None, 1.0, -3.0, 1e-3])
def test_lora_of_has_the_scale_that_is_asked_for(alpha):
    found = spectrum_of([(load({"diff": rand(20, 30)}), 1.0)], ALL, (20, 30))
    made = lora_of(found, 20, (20, 30), torch.float32, alpha)
    assert float(made["alpha"]) == (20.0 if alpha is None else pytest.approx(alpha))
    near(of(made, (20, 30)), rand(20, 30).double())
    up, down = made["lora_up.weight"], made["lora_down.weight"]
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


@pytest.mark.parametrize(("shape", "up", "down"), [
    ((8, 6), (8, 3), (3, 6)), ((8, 6, 3), (8, 3, 1), (3, 6, 3)),
    ((8, 6, 3, 3), (8, 3, 1, 1), (3, 6, 3, 3)), ((8, 6, 1, 2, 2), (8, 3, 1, 1, 1), (3, 6, 1, 2, 2)),
])  # fmt: skip
def test_shapes_are_those_of_lora_files(shape, up, down):
    found = spectrum_of([(load({"diff": rand(*shape)}), 1.0)], ALL, shape)
    made = lora_of(found, 3, shape, torch.bfloat16)
    assert made["lora_up.weight"].shape == up and made["lora_down.weight"].shape == down
    assert made["lora_up.weight"].dtype == torch.bfloat16 and made["alpha"].shape == ()
    assert made["lora_down.weight"].is_contiguous() and made["lora_up.weight"].is_contiguous()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_half_precision_holds_both_factors(size):
    """All of it in one factor would be below float16's normal numbers, or above its largest."""
    weight = rand(40, 6) @ rand(6, 30) * size
    found = spectrum_of([(load({"diff": weight}), 1.0)], ALL, (40, 30))
    near(of(lora_of(found, 6, (40, 30), torch.float16), (40, 30)), weight.double(), 2e-3)


def test_what_does_not_fit_is_an_error():
    found = spectrum_of([(load({"diff": rand(8, 6) * 1e12}), 1.0)], ALL, (8, 6))
    with pytest.raises(AdapterLabError, match=r"'lora_up.weight' does not fit into float16"):
        lora_of(found, 4, (8, 6), torch.float16)
    with pytest.raises(AdapterLabError, match="alpha of 0"):
        lora_of(found, 4, (8, 6), torch.float32, 0.0)
    assert torch.isfinite(cast(torch.tensor([60000.0]), torch.float16, "x")).all()


def test_zeros_are_a_lora_of_rank_one():
    zero = load({"lora_up.weight": torch.zeros(20, 4), "lora_down.weight": rand(4, 30)})
    found = spectrum_of([(zero, 1.0)], RankRule("sv_fro", 0.9), (20, 30))
    rank = RankRule("sv_fro", 0.9).choose(found, (20, 30))
    made = lora_of(found, rank, (20, 30), torch.float32)
    assert rank == 1 and not of(made, (20, 30)).any() and not math.isnan(float(made["alpha"]))
