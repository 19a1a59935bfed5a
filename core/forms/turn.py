"""Rotations of what a layer gives: y' = y + (M - I)(y - bias)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..orthogonal import Blocks, Butterfly, eye
from .layer import owned

KEPT = 3  # copies of y that a butterfly keeps for the backward pass


def turned(
    y: Tensor, bias: Tensor | None, change: Tensor, turn: Callable[[Tensor], Blocks | Butterfly]
) -> Tensor:
    """M (y - bias) + bias along the last axis, differentiable.

    Of block-diagonal rotations y is kept for the backward pass, of a butterfly three times as much.

    Args:
        y: (..., out). bias: (out,), which is not turned.
        change: what M is made of, E_i = R_i - I, float32 or float64; bitwise y where it is zero.
        turn: M from ``change``; not part of what is kept, so it is run once more.
    """
    matrix = turn(change.detach())
    through = _Butterfly if isinstance(matrix, Butterfly) else _Blocks
    return through.apply(y, bias, change, turn, matrix)


def _graded(
    change: Tensor, turn: Callable[[Tensor], Blocks | Butterfly], grads: list[Tensor]
) -> Tensor:
    """The gradient of ``change`` from those of the matrices of M."""
    with torch.enable_grad():
        leaf = change.detach().requires_grad_()
        matrices = _matrices(turn(leaf))
    pairs = [(m, g.to(m.dtype)) for m, g in zip(matrices, grads, strict=True)]
    return torch.autograd.grad([m for m, _ in pairs], leaf, [g for _, g in pairs])[0]


def _matrices(turn: Blocks | Butterfly) -> list[Tensor]:
    if isinstance(turn, Blocks):
        return list(turn.parts)
    return [matrices for _, matrices in turn.products]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, bias: Tensor | None, change: Tensor,
        turn: Callable[[Tensor], Blocks], matrix: Blocks,
    ) -> Tensor:  # fmt: skip
        ctx.turn = turn
        bare = y if bias is None else y - bias
        ctx.save_for_backward(bare, change)
        if bias is None and y.dtype == change.dtype:
            return _rotated(matrix, bare, back=False)
        result = y.clone(memory_format=torch.contiguous_format)
        for e, rows, out in _ranges(matrix, bare, result):
            out.add_(torch.bmm(rows, e.mT))
        return result

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        bare, change = ctx.saved_tensors
        g, turn = outer[0].contiguous(), ctx.turn(change)
        gy = _rotated(turn, g, back=True) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return gy, None, None, None, None
        grads = [back.mT @ rows for _, rows, back in _ranges(turn, bare, g)]
        return gy, None, _graded(change, ctx.turn, grads), None, None


def _rotated(turn: Blocks, x: Tensor, *, back: bool) -> Tensor:
    """M x, or M^T x, of x (..., out)."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    for e, rows, out in _ranges(turn, x, result):
        matrices = e + eye(e)
        torch.bmm(rows, matrices if back else matrices.mT, out=out)
    return result


def _ranges(turn: Blocks, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(E, its range of x, and of y) as (blocks, tokens, b), views where they are contiguous."""
    sizes = [len(e) * e.shape[-1] for e in turn.parts]
    pairs = (torch.split(t.reshape(-1, t.shape[-1]), sizes, 1) for t in (x, y))
    return [
        (e.to(x.dtype), _units(a, e), _units(b, e))
        for e, a, b in zip(turn.parts, *pairs, strict=True)
    ]


def _units(rows: Tensor, e: Tensor) -> Tensor:
    return rows.view(-1, *e.shape[:2]).transpose(0, 1)


class _Butterfly(torch.autograd.Function):
    """Butterflies mix at growing distances: each product reads its own order of the channels."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, bias: Tensor | None, change: Tensor,
        turn: Callable[[Tensor], Butterfly], matrix: Butterfly,
    ) -> Tensor:  # fmt: skip
        ctx.turn, ctx.shape = turn, y.shape
        wide = y.reshape(-1, y.shape[-1]).to(change.dtype)
        bare = wide if bias is None else wide - bias
        # What each product reads is kept or, if they are many, of every second or third of them;
        # in a wider type than y only what the first one does.
        count = len(matrix.products)
        ctx.every = -(-count // KEPT) if y.dtype == change.dtype else count
        units, kept = _split(matrix, bare), list[Tensor]()
        for start in range(0, count, ctx.every):
            units, seen = _through(matrix, range(start, min(count, start + ctx.every)), units)
            kept.append(seen[0])
        kept[0] = bare.to(y.dtype)
        ctx.save_for_backward(change, *kept)
        result = _joined(units)
        if bias is not None or y.dtype != change.dtype:
            result = wide + (result - bare)
        return owned(result.to(y.dtype).view(y.shape))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        change, bare, *kept = ctx.saved_tensors
        matrix: Butterfly = ctx.turn(change)
        units = _split(matrix, outer[0].reshape(-1, ctx.shape[-1]).to(change.dtype))
        count, grads = len(matrix.products), list[Tensor]()
        first = _read(matrix, 0, _split(matrix, bare.to(change.dtype)))
        starts = range(0, count, ctx.every)
        for start, rows in reversed([*zip(starts, (first, *kept), strict=True)]):
            stages = range(start, min(count, start + ctx.every))
            for i, seen in reversed([*zip(stages, _again(matrix, stages, rows), strict=True)]):
                axis, matrices = matrix.products[i]
                back = _read(matrix, i, units)
                grads.append(back.mT @ seen)
                units = _given(torch.bmm(back, matrices), axis, units)
        gy = _joined(units).to(outer[0].dtype).view(ctx.shape)
        wants = ctx.needs_input_grad[2]
        return gy, None, _graded(change, ctx.turn, grads[::-1]) if wants else None, None, None


def _through(turn: Butterfly, stages: range, units: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``units`` after the products ``stages``, and what each of them reads."""
    seen: list[Tensor] = []
    for i in stages:
        axis, matrices = turn.products[i]
        seen.append(_read(turn, i, units))
        units = _given(torch.bmm(seen[-1], matrices.mT), axis, units)
    return units, seen


def _read(turn: Butterfly, i: int, units: Tensor) -> Tensor:
    """``units`` as product i takes them, (n, tokens, rows that it mixes)."""
    axis, matrices = turn.products[i]
    return units.movedim(axis, -2).reshape(len(matrices), units.shape[-2], -1)


def _given(rows: Tensor, axis: int, like: Tensor) -> Tensor:
    """Back from :func:`_read`."""
    return rows.view(like.movedim(axis, -2).shape).movedim(-2, axis)


def _again(turn: Butterfly, stages: range, rows: Tensor) -> list[Tensor]:
    """What the products ``stages`` read, from what the first of them does."""
    if len(stages) == 1:
        return [rows]
    axis, matrices = turn.products[stages[0]]
    shape = (*turn.split[:-1], rows.shape[1], turn.split[-1])
    like = rows.new_empty(1).expand(shape)
    units = _given(torch.bmm(rows, matrices.mT), axis, like)
    return [rows, *_through(turn, stages[1:], units)[1]]


def _split(turn: Butterfly, x: Tensor) -> Tensor:
    """(tokens, out) -> (spans, r_p, .., r_1, tokens, h)"""
    return x.view(-1, *turn.split).movedim(0, -2)


def _joined(units: Tensor) -> Tensor:
    return units.movedim(-2, 0).flatten(1)
