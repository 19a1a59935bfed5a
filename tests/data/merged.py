"""Small adapters to merge, and whether the result changes a model by their sum."""

from __future__ import annotations

import torch
from adapter_lab.core.bake import merge_into
from adapter_lab.core.files import Adapter

STEM, KEY = "lora_unet_layer", "diffusion_model.layer.weight"
UP, DOWN = "lora_up.weight", "lora_down.weight"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def model(shape):
    """One layer with a bias."""
    weight = torch.randn(shape, generator=rng(9)) * 0.1
    bias = torch.randn(shape[0], generator=rng(8))
    return {KEY: weight, "diffusion_model.layer.bias": bias}


def file(tensors, stem=STEM, **metadata):
    return Adapter({f"{stem}.{name}": t for name, t in tensors.items()}, metadata)


def lora(out=16, width=12, rank=2, alpha=None, seed=0, k=(), dtype=torch.float32):
    draw = rng(seed)
    made = {
        UP: torch.randn((out, rank, *(1 for _ in k)), generator=draw).to(dtype),
        DOWN: torch.randn((rank, width, *k), generator=draw).to(dtype),
    }
    return made if alpha is None else {**made, "alpha": torch.tensor(float(alpha))}


def by_hand(tensors, prefix=""):
    """alpha / r times up down, in float64."""
    up, down = (tensors[prefix + name].double().flatten(1) for name in (UP, DOWN))
    alpha = tensors.get(prefix + "alpha")
    return up @ down * (1.0 if alpha is None else float(alpha) / len(down))


def change(weights, adapter, strength=1.0):
    """What an adapter adds to each weight of ``weights``."""
    merged, report = merge_into(weights, adapter, strength)
    assert not report.unmatched
    return {
        key: merged[key] - weights[key] if key in merged else torch.zeros(()) for key in weights
    }


def close(one, two, tolerance=2e-5):
    scale = max(float(two.norm()), 1e-6)
    return one.shape == two.shape and float((one - two).norm()) <= tolerance * scale


def assert_sum(merged, weights, given, tolerance=2e-5):
    """``merged`` changes ``weights`` by the sum of what ``given``, (adapter, ratio), do."""
    found = change(weights, merged)
    parts = [change(weights, adapter, ratio) for adapter, ratio in given]
    for key in weights:
        wanted = torch.zeros_like(weights[key])
        for part in parts:
            wanted = wanted + part[key]
        assert close(found[key].expand_as(wanted), wanted, tolerance), key
