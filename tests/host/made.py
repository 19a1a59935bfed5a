"""Adapters of every algorithm with random factors, for layers of any shape."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from torch import Tensor

Shape = tuple[int, ...]
Factors = dict[str, Tensor]
RANK = 4
# Of what is read and never begun: suffix -> shape for a weight (out, in * prod(k)).
_READ: dict[str, Callable[[int, int], dict[str, Shape]]] = {
    "boft_peft": lambda out, n: {"boft_R": (2, n // 4, 4, 4), "boft_s": (out, 1)},
    "glora_peft": lambda out, n: {
        "glora_A.Xd": (out, RANK), "glora_A.Xu": (RANK, n), "glora_B.Xd": (out, RANK),
        "glora_B.Xu": (RANK, n), "glora_D.X": (out,), "glora_E.X": (out,),
    },
    "hra": lambda out, n: {"hra_u": (n, RANK)},
    "ia3_peft": lambda out, n: {"ia3_l": (out, 1)},
    "oft_kohya": lambda out, n: {"kohya_oft_blocks": (out // 4, 4, 4), "alpha": ()},
    "tlora": lambda out, n: {
        "q_layer.weight": (RANK, n), "p_layer.weight": (out, RANK), "lambda_layer": (1, RANK),
    },
    "vera": lambda out, n: {
        "vera_A": (RANK, n), "vera_B": (out, RANK), "vera_lambda_b": (out,),
        "vera_lambda_d": (RANK,),
    },
}  # fmt: skip
# Only for layers without a kernel.
_FLAT = {"glora_peft", "tlora", "vera", "ia3_peft", "boft_peft"}
WEIGHTS = [name for name, a in ALGORITHMS.items() if a.parameter == "weight" and name != "norm"]


def factors(name: str, shape: Shape, seed: int = 0, std: float = 0.1) -> Factors | None:
    """Suffix -> random tensor, None where the algorithm is for no such shape."""
    rng = torch.Generator().manual_seed(seed)
    out, columns = shape[0], math.prod(shape[1:])
    if name in _FLAT and len(shape) > 2:
        return None
    if name in _READ:
        sizes = _READ[name](out, columns)
        std = {"vera": 1.0, "tlora": 0.3}.get(name, std)
        made = {s: torch.randn(size, generator=rng) * std for s, size in sizes.items()}
        return {s: t.abs() if s == "alpha" else t for s, t in made.items()}  # a constraint
    if name == "set":
        return {"set_weight": torch.randn(shape, generator=rng) * columns**-0.5}
    try:
        state = ALGORITHMS[name].init(shape, AdapterConfig(name, RANK, 2.0), rng).state()
    except AdapterLabError:
        return None
    scale = std * columns**-0.5 if name == "full" else std
    return {
        suffix: t + torch.randn(t.shape, generator=rng) * scale if t.is_floating_point() and t.ndim
        else t
        for suffix, t in state.items()
    }  # fmt: skip


def dora(name: str, shape: Shape, seed: int = 0, axis: int = 0) -> Factors:
    """The same under DoRA with lengths on outputs (0) or inputs (1)."""
    given = factors(name, shape, seed)
    assert given is not None
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    rng = torch.Generator().manual_seed(seed + 1)
    return {**given, "dora_scale": 1 + 0.2 * torch.rand(sizes, generator=rng)}


def adapter(modules: dict[str, Factors | None], name: str = "made.safetensors") -> Adapter:
    """A file in ComfyUI's spelling: path of a module in the diffusion model -> its tensors."""
    tensors = {
        f"diffusion_model.{path}.{suffix}": tensor
        for path, made in modules.items()
        for suffix, tensor in (made or {}).items()
    }
    return Adapter(tensors, name=name)
