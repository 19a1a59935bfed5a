"""How much an adapter changes each block of a model: the Frobenius norm of dW."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..adapters import Algorithm, Ordered
from ..adapters.vera import VeRA
from ..archs import ArchSpec
from ..tensors import wide
from .resolve import Entry

_ANY_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")
_NUMBER = re.compile(r"(\d+)")


def block_norms(
    entries: Iterable[Entry], spec: ArchSpec | None, weights: Mapping[str, Tensor] | None = None
) -> list[tuple[str, float]]:
    """(block, sqrt of the sum of ||dW||^2 over its modules), in the order of the model.

    Memory stays at one dense matrix. Modules whose delta depends on W count only with
    ``weights``, name in the index -> tensor.
    """
    squares: dict[str, float] = {}
    for entry in entries:
        weight = weights.get(entry.key) if weights else None
        if weight is not None and entry.slice:
            weight = weight.narrow(*entry.slice)
        norm = delta_norm(entry.algorithm, weight)
        if norm is not None:
            block = _block(entry, spec)
            squares[block] = squares.get(block, 0.0) + norm**2
    order = {block: _order(block, spec) for block in squares}
    return [(block, math.sqrt(squares[block])) for block in sorted(squares, key=order.__getitem__)]


def delta_norm(algorithm: Algorithm, weight: Tensor | None = None) -> float | None:
    """||dW||_F, exact but for float32; None where it depends on W and that is not given, be it
    only on its width (VeRA).

    Of a LoRA from r x r products alone: ||B A||^2 = sum((B^T B) o (A A^T)); of a Kronecker product
    the product of the norms.
    """
    if isinstance(algorithm, Ordered) and not algorithm.reads_weight:
        algorithm = algorithm.inner  # rows in another order have the same norm
    names = set(algorithm.tensors)
    with torch.no_grad():
        if names == {"lora_up.weight", "lora_down.weight"}:
            up, down = (algorithm.tensors[f"lora_{x}.weight"].flatten(1) for x in ("up", "down"))
            up, down = wide(up, up), wide(down, up)
            square = float(((up.T @ up) * (down @ down.T)).sum())
            return abs(algorithm.scale) * math.sqrt(max(square, 0.0))
        if names == {"lokr_w1", "lokr_w2"}:
            first, second = (_norm(wide(t, t)) for t in algorithm.tensors.values())
            return abs(algorithm.scale) * first * second
        if weight is None and needs_weight(algorithm):
            return None
        if weight is None:
            # Only its shape counts: no memory for its values.
            weight = torch.zeros(1).expand(algorithm.shape)
        return _norm(algorithm.delta(wide(weight, weight)))


def needs_weight(algorithm: Algorithm) -> bool:
    """Whether its norm takes the weight to know."""
    inner = algorithm.inner if isinstance(algorithm, Ordered) else algorithm
    return inner.reads_weight or isinstance(inner, VeRA)


def _norm(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.square().sum()))


def _block(entry: Entry, spec: ArchSpec | None) -> str:
    if entry.part != "model":
        found = _ANY_BLOCK.match(entry.path)
        return f"{entry.part}.{found[0] if found else entry.path.partition('.')[0]}"
    for pattern in spec.blocks if spec else ():
        found = re.match(rf"(?:{pattern})(?=\.|$)", entry.path)
        if found:
            return found[0]
    found = None if spec else _ANY_BLOCK.match(entry.path)
    return found[0] if found else entry.path.partition(".")[0]


def _order(block: str, spec: ArchSpec | None) -> tuple[int, list[tuple[int, str]]]:
    """Layers outside the blocks first, then the kinds of blocks as the architecture has them."""
    kinds = spec.blocks if spec else ()
    kind = next((n for n, pattern in enumerate(kinds) if re.fullmatch(pattern, block)), -1)
    pieces = _NUMBER.split(block)
    return kind, [(int(p), "") if n % 2 else (0, p) for n, p in enumerate(pieces)]
