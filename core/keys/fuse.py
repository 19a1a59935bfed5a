"""Modules of a fused weight and of its row ranges, into one another and exactly.

Functions on the tensors of one module, canonical suffix -> tensor, ``alpha`` included where the
file has it. What can't be said exactly is None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Tensors
from ..tensors import wide

# The axis of each factor that runs over the output rows; of a LoHa with cores it is the other.
_ROWS = dict.fromkeys(
    ("lora_up.weight", "lora_up.bias", "hada_w1_a", "hada_w2_a", "diff", "diff_b", "set_weight",
     "w_norm", "b_norm", "dora_scale", "magnitude"), 0,
)  # fmt: skip
# The factors that all rows have in common.
_COMMON = (
    "lora_down.weight", "lora_mid.weight", "hada_w1_b", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "scalar",
)  # fmt: skip
_KRON = ("lokr_w1", "lokr_w1_a")  # rows of the outer factor
_DENSE = {"diff", "diff_b", "lora_up.bias"}  # no change is a zero there
_MAGNITUDES = {"dora_scale", "magnitude"}
# Of each product of two: the factor over the rows, the other.
_PAIRS = (
    ("lora_up.weight", "lora_down.weight"), ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
)  # fmt: skip


def take(tensors: Tensors, rows: Tensor) -> dict[str, Tensor] | None:
    """The module that has only ``rows`` of the outputs, in that order: dW' = dW[rows].

    LoRA, LoHa, whole differences and biases by their own rows, DoRA over the outputs as well;
    LoKr where the rows come in whole runs of its inner factor.
    """
    taken = dict(tensors)
    last = int(rows.max())
    for name, tensor in tensors.items():
        axis = int(name in ("hada_w1_a", "hada_w2_a") and "hada_t1" in tensors)
        picked: Tensor | None = rows
        if name in _KRON:
            picked = _runs(rows, _inner_rows(tensors))
        elif name in _COMMON:
            continue
        elif name not in _ROWS or tensor.ndim <= axis or tensor.shape[axis] <= last:
            return None  # of another algorithm, or of DoRA over the inputs
        if picked is None:
            return None
        taken[name] = tensor.index_select(axis, picked.to(tensor.device))
    return taken


def join(pieces: Sequence[tuple[Tensors | None, int]]) -> dict[str, Tensor] | None:
    """The module whose output rows are those of ``pieces`` one after the other.

    Args:
        pieces: tensors and number of rows of each; None for rows that stay as they are.

    LoRA and LoHa of ranks r_i become one of rank sum r_i whose factor over the rows is
    block-diagonal, or keep their rank where they share the other factor; so do LoKr that share all
    but the rows of their outer factor. The scale stays.
    """
    given = [tensors for tensors, _ in pieces if tensors]
    names = set(given[0]) - {"alpha"}
    if any(set(tensors) - {"alpha"} != names for tensors in given):
        return None
    if len(given) < len(pieces) and names & _MAGNITUDES:
        return None
    if names <= _DENSE:
        return {name: _stacked(name, pieces, given[0]) for name in sorted(names)}
    if all(_alike(given[0], tensors) for tensors in given):
        return _joined_rows(pieces, given[0])
    if names <= {*sum(_PAIRS, ()), *_DENSE, *_MAGNITUDES} and names & set(sum(_PAIRS, ())):
        return _joined_ranks(pieces, given)
    return None


def _joined_rows(
    pieces: Sequence[tuple[Tensors | None, int]], like: Tensors
) -> dict[str, Tensor] | None:
    joined = dict(like)
    for name in like:
        if name in _KRON:
            inner = _inner_rows(like)
            if any(rows % inner for _, rows in pieces):
                return None
            runs = [(tensors, rows // inner) for tensors, rows in pieces]
            joined[name] = _stacked(name, runs, like)
        elif name in _ROWS:
            joined[name] = _stacked(name, pieces, like)
        elif name not in _COMMON:
            return None
    return joined


def _joined_ranks(
    pieces: Sequence[tuple[Tensors | None, int]], given: Sequence[Tensors]
) -> dict[str, Tensor] | None:
    pairs = [pair for pair in _PAIRS if pair[0] in given[0]]
    rest = {tuple(t[other].shape[1:]) for t in given for _, other in pairs}
    if len(rest) > 1 or any(t[first].flatten(1).shape[1] != len(t[other])
                            for t in given for first, other in pairs):  # fmt: skip
        return None
    scales = [_scale(tensors, pairs[0][1]) for tensors in given]
    scale = max(scales, key=abs)
    joined: dict[str, Tensor] = {}
    for n, (first, other) in enumerate(pairs):
        joined[other] = torch.cat([tensors[other] for tensors in given])
        ratios = [s / scale if scale and not n else 1.0 for s in scales]
        joined[first] = _block_diagonal(
            [(t[first] if t else None, rows) for t, rows in pieces], ratios
        )
    for name in set(given[0]) & (_DENSE | _MAGNITUDES):
        if name == "lora_up.bias" and len(set(scales)) > 1:
            return None
        joined[name] = _stacked(name, pieces, given[0])
    return {**joined, "alpha": torch.tensor(scale * len(joined[pairs[0][1]]))}


def _block_diagonal(blocks: Sequence[tuple[Tensor | None, int]], ratios: list[float]) -> Tensor:
    """``blocks``: (rows, r_i, 1, ..) and rows, None: without a column; the i-th times ratio i."""
    given = [block for block, _ in blocks if block is not None]
    unit = given[0].shape[2:]
    joined = given[0].new_zeros(sum(n for _, n in blocks), sum(b.shape[1] for b in given), *unit)
    row = column = 0
    factors = iter(ratios)
    for block, rows in blocks:
        if block is not None:
            ratio, width = next(factors), block.shape[1]
            scaled = block if ratio == 1 else wide(block, block) * ratio
            joined[row : row + rows, column : column + width] = scaled
            column += width
        row += rows
    return joined


def _stacked(name: str, pieces: Sequence[tuple[Tensors | None, int]], like: Tensors) -> Tensor:
    axis = int(name in ("hada_w1_a", "hada_w2_a") and "hada_t1" in like)
    shape = list(like[name].shape)
    parts: list[Tensor] = []
    for tensors, rows in pieces:
        shape[axis] = rows
        parts.append(like[name].new_zeros(shape) if tensors is None else tensors[name])
    return torch.cat(parts, axis)


def _alike(one: Tensors, two: Tensors) -> bool:
    """Whether both have the same factors but for those over the rows, and the same scale."""
    same = [name for name in {*one, *two} if name not in _ROWS and name not in _KRON]
    return all(n in one and n in two and _equal(one[n], two[n]) for n in same)


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return one.is_meta or two.is_meta or torch.equal(one, two)  # of a plan, what may be


def _scale(tensors: Tensors, down: str) -> float:
    alpha = tensors.get("alpha")
    return 1.0 if alpha is None else float(alpha.item()) / len(tensors[down])


def _inner_rows(tensors: Tensors) -> int:
    """Rows of LoKr's inner factor."""
    if "lokr_w2" in tensors:
        return len(tensors["lokr_w2"])
    return tensors["lokr_w2_a"].shape[int("lokr_t2" in tensors)]


def _runs(rows: Tensor, length: int) -> Tensor | None:
    """Numbers of the runs of ``length`` rows that ``rows`` is made of; None where it is not."""
    if len(rows) % length:
        return None
    table = rows.reshape(-1, length)
    runs = table[:, 0] // length
    whole = torch.equal(table, runs[:, None] * length + torch.arange(length))
    return runs if whole else None
