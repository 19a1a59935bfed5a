"""Rotations: exact at strength 0, the same once saved, in place; what is wrong with broken ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig, Algorithm, load
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.orthogonal import cayley, eye, neumann, skew
from adapter_lab.core.tensors import Op
from lycoris.functional.boft import diff_weight as boft_diff_weight
from lycoris.functional.general import power2factorization
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from torch import Tensor, nn

OUT, COLUMNS = 24, 32
CONFIGS: dict[str, dict[str, Any]] = {
    "oft_peft exact": {"use_cayley_neumann": False},
    "oft_peft coft": {"coft": True, "eps": 0.5},
    "hra orthonormal": {"apply_GS": True},
}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


FILES: dict[str, dict[str, Tensor]] = {
    "oft": {"oft_blocks": noise(6, 4, 4), "alpha": torch.tensor(0)},
    "oft without alpha": {"oft_blocks": noise(6, 4, 4)},
    "oft constrained": {
        "oft_blocks": noise(6, 4, 4), "alpha": torch.tensor(0.01), "rescale": 1 + noise(OUT, 1),
    },
    "oft finished": {"oft_diag": noise(6, 4, 4) + torch.eye(4)},
    "boft": {"oft_blocks": noise(3, 4, 6, 6), "rescale": 1 + noise(OUT, 1)},
    "kohya": {"kohya_oft_blocks": noise(6, 4, 4), "alpha": torch.tensor(0.02)},
    "kohya unconstrained": {"kohya_oft_blocks": noise(8, 3, 3).bfloat16(),
                            "alpha": torch.tensor(1.0)},
    "kohya qkv": {
        **{f"kohya_oft_blocks.{i}": noise(2, 4, 4) * (i + 1) for i in range(3)},
        "alpha": torch.tensor(0.1),
    },
    "kohya qkv and mlp": {
        **{f"kohya_oft_blocks.{i}": noise(2, b, b) for i, b in enumerate((3, 3, 3))},
        "kohya_oft_blocks.3": noise(1, 6, 6), "alpha": torch.tensor(0.02),
    },
    "oft_peft": {"oft_R.weight": noise(8, 6)},
    "oft_peft exact": {"oft_R.weight": noise(8, 6)},
    "oft_peft coft": {"oft_R.weight": noise(1, 28)},
    "boft_peft": {"boft_R": noise(2, 8, 4, 4), "boft_s": 1 + noise(OUT, 1)},
    "hra": {"hra_u": noise(COLUMNS, 5)},
    "hra orthonormal": {"hra_u": noise(COLUMNS, 5)},
}  # fmt: skip


TRAINED = ("oft_blocks", "kohya_oft_blocks", "oft_R.weight", "boft_R", "hra_u")


def adapter_of(name: str) -> Algorithm:
    adapter = load(FILES[name])
    assert adapter is not None
    return adapter.configured(CONFIGS.get(name, {}))


@pytest.mark.parametrize("shape", [(OUT, COLUMNS), (OUT, 8, 2, 2)])
@pytest.mark.parametrize("name", FILES)
def test_in_place_and_exact_at_zero(name: str, shape: tuple[int, ...]) -> None:
    adapter, whole = adapter_of(name), noise(OUT + 4, *shape[1:])
    weight = whole[2:-2]  # as a row range of a fused weight
    before, expected = weight.clone(), weight + adapter.delta(weight)
    assert adapter.misfit(shape) is None
    assert torch.equal(adapter.at(0).merge(weight), before)
    endless = torch.full_like(weight, torch.inf)
    assert torch.equal(adapter.at(0).merge(endless), torch.full_like(weight, torch.inf))
    assert not adapter.at(0).delta(weight).any()
    assert (expected - before).norm() > 0.01 * before.norm()
    merged = adapter.merge(weight)
    assert merged.data_ptr() == weight.data_ptr()
    assert torch.allclose(whole[2:-2], expected, atol=1e-6)


def test_merge_into_a_weight_that_is_no_matrix() -> None:
    adapter, weight = adapter_of("oft"), noise(OUT, 8, 2, 3)[..., :2]
    expected = weight + adapter.delta(weight)
    adapter.merge(weight)
    assert torch.allclose(weight, expected, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", FILES)
def test_saved_and_loaded_without_config(name: str, strength: float) -> None:
    weight, adapter = noise(OUT, COLUMNS), adapter_of(name).at(strength)
    again = load(adapter.state())
    assert again is not None
    delta = adapter.delta(weight)
    assert (again.delta(weight) - delta).norm() < 2e-6 * delta.norm()


def test_constraint_is_saved_as_it_was_read() -> None:
    state = adapter_of("oft constrained").state()
    assert float(state["alpha"]) == pytest.approx(0.01)
    assert torch.equal(state["oft_blocks"], FILES["oft constrained"]["oft_blocks"])


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("kohya")])
def test_lycoris_reads_saved_kohya(name: str) -> None:
    adapter, layer = adapter_of(name), nn.Linear(COLUMNS, OUT)
    state = adapter.state()
    if "oft_blocks" not in state:
        assert name == "kohya qkv and mlp", "whose blocks differ in size"
        return
    with torch.no_grad():
        module = DiagOFTModule.make_module_from_state_dict(
            "", layer, state["oft_blocks"], None, state["alpha"]
        )
        theirs, _ = module.get_diff_weight()
        ours = adapter.delta(layer.weight)
    assert (ours - theirs).norm() < 1e-5 * ours.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(OUT, COLUMNS), (OUT, 8, 2, 2)])
@pytest.mark.parametrize("name", FILES)
def test_settled_bypass(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    adapter, weight = adapter_of(name), noise(*shape)
    op, x = (Op(), noise(3, 7, COLUMNS)) if len(shape) == 2 else (Op(2), noise(2, 8, 5, 5))
    expected = op(x, adapter.at(0.7).delta(weight))
    settled = adapter.settled(weight)
    assert not any(name in settled.tensors for name in TRAINED)
    h = settled.at(0.7).bypass(x.to(dtype), op, weight.to(dtype))
    assert h.dtype == dtype
    error = (h.float() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("rank", [6, 12, 16])
@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
def test_starts_as_lycoris_does(kind: type[Any], rank: int) -> None:
    layer = nn.Conv2d(5, 48, 3)
    config = AdapterConfig("oft" if kind is DiagOFTModule else "boft", rank=rank)
    adapter = ALGORITHMS[config.algorithm].init(layer.weight.shape, config, torch.Generator())
    theirs = kind("", layer, lora_dim=rank).oft_blocks
    assert torch.equal(adapter.tensors["oft_blocks"], theirs)
    assert not adapter.delta(layer.weight).any()


def test_peft_oft_starts_at_the_identity() -> None:
    adapter = ALGORITHMS["oft_peft"].init((8, 6, 2, 2), AdapterConfig(rank=5), torch.Generator())
    assert adapter.rank == 4 and adapter.misfit((8, 6, 2, 2)) is None
    assert not adapter.delta(noise(8, 6, 2, 2)).any()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_cayley_is_a_rotation_at_any_angle(size: float) -> None:
    q = skew(noise(5, 8, 8).double()) * size
    change = cayley(q)
    rotation = change + eye(change)
    assert (rotation @ rotation.mT - eye(q)).abs().max() < 1e-11
    assert torch.allclose(rotation @ (eye(q) - q), eye(q) + q, rtol=1e-9, atol=1e-9 * size)


def test_series_tends_to_the_transform() -> None:
    q = skew(noise(3, 4, 4).double()) * 0.2
    errors = [float((neumann(q, n) - cayley(q)).norm()) for n in (1, 2, 4, 6, 8, 30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "only a rescale": ({"rescale": noise(OUT, 1)}, "Which rotation"),
    "both": ({"oft_blocks": noise(2, 3, 3), "oft_diag": noise(2, 3, 3)}, "Which rotation"),
    "oblong": ({"oft_blocks": noise(2, 3, 4)}, "not square"),
    "five axes": ({"oft_blocks": noise(1, 1, 2, 3, 3)}, "not square"),
    "one matrix": ({"oft_blocks": noise(3, 3)}, "not square"),
    "no blocks": ({"oft_blocks": noise(0, 3, 3)}, "empty"),
    "integers": ({"oft_blocks": torch.ones(2, 3, 3, dtype=torch.int32)}, "no real numbers"),
    "alpha": ({"oft_blocks": noise(2, 3, 3), "alpha": noise(2)}, "alpha is not a number"),
    "too many stages": ({"oft_blocks": noise(4, 4, 2, 2)}, "no butterfly"),
    "odd blocks": ({"oft_blocks": noise(2, 4, 3, 3)}, "no butterfly"),
    "one stage of odd blocks": ({"oft_blocks": noise(1, 4, 3, 3)}, "BOFT blocks have no halves"),
    "a constraint below 0": (
        {"kohya_oft_blocks": noise(2, 4, 4), "alpha": torch.tensor(-0.1)}, "below 0.*-0.1",
    ),
    "a range missing": ({f"kohya_oft_blocks.{i}": noise(1, 2, 2) for i in (0, 2)}, "incomplete"),
    "whole and ranges": (
        {"kohya_oft_blocks": noise(1, 2, 2), "kohya_oft_blocks.0": noise(1, 2, 2)}, "incomplete",
    ),
    "no triangle": ({"oft_R.weight": noise(3, 7)}, "no triangles"),
    "gains alone": ({"boft_s": noise(4, 1)}, "Which rotation"),
    "reflections": ({"hra_u": noise(4)}, "not a matrix"),
    "two strengths": ({"hra_u": noise(4, 2), "hra_strength": noise(2)}, "hra_strength is not a"),
    "strength NaN": (
        {"hra_u": noise(4, 2), "hra_strength": torch.tensor(math.nan)}, "strength is not finite",
    ),
    "strength alone": ({"hra_strength": torch.tensor(0.5)}, "missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str) -> None:
    tensors, words = BROKEN[name]
    with pytest.raises(AdapterLabError, match=words):
        load(tensors)


@pytest.mark.parametrize(
    "config",
    [
        *({"num_cayley_neumann_terms": n} for n in (0, None, 0.5, math.inf, math.nan, True)),
        *({"coft": True, "eps": eps} for eps in ("small", 0, math.inf, None)),
    ],
)
def test_broken_config(config: dict[str, Any]) -> None:
    adapter = load(FILES["oft_peft"])
    assert adapter is not None
    with pytest.raises(AdapterLabError, match="adapter_config.json"):
        adapter.configured(config)


def test_settings_that_are_off_may_be_anything() -> None:
    adapter, weight = load(FILES["oft_peft"]), noise(OUT, COLUMNS)
    assert adapter is not None
    plain = adapter.configured({"coft": False, "eps": 0})
    assert torch.equal(plain.delta(weight), adapter.delta(weight)) and not plain.traits
    exact = {"use_cayley_neumann": False, "num_cayley_neumann_terms": None}
    assert adapter.configured(exact).delta(weight).norm() > 0


@pytest.mark.parametrize("name, rows, rank", [("boft", 43, 8), ("boft", 42, 1), ("oft", 43, 8)])
def test_no_blocks_for_the_layer(name: str, rows: int, rank: int) -> None:
    with pytest.raises(AdapterLabError, match="no blocks"):
        ALGORITHMS[name].init((rows, 8), AdapterConfig(name, rank), torch.Generator())


@pytest.mark.parametrize(
    "rows, rank, stages, block",
    [
        (21504, 16, 10, 14),  # linear1 of FLUX.1, 2^10 * 21: spans of 7168 rows
        (13824, 16, 8, 12),  # 2^9 * 27
        (42, 8, 1, 6),
        (3072, 16, 9, 12), (1280, 16, 8, 10), (4096, 16, 9, 16),  # all rows, as in LyCORIS
    ],
)  # fmt: skip
def test_butterflies_mix_the_widest_spans(rows: int, rank: int, stages: int, block: int) -> None:
    made = ALGORITHMS["boft"].init((rows, 8), AdapterConfig("boft", rank), torch.Generator())
    assert made.tensors["oft_blocks"].shape == (stages, rows // block, block, block)
    size, number = power2factorization(rows, rank)
    assert (size, 1 << stages - 1) == (block, number) or not number


def test_no_blocks_of_one_row() -> None:
    """LyCORIS has 64 blocks of one row there, which never learn."""
    made = ALGORITHMS["oft"].init((64, 8), AdapterConfig("oft", 64), torch.Generator())
    assert made.tensors["oft_blocks"].shape == (8, 8, 8)


def test_butterfly_of_fewer_stages_is_that_of_lycoris() -> None:
    made = ALGORITHMS["boft"].init((84, 5), AdapterConfig("boft", 16), torch.Generator())
    blocks = 0.3 * noise(*made.tensors["oft_blocks"].shape)
    assert blocks.shape == (2, 6, 14, 14) and not power2factorization(84, 16)[1]
    weight = noise(84, 5)
    delta = made.on({"oft_blocks": blocks}).delta(weight)
    theirs = boft_diff_weight(weight, blocks, None, constraint=0, backend="torch")
    assert (delta - theirs).norm() < 1e-5 * theirs.norm()
    # Rows of one span are mixed with each other, and with no others.
    mixed = made.on({"oft_blocks": blocks}).delta(torch.eye(84)) != 0
    assert torch.equal(mixed, torch.block_diag(*torch.ones(3, 28, 28)) != 0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("shape", [(OUT + 2, COLUMNS + 2), (OUT,)])
def test_misfits(name: str, shape: tuple[int, ...]) -> None:
    assert adapter_of(name).misfit(shape)
