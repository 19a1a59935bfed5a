"""Adapters of every algorithm as files hold them, for a layer of a given shape."""

from __future__ import annotations

import math

import torch
from adapter_lab.core.adapters import ALGORITHMS
from torch import Tensor

OUT, WIDTH, RANK = 16, 12, 2
_rng = torch.Generator()


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_rng)


def samples(shape: tuple[int, ...], groups: int = 1) -> dict[str, dict[str, Tensor]]:
    """Sample -> its tensors, for a weight of ``shape`` (16, 12 / groups, *k).

    A sample is called after its algorithm, a second one of it with what is special about it after
    a comma.
    """
    _rng.manual_seed(0)
    out, width, *k = shape
    unit, columns = (1,) * len(k), width * math.prod(k)
    found = {
        **_additive(out, width, k, unit),
        **_rotations(out, columns, unit),
        **_on_the_weight(out, width, k, unit),
        "ia3": {"weight": r(1, out, *unit) if k else r(out), "on_input": torch.tensor(0)},
        "ia3, inputs": {"weight": r(1, width * groups, *unit), "on_input": torch.tensor(1)},
        "ia3_peft": {"ia3_l": r(1, out, *unit) if k else r(out, 1)},
        "ia3_peft, inputs": {"ia3_l": r(1, width * groups, *unit)},
    }
    if math.prod(k) == 1:
        found |= _thin(out, width, unit)
    return found


def biases(out: int) -> dict[str, dict[str, Tensor]]:
    """The same for what is made for a bias, (out,), and for norms."""
    bias = [name for name, algorithm in ALGORITHMS.items() if algorithm.parameter == "bias"]
    return {name: {ALGORITHMS[name].suffixes[0]: r(out)} for name in (*bias, "norm")}


def _additive(out: int, width: int, k: list[int], unit: tuple[int, ...]):
    flat = math.prod(k)
    lora = {"lora_up.weight": r(out, RANK, *unit), "lora_down.weight": r(RANK, width, *k)}
    loha = {f"hada_w{i}_a": r(out, RANK) for i in "12"}
    found = {
        "lora": {**lora, "alpha": torch.tensor(3.0)},
        "loha": {**loha, **{f"hada_w{i}_b": r(RANK, width * flat) for i in "12"}},
        "lokr": {
            "lokr_w1": r(4, 3), "lokr_w2_a": r(out // 4, RANK),
            "lokr_w2_b": r(RANK, width // 3 * flat),
        },
        "lokr, full": {"lokr_w1": r(4, 3), "lokr_w2": r(out // 4, width // 3, *k)},
        "full": {"diff": r(out, width, *k)},
        "set": {"set_weight": r(out, width, *k)},
    }  # fmt: skip
    if flat > 1:
        found["lora, tucker"] = {
            "lora_up.weight": r(out, RANK, *unit), "lora_mid.weight": r(RANK, RANK, *k),
            "lora_down.weight": r(RANK, width, *unit),
        }  # fmt: skip
    return found


def _rotations(out: int, columns: int, unit: tuple[int, ...]):
    return {
        "oft": {"oft_blocks": r(out // 4, 4, 4) * 0.3, "alpha": torch.tensor(0.01)},
        "oft, rescaled": {"oft_blocks": r(out // 4, 4, 4) * 0.3, "rescale": 1 + r(out, 1) * 0.3},
        "boft": {"oft_blocks": r(2, out // 4, 4, 4) * 0.3},
        "oft_kohya": {"kohya_oft_blocks": r(out // 4, 4, 4), "alpha": torch.tensor(0.1)},
        "oft_peft": {"oft_R.weight": r(columns // 3, 3) * 0.3},
        "oft_peft, shared": {"oft_R.weight": r(1, 3) * 0.3},
        "boft_peft": {"boft_R": r(1, columns // 3, 3, 3) * 0.3, "boft_s": 1 + r(out, 1) * 0.3},
        "hra": {"hra_u": r(columns, RANK), "hra_strength": torch.tensor(0.7)},
    }


def _on_the_weight(out: int, width: int, k: list[int], unit: tuple[int, ...]):
    third = width // 3
    return {
        "glora": {
            "a1.weight": r(width, RANK, *unit), "a2.weight": r(RANK, width, *unit),
            "b1.weight": r(out, RANK, *unit), "b2.weight": r(RANK, width, *k),
        },
        "glokr": {
            "glokr_a_w1": r(3, 3), "glokr_a_w2": r(third, third),
            "glokr_b_w1": r(4, 3), "glokr_b_w2": r(out // 4, third, *k),
        },
    }  # fmt: skip


def _thin(out: int, width: int, unit: tuple[int, ...]):
    return {
        "tlora": {
            "q_layer.weight": r(RANK, width, *unit), "p_layer.weight": r(out, RANK, *unit),
            "lambda_layer": r(1, RANK),
        },
        "vera": {
            "vera_A": r(RANK, width + 3), "vera_B": r(out + 2, RANK), "vera_lambda_b": r(out),
            "vera_lambda_d": r(RANK),
        },
        "glora_peft": {
            "glora_A.Xd": r(out, RANK), "glora_A.Xu": r(RANK, width), "glora_B.X": r(out, 1),
            "glora_C.X": r(width, 1), "glora_D.X": r(out), "glora_E.X": r(out),
        },
    }  # fmt: skip
