"""Merging by the numbers of sd-scripts.

The figures in merge_lora.json are those of the scripts at 48d368fa, run on ``inputs()``:
``merge_lora.py --precision float --ratios 0.7 -0.4 1.3``, the same with ``--concat``, and
``svd_merge_lora.py --precision float --ratios 0.7 -0.4 1.3 --new_rank 5 --new_conv_rank 3``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.core.merge.combine import Merge
from adapter_lab.core.merge.ranks import RankRule

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "merge_lora.json").read_text())
RATIOS = [0.7, -0.4, 1.3]
SHAPES = {
    "lora_unet_a": (12, 8), "lora_unet_b": (6, 10, 3, 3), "lora_unet_c": (8, 6, 1, 1),
    "lora_te_d": (5, 7),
}  # fmt: skip
# Alphas by file, None: not in it; and the module that it lacks.
FILES = [
    ((4.0, 2.0, 1.0, 3.0), ""),
    ((2.0, None, 0.5, None), "lora_te_d"),
    ((1.0, 1.0, 1.0, 1.0), "lora_unet_b"),
]


def inputs(dtype=torch.float32):
    rng = torch.Generator().manual_seed(7)
    files = []
    for alphas, left in FILES:
        one = Adapter()
        for (name, (out, width, *k)), alpha in zip(SHAPES.items(), alphas, strict=True):
            if name == left:
                continue
            up = torch.randn((out, 4, *(1 for _ in k)), generator=rng)
            down = torch.randn((4, width, *k), generator=rng)
            one |= {
                f"{name}.lora_up.weight": up.to(dtype),
                f"{name}.lora_down.weight": down.to(dtype),
            }
            if alpha is not None:
                one[f"{name}.alpha"] = torch.tensor(alpha)
        files.append(one)
    return files


def product(file, name):
    """up down as a matrix, float64, without its scale."""
    up, down = (file[f"{name}.lora_{x}.weight"].flatten(1).double() for x in ("up", "down"))
    return up @ down


def sha(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("method", "kind"), [("kohya", "plain"), ("kohya concat", "concat")])
def test_factors_bit_by_bit(method, kind):
    merged = Merge(inputs(), RATIOS, method=method).collect()
    assert len(merged) == sum(len(row) for row in VECTORS[kind].values())
    for name, row in VECTORS[kind].items():
        assert float(merged[f"{name}.alpha"]) == row["alpha"]
        for suffix in ("lora_up.weight", "lora_down.weight"):
            tensor = merged[f"{name}.{suffix}"]
            assert list(tensor.shape) == row[suffix]["shape"]
            assert sha(tensor) == row[suffix]["sha256"], (name, suffix)


def clamped_products(total, rank):
    """U S V^T cut at the 0.99 quantile of the factors' values, for all signs of the vectors: these
    are LAPACK's choice and differ between processors."""
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    for signs in itertools.product((1.0, -1.0), repeat=rank):
        turn = torch.tensor(signs, dtype=torch.float64)
        up, down = u[:, :rank] * s[:rank] * turn, vh[:rank] * turn[:, None]
        edge = torch.cat([up.flatten(), down.flatten()]).quantile(0.99)
        yield up.clamp(-edge, edge) @ down.clamp(-edge, edge)


def test_decomposed_sums():
    """Of the script and of ours: one of those that differ in signs only."""
    job = Merge(inputs(), RATIOS, method="kohya svd", rule=RankRule(rank=5, conv_rank=3))
    merged, files = job.collect(), inputs()
    for name, row in VECTORS["svd"].items():
        up, down = merged[f"{name}.lora_up.weight"], merged[f"{name}.lora_down.weight"]
        assert float(merged[f"{name}.alpha"]) == row["alpha"] == len(down) == row["rank"]
        assert [len(up), *down.shape[1:]] == row["shape"]
        having = [
            (f, r) for f, r in zip(files, RATIOS, strict=True) if f"{name}.lora_up.weight" in f
        ]
        total = sum(
            r * product(f, name) * float(f.get(f"{name}.alpha", 4.0)) / 4 for f, r in having
        )
        choices = list(clamped_products(total, row["rank"]))
        ours = product(merged, name)
        assert any(torch.allclose(ours, one, rtol=0, atol=1e-4) for one in choices)
        assert any(
            float(one.norm()) == pytest.approx(row["norm"], rel=1e-5)
            and one[0, :5].tolist() == pytest.approx(row["first"], abs=1e-4)
            for one in choices
        )


def test_the_faults_are_there_and_told():
    """A ratio acts squared, and ups meet foreign downs."""
    one = inputs()[0]
    merged = Merge([one], [0.7], method="kohya")
    found, up = merged.collect(), "lora_unet_a.lora_up.weight"
    torch.testing.assert_close(found[up], one[up] * 0.7)
    down = up.replace("up", "down")
    torch.testing.assert_close(found[up] @ found[down], 0.49 * (one[up] @ one[down]))
    assert "squared" in merged.outcome.to_text()


def test_saved_in_the_dtype_of_the_inputs_after_float32():
    merged = Merge(inputs(torch.bfloat16), RATIOS, method="kohya").collect()
    up = "lora_unet_a.lora_up.weight"
    wide = Merge([Adapter({k: t.float() for k, t in a.items()}) for a in inputs(torch.bfloat16)],
                 RATIOS, method="kohya").collect()  # fmt: skip
    assert merged[up].dtype == torch.bfloat16 and torch.equal(merged[up], wide[up].bfloat16())


def test_only_plain_lora_of_one_rank():
    one = inputs()[0]
    halves = {"w1_a": (12, 2), "w1_b": (2, 8), "w2_a": (12, 2), "w2_b": (2, 8)}
    loha = Adapter({f"lora_unet_a.hada_{n}": torch.ones(size) for n, size in halves.items()})
    with pytest.raises(AdapterLabError, match="plain LoRA only"):
        Merge([one, loha], [1, 1], method="kohya").collect()
    dora = Adapter({**one, "lora_unet_a.dora_scale": torch.ones(12, 1)})
    with pytest.raises(AdapterLabError, match="plain LoRA only"):
        Merge([dora], [1], method="kohya svd", rule=RankRule(rank=4)).collect()
    smaller = Adapter({"lora_unet_a.lora_up.weight": torch.ones(12, 2),
                       "lora_unet_a.lora_down.weight": torch.ones(2, 8)})  # fmt: skip
    with pytest.raises(AdapterLabError, match="one shape only"):
        Merge([one, smaller], [1, 1], method="kohya").collect()
    assert Merge([one, smaller], [1, 1], method="kohya concat").collect()
    negative = Adapter({**one, "lora_unet_a.alpha": torch.tensor(-1.0)})
    with pytest.raises(AdapterLabError, match="these alphas"):
        Merge([one, negative], [1, 1], method="kohya").collect()
