"""TIES and DARE by peft's own functions."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.files import Adapter
from adapter_lab.core.merge.combine import Merge
from adapter_lab.core.merge.menus import TIES
from adapter_lab.core.merge.ranks import RankRule
from adapter_lab.core.merge.ties import disagreeing
from peft.utils import merge_utils as peft

PEFT = {"ties": peft.ties, "dare": peft.dare_linear, "dare_ties": peft.dare_ties}
RATIOS = [0.7, 1.0, 0.4]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def tasks(count=3, shape=(24, 18)):
    draw = rng()
    return [torch.randn(shape, generator=draw) * (i + 1) for i in range(count)]


def theirs(method, given, ratios, density, sign="total"):
    torch.manual_seed(5)
    options = {} if method == "dare" else {"majority_sign_method": sign}
    return PEFT[method](list(given), torch.tensor(ratios), density, **options)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("method", TIES)
def test_numbers_of_peft(method, density, sign):
    given = tasks()
    wanted = theirs(method, given, RATIOS, density, sign)
    with torch.random.fork_rng():
        found = disagreeing(method, given, RATIOS, density, rng(5), sign)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", TIES)
def test_density_one_prunes_nothing(method):
    given = tasks()
    with pytest.warns(UserWarning, match="no pruning"):
        wanted = theirs(method, given, RATIOS, 1.0)
    torch.testing.assert_close(disagreeing(method, given, RATIOS, 1.0, rng(5)), wanted)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_a_negative_ratio_turns_the_delta_first(method):
    given = tasks(2)
    wanted = theirs(method, [given[0], -given[1]], [1.0, 0.5], 0.5)
    torch.testing.assert_close(disagreeing(method, given, [1.0, -0.5], 0.5, rng(5)), wanted)


def lora(seed, rank=4, alpha=2.0, stem="lora_unet_layer"):
    draw = rng(seed)
    return Adapter({
        f"{stem}.lora_up.weight": torch.randn(24, rank, generator=draw),
        f"{stem}.lora_down.weight": torch.randn(rank, 18, generator=draw),
        f"{stem}.alpha": torch.tensor(alpha),
    })  # fmt: skip


def delta(adapter, stem="lora_unet_layer"):
    up, down = adapter[f"{stem}.lora_up.weight"], adapter[f"{stem}.lora_down.weight"]
    return up @ down * (float(adapter[f"{stem}.alpha"]) / len(down))


def test_merged_files_are_the_best_loras_of_peft_s_result():
    one, two = lora(1), lora(2, rank=6, alpha=6)
    wanted = theirs("ties", [delta(one), delta(two)], [1.0, 0.5], 0.3)
    whole = Merge([one, two], [1, 0.5], method="ties", density=0.3, rule=RankRule(rank=18))
    torch.testing.assert_close(delta(whole.collect()), wanted, rtol=1e-4, atol=1e-5)
    job = Merge([one, two], [1, 0.5], method="ties", density=0.3, rule=RankRule(rank=5))
    merged = job.collect()
    s = torch.linalg.svdvals(wanted)
    error = float((delta(merged) - wanted).norm() / wanted.norm())
    assert error == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-4)
    assert job.outcome.rows["lora_unet_layer"].error == pytest.approx(error, rel=1e-4)


def test_dare_draws_by_seed_and_module():
    two = [Adapter({**lora(1), **lora(1, stem="lora_unet_other")}) for _ in range(2)]

    def merged(seed):
        return Merge(two, [1, 1], method="dare", seed=seed, rule=RankRule(rank=18)).collect()

    first = merged(3)
    assert all(torch.equal(first[key], t) for key, t in merged(3).items())
    assert not torch.allclose(delta(first), delta(merged(4)))
    assert not torch.allclose(delta(first), delta(first, "lora_unet_other"))


def test_norms_and_biases_are_merged_dense():
    def file(value):
        draw = rng(value)
        return Adapter({"lora_unet_norm.w_norm": torch.randn(16, generator=draw),
                        "lora_unet_layer.diff_b": torch.randn(16, generator=draw)})  # fmt: skip

    given = [file(1), file(2)]
    merged = Merge(given, [1, 0.5], method="ties", density=0.5, rule=RankRule(rank=4)).collect()
    for key in given[0]:
        wanted = theirs("ties", [a[key] for a in given], [1.0, 0.5], 0.5)
        torch.testing.assert_close(merged[key], wanted)
