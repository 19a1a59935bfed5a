"""The delta of a merged adapter is the sum of the deltas that went into it."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.core.merge.combine import Merge
from adapter_lab.core.merge.ranks import RankRule
from adapter_samples import biases, samples
from merged import DOWN, STEM, UP, assert_sum, by_hand, close, file, lora, model, rng

SHAPES = [(16, 12), (16, 12, 3, 3), (16, 12, 1, 1)]
READING = {
    "set", "oft", "boft", "oft_kohya", "oft_peft", "boft_peft", "hra", "glora", "glokr", "ia3",
    "ia3_peft", "glora_peft", "tlora",
}  # fmt: skip


def algorithm(name):
    return name.partition(",")[0]


def flipped(tensors):
    """Another module of the same sort."""
    return {n: t.flip(0) if n != "on_input" else t for n, t in tensors.items()}


def pairs_of(found):
    """Every sample with another of its sort, with a LoRA and with the next one."""
    names = [*found]
    for one, two in zip(names, [*names[1:], names[0]], strict=True):
        yield one, one, flipped(found[one])
        yield one, "lora", found["lora"]
        yield one, two, found[two]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_two_algorithms(shape):
    """With the base model, whatever they are; those that need it say so without it."""
    weights, found = model(shape), samples(shape)
    for one, two, tensors in pairs_of(found):
        given, ratios = [file(found[one]), file(tensors)], [0.7, -0.4]
        terms = list(zip(given, ratios, strict=True))
        assert_sum(Merge(given, ratios, base=weights).collect(), weights, terms, 5e-5)
        if {algorithm(one), algorithm(two)} & READING or one == two == "vera":
            with pytest.raises(AdapterLabError, match="depends on the weight"):
                Merge(given, ratios).collect()
        else:
            assert_sum(Merge(given, ratios).collect(), weights, terms, 5e-5)


@pytest.mark.parametrize("ratio", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone_keeps_its_algorithm(shape, ratio):
    weights = model(shape)
    for name, tensors in samples(shape).items():
        if ratio != 1 and algorithm(name) in READING:
            with pytest.raises(AdapterLabError, match="depends on the weight"):
                Merge([file(tensors)], [ratio]).collect()
            continue
        merge = Merge([file(tensors)], [ratio])
        merged = merge.collect()
        assert {key.removeprefix(STEM + ".") for key in merged} - {"alpha"} == {*tensors} - {
            "alpha"
        }
        assert_sum(merged, weights, [(file(tensors), ratio)])
        if ratio == 1:
            assert all(torch.equal(merged[f"{STEM}.{n}"], t) for n, t in tensors.items())


def test_biases_and_norms_add_up():
    weights = {"diffusion_model.norm.weight": torch.ones(16), **model((16, 12))}
    plain = biases(16)
    one = file({**lora(alpha=3), "diff_b": plain["bias"]["diff_b"]})
    two = Adapter({**file({"diff_b": torch.ones(16)}), "lora_unet_norm.w_norm": torch.ones(16)})
    three = Adapter({"lora_unet_norm.w_norm": plain["norm"]["w_norm"]})
    given = [(one, 0.5), (two, -2.0), (three, 3.0)]
    merged = Merge([a for a, _ in given], [r for _, r in given]).collect()
    assert_sum(merged, weights, given)
    assert "lora_unet_norm.w_norm" in merged


def test_bias_of_the_up_factor_and_replaced_bias():
    weights = model((16, 12))
    one = file({**lora(), "lora_up.bias": torch.randn(16, generator=rng(4))})
    two = Adapter({f"{STEM}.diff_b": torch.ones(16)})
    assert_sum(Merge([one], [-0.5]).collect(), weights, [(one, -0.5)])
    assert_sum(Merge([one, two], [-0.5, 2]).collect(), weights, [(one, -0.5), (two, 2)])


def test_ratios_act_once_and_factors_do_not_meet():
    one, two = lora(rank=2, alpha=1, seed=1), lora(rank=5, alpha=None, seed=2)
    merged = Merge([file(one), file(two)], [0.7, -0.4], method="concatenate").collect()
    wanted = 0.7 * by_hand(one) - 0.4 * by_hand(two)
    assert close(by_hand(merged, STEM + "."), wanted, 1e-6)
    assert len(merged[f"{STEM}.{DOWN}"]) == 7


def test_one_ratio_serves_all_and_zero_leaves_out():
    one, two = lora(seed=1), lora(seed=2)
    merged = Merge([file(one), file(two)], [0.5]).collect()
    assert close(by_hand(merged, STEM + "."), 0.5 * (by_hand(one) + by_hand(two)), 1e-6)
    job = Merge([file(one), file(two)], [0.0, 1.0])
    assert torch.equal(job.collect()[f"{STEM}.{UP}"], two[UP])
    assert any("ratio 0" in said for said in job.outcome.warnings)


def test_bfloat16_factors_keep_their_bits():
    """Where the scales differ by powers of two; a sign is a bit."""
    one = lora(64, 48, 8, alpha=8, seed=1, dtype=torch.bfloat16)
    two = lora(64, 48, 4, alpha=2, seed=2, dtype=torch.bfloat16)
    merged = Merge([file(one), file(two)], [1.0, -1.0]).collect()
    up, down = merged[f"{STEM}.{UP}"], merged[f"{STEM}.{DOWN}"]
    assert up.dtype == down.dtype == torch.bfloat16
    assert torch.equal(up[:, :8], one[UP]) and torch.equal(down, torch.cat((one[DOWN], two[DOWN])))
    assert torch.equal(up[:, 8:], two[UP] * -0.5)
    assert close(by_hand(merged, STEM + "."), by_hand(one) - by_hand(two), 1e-7)


def test_bfloat16_is_exact_to_its_rounding():
    one = lora(64, 48, 8, alpha=8, seed=1, dtype=torch.bfloat16)
    two = lora(64, 48, 8, alpha=3, seed=2, dtype=torch.bfloat16)
    merged = Merge([file(one), file(two)], [0.7, -0.3]).collect()
    wanted = 0.7 * by_hand(one) - 0.3 * by_hand(two)
    assert torch.equal(merged[f"{STEM}.{UP}"][:, :8], one[UP])
    assert close(by_hand(merged, STEM + "."), wanted, 2**-9)


def test_widest_dtype_and_option():
    one, two = lora(dtype=torch.float16), lora(seed=1, dtype=torch.bfloat16)
    merged = Merge([file(one), file(two)], [1, 1]).collect()
    assert merged[f"{STEM}.{UP}"].dtype == torch.float32
    halved = Merge([file(one), file(two)], [1, 1], dtype=torch.float16).collect()
    assert halved[f"{STEM}.{UP}"].dtype == torch.float16
    large = {**lora(), UP: torch.full((16, 2), 60000.0)}
    with pytest.raises(AdapterLabError, match="does not fit"):
        Merge([file(one), file(large)], [1, 4], dtype=torch.float16).collect()


def test_ratios_that_no_alpha_can_hold():
    for more in ([], [file(lora())]):
        adapters = [file(lora(alpha=4)), *more]
        with pytest.raises(AdapterLabError, match=f"'{STEM}'.*alpha does not fit.*smaller ratios"):
            Merge(adapters, [1e38]).collect()


def test_what_holds_no_modules():
    """An empty adapter is named; one of embeddings alone does not decide about the names."""
    with pytest.raises(AdapterLabError, match="'none.safetensors' is empty"):
        Merge([file(lora()), Adapter(name="none.safetensors")], [1])
    word = Adapter({"bundle_emb.cat.string_to_param.*": torch.ones(2, 4)})
    merged = Merge([word, file(lora())], [1]).collect()
    assert merged.keys() == {*file(lora()), *word}


def test_the_same_factors_become_one():
    one = file(lora(alpha=1))
    job = Merge([one, one], [0.5, 0.25])
    merged = job.collect()
    assert len(merged[f"{STEM}.{DOWN}"]) == 2
    assert close(by_hand(merged, STEM + "."), 0.75 * by_hand(one, STEM + "."), 1e-6)
    assert any("more than once" in said for said in job.outcome.warnings)
    gone = Merge([one, one], [1, -1])
    assert not gone.collect() and gone.outcome.left_out == {STEM: "its changes cancel out"}


def test_loha_with_a_common_half_stays_loha():
    draw = rng(3)
    half = {"hada_w2_a": torch.randn(16, 3, generator=draw),
            "hada_w2_b": torch.randn(3, 12, generator=draw)}  # fmt: skip
    given = []
    for alpha in (3.0, 2.0):
        own = {"hada_w1_a": torch.randn(16, 3, generator=draw),
               "hada_w1_b": torch.randn(3, 12, generator=draw)}  # fmt: skip
        given.append(file({**own, **half, "alpha": torch.tensor(alpha)}))
    merged = Merge(given, [0.5, -2.0]).collect()
    assert merged[f"{STEM}.hada_w1_a"].shape == (16, 6)
    assert_sum(merged, model((16, 12)), list(zip(given, [0.5, -2.0], strict=True)))


@pytest.mark.parametrize("full", [True, False])
def test_lokr_with_a_common_factor_stays_lokr(full):
    draw = rng(3)
    outer = {"lokr_w1": torch.randn(4, 3, generator=draw)}
    given = []
    for alpha in (2.0, 1.0):
        a, b = torch.randn(4, 2, generator=draw), torch.randn(2, 4, generator=draw)
        inner = {"lokr_w2": a @ b} if full else {"lokr_w2_a": a, "lokr_w2_b": b}
        given.append(file({**outer, **inner, "alpha": torch.tensor(alpha)}))
    merged = Merge(given, [0.5, -2.0]).collect()
    assert torch.equal(merged[f"{STEM}.lokr_w1"], outer["lokr_w1"])
    assert_sum(merged, model((16, 12)), list(zip(given, [0.5, -2.0], strict=True)))


def test_a_difference_is_taken_where_it_is_smaller():
    one, two = lora(rank=6, seed=1), lora(rank=6, seed=2)
    merged = Merge([file(one), file(two)], [1, 1]).collect()
    assert [*merged] == [f"{STEM}.diff"]
    assert close(merged[f"{STEM}.diff"].double(), by_hand(one) + by_hand(two), 1e-6)
    kept = Merge([file(one), file(two)], [1, 1], method="concatenate").collect()
    assert len(kept[f"{STEM}.{DOWN}"]) == 12


@pytest.mark.parametrize("method", ["auto", "svd"])
def test_a_limit_gives_the_best_of_that_rank(method):
    one, two = lora(64, 48, 8, seed=1), lora(64, 48, 8, seed=2)
    job = Merge([file(one), file(two)], [0.7, -0.4], method=method, rule=RankRule(rank=6))
    merged = job.collect()
    wanted = 0.7 * by_hand(one) - 0.4 * by_hand(two)
    s = torch.linalg.svdvals(wanted)
    best = float(s[6:].norm() / s.norm())
    error = float((by_hand(merged, STEM + ".") - wanted).norm() / wanted.norm())
    assert error == pytest.approx(best, rel=1e-5)
    assert job.outcome.rows[STEM].error == pytest.approx(best, rel=1e-5)
    loose = Merge([file(one), file(two)], [1, 1], rule=RankRule(rank=16))
    assert len(loose.collect()[f"{STEM}.{DOWN}"]) == 16 and loose.outcome.rows[STEM].error is None


def test_an_error_budget_chooses_the_rank():
    one, two = lora(64, 48, 8, seed=1), lora(64, 48, 8, seed=2)
    job = Merge([file(one), file(two)], [1, 0.01], rule=RankRule("error", 0.05))
    merged = job.collect()
    wanted = by_hand(one) + 0.01 * by_hand(two)
    assert len(merged[f"{STEM}.{DOWN}"]) == 8
    assert float((by_hand(merged, STEM + ".") - wanted).norm() / wanted.norm()) < 0.05
