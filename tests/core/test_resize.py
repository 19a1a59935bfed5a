"""Resized adapters against sd-scripts' own resize_lora and against the delta they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.lazy import AdapterFile
from adapter_lab.core.merge.modules import Source
from adapter_lab.core.merge.ranks import RankRule
from adapter_lab.core.merge.resize import Resize
from adapter_samples import OUT, WIDTH, samples

# Ranks, alphas, norms and entries of what resize_lora.py of kohya-ss/sd-scripts (48d368fa) writes
# for the two files below.
VECTORS = json.loads((Path(__file__).parents[1] / "data" / "resize_lora.json").read_text("utf-8"))
SHAPES = {
    "lin_a": ((48, 40), 8, 4.0), "lin_b": ((24, 64), 8, 16.0), "point": ((24, 32, 1, 1), 8, 8.0),
    "conv": ((20, 16, 3, 3), 6, 3.0), "zero": ((16, 12), 4, 1.0),
}  # fmt: skip


def _pair(shape, rank, g):
    out, width, *k = shape
    up = torch.randn(out, rank, generator=g) * 0.6 ** torch.arange(rank)
    down = torch.randn(rank, width, *k, generator=g)
    return up.reshape(out, rank, *(1 for _ in k)), down


def kohya() -> Adapter:
    g, made = torch.Generator().manual_seed(7), {}
    for name, (shape, rank, alpha) in SHAPES.items():
        up, down = _pair(shape, rank, g)
        stem = f"lora_unet_{name}"
        made[f"{stem}.lora_up.weight"] = up * (name != "zero")
        made |= {f"{stem}.lora_down.weight": down, f"{stem}.alpha": torch.tensor(alpha)}
    metadata = {"ss_training_comment": "mine", "ss_network_dim": "8", "ss_network_alpha": "4.0",
                "ss_network_module": "networks.lora"}  # fmt: skip
    return Adapter(made, metadata, name="a.safetensors")


def peft() -> Adapter:
    g, made = torch.Generator().manual_seed(8), {}
    for name in ("attn.to_q", "attn.to_k"):
        up, down = _pair((40, 32), 8, g)
        made |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return Adapter(made)


def deltas(adapter, weight=None):
    """Module -> dW, float64."""
    source, found = Source(adapter), {}
    for module in source.modules():
        like = torch.zeros(module.weight.shape) if weight is None else weight
        found[module.name] = module.weight.delta(like.double())
    return found


def near(found, wanted, tolerance=1e-5):
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


def one(tensors, **more):
    """A file of one module called a."""
    return Adapter({f"diffusion_model.a.{n}": t for n, t in tensors.items()}, **more)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: f"{c['file']} {c['rule']}")
def test_numbers_of_sd_scripts(case):
    rule = RankRule(case["rule"], case["parameter"], case["rank"], case["conv_rank"])
    job = Resize({"kohya": kohya, "peft": peft}[case["file"]](), rule)
    made = job.collect()
    changes = deltas(made)
    assert set(changes) == set(case["modules"])
    for name, wanted in case["modules"].items():
        (rank,) = {len(t) for n, t in made.items()
                   if n in (f"{name}.lora_down.weight", f"{name}.lora_A.weight")}  # fmt: skip
        alpha = made[f"{name}.alpha"]
        assert (rank, float(alpha)) == (wanted["rank"], pytest.approx(wanted["alpha"]))
        matrix = changes[name].flatten(1)
        assert float(matrix.norm()) == pytest.approx(wanted["norm"], rel=1e-5, abs=1e-7)
        entries = [float(matrix[at]) for at in ((0, 0), (1, 2), (-1, -1))]
        assert entries == pytest.approx(wanted["entries"], rel=1e-4, abs=2e-5)
    theirs = case["metadata"]
    for name in ("ss_training_comment", "ss_network_dim"):
        assert made.metadata[name] == theirs[name]
    if theirs["ss_network_alpha"] == "Dynamic":
        assert made.metadata["ss_network_alpha"] == "Dynamic"


def test_best_of_its_rank_and_the_error_said():
    adapter = kohya()
    job = Resize(adapter, RankRule("fixed", rank=3))
    before, after = deltas(adapter), deltas(job.collect())
    lost = total = 0.0
    for name, row in job.outcome.rows.items():
        if name == "lora_unet_zero":
            continue
        s = torch.linalg.svdvals(before[name].flatten(1))
        best = float(s[3:].norm() / s.norm())
        error = float((after[name] - before[name]).norm() / before[name].norm())
        assert row.error == pytest.approx(error, rel=1e-4) == pytest.approx(best, rel=1e-4)
        kept, sums = float(s[:3].norm() / s.norm()), float(s[:3].sum() / s.sum())
        assert f"norm kept {kept:.1%}, sum kept {sums:.1%}" in row.note
        lost += float(s[3:].square().sum())
        total += float(s.square().sum())
    facts = dict(job.outcome.facts)
    assert facts["error of all modules together"] == f"{(lost / total) ** 0.5:.2%}"
    assert facts["ranks"] == "4 to 8 -> 1 to 3"
    assert job.outcome.verdict == "resized 5 modules, kept 0 as they were"


def test_ranks_that_are_small_enough_keep_their_bits():
    """sd-scripts fills the ranks that are missing with rounding noise."""
    adapter = kohya()
    job = Resize(adapter, RankRule("fixed", rank=6))
    made = job.collect()
    for suffix in ("lora_up.weight", "lora_down.weight", "alpha"):
        key = f"lora_unet_conv.{suffix}"
        assert torch.equal(made[key], adapter[key])
    row = job.outcome.rows["lora_unet_conv"]
    assert (row.rank, row.error, row.note) == (6, None, "rank 6 already")
    assert len(made["lora_unet_lin_a.lora_down.weight"]) == 6
    assert job.outcome.verdict == "resized 4 modules, kept 1 as they were"


@pytest.mark.parametrize("shape", [(OUT, WIDTH), (OUT, WIDTH, 3, 3)], ids=str)
def test_every_algorithm_becomes_a_lora_of_its_delta(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    base = {"diffusion_model.a.weight": weight, "diffusion_model.a.bias": torch.zeros(OUT)}
    kept = []
    for sample, tensors in samples(shape).items():
        adapter = one({**tensors, "diff_b": torch.ones(OUT)} if sample == "lokr" else tensors)
        if "bias" in Source(adapter).module("diffusion_model.a").parts and sample != "lokr":
            kept.append(sample)
            continue
        job = Resize(adapter, RankRule("fixed"), base=base)
        made = job.collect()
        wanted = deltas(adapter, weight)["diffusion_model.a"]
        near(deltas(made)["diffusion_model.a"].reshape(shape), wanted, 5e-5)
        row = job.outcome.rows["diffusion_model.a"]
        assert row.made == "LoRA" and (row.error or 0.0) < 1e-4, sample
        assert ("diffusion_model.a.diff_b" in made) == (sample == "lokr")
    assert len(kept) < 6


@pytest.mark.parametrize("sample", ["oft", "glora", "ia3", "hra", "vera", "set"])
def test_what_depends_on_the_weights_asks_for_the_model(sample):
    adapter = one(samples((OUT, WIDTH))[sample])
    with pytest.raises(AdapterLabError, match=r"depend on the weights.*'diffusion_model.a' \("):
        Resize(adapter, RankRule("fixed", rank=2))
    other = {"diffusion_model.b.weight": torch.zeros(OUT, WIDTH)}
    with pytest.raises(AdapterLabError, match="no weight that 'diffusion_model.a' fits"):
        Resize(adapter, RankRule("fixed", rank=2), base=other).collect()


def test_dora_keeps_its_lengths():
    """LoRA under DoRA takes no model: the delta that is turned is resized, Liu et al. 2024, 4.3."""
    g = torch.Generator().manual_seed(4)
    up, down = _pair((24, 20), 8, g)
    weight, lengths = torch.randn(24, 20, generator=g), torch.rand(24, 1, generator=g) + 4
    lora = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(4.0)}
    job = Resize(one({**lora, "dora_scale": lengths}), RankRule("fixed", rank=3))
    made = job.collect()
    assert torch.equal(made["diffusion_model.a.dora_scale"], lengths)
    assert made.metadata["ss_network_module"] == "lycoris.kohya"
    assert "DoRA stays" in job.outcome.rows["diffusion_model.a"].note
    (rest,) = deltas(Resize(one(lora), RankRule("fixed", rank=3)).collect()).values()
    turned = weight.double() + rest
    wanted = turned * lengths / turned.norm(dim=1, keepdim=True) - weight
    (found,) = deltas(made, weight).values()
    near(found, wanted)
    kept = Resize(one({**lora, "dora_scale": lengths}), RankRule("fixed", rank=8)).collect()
    assert all(torch.equal(kept[f"diffusion_model.a.{n}"], t) for n, t in lora.items())


def test_the_first_ranks_of_a_dylora_are_its_own():
    """As kohya's extract_lora_from_dylora writes them: slices, and alpha as it was."""
    adapter = kohya()
    job = Resize(adapter, RankRule("fixed", rank=5), nested=True)
    made = job.collect()
    for name in ("lin_a", "lin_b", "point", "conv"):
        stem = f"lora_unet_{name}"
        up, down = (f"{stem}.lora_{x}.weight" for x in ("up", "down"))
        assert torch.equal(made[up], adapter[up][:, :5])
        assert torch.equal(made[down], adapter[down][:5])
        assert torch.equal(made[f"{stem}.alpha"], adapter[f"{stem}.alpha"])
    assert len(made["lora_unet_zero.lora_down.weight"]) == 4
    assert made.metadata["ss_network_dim"] == "5"
    assert made.metadata["ss_training_comment"] == "split from DyLoRA, rank 8 to 5; mine"
    with pytest.raises(AdapterLabError, match="takes a rank"):
        Resize(adapter, RankRule("fixed"), nested=True)


def test_scale_from_outside_is_written_into_the_file():
    """peft's config, rank-stabilised: lora_alpha / sqrt(r)."""
    config = {"r": 8, "lora_alpha": 4, "use_rslora": True, "peft_type": "LORA"}
    adapter = Adapter(peft(), {"lora_adapter_metadata": "{}"}, config)
    before = deltas(adapter)
    for rank in (8, 20, 3):
        made = Resize(adapter, RankRule("fixed", rank=rank)).collect()
        assert made.config is None and "lora_adapter_metadata" not in made.metadata
        key = "transformer.attn.to_q.alpha"
        assert float(made[key]) == pytest.approx(4 / 8**0.5 * min(rank, 8))
        after = deltas(made)
        for name, wanted in before.items():
            s = torch.linalg.svdvals(wanted)
            lost = float((after[name] - wanted).norm())
            assert lost == pytest.approx(float(s[rank:].norm()), rel=1e-3, abs=1e-5)


def test_what_a_lora_has_beside_it_stays():
    """A scaled bias of the up factor, a bias of its own, an enlarged weight, norms, embeddings."""
    g = torch.Generator().manual_seed(0)
    up, down = _pair((20, 24), 8, g)
    bias = torch.randn(20, generator=g)
    lora = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    adapter = one({**lora, "lora_up.bias": bias, "reshape_weight": torch.tensor([20, 24])})
    adapter |= {"diffusion_model.n.w_norm": bias, "diffusion_model.n.b_norm": bias,
                "diffusion_model.c.diff_b": bias, "bundle_emb.word.string": down}  # fmt: skip
    job = Resize(adapter, RankRule("fixed", rank=3))
    made = job.collect()
    assert set(made) == set(adapter)
    for key in set(adapter) - {f"diffusion_model.a.{name}" for name in lora}:
        assert torch.equal(made[key], adapter[key])
    before, after = (Source(a).module("diffusion_model.a").parts["bias"] for a in (adapter, made))
    zero = torch.zeros(20)
    torch.testing.assert_close(after.delta(zero), before.delta(zero))
    assert job.outcome.rows["diffusion_model.n"].note == "acts on a norm"
    assert job.outcome.rows["diffusion_model.c"].note == "acts on a bias only"
    assert "bundle_emb" not in str(job.outcome.rows)


def test_dtypes(tmp_path):
    adapter = kohya().cast(torch.bfloat16)
    made = Resize(adapter, RankRule("fixed", rank=4)).collect()
    assert {t.dtype for t in made.values() if t.ndim} == {torch.bfloat16}
    made = Resize(adapter, RankRule("fixed", rank=4), dtype=torch.float16).collect()
    assert {t.dtype for t in made.values() if t.ndim} == {torch.float16}
    big = one({"lora_up.weight": torch.full((8, 2), 1e12), "lora_down.weight": torch.ones(2, 8)})
    with pytest.raises(AdapterLabError, match="does not fit into float16"):
        Resize(big, RankRule("fixed", rank=2), dtype=torch.float16).collect()


def test_file_to_file_is_as_in_memory(tmp_path):
    adapter = kohya()
    write_adapter(tmp_path / "a.safetensors", adapter)
    seen = []
    rule = RankRule("sv_fro", 0.9, 8)
    with AdapterFile(tmp_path / "a.safetensors") as file:
        job = Resize(file, rule, tick=lambda *told: seen.append(told))
        written = job.write(tmp_path / "b.safetensors")
    again, wanted = read_adapter(tmp_path / "b.safetensors"), Resize(adapter, rule).collect()
    assert all(torch.equal(again[key], wanted[key]) for key in {*again, *wanted})
    assert written["ss_network_dim"] == "Dynamic" and len(written["sshs_model_hash"]) == 64
    assert seen[0][:2] == (0, 5) and [done for done, *_ in seen] == list(range(5))


def test_cancelled_work_leaves_no_file(tmp_path):
    def tick(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Resize(kohya(), RankRule("fixed", rank=2), tick=tick).write(tmp_path / "b.safetensors")
    assert not list(tmp_path.iterdir())


def test_bad_input():
    with pytest.raises(AdapterLabError, match="no modules"):
        Resize({}, RankRule("fixed", rank=2))
    strange = one({"lora_up.weight": torch.ones(8, 2)})
    with pytest.raises(AdapterLabError, match=r"module 'diffusion_model.a': A factor is missing"):
        Resize(strange, RankRule("fixed", rank=2)).collect()
    still = one({"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 8),
                 "alpha": torch.tensor(0.0)})  # fmt: skip
    job = Resize(still, RankRule("fixed", rank=1))
    assert torch.equal(job.collect()["diffusion_model.a.alpha"], torch.tensor(0.0))
    assert "alpha is 0" in job.outcome.rows["diffusion_model.a"].note
