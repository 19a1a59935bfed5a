"""Adapters out of two model files: what they hold, what they leave out, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapter_lab.core.bake import merge_into
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter
from adapter_lab.core.merge.extract import Extract, extract
from adapter_lab.core.merge.kronecker import Nearest
from adapter_lab.core.merge.ranks import RankRule
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Q, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2"
SHAPES = {
    f"{Q}.weight": (192, 64),
    f"{MLP}.weight": (64, 256),
    "single_blocks.0.linear1.weight": (448, 64),
    f"{Q}.bias": (192,),
    "img_in.weight": (64, 16),
}


def state(seed: int, scale: float, base: State | None = None) -> State:
    """Normal numbers times ``scale``, added to ``base``; as the vectors below were made."""
    rng = torch.Generator().manual_seed(seed)
    made = {key: torch.randn(shape, generator=rng) * scale for key, shape in SHAPES.items()}
    return made if base is None else {key: base[key] + made[key] for key in made}


def low_rank(base: State, rank: int, size: float, keys: list[str] | None = None) -> State:
    """``base`` with a change of ``rank`` whose norm is ``size`` of the weight's."""
    rng, tuned = torch.Generator().manual_seed(3), dict(base)
    for key in keys or [key for key in base if base[key].ndim > 1]:
        rows, columns = base[key].flatten(1).shape
        change = torch.randn(rows, rank, generator=rng) @ torch.randn(rank, columns, generator=rng)
        change *= size * base[key].float().norm() / change.norm()
        tuned[key] = (base[key].float() + change.reshape(base[key].shape)).to(base[key].dtype)
    return tuned


@pytest.fixture
def run(tmp_path: Path):
    """Extract tuned - base: the outcome and the adapter."""

    def go(base: State, tuned: State, **options):
        save_file({k: t.contiguous() for k, t in base.items()}, tmp_path / "base.safetensors")
        save_file({k: t.contiguous() for k, t in tuned.items()}, tmp_path / "tuned.safetensors")
        files = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "out"))
        outcome = extract(*files, overwrite=True, **options)
        return outcome, read_adapter(tmp_path / "out.safetensors")

    return go


def product(adapter: State, path: str) -> Tensor:
    up, down = (adapter[f"diffusion_model.{path}.lora_{x}.weight"].double() for x in ("up", "down"))
    assert float(adapter[f"diffusion_model.{path}.alpha"]) == up.shape[1]
    return up.flatten(1) @ down.flatten(1)


# sd-scripts 48d368fa, networks/flux_extract_lora.py --dim 4 --clamp_quantile 0.99 --save_precision
# float, on state(..) as made below: norm of up down, its first entries, largest value of up, down.
SD_SCRIPTS = {
    Q: (0.371716730400767, (0.0064739703473118485, -0.0026050803609282136, -0.0002283701028028967),
        0.04978799447417259, 0.195799320936203),
    MLP: (0.44057346197314323, (-0.0014707320609246843, 0.0077393599536346724),
          0.08338651061058044, 0.14468835294246674),
    "single_blocks.0.linear1": (0.4752975665938532, (-0.0016742089934633862, 0.004483712865712766),
                                0.04178652539849281, 0.17356592416763306),
}  # fmt: skip


def vectors() -> tuple[State, State]:
    """Both models in one draw."""
    rng = torch.Generator().manual_seed(7)
    base = {key: torch.randn(shape, generator=rng) * 0.1 for key, shape in SHAPES.items()}
    return base, {k: w + torch.randn(w.shape, generator=rng) * 0.01 for k, w in base.items()}


@pytest.mark.parametrize("exact", [True, False])
def test_numbers_of_sd_scripts(run, exact):
    options = {"rank": 4, "clamp": 0.99, "others": False, "min_change": 0, "exact": exact}
    outcome, adapter = run(*vectors(), **options)
    for path, (norm, entries, up, down) in SD_SCRIPTS.items():
        found = product(adapter, path)
        # The quantile depends on the signs of the vectors, which only LAPACK's SVD repeats.
        assert float(found.norm()) == pytest.approx(norm, rel=1e-6 if exact else 0.02)
        if exact:
            assert found[0, : len(entries)].tolist() == pytest.approx(entries, rel=1e-4)
            largest = [float(adapter[f"diffusion_model.{path}.lora_{x}.weight"].max())
                       for x in ("up", "down")]  # fmt: skip
            assert largest == pytest.approx([up, down], rel=1e-5)
    assert not any("bias" in key or ".diff" in key for key in adapter)
    assert outcome.left_out[f"{Q}.bias"] == "a bias, norm or other parameter"
    clamped = math.sqrt(1 - float(outcome.verdict.split()[-5].rstrip("%")) / 100)
    best = run(*vectors(), **{**options, "clamp": 1.0})[0]
    assert clamped > math.sqrt(1 - float(best.verdict.split()[-5].rstrip("%")) / 100)


def test_gives_back_a_change_of_low_rank(run):
    """From a bare model and a checkpoint; fp32 errors only, in every parameter that changed."""
    base = state(0, 0.1)
    tuned = low_rank(base, 4, 0.05)
    tuned[f"{Q}.bias"] = base[f"{Q}.bias"] + 0.25
    whole = {f"model.diffusion_model.{key}": t for key, t in tuned.items()}
    whole["first_stage_model.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3)
    outcome, adapter = run(base, whole, rank=4)
    merged, report = merge_into(base, adapter)
    assert not report.unmatched and len(merged) == 5
    for key, weight in merged.items():
        change = tuned[key] - base[key]
        assert float((weight - tuned[key]).norm() / change.norm()) < 1e-5
    assert outcome.verdict == "extracted 4 LoRA, 1 Bias: 100.00% of the squared change"
    assert ("not compared", "1 tensors of a VAE or other parts") in outcome.facts
    assert adapter.metadata["ss_network_module"] == "networks.lora"
    assert adapter.metadata["ss_network_dim"] == "4"


@pytest.mark.parametrize("rule, parameter", [("error", 0.5), ("sv_fro", 0.8), ("sv_ratio", 2.0)])
def test_ranks_follow_the_rule(run, rule, parameter):
    """Against numpy-like full decompositions of the differences."""
    base, tuned = vectors()
    outcome, adapter = run(base, tuned, rank=48, rule=rule, parameter=parameter, others=False)
    for path in SD_SCRIPTS:
        key = f"{path}.weight"
        s = torch.linalg.svdvals((tuned[key] - base[key]).double())
        left = (s.square().sum() - s.square().cumsum(0)).clamp(min=0).sqrt() / s.norm()
        wanted = {
            "error": int((left > parameter).sum()) + 1,
            "sv_fro": int((s.square().cumsum(0) / s.square().sum() < parameter**2).sum()) + 2,
            "sv_ratio": int((s > s[0] / parameter).sum()) + 1,
        }[rule]
        assert outcome.rows[path].rank == min(wanted, 48)
        assert outcome.rows[path].error == pytest.approx(float(left[min(wanted, 48) - 1]), rel=1e-3)
    assert adapter.metadata["ss_network_dim"] == "Dynamic"


def test_convolutions_have_a_rank_of_their_own_or_none(run):
    key = "input_blocks.1.0.in_layers.2"
    base = {f"{key}.weight": torch.randn(32, 16, 3, 3), "out.2.weight": torch.randn(4, 32, 1, 1)}
    tuned = {name: t + 0.01 * torch.randn(t.shape) for name, t in base.items()}
    outcome, adapter = run(base, tuned, rank=4, conv_rank=2)
    assert adapter[f"diffusion_model.{key}.lora_down.weight"].shape == (2, 16, 3, 3)
    assert adapter[f"diffusion_model.{key}.lora_up.weight"].shape == (32, 2, 1, 1)
    assert outcome.rows["out.2"].rank == 4
    outcome, adapter = run(base, tuned, rank=4, convolutions=False)
    assert outcome.left_out == {key: "a k x k convolution"} and len(adapter) == 3


def blocks(matrix: Tensor, a: int, b: int) -> Tensor:
    """Van Loan's rearrangement, block by block."""
    c, d = matrix.shape[0] // a, matrix.shape[1] // b
    return torch.stack([
        matrix[i * c : (i + 1) * c, j * d : (j + 1) * d].flatten()
        for i in range(a) for j in range(b)
    ])  # fmt: skip


def test_nearest_kronecker_product():
    """The best error there is, by a full decomposition of the rearranged matrix."""
    rng = torch.Generator().manual_seed(2)
    w1, w2 = torch.randn(4, 6, generator=rng), torch.randn(16, 20, generator=rng)
    matrix = torch.kron(w1, w2) + 0.5 * torch.randn(64, 120, generator=rng)
    nearest = Nearest(matrix, 4)
    assert (nearest.a, nearest.b) == (4, 4)
    s = torch.linalg.svdvals(blocks(matrix, 4, 4).double())
    one, two, rest = nearest.full()
    best = float(s[1:].norm())
    assert rest == pytest.approx(best, rel=1e-4)
    assert float((torch.kron(one, two) - matrix).norm()) == pytest.approx(best, rel=1e-4)


def test_second_factor_of_low_rank_is_fitted_with_the_first():
    """Nearer than the nearest product with its second factor cut afterwards."""
    rng = torch.Generator().manual_seed(4)
    matrix = torch.randn(64, 64, generator=rng)
    nearest = Nearest(matrix, 8)
    w1, cut, rest = nearest.low(2)
    made = torch.kron(w1, (cut.u * cut.s) @ cut.vh)
    assert float((made - matrix).norm()) == pytest.approx(rest, rel=1e-4)
    first, second, _ = nearest.full()
    u, s, vh = torch.linalg.svd(second)
    after = torch.kron(first, (u[:, :2] * s[:2]) @ vh[:2])
    assert rest < float((after - matrix).norm()) * 0.999


@pytest.mark.parametrize("full", [True, False])
def test_lokr_of_a_kronecker_product(run, full):
    base = state(0, 0.1)
    key, rng = f"{MLP}.weight", torch.Generator().manual_seed(1)
    w2 = torch.randn(8, 16, generator=rng)
    if not full:
        w2 = torch.outer(w2[:, 0], w2[0]) + torch.outer(w2[:, 1], w2[1])
    change = torch.kron(torch.randn(8, 16, generator=rng), w2) * 0.01
    tuned = {**base, key: base[key] + change}
    outcome, adapter = run(base, tuned, algorithm="lokr", rank=64 if full else 2)
    assert (f"diffusion_model.{MLP}.lokr_w2" in adapter) == full
    merged, _ = merge_into(base, adapter)
    assert float((merged[key] - tuned[key]).norm() / change.norm()) < 1e-4
    assert outcome.rows[MLP].made == "LoKr"


def test_rounding_is_left_out_and_a_light_training_is_not(run):
    """fp32 and its bf16: rounding. Two in bf16, or fp32 and bf16, with a change that is smaller
    than a rounding step of most numbers: a change."""
    base = {key: t for key, t in state(0, 0.1).items() if key != "img_in.weight"}
    light = low_rank(base, 1, 1e-3, [f"{Q}.weight"])
    stored = {key: t.bfloat16() for key, t in light.items()}
    outcome, adapter = run(base, stored, rank=4)
    assert set(outcome.rows) == {Q}
    assert outcome.left_out[MLP] == "nothing but the rounding of bfloat16"
    assert len(outcome.left_out) == 3 and len(adapter) == 3
    change = light[f"{Q}.weight"] - base[f"{Q}.weight"]
    u, _, vh = torch.linalg.svd(change)
    found = product(adapter, Q).float()
    assert float(u[:, 0] @ found @ vh[0]) == pytest.approx(float(change.norm()), rel=0.05)
    outcome, _ = run(base, stored, rank=4, min_change=0)
    assert len(outcome.rows) == 4 and not outcome.left_out
    half = {key: t.bfloat16() for key, t in base.items()}
    outcome, _ = run(half, low_rank(half, 1, 1e-3, [f"{Q}.weight"]), rank=4)
    assert set(outcome.rows) == {Q} and not outcome.left_out


def test_noise_of_one_step_in_the_same_dtype_is_left_out(run):
    """Numbers that fell to the other side when they were rounded, at random."""
    base = {key: t.bfloat16() for key, t in state(0, 0.1).items() if t.ndim > 1}
    rng = torch.Generator().manual_seed(9)
    key = f"{MLP}.weight"
    flips = torch.randint(-1, 2, base[key].shape, generator=rng, dtype=torch.int16)
    noisy = (base[key].view(torch.int16) + flips).view(torch.bfloat16)
    tuned = low_rank(base, 2, 0.02, [f"{Q}.weight"]) | {key: noisy}
    outcome, _ = run(base, tuned, rank=4)
    assert outcome.left_out == {MLP: "nothing but the rounding of bfloat16"}
    assert set(outcome.rows) == {Q}


def test_steps_with_a_direction_are_kept(run):
    """A training too light to move any number by more than one rounding step."""
    rng = torch.Generator().manual_seed(6)
    key, other = f"{MLP}.weight", f"{Q}.weight"
    base = {k: (1 + torch.rand(SHAPES[k], generator=rng)).bfloat16() for k in (key, other)}
    signs = torch.outer(*(torch.randn(n, generator=rng) for n in SHAPES[key])).sign()
    moved = torch.rand(SHAPES[key], generator=rng) < 0.3
    steps = (signs * moved).to(torch.int16)
    tuned = (base[key].view(torch.int16) + steps).view(torch.bfloat16)
    outcome, adapter = run(base, {**base, key: tuned}, rank=1)
    assert set(outcome.rows) == {MLP} and not outcome.left_out
    # What the steps are in the mean: 0.3 of 2^-7 everywhere.
    mean = product(adapter, MLP).float() * signs
    assert float(mean.mean()) == pytest.approx(0.3 * 2**-7, rel=0.1)


def test_open_clip_of_sdxl(run):
    """q, k and v are rows of one stored tensor; the encoder is left out where it is alike."""
    block = "conditioner.embedders.1.model.transformer.resblocks.0."
    rng, width = torch.Generator().manual_seed(4), 32
    base = {
        f"{block}attn.in_proj_weight": torch.randn(3 * width, width, generator=rng),
        f"{block}attn.in_proj_bias": torch.randn(3 * width, generator=rng),
        f"{block}mlp.c_fc.weight": torch.randn(4 * width, width, generator=rng),
        "model.diffusion_model.out.2.weight": torch.randn(4, 32, generator=rng),
    }
    tuned = {key: t.clone() for key, t in base.items()}
    change = torch.outer(torch.randn(width, generator=rng), torch.randn(width, generator=rng))
    tuned[f"{block}attn.in_proj_weight"][width : 2 * width] += 0.01 * change
    tuned[f"{block}attn.in_proj_bias"][2 * width :] += 0.5
    tuned["model.diffusion_model.out.2.weight"] *= 1.01
    _, adapter = run(base, tuned, rank=1)
    head = "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn"
    up, down = (adapter[f"{head}.k_proj.lora_{x}.weight"] for x in ("up", "down"))
    assert torch.allclose(up @ down, 0.01 * change, atol=1e-6)
    assert torch.equal(
        adapter[f"{head}.v_proj.diff_b"],
        tuned[f"{block}attn.in_proj_bias"][64:] - base[f"{block}attn.in_proj_bias"][64:],
    )
    assert not any("q_proj" in key or "fc1" in key for key in adapter)
    _, adapter = run(base, tuned, rank=1, min_diff=1.0)
    assert not any("text_encoders" in key for key in adapter)


def test_text_encoder_alone(run):
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    base = {key: torch.randn(16, 16), "shared.weight": torch.randn(32, 16)}
    _, adapter = run(base, {**base, key: base[key] + torch.eye(16)}, rank=2)
    assert set(adapter) == {
        f"text_encoders.t5xxl.transformer.{key.removesuffix('weight')}{suffix}"
        for suffix in ("lora_up.weight", "lora_down.weight", "alpha")
    }


def test_what_only_one_model_has_is_listed(run):
    base = state(0, 0.1)
    tuned = low_rank(base, 2, 0.05)
    tuned["img_in.weight"] = torch.zeros(64, 32)
    tuned["txt_in.weight"] = torch.zeros(4, 4)
    del tuned[f"{MLP}.weight"]
    outcome, _ = run(base, tuned, rank=2)
    assert outcome.left_out == {
        "txt_in": "not in the base model",
        MLP: "not in the tuned model",
        "img_in": "(64, 16) in the base, (64, 32) when tuned",
    }


def test_same_seed_same_file(tmp_path, run):
    first = run(*vectors(), rank=2, seed=5)[1]
    again = run(*vectors(), rank=2, seed=5)[1]
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_bad_input(run, tmp_path):
    base = state(0, 0.1)
    with pytest.raises(AdapterLabError, match="do not differ"):
        run(base, base)
    with pytest.raises(AdapterLabError, match="All that differs is left out"):
        run(base, {key: t.bfloat16() for key, t in base.items()})
    assert not (tmp_path / "out.safetensors").exists()
    broken = low_rank(base, 2, 0.1)
    broken[f"{MLP}.weight"][3, 4] = math.nan
    with pytest.raises(AdapterLabError, match=rf"tuned.* NaN or infinity in '{MLP}.weight'"):
        run(base, broken)
    with pytest.raises(AdapterLabError, match="no weights in common"):
        run(base, {"decoder.conv_in.weight": torch.zeros(4, 4)})
    file = tmp_path / "base.safetensors"
    with pytest.raises(AdapterLabError, match="the same file"):
        Extract(file, file)
    with pytest.raises(AdapterLabError, match="is one of the inputs"):
        extract(file, tmp_path / "tuned.safetensors", file, overwrite=True)
    options = (
        ({"algorithm": "vera"}, "'vera' can't be extracted"),
        ({"clamp": 0.2}, "clamp quantile"),
        ({"factor": 0}, "No such factor"),
        ({"min_change": -1}, "negative"),
        ({"dora_on": "x"}, "No such axis"),
    )
    for option, said in options:
        with pytest.raises(AdapterLabError, match=said):
            run(base, low_rank(base, 2, 0.1), **option)


def test_other_architectures_are_refused(run):
    wan = {
        "head.modulation": torch.zeros(1, 2, 64),
        "patch_embedding.weight": torch.zeros(64, 16, 1, 2, 2),
        **{f"blocks.0.{name}_attn.q.weight": torch.zeros(64, 64) for name in ("cross", "self")},
        "blocks.0.modulation": torch.zeros(1, 6, 64),
    }
    with pytest.raises(AdapterLabError, match=r"different architectures: found .* and Wan"):
        run(state(0, 0.1), wan)


def test_diffusers_names_against_comfyuis_are_refused(run):
    theirs = {f"transformer_blocks.0.{name}.weight": torch.zeros(64, 64)
              for name in ("attn.to_q", "attn.add_q_proj", "ff.net.0.proj")}  # fmt: skip
    theirs |= {"single_transformer_blocks.0.proj_mlp.weight": torch.zeros(64, 64),
               "context_embedder.weight": torch.zeros(64, 16)}  # fmt: skip
    ours = {key: t for key, t in state(0, 0.1).items() if key != "txt_in.weight"}
    with pytest.raises(AdapterLabError, match=r"diffusers' names in '.*tuned.safetensors', not in"):
        run({**ours, "guidance_in.in_layer.weight": torch.zeros(8, 8)}, theirs)


def test_layers_called_embedders_are_no_embeddings(run):
    base = {**state(0, 0.1), "x_embedder.weight": torch.zeros(64, 16)}
    tuned = {key: t + 0.01 * torch.randn(t.shape) for key, t in base.items()}
    assert "x_embedder" in run(base, tuned, rank=2, others=False)[0].rows


def test_quantised_models(run):
    """Refused; on request read, and its rounding is noise that is left out."""
    base = {key: t for key, t in state(0, 0.1).items() if t.ndim > 1}
    tuned = low_rank(base, 2, 0.3, [f"{Q}.weight"])
    low: State = {}
    for key, weight in tuned.items():
        scale = weight.abs().amax() / 448
        low[key] = (weight / scale).to(torch.float8_e4m3fn)
        low[key.replace("weight", "weight_scale")] = scale
    with pytest.raises(AdapterLabError, match="tuned.safetensors' is quantised"):
        run(base, low)
    outcome, adapter = run(base, low, rank=2, dequantise=True)
    assert set(outcome.rows) == {Q} and len(outcome.left_out) == 3
    change = tuned[f"{Q}.weight"] - base[f"{Q}.weight"]
    assert float((product(adapter, Q) - change).norm() / change.norm()) < 0.1
    assert "A model is quantised" in outcome.warnings[0]


def test_rank_rule_reaches_the_job(tmp_path):
    for name, tensors in zip("ab", vectors(), strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    ticks: list[tuple[int, int, str]] = []
    job = Extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors",
                  rule=RankRule(rank=3), tick=lambda *t: ticks.append(t))  # fmt: skip
    assert {r.rank for r in (job.collect(), job.outcome)[1].rows.values()} == {3, None}
    assert [done for done, *_ in ticks] == [0, 1, 2, 3] and {total for _, total, _ in ticks} == {4}
