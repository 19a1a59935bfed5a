"""One training step of a stack of frozen layers with adapters, beside lycoris-lora and peft.

The stack is ``LAYERS`` linear layers of ``WIDTH``, float32, two threads; a step is forward and
backward to the factors and to the input. Times are over those of the bare stack, which is run
before every one of them, and alternate with the peer's. Bytes are what autograd keeps between
forward and backward beyond the bare stack and the parameters, storages counted once, in copies of
the layers' inputs: exact, so both sides count everything, also activations of rank channels and
finished rotations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import host  # noqa: F401  first, it sets ComfyUI up

import peft  # isort: skip
import torch
import torch.nn.functional as F
from adapter_lab.core.adapters import AdapterConfig, Algorithm
from adapter_lab.core.adapters.training import make, with_leaves
from adapter_lab.core.tensors import Op
from adapter_lab.core.train.layer import adapted
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

LAYERS, WIDTH = 8, 1024
PAIRS = {256: 7, 2048: 3}  # of each number of tokens, so that a bench takes some 20 s
Model = Callable[[Tensor], Tensor]
LYCORIS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora16": (LoConModule, {"lora_dim": 16, "alpha": 16}),
    "loha8": (LohaModule, {"lora_dim": 8, "alpha": 8}),
    "loha16": (LohaModule, {"lora_dim": 16, "alpha": 16}),
    "lokr_full": (LokrModule, {"lora_dim": 10000, "alpha": 10000, "full_matrix": True}),
    "lokr8": (LokrModule, {"lora_dim": 8, "alpha": 8}),
    "oft32": (DiagOFTModule, {"lora_dim": 32, "alpha": 0}),
    "boft32": (ButterflyOFTModule, {"lora_dim": 32, "alpha": 0}),
    "dora16": (LoConModule, {"lora_dim": 16, "alpha": 16, "weight_decompose": True}),
}
PEFT: dict[str, Callable[..., Any]] = {
    "lora16": partial(peft.LoraConfig, r=16, lora_alpha=16),
    "loha8": partial(peft.LoHaConfig, r=8, alpha=8),
    "loha16": partial(peft.LoHaConfig, r=16, alpha=16),
    "lokr8": partial(peft.LoKrConfig, r=8, alpha=8),
    "oft32": partial(peft.OFTConfig, oft_block_size=32),
    # Without its CUDA extension it runs a single factor: less than the others do.
    "boft32": partial(peft.BOFTConfig, boft_block_size=32, boft_n_butterfly_factor=1),
    "dora16": partial(peft.LoraConfig, r=16, lora_alpha=16, use_dora=True),
}
OURS = {
    "lora16": AdapterConfig("lora", 16, 16),
    "loha8": AdapterConfig("loha", 8, 8),
    "loha16": AdapterConfig("loha", 16, 16),
    "lokr_full": AdapterConfig("lokr", 16, full_matrix=True),
    "lokr8": AdapterConfig("lokr", 8, 8),
    "oft32": AdapterConfig("oft", 32),
    "boft32": AdapterConfig("boft", 32),
    "dora16": AdapterConfig("lora", 16, 16, dora=True),
}


class Frozen:
    """A frozen linear layer with its weight in memory."""

    op, plain, bias = Op(), True, None

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    def weight(self) -> Tensor:
        return self.matrix


def weights(count: int = LAYERS) -> list[Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(WIDTH, WIDTH, generator=noise) / math.sqrt(WIDTH) for _ in range(count)]


def noisy(factors: Iterable[Tensor]) -> list[Tensor]:
    """As in the midst of training: nothing is zero any more."""
    noise = torch.Generator().manual_seed(1)
    found = list(factors)
    for t in found:
        t.data += 0.01 * torch.randn(t.shape, generator=noise)
    return found


def bare(matrices: list[Tensor]) -> tuple[Model, list[Tensor]]:
    def run(x: Tensor) -> Tensor:
        for w in matrices:
            x = F.linear(x, w)
        return x

    return run, []


def adapters(name: str, matrices: list[Tensor]) -> list[Algorithm]:
    """Ours in training on ``matrices``."""
    made: list[Algorithm] = []
    for w in matrices:
        fresh = make(w.shape, OURS[name], torch.Generator().manual_seed(0))
        made.append(with_leaves(fresh.started(w), w.device))
    return made


def chain(made: list[Algorithm], matrices: list[Tensor]) -> Model:
    """The stack of frozen layers under ``made``."""
    layers = [Frozen(w) for w in matrices]

    def run(x: Tensor) -> Tensor:
        for algorithm, layer in zip(made, layers, strict=True):
            x = adapted(algorithm, layer, x)
        return x

    return run


def ours(name: str, matrices: list[Tensor]) -> tuple[Model, list[Tensor]]:
    made = adapters(name, matrices)
    return chain(made, matrices), noisy(t for a in made for t in a.trained.values())


def stack(matrices: list[Tensor]) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in matrices))
    for layer, w in zip(model, matrices, strict=True):
        layer.weight = nn.Parameter(w, requires_grad=False)
    return model


def lycoris(name: str, matrices: list[Tensor]) -> tuple[Model, list[Tensor]]:
    model, (kind, options) = stack(matrices), LYCORIS[name]
    modules = [kind(f"layer{i}", layer, **options) for i, layer in enumerate(model)]
    for module in modules:
        module.apply_to()
    model.adapters = nn.ModuleList(modules)  # lets nothing be collected

    def run(x: Tensor) -> Tensor:
        for layer in list(model)[:-1]:
            x = layer(x)
        return x

    return run, noisy(p for m in modules for p in m.parameters() if p.requires_grad)


def peft_(name: str, matrices: list[Tensor]) -> tuple[Model, list[Tensor]]:
    targets = [str(i) for i in range(len(matrices))]
    model = peft.get_peft_model(stack(matrices), PEFT[name](target_modules=targets))
    return model, noisy(p for p in model.parameters() if p.requires_grad)


def step(model: Model, factors: list[Tensor], x: Tensor, g: Tensor) -> None:
    for t in (x, *factors):
        t.grad = None
    model(x).backward(g)


def saved(model: Model, own: Iterable[Tensor], x: Tensor) -> int:
    """Bytes kept for the backward pass that are not of ``own``."""
    known = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


def _inputs(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(tokens, WIDTH)


def _over(mine: Callable[[], None], base: Callable[[], None]) -> Callable[[], float]:
    """The time of ``mine`` over that of ``base``, run one after the other."""

    def run() -> float:
        start = time.perf_counter()
        base()
        middle = time.perf_counter()
        mine()
        return (time.perf_counter() - middle) / (middle - start)

    return run


def _bench(name: str, tokens: int, peer: str) -> Callable[..., None]:
    def bench(measure: Callable[..., None]) -> None:
        torch.set_num_threads(2)
        matrices, (x, g) = weights(), _inputs(tokens)
        other = lycoris if peer == "lycoris-lora" else peft_
        base = partial(step, *bare(matrices), x, g)
        mine, theirs = (made(name, matrices) for made in (ours, other))
        runs = (_over(partial(step, *made, x, g), base) for made in (mine, theirs))
        measure(*runs, peer, "steps of the bare stack", PAIRS[tokens])
        figures = [
            saved(model, (*matrices, *factors), x) / (LAYERS * x.nbytes)
            for model, factors in (mine, theirs)
        ]
        counts = [partial(float, figure) for figure in figures]
        measure(*counts, peer, "copies of the layers' inputs kept", 1)

    return bench


BENCHES: dict[str, Callable[..., None]] = {
    f"step_{name}_{tokens}_{peer}": _bench(name, tokens, peer)
    for name in OURS
    for tokens in PAIRS
    for peer, known in (("lycoris-lora", LYCORIS), ("peft", PEFT))
    if name in known
}
