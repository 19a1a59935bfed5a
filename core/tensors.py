"""Pure tensor functions shared by the algorithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_linalg: Any = torch.linalg  # has no types
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Elements of a block of rows: three of them stay in a core's cache, or one keeps a GPU busy.
_CPU_BLOCK, _GPU_BLOCK = 3 << 15, 1 << 24
_PIECE = 1 << 18  # numbers that are summed at once
_SHORT = 16  # elements of a row that cost less than coming to it


@dataclass(frozen=True)
class Op:
    """A linear layer (``dims`` 0) or convolution (``dims`` 1-3) without its weight and bias."""

    dims: int = 0
    stride: tuple[int, ...] | int = 1
    padding: tuple[int, ...] | str | int = 0
    dilation: tuple[int, ...] | int = 1
    groups: int = 1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """``weight``: (out, in) or (out, in / groups, *k)."""
        if self.dims == 0:
            return F.linear(x, weight)
        conv = _CONV[self.dims]
        return conv(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def wide(factor: Tensor, like: Tensor) -> Tensor:
    """``factor`` on the device of ``like``, in float64 beside float64 and else in float32.

    All factors of a module meet in one dtype so, whatever dtypes a file has them in.
    """
    return factor.to(like.device, wide_dtype(like))


def wide_dtype(like: Tensor) -> torch.dtype:
    """What to compute in beside ``like``."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """``factor`` times ``tensor`` in its own dtype, rounded once; itself for a factor of 1."""
    return tensor if factor == 1 else (wide(tensor, tensor) * factor).to(tensor.dtype)


def factorization(n: int, factor: int = -1) -> tuple[int, int]:
    """The pair (m, n / m), m <= n / m, into which LoKr splits a dimension.

    A ``factor`` > 0 that divides n is one of the pair. One that does not is an upper limit for
    m, and a negative one is no limit: m is then the largest divisor of n within it such that
    m <= sqrt(n).

    Reference: LyCORIS, ``factorization``; 128 -> (8, 16), 512 by 7 -> (4, 128), 127 -> (1, 127).
    """
    if factor > 0 and n % factor == 0:
        return min(factor, n // factor), max(factor, n // factor)
    limit = math.isqrt(n) if factor < 0 else min(factor, math.isqrt(n))
    m = next((m for m in range(limit, 1, -1) if n % m == 0), 1)
    return m, n // m


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """W1 (x) W2 where the kernel belongs to W2: D[i c + k, j d + l, *] = w1[i, j] w2[k, l, *].

    Args:
        w1: (a, b). w2: (c, d, *k).

    Returns:
        (a c, b d, *k). Autograd keeps the factors only.
    """
    (a, b), (c, d, *k) = w1.shape, w2.shape
    blocks = w1[:, None, :, None] * w2.reshape(c, -1)[None, :, None, :]
    return blocks.reshape(a * c, b * d, *k)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Contract a Tucker core with its mode factors: D[o, i, *] = sum a[o, p] core[p, q, *] b[q, i].

    Args:
        core: (p, q, *k). a: (out, p). b: (q, in).

    Returns:
        (out, in, *k)
    """
    narrow = inner(core, b)
    return (a @ narrow.flatten(1)).reshape(len(a), *narrow.shape[1:])


def inner(core: Tensor, b: Tensor) -> Tensor:
    """The input half of :func:`tucker`: sum_q core[p, q, *] b[q, i], (p, in, *k)."""
    return torch.einsum("pq...,qi->pi...", core, b)


def khatri_rao(a: Tensor, c: Tensor) -> Tensor:
    """Row-wise Kronecker product, (n, r) and (n, s) -> (n, r s).

    (A B) o (C D) = khatri_rao(A, C) khatri_rao(B^T, D^T)^T: a Hadamard product of two low-rank
    matrices is one matrix of rank r s.
    """
    return (a[:, :, None] * c[:, None, :]).flatten(1)


class _Hadamard(torch.autograd.Function):
    """Backward rebuilds A B and C D: autograd would keep both of them, dense, for every layer."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, c, d)
        return (a @ b).mul_(c @ d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = ctx.saved_tensors
        left, right = grads[0] * (c @ d), grads[0] * (a @ b)
        return left @ b.T, a.T @ left, right @ d.T, c.T @ right


def hadamard(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(A B) o (C D), keeping only the factors for the backward pass.

    Args:
        a: (out, r). b: (r, in). c: (out, s). d: (s, in).
    """
    return _Hadamard.apply(a, b, c, d)


def length(values: Tensor) -> float:
    """||values||, summed in float64, a piece at a time: torch copies all that it sums wider."""
    pieces = torch.split(values.reshape(-1), _PIECE)
    return math.hypot(*(float(_linalg.vector_norm(p, dtype=torch.float64)) for p in pieces))


def rows_of(weight: Tensor) -> Tensor | None:
    """``weight`` (out, in, *k) as (out, in * prod(k)) in the same memory; None where that has no
    such view (channels last)."""
    return weight.flatten(1) if weight.ndim > 1 and weight[:1].is_contiguous() else None


@torch.no_grad()
def add_kron(rows: Tensor, w1: Tensor, w2: Tensor) -> None:
    """``rows`` += w1 (x) w2 in place, from memory for a row of blocks and a column of them at most.

    Args:
        rows: (a c, b d). w1: (a, b). w2: (c, d).
    """
    (a, b), (c, d) = w1.shape, w2.shape
    w1, w2 = w1.to(rows), w2.to(rows)
    if d < _SHORT:
        first, second = w1.repeat_interleave(d, 1), w2.repeat(1, b)
        rows.view(a, c, b * d).addcmul_(first[:, None], second)
    else:
        rows.view(a, c, b, d).addcmul_(w1[:, None, :, None], w2[:, None])


@torch.no_grad()
def add_hadamard(rows: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """``rows`` += (A B) o (C D) in place, a block of rows at a time so that both products stay in
    the cache.

    Args:
        rows: (out, in). a, c: (out, r). b, d: (r, in).
    """
    cpu = rows.device.type == "cpu"
    block = _CPU_BLOCK * torch.get_num_threads() if cpu else _GPU_BLOCK
    height = min(len(rows), max(16, block // rows.shape[1] // 16 * 16))
    left, right = torch.stack((a, c)).to(rows), torch.stack((b, d)).to(rows)
    products = rows.new_empty(2, height, rows.shape[1])
    for part, thin in zip(torch.split(rows, height), torch.split(left, height, 1), strict=True):
        if len(part) < height:
            products = products[:, : len(part)]
        torch.bmm(thin, right, out=products)
        part.addcmul_(products[0], products[1])


def low_rank(x: Tensor, op: Op, up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    """op(x, up down), or with a core op(x, tucker(core, up, down)), without the dense product.

    The narrow factor sees the kernel, stride, padding and dilation, the wide one is 1 x 1. Each
    group of the layer meets the same ``down``, so the groups go through it as a batch.

    Args:
        x: (..., in) or (b, in, *spatial).
        up: (out, r). down: (r, in / groups, *k); with a core (r, in / groups).
        core: (r, r, *k)
    """
    if op.dims == 0:
        h = F.linear(x, down)
        return F.linear(h if core is None else F.linear(h, core), up)
    point = Op(op.dims)
    h = x.reshape(len(x) * op.groups, -1, *x.shape[2:])
    if core is not None:
        h, down = point(h, unit_axes(down, op.dims)), core
    h = replace(op, groups=1)(h, down)
    h = h.reshape(len(x), -1, *h.shape[2:])
    return replace(point, groups=op.groups)(h, unit_axes(up, op.dims))


def unit_axes(matrix: Tensor, dims: int) -> Tensor:
    """(n, m) -> (n, m, 1, ...), the weight of a 1 x 1 convolution of ``dims`` axes."""
    return matrix.reshape(*matrix.shape, *(1,) * dims)


def kaiming_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """U(-b, b) with b = 1 / sqrt(fan_in), which is kaiming_uniform(a = sqrt 5), float32.

    Reference: He et al. 2015, section 2.2, with the leak that torch's own layers use.
    """
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return _empty(shape, generator).uniform_(-bound, bound, generator=generator)


def normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    """N(0, std^2), float32."""
    return _empty(shape, generator).normal_(0, std, generator=generator)


def _empty(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.empty(*shape, device=generator.device, dtype=torch.float32)
