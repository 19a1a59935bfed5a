"""T-LoRA against LyCORIS, its starting point against a full decomposition."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.adapters import load
from adapter_lab.core.adapters.tlora import principal
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24), {}),
    "alpha": (lambda: nn.Linear(24, 40), (3, 24), {"lora_dim": 5, "alpha": 2}),
    "narrow": (lambda: nn.Linear(3, 40), (3, 3), {"lora_dim": 6, "alpha": 6}),
    "conv1d": (lambda: nn.Conv1d(12, 20, 1, stride=2), (2, 12, 9), {}),
    "conv2d": (lambda: nn.Conv2d(12, 20, 1, padding=1), (2, 12, 5, 5), {}),
    "grouped": (lambda: nn.Conv2d(12, 20, 1, groups=2), (2, 12, 5, 5), {"lora_dim": 3}),
    "conv3d": (lambda: nn.Conv3d(12, 20, 1), (2, 12, 2, 5, 4), {}),
}


def op_of(layer: nn.Module) -> Op:
    if isinstance(layer, nn.Linear):
        return Op()
    dims = layer.weight.ndim - 2
    return Op(dims, layer.stride, layer.padding, layer.dilation, layer.groups)


def trained(layer: nn.Module, **options: object) -> TLoraModule:
    """A module some way from where it began."""
    module = TLoraModule("", layer, **{"lora_dim": 4, "alpha": 4, "bypass_mode": False, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return module


def file_of(module: TLoraModule) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.custom_state_dict().items()}


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_lycoris(name: str) -> None:
    torch.manual_seed(0)
    make, shape, options = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    module = trained(layer, **options)
    adapter = load(file_of(module))
    op, weight = op_of(layer), layer.weight
    assert adapter.misfit(weight.shape) is None and adapter.rank == module.lora_dim
    for strength in (1.0, -0.6):
        module.multiplier = strength
        theirs, ours = (module(x) - layer(x)).detach(), adapter.at(strength)
        assert error(op(x, ours.delta(weight)), theirs) < 1e-4
        assert error(op(x, ours.merge(weight.clone()) - weight), theirs) < 1e-4
        assert error(ours.bypass(x, op, weight), theirs) < 1e-4
        assert error(ours.lora(weight).bypass(x, op, weight), theirs) < 1e-4
    again = load(adapter.at(0.5).state())
    assert torch.allclose(again.delta(weight), adapter.at(0.5).delta(weight), atol=1e-6)


def test_what_has_not_been_trained_changes_nothing() -> None:
    layer = nn.Linear(400, 600)
    adapter = load(file_of(TLoraModule("", layer, lora_dim=4)))
    assert adapter.delta(layer.weight).norm() < 1e-3 * layer.weight.norm()


def test_a_kernel_is_refused() -> None:
    layer = nn.Conv2d(12, 20, 3)
    adapter = load(file_of(trained(layer)))
    found = adapter.misfit(layer.weight.shape)
    assert found == "1 x 1 factors say nothing about a kernel of (3, 3)"
    assert adapter.misfit((20, 13)) is not None
    assert "as patched so far" in " ".join(adapter.traits)


def spectrum(kind: str, out: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(out, width, generator=generator)
    if kind == "noise":
        return noise
    u, s, vh = torch.linalg.svd(noise, full_matrices=False)
    n = torch.arange(1, len(s) + 1)
    values = {"decay": n**-0.5, "rank 3": (n <= 3).float(), "equal": torch.ones(len(s))}[kind]
    return (u * values) @ vh


@pytest.mark.parametrize("kind", ["noise", "decay", "rank 3"])
@pytest.mark.parametrize("shape", [(640, 500), (500, 640)])
def test_principal_triplets_are_those_of_a_full_decomposition(
    kind: str, shape: tuple[int, int]
) -> None:
    matrix, rank = spectrum(kind, *shape), 8
    near = torch.zeros(rank, shape[1]) if kind == "decay" else spectrum("noise", rank, shape[1], 9)
    u, s, v = principal(matrix, rank, near)
    fu, fs, fv = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (fu[:, :rank] * fs[:rank]) @ fv[:rank]
    assert u.shape == (shape[0], rank) and v.shape == (rank, shape[1])
    assert torch.allclose(s.double(), fs[:rank], atol=2e-5 * float(fs[0]))
    # The subspace is only as sharp as the gap to the next value lets it be.
    tolerance = 1e-3 if kind == "noise" else 1e-5
    assert error(((u * s) @ v).double(), best) < tolerance
    assert torch.equal(principal(matrix, rank, near)[0], u)


def test_principal_triplets_without_a_gap_are_still_singular() -> None:
    matrix = spectrum("equal", 500, 500)
    u, s, v = principal(matrix, 4, matrix[:4])
    assert torch.allclose(s, torch.ones(4), atol=1e-5)
    assert torch.allclose(matrix @ v.T, u * s, atol=1e-5)
    assert torch.allclose(v @ v.T, torch.eye(4), atol=1e-5)


BROKEN = {
    "no values": ("lambda_layer", None, "missing.*lambda_layer"),
    "too few values": ("lambda_layer", (1, 3), r"multiply.*lambda_layer \(1, 3\)"),
    "ranks": ("p_layer.weight", (40, 3), r"multiply.*p_layer.weight \(40, 3\)"),
    "a kernel": ("q_layer.weight", (4, 24, 3), r"multiply.*q_layer.weight \(4, 24, 3\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    suffix, shape, message = BROKEN[name]
    file = file_of(trained(nn.Linear(24, 40)))
    file.pop(suffix)
    if shape:
        file[suffix] = torch.ones(shape)
    with pytest.raises(AdapterLabError, match=message):
        load(file)
