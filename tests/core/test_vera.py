"""VeRA against peft: saved matrices, matrices from their seed, and who shares them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from adapter_lab.core.adapters import load
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.keys.shared import projections, share
from adapter_lab.core.tensors import Op
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

SIZES = {"wide": (24, 10), "tall": (8, 40), "plain": (16, 16)}  # inputs, outputs
STEM = "base_model.model."


def trained(**options: object) -> PeftModel:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(*size) for name, size in SIZES.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the matrices are not saved
        wrapped = get_peft_model(model, VeraConfig(target_modules=list(SIZES), **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    return wrapped


def modules_of(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        stem, _, suffix = key.rpartition(".")
        modules.setdefault(stem, {})[suffix] = tensor
    return modules


def saved(model: PeftModel, folder: Path) -> dict[str, dict[str, Tensor]]:
    model.save_pretrained(folder)
    return modules_of(load_file(folder / "adapter_model.safetensors"))


def check(model: PeftModel, modules: dict[str, dict[str, Tensor]]) -> None:
    for name, (width, out) in SIZES.items():
        layer = model.base_model.model[name]
        adapter, weight = load(modules[STEM + name]), layer.base_layer.weight.detach()
        assert adapter is not None and adapter.misfit(weight.shape) is None
        x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            effect = layer(x) - layer.base_layer(x)
        for h in (
            x @ adapter.delta(weight).T,
            x @ (adapter.merge(weight.clone()) - weight).T,
            adapter.bypass(x, Op(), weight),
            2 * x @ adapter.at(0.5).delta(weight).T,
            x @ load(adapter.at(-3.0).state()).delta(weight).T / -3,
        ):
            assert (h - effect).norm() < 1e-5 * effect.norm()
        assert adapter.misfit((out + 1, width)) is not None
        assert adapter.misfit((out, 25)) is not None
        assert adapter.misfit((out, width, 3)) is not None
        assert adapter.misfit((out, width, 1, 1)) is None


def test_saved_matrices(tmp_path: Path) -> None:
    model = trained(r=6)
    modules = saved(model, tmp_path)
    extra = share(modules)
    assert extra["base_model"] == {} and len(extra) == 4
    assert extra[STEM + "wide"]["vera_A"] is modules["base_model"]["vera_A"]
    check(model, {name: {**modules[name], **tensors} for name, tensors in extra.items()})


@pytest.mark.parametrize("options", [{"r": 6}, {"r": 3, "projection_prng_key": 77}])
def test_matrices_from_their_seed(options: dict[str, int], tmp_path: Path) -> None:
    model = trained(save_projection=False, **options)
    modules = saved(model, tmp_path)
    assert set(modules) == {STEM + name for name in SIZES}
    extra = share(modules, options, width=24)
    check(model, {name: {**modules[name], **extra[name]} for name in modules})


def test_without_the_widest_layer_nothing_is_made_up(tmp_path: Path) -> None:
    modules = saved(trained(r=6, save_projection=False), tmp_path)
    assert share(modules, {"r": 6}) == {} and share(modules, width=24) == {}
    with pytest.raises(AdapterLabError, match="random matrices.*save_projection=True"):
        load(modules[STEM + "wide"])


def test_matrices_beside_every_module_need_no_sharing(tmp_path: Path) -> None:
    model = trained(r=6)
    own = {STEM + name for name in SIZES}
    state = {k.removesuffix(".default"): t for k, t in model.state_dict().items()}
    modules = {k: t for k, t in modules_of(state).items() if k in own}
    check(model, modules)
    assert share(modules) == {}


def test_other_algorithms_share_nothing() -> None:
    assert (
        share({"a": {"lora_up.weight": torch.ones(2, 2)}, "b": {"vera_lambda": torch.ones(2)}})
        == {}
    )


def test_two_different_matrices() -> None:
    one, two = torch.ones(2, 4), torch.zeros(2, 4)
    module = {"vera_lambda_d": torch.ones(2), "vera_lambda_b": torch.ones(4)}
    same = share({"base_model": {"vera_A": one}, "b": {"vera_A": one.clone()}, "c": module})
    assert torch.equal(same["c"]["vera_A"], one)
    with pytest.raises(AdapterLabError, match="vera_A is there twice.*'base_model', 'b'"):
        share({"base_model": {"vera_A": one}, "b": {"vera_A": two}, "c": module})


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_projections_are_those_of_peft(key: int, rank: int, rows: int, width: int) -> None:
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator().manual_seed(key)
    a, b = projections(key, rank, rows, width)
    assert torch.equal(a, _kaiming_init((rank, width), generator))
    assert torch.equal(b, _kaiming_init((rows, rank), generator))


E = torch.empty
BROKEN = {
    "no vector": ({"vera_A": E(2, 4), "vera_B": E(5, 2)}, "missing.*vera_lambda_b"),
    "rank": ({"vera_lambda_d": E(3)}, r"multiply.*vera_lambda_d \(3,\)"),
    "rows": ({"vera_lambda_b": E(6)}, r"multiply.*vera_lambda_b \(6,\)"),
    "flat": ({"vera_A": E(8)}, r"multiply.*vera_A \(8,\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    tensors, message = BROKEN[name]
    if name != "no vector":
        whole = {
            "vera_A": E(2, 4), "vera_B": E(5, 2), "vera_lambda_b": E(5), "vera_lambda_d": E(2)
        }  # fmt: skip
        tensors = {**whole, **tensors}
    with pytest.raises(AdapterLabError, match=message):
        load(tensors)
