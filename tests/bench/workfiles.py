"""Seeded files for the file tools, and how far a result is from the exact one."""

from __future__ import annotations

import atexit
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(tempfile.mkdtemp(prefix="adapter-lab-bench-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
Shapes = tuple[tuple[str, tuple[int, int]], ...]
_DOWN = re.compile(r"(lora_unet_|transformer\.|diffusion_model\.|)(.+)\.lora_(?:down|A)\.weight")
_H = 3072
_BLOCK = (("attn.qkv", (3 * _H, _H)), ("attn.proj", (_H, _H)), ("mlp.0", (4 * _H, _H)),
          ("mlp.2", (_H, 4 * _H)), ("mod.lin", (6 * _H, _H)))  # fmt: skip
_SINGLE = (("linear1", (7 * _H, _H)), ("linear2", (_H, 5 * _H)), ("modulation.lin", (3 * _H, _H)))
# 304 layers of Flux; a LoRA of rank 7 on them has 64 MiB in 16 bits.
FLUX: Shapes = (
    *((f"double_blocks.{i}.{side}_{name}", shape)
      for i in range(19) for side in ("img", "txt") for name, shape in _BLOCK),
    *((f"single_blocks.{i}.{name}", shape) for i in range(38) for name, shape in _SINGLE),
)  # fmt: skip


def attention(blocks: int, size: int) -> Shapes:
    """Four layers of ``size`` to a block, named as in Wan."""
    names = [f"blocks.{i}.self_attn.{name}" for i in range(blocks) for name in "qkvo"]
    return tuple((name, (size, size)) for name in names)


@cache
def lora(
    shapes: Shapes, rank: int, seed: int, alpha: float = 8.0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A LoRA file in kohya's spelling; singular values fall as they do in trained ones."""
    noise = torch.Generator().manual_seed(seed)
    fall = 1 / torch.arange(1, rank + 1)
    tensors: dict[str, Tensor] = {}
    for name, (out, width) in shapes:
        stem = "lora_unet_" + name.replace(".", "_")
        up = torch.randn(out, rank, generator=noise) * (fall / math.sqrt(out))
        down = torch.randn(rank, width, generator=noise) / math.sqrt(width)
        tensors[f"{stem}.lora_up.weight"] = up.to(dtype)
        tensors[f"{stem}.lora_down.weight"] = down.to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    path = FOLDER / f"lora-{len(shapes)}-{shapes[0][1][0]}-{rank}-{seed}-{alpha}.safetensors"
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_steps": f"{100 * seed}"})
    return path


@cache
def model(shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model of these layers."""
    noise = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=noise).to(dtype) * 0.02
               for name, shape in shapes}  # fmt: skip
    path = FOLDER / f"model-{len(shapes)}-{shapes[0][1][0]}-{dtype.itemsize}.safetensors"
    save_file(tensors, path)
    return path


@cache
def tuned(shapes: Shapes, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A model, and another whose weights differ by matrices with singular values of about 1/i."""
    base = model(shapes, dtype)
    noise, tensors = torch.Generator().manual_seed(1), load_file(base)
    for name, (out, width) in shapes:
        count = min(out, width)
        fall = 1 / torch.arange(1, count + 1)
        left = torch.randn(out, count, generator=noise) * (fall / math.sqrt(out))
        right = torch.randn(count, width, generator=noise) / math.sqrt(width)
        tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].float() + left @ right).to(dtype)
    path = base.with_name(f"tuned-{base.name}")
    save_file(tensors, path)
    return base, path


def header(path: Path) -> int:
    """Bytes before the data of a file."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def largest(path: Path) -> int:
    """Bytes of the largest tensor of a file as float32."""
    with open(path, "rb") as file:
        table = json.loads(file.read(header(path))[8:])
    return max(4 * math.prod(info["shape"]) for key, info in table.items() if key[0] != "_")


def deltas(path: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(name, (up with the scale, down)) of every module of a LoRA file, float64.

    Names are those of the model without a prefix, with underscores.
    """
    tensors = load_file(path)
    for key, down in tensors.items():
        found = _DOWN.fullmatch(key)
        if found:
            up = tensors[key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")]
            alpha = tensors.get(f"{found[1]}{found[2]}.alpha", torch.tensor(len(down)))
            yield (
                found[2].replace(".", "_"),
                (up.double() * float(alpha) / len(down), down.double()),
            )


def sums(paths: Sequence[Path], ratios: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """sum_i ratio_i dW_i as one pair of factors to a module."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, ratio in zip(paths, ratios, strict=True):
        for name, (up, down) in deltas(path):
            a, b = found.get(name, (up[:, :0], down[:0]))
            found[name] = torch.cat([a, up * ratio], 1), torch.cat([b, down])
    return found


def error(path: Path, exact: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """||dW' - dW|| / ||dW|| over all modules, of a LoRA file."""
    apart, whole, made = 0.0, 0.0, dict(deltas(path))
    for name, (up, down) in exact.items():
        a, b = made[name]
        apart += _square(torch.cat([up, -a], 1), torch.cat([down, b]))
        whole += _square(up, down)
    return math.sqrt(apart / whole)


def best(rank: int, exact: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """The least error that any factors of ``rank`` have."""
    rest, whole = 0.0, 0.0
    for up, down in exact.values():
        small = torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T
        squares = torch.linalg.svdvals(small).square()
        rest, whole = rest + float(squares[rank:].sum()), whole + float(squares.sum())
    return math.sqrt(rest / whole)


def difference(pair: tuple[Path, Path]) -> dict[str, Tensor]:
    """tuned - base of every layer by its name, float32."""
    base, other = (load_file(path) for path in pair)
    names = {key: key.removesuffix(".weight").replace(".", "_") for key in base}
    return {name: other[key] - base[key] for key, name in names.items()}


def dense_error(path: Path, exact: Mapping[str, Tensor]) -> float:
    """As :func:`error`, of dense deltas."""
    made = dict(deltas(path))
    apart, whole = 0.0, 0.0
    for name, (up, down) in made.items():
        apart += float((up.float() @ down.float() - exact[name]).double().square().sum())
        whole += float(exact[name].double().square().sum())
    return math.sqrt(apart / whole)


def dense_best(rank: int, exact: Mapping[str, Tensor]) -> float:
    """As :func:`best`, by the eigenvalues of the smaller Gram matrix in float64."""
    rest, whole = 0.0, 0.0
    for matrix in exact.values():
        wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
        squares = torch.linalg.eigvalsh(wide @ wide.T).flip(0)
        rest, whole = rest + float(squares[rank:].sum()), whole + float(squares.sum())
    return math.sqrt(rest / whole)


def _square(up: Tensor, down: Tensor) -> float:
    """||up down||^2 without the product."""
    return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))
