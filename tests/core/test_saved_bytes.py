"""What a step keeps between forward and backward: exact, by hooks, storages counted once.

Not counted: weights and trained tensors themselves. Everything else is, also activations of rank
channels and finished rotations.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.adapters.training import make, with_leaves
from adapter_lab.core.tensors import Op
from adapter_lab.core.train.layer import adapted
from saved import kept
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LAYERS, WIDTH, TOKENS = 3, 256, 512
ROTATIONS = 8 * 32 * 32 * 4  # bytes of the finished blocks of 32 rows; times 4 stages in BOFT
CASES = {
    "lora": (AdapterConfig("lora", 16, 8), 1, TOKENS * 16 * 4),
    "lora_fa": (AdapterConfig("lora_fa", 16), 1, TOKENS * 16 * 4),
    "loha": (AdapterConfig("loha", 4, 2), 1, 0),
    "loha, dense": (AdapterConfig("loha", 24), 1, 0),
    "lokr": (AdapterConfig("lokr", 4, 2, factor=4), 1, 0),
    "lokr, two full factors": (AdapterConfig("lokr", full_matrix=True), 1, 0),
    "full": (AdapterConfig("full"), 1, 0),
    "oft": (AdapterConfig("oft", 32), 1, ROTATIONS),
    "boft": (AdapterConfig("boft", 32), 3, 4 * ROTATIONS),
    "glora": (AdapterConfig("glora", 8, 8), 1, 0),
    "glokr": (AdapterConfig("glokr", full_matrix=True), 1, 0),
    "ia3 on inputs": (AdapterConfig("ia3", on_input=True), 1, 0),
    "ia3": (AdapterConfig("ia3"), 1, WIDTH * 4),
    "dora": (AdapterConfig("lora", 16, dora=True), 2, TOKENS * 16 * 4 + 2 * WIDTH * 4),
    "dora on inputs": (
        AdapterConfig("lora", 16, dora=True, dora_on="input"), 2, TOKENS * 16 * 4 + 2 * WIDTH * 4,
    ),
}  # fmt: skip


class Frozen:
    """A layer whose weight is, unless it is plain, made at each use."""

    op, bias = Op(), None

    def __init__(self, plain: bool, dtype: torch.dtype = torch.float32) -> None:
        noise = torch.Generator().manual_seed(0)
        self.matrix = (torch.randn(WIDTH, WIDTH, generator=noise) / math.sqrt(WIDTH)).to(dtype)
        self.plain = plain

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    def weight(self) -> Tensor:
        return self.matrix if self.plain else self.matrix.clone()


def stack(config: AdapterConfig, plain: bool, mode: str = "auto", dtype=torch.float32):
    """A stack of layers, and the tensors that are there without it."""
    layers = [Frozen(plain, dtype) for _ in range(LAYERS)]
    made = []
    for layer in layers:
        fresh = make((WIDTH, WIDTH), config, torch.Generator().manual_seed(0))
        fresh = fresh.started(layer.matrix) if fresh.needs_weight_to_start else fresh
        made.append(with_leaves(fresh, layer.matrix.device))

    def run(x: Tensor) -> Tensor:
        for algorithm, layer in zip(made, layers, strict=True):
            x = adapted(algorithm, layer, x, mode)
        return x

    return run, [t for a in made for t in a.tensors.values()] + [layer.matrix for layer in layers]


@pytest.mark.parametrize("plain", (True, False))
@pytest.mark.parametrize("name", CASES)
def test_copies_of_the_input(name: str, plain: bool) -> None:
    config, copies, narrow = CASES[name]
    run, own = stack(config, plain)
    x = torch.randn(2, TOKENS // 2, WIDTH, requires_grad=True)
    assert 0 < kept(lambda: run(x), own) <= LAYERS * (copies * x.nbytes + narrow)


@pytest.mark.parametrize("plain", (True, False))
@pytest.mark.parametrize("name", CASES)
def test_no_weight_is_kept_in_sixteen_bits(name: str, plain: bool) -> None:
    """Neither as it was cast to be multiplied nor as it was made for one use."""
    config, copies, narrow = CASES[name]
    run, own = stack(config, plain, dtype=torch.bfloat16)
    x = torch.randn(32, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    assert 0 < kept(lambda: run(x), own) <= LAYERS * (copies * x.nbytes + narrow)


@pytest.mark.parametrize("name", ("lora", "loha", "lokr", "lokr, two full factors", "full"))
def test_rebuilding_keeps_the_input_alone(name: str) -> None:
    run, own = stack(CASES[name][0], True, "rebuild")
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    assert kept(lambda: run(x), own) == LAYERS * x.nbytes


@pytest.mark.parametrize("name", CASES)
def test_checkpointing_keeps_the_input_of_the_block(name: str) -> None:
    run, own = stack(CASES[name][0], True)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    assert kept(lambda: checkpoint(run, x, use_reentrant=False), own) <= x.nbytes
