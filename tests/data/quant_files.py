"""A toy FLUX.1 to quantise, and how to look at what became of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.quant import quantize_file
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 128
LAYERS = {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH),
    "double_blocks.0.img_attn.proj": (WIDTH, WIDTH),
    "double_blocks.0.img_mlp.0": (4 * WIDTH, WIDTH),
    "double_blocks.0.img_mlp.2": (WIDTH, 4 * WIDTH),
    "single_blocks.0.linear2": (WIDTH, 5 * WIDTH),
}
OTHERS = {"img_in": (WIDTH, 64), "double_blocks.0.img_mod.lin": (6 * WIDTH, WIDTH)}
WORST = "double_blocks.0.img_mlp.2"  # see `weights`
TEXT = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A toy FLUX.1, one layer of which has numbers that stand out of most rows."""
    shapes = LAYERS | OTHERS
    made = {f"{n}.weight": random(*s, seed=i) * 0.02 for i, (n, s) in enumerate(shapes.items())}
    made |= {f"{n}.bias": random(s[0], seed=50 + i) for i, (n, s) in enumerate(shapes.items())}
    made[f"{WORST}.weight"][::2, 7] = 20
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def saved(folder: Path) -> Path:
    """The same as a file, with metadata of which some are of no other."""
    path = folder / "model.safetensors"
    stale = {"modelspec.hash_sha256": "0x1", "modelspec.unet_dtype": "bf16"}
    save_file(weights(), path, {**stale, "modelspec.title": "mine", "ss_steps": "10"})
    return path


def lora(path: str, rank: int = 4, *, scale: float = 0.1, seed: int = 90) -> dict[str, Tensor]:
    out, width = (LAYERS | OTHERS)[path]
    return {
        f"diffusion_model.{path}.lora_up.weight": random(out, rank, seed=seed) * scale,
        f"diffusion_model.{path}.lora_down.weight": random(rank, width, seed=seed + 1) * scale,
        f"diffusion_model.{path}.alpha": torch.tensor(2.0),
    }


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q and s = max |W| / 448, as ComfyUI's layout of fp8 has them."""
    scale = weight.float().abs().max() / 448
    return (weight.float() * (1 / scale)).to(torch.float8_e4m3fn), scale


def same(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def refused(match: str, src: Path, dst: Path, **more) -> None:
    """Nothing is written, and what was there stays."""
    before, threads = dst.read_bytes() if dst.exists() else None, threading.active_count()
    with pytest.raises(AdapterLabError, match=match):
        quantize_file(src, dst, **more)
    assert (dst.read_bytes() if dst.exists() else None) == before
    assert not list(dst.parent.glob(".adapter_lab-*"))
    assert threading.active_count() == threads
