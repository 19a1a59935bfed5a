"""Adapters into bf16 weights, beside ComfyUI on the same tensors and beside the bound.

The bound is what any LoRA costs: the weight to float32, one ``addmm_``, back to bf16. Memory is
what a merge holds at its peak beside the float32 weight, in matrices of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import host  # noqa: F401  first, it sets ComfyUI up

import comfy.lora  # isort: skip
import torch
from adapter_lab.core.adapters import load
from adapter_lab.nodes.host.adapter import AdapterPatch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from pairs import peak, timed
from torch import Tensor, nn

PAIRS, RANK = 7, 16
AGREEMENT = 1e-5  # of the change: float32 in another order of operations
SIZES = (*[1536] * 48, *[3072] * 12)
MODULES = {
    "lora": LoConModule,
    "loha": LohaModule,
    "lokr": LokrModule,
    "glora": GLoRAModule,
    "oft": DiagOFTModule,
    "boft": ButterflyOFTModule,
}
Patch = Any
Merge = Callable[[Tensor, Patch], Tensor]


def state(algorithm: str, size: int) -> dict[str, Tensor]:
    """A module's tensors as LyCORIS saves them, filled with noise."""
    layer = nn.Linear(size, size, bias=False)
    module = MODULES[algorithm]("", layer, lora_dim=RANK, alpha=0 if "oft" in algorithm else RANK)
    tensors = {name: t.detach() for name, t in module.state_dict().items()}
    noise = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape, generator=noise) * 0.02 if t.numel() > 1 else t
        for name, t in tensors.items()
    }


def ours(algorithm: str, size: int) -> Patch:
    return AdapterPatch.of(load(state(algorithm, size)))


def comfyui(algorithm: str, size: int) -> Patch:
    tensors = {f"m.{suffix}": t for suffix, t in state(algorithm, size).items()}
    return comfy.lora.load_lora(tensors, {"m": "m.weight"})["m.weight"]


def patched(wide: Tensor, patch: Patch) -> Tensor:
    return comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], wide, "m.weight")


def merged(weight: Tensor, patch: Patch) -> Tensor:
    """As ComfyUI patches a weight, without its stochastic rounding."""
    return patched(weight.to(torch.float32), patch).to(weight.dtype)


def bound(weight: Tensor, patch: tuple[Tensor, Tensor]) -> Tensor:
    return weight.to(torch.float32).addmm_(*patch).to(weight.dtype)


def factors(_algorithm: str, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, RANK), torch.randn(RANK, size)


def _time(merge: Merge, make: Callable[[str, int], Patch], algorithm: str) -> Callable[[], float]:
    weights = [torch.randn(size, size, dtype=torch.bfloat16) for size in SIZES]
    patches = {size: make(algorithm, size) for size in set(SIZES)}
    return timed(lambda: _drop(merge(w, patches[len(w)]) for w in weights))


def _require_agreement(algorithm: str) -> None:
    """ComfyUI is right where alpha is 0 or the rank and the strength 1: else times mean nothing."""
    weight = torch.randn(256, 256)
    mine, theirs = (patched(weight.clone(), make(algorithm, 256)) for make in (ours, comfyui))
    apart = float((mine - theirs).norm() / (theirs - weight).norm())
    assert apart < AGREEMENT, f"{algorithm}: the results are {apart:.2g} apart"


def _drop(results: Iterable[Tensor]) -> None:
    for _ in results:
        pass


def _memory(make: Callable[[str, int], Patch], algorithm: str) -> Callable[[], float]:
    size = max(SIZES)
    weight, patch = torch.randn(size, size), make(algorithm, size)
    return lambda: peak(lambda: patched(weight, patch)) / weight.nbytes


def _bench(algorithm: str, peer: str) -> Callable[..., None]:
    def bench(measure: Callable[..., None]) -> None:
        with torch.inference_mode():
            if peer == "ComfyUI":
                _require_agreement(algorithm)
            if peer == "memory":
                sizes = (_memory(make, algorithm) for make in (ours, comfyui))
                measure(*sizes, "ComfyUI", "fp32 matrices", 3)
            else:
                theirs = (bound, factors) if peer == "bound" else (merged, comfyui)
                mine = _time(merged, ours, algorithm)
                measure(mine, _time(*theirs, algorithm), peer, "s", PAIRS)

    return bench


BENCHES = {
    f"merge_{algorithm}_{peer.lower()}": _bench(algorithm, peer)
    for algorithm in MODULES
    for peer in ("ComfyUI", "bound", "memory")
}
