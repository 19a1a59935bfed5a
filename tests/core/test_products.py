"""Averages of what checkpoints do to the weights, against dense sums in float64."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.merge.ema import Average, Settings, plan
from adapter_lab.core.merge.products import ProductAverage
from averaged import ALPHA, DOWN, UP, put, tensors, three
from safetensors.torch import load_file


def products(stored, weights):
    pairs = [(s[UP].double() @ s[DOWN].double()) * (s[ALPHA] / len(s[DOWN])) for s in stored]
    return sum(w * p for w, p in zip(weights, pairs, strict=True))


def test_products_are_the_best_of_their_rank(tmp_path):
    paths = three(tmp_path)
    made = plan(paths, "power", Settings(0.25))
    job = ProductAverage(made)
    job.write(tmp_path / "out.safetensors")
    out, stored = load_file(tmp_path / "out.safetensors"), [load_file(p) for p in paths]
    exact = products(stored, made.weights)
    left = torch.linalg.svdvals(exact)[2:].norm() / exact.norm()
    assert out[UP].shape == (6, 2) and out[ALPHA] == 1
    error = (products([out], [1.0]) - exact).norm() / exact.norm()
    assert float(error) == pytest.approx(float(left), rel=1e-4) and left > 0.05
    assert job.outcome.rows["x"].error == pytest.approx(float(left), rel=1e-4)
    factors = (products([Average(made).collect()], [1.0]) - exact).norm() / exact.norm()
    assert factors > 1.2 * left


def test_products_of_one_row_space_are_exact(tmp_path):
    same = tensors()[DOWN]
    paths = [put(tmp_path / f"a-{k}.safetensors", {**tensors(k), DOWN: same, "x.diff_b": torch.ones(
        6) * k, "y.bits": torch.tensor([k])}) for k in (1, 2, 3)]  # fmt: skip
    made = plan(paths, "power", Settings(0.2))
    out = ProductAverage(made).collect()
    exact = products([load_file(p) for p in paths], made.weights)
    assert (products([out], [1.0]) - exact).norm() < 1e-5 * exact.norm()
    mean = sum(k * w for k, w in zip((1, 2, 3), made.weights, strict=True))
    assert out["x.diff_b"][0] == pytest.approx(mean, rel=1e-6)
    assert out["y.bits"].tolist() == [1]


def test_products_of_loha_become_lora(tmp_path):
    """dW = (alpha / r) (w1a w1b) o (w2a w2b), here with r 1 and of one direction in all files."""
    stem, shapes = "lora_unet_blocks_0_x", {"w1_a": (6, 1), "w1_b": (1, 5), "w2_a": (6, 1)}
    rng = torch.Generator().manual_seed(1)
    shapes["w2_b"] = (1, 5)
    first = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    paths = []
    for k in (1, 2, 3):
        values = {f"{stem}.hada_{n}": t * (k if n == "w1_a" else 1) for n, t in first.items()}
        values[f"{stem}.alpha"] = torch.tensor(2.0)
        paths.append(put(tmp_path / f"h-{k}.safetensors", values))
    made = plan(paths, "power", Settings(0.2))
    job = ProductAverage(made)
    out = job.collect()
    mean = sum(k * w for k, w in zip((1, 2, 3), made.weights, strict=True))
    a, b, c, d = first.values()
    exact = mean * 2.0 * (a @ b) * (c @ d)
    up, down, alpha = (out[f"{stem}.{n}"] for n in ("lora_up.weight", "lora_down.weight", "alpha"))
    assert up.shape == (6, 1) and len(out) == 3
    assert torch.allclose(up @ down * alpha, exact, rtol=1e-4, atol=1e-6)
    assert job.outcome.rows[stem].made == "LoRA"
    written = ProductAverage(made).write(tmp_path / "out.safetensors")
    assert written["ss_network_module"] == "networks.lora" and written["ss_network_dim"] == "1"


def averaged(folder, make, **metadata):
    """The average of the products of two files; what they hold; their weights."""
    paths = [put(folder / f"k-{k}.safetensors", make(torch.Generator().manual_seed(k)), **metadata)
             for k in (1, 2)]  # fmt: skip
    made = plan(paths, "power", Settings(0.2))
    return ProductAverage(made), [load_file(p) for p in paths], made.weights


def test_products_of_lokr_have_the_rank_of_both_factors(tmp_path):
    """dW = (alpha / r) w1 (x) (w2a w2b) with one w1 and w2b: rank 4 * 2 in all files."""
    stem, rng = "lora_unet_blocks_0_x", torch.Generator().manual_seed(9)
    w1, w2b = torch.randn(4, 4, generator=rng), torch.randn(2, 8, generator=rng)
    job, stored, weights = averaged(tmp_path, lambda rng: {
        f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2_a": torch.randn(8, 2, generator=rng),
        f"{stem}.lokr_w2_b": w2b, f"{stem}.alpha": torch.tensor(1.0)})  # fmt: skip
    out = job.collect()
    w2a = sum(w * s[f"{stem}.lokr_w2_a"] for w, s in zip(weights, stored, strict=True))
    up, down = out[f"{stem}.lora_up.weight"], out[f"{stem}.lora_down.weight"]
    assert up.shape == (32, 8) and out[f"{stem}.alpha"] == 8
    assert torch.allclose(up @ down, torch.kron(w1, w2a @ w2b) / 2, rtol=1e-4, atol=1e-5)


def test_lokr_of_full_rank_stays_lokr(tmp_path):
    stem = "lora_unet_blocks_0_x"
    job, stored, weights = averaged(tmp_path, lambda rng: {
        f"{stem}.lokr_w1": torch.randn(4, 4, generator=rng),
        f"{stem}.lokr_w2": torch.randn(6, 6, generator=rng),
        f"{stem}.alpha": torch.tensor(1.0)}, ss_network_module="lycoris.kohya")  # fmt: skip
    out = job.collect()
    assert out.keys() == stored[0].keys()
    for key in (f"{stem}.lokr_w1", f"{stem}.lokr_w2"):
        mean = sum(w * s[key] for w, s in zip(weights, stored, strict=True))
        assert torch.allclose(out[key], mean, atol=1e-6)
    assert out.metadata["ss_network_module"] == "lycoris.kohya"
    assert "factors are averaged" in job.outcome.rows[stem].note


def test_products_keep_the_bias_of_the_factors(tmp_path):
    """lora_up.bias adds alpha / r of itself, also where the rank falls to that of the weight."""
    job, stored, weights = averaged(tmp_path, lambda rng: {
        UP: torch.randn(3, 4, generator=rng), DOWN: torch.randn(4, 5, generator=rng),
        "x.lora_up.bias": torch.randn(3, generator=rng), ALPHA: torch.tensor(2.0)})  # fmt: skip
    out = job.collect()
    assert out[UP].shape == (3, 3)
    bias = sum(w * s["x.lora_up.bias"] for w, s in zip(weights, stored, strict=True)) * 2 / 4
    assert torch.allclose(out["x.lora_up.bias"] * out[ALPHA] / 3, bias, atol=1e-6)
    assert torch.allclose(products([out], [1]), products(stored, weights), atol=1e-5)


def test_products_leave_embeddings_as_they_are(tmp_path):
    stem = "base_model.model.emb.lora_embedding_"
    job, stored, _ = averaged(tmp_path, lambda rng: {
        f"{stem}A": torch.randn(2, 11, generator=rng),
        f"{stem}B": torch.randn(5, 2, generator=rng)})  # fmt: skip
    assert job.collect().keys() == stored[0].keys()
    assert "acts on an embedding" in job.outcome.to_text()
