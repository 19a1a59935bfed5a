"""Training data: cached latents with their conditioning, and the batches of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterLabError
from .random import permutation


@dataclass(frozen=True)
class TrainItem:
    """One picture or clip with its conditioning.

    Args:
        latent: (c, h, w) or (c, t, h, w), as the VAE gives it, before the model's latent format.
        cond: (tokens, dim) text conditioning, None for models without.
        extra: what else the conditioning holds: tensors without batch axis, numbers, strings.
        mask: (h, w) in [0, 1] at any size, the weight of each place in the loss.
        weight: weight of the item in the loss.
    """

    latent: Tensor
    cond: Tensor | None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    caption: str = ""
    mask: Tensor | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.latent.ndim not in (3, 4) or self.latent.numel() == 0:
            raise AdapterLabError(
                "A latent has an unusable shape",
                found=str(tuple(self.latent.shape)),
                expected="(channels, height, width) or (channels, frames, height, width)",
            )
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise AdapterLabError(
                "A mask is black everywhere, so that nothing would be learned",
                fix="White is what counts. Load Image gives a black mask for a picture without "
                "transparency: invert it, or leave 'mask' empty",
            )
        if not math.isfinite(self.weight):
            raise AdapterLabError("The weight of a training item is no number")
        for name, tensor in tensors({"latent": self.latent, "conditioning": self.cond,
                                     "mask": self.mask, **self.extra}):  # fmt: skip
            if not bool(torch.isfinite(tensor).all()):
                subject = f"'{self.caption}'" if self.caption else "A training item"
                raise AdapterLabError(
                    f"{subject} holds NaN or infinite values",
                    found=f"in its {name}",
                    fix="Encode it again",
                )


def tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in nested dicts and lists."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from tensors(cast(Mapping[str, Any], value))
        elif isinstance(value, (list, tuple)):
            yield from tensors({f"{name}.{i}": v for i, v in enumerate(cast(Sequence[Any], value))})


class TrainDataset:
    """A non-empty list of items with the batches an epoch is made of.

    Attributes:
        buckets: latent shape -> indices of the items that have it.
    """

    def __init__(self, items: Sequence[TrainItem], name: str = "") -> None:
        if not items:
            raise AdapterLabError(
                "The dataset is empty",
                found="0 items",
                expected="at least one latent",
                fix="Encode at least one image",
            )
        self.items, self.name = list(items), name
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(self.items):
            self.buckets.setdefault(tuple(item.latent.shape), []).append(i)

    def __getitem__(self, index: int) -> TrainItem:
        return self.items[index]

    def __iter__(self) -> Iterator[TrainItem]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, number: int, batch_size: int, seed: int) -> list[int]:
        """Items of the ``number``-th batch since the start: a pure function of its arguments.

        Every epoch visits each item once, in shuffled batches of one latent shape. A bucket that
        ``batch_size`` does not divide is cut into batches of nearly equal size, so that no item
        has a step to itself.
        """
        counts = [math.ceil(len(bucket) / batch_size) for bucket in self.buckets.values()]
        epoch, position = divmod(number, sum(counts))
        wanted = permutation(seed, "batches", sum(counts), epoch)[position]
        for i, (bucket, count) in enumerate(zip(self.buckets.values(), counts, strict=True)):
            if wanted < count:
                order = permutation(seed, "items", len(bucket), epoch, i)
                return [bucket[int(j)] for j in np.array_split(order, count)[wanted]]
            wanted -= count
        raise AssertionError("unreachable: wanted is below the sum of the counts")

    def to_text(self) -> str:
        """What is in it, a line per latent shape."""
        captions = {item.caption for item in self.items} - {""}
        masks = sum(item.mask is not None for item in self.items)
        facts = [f"{len(self)} item{'s' * (len(self) > 1)}"]
        facts += [f"{len(captions)} different captions"] if captions else []
        facts += [f"{masks} masks"] if masks else []
        sizes = [
            f"  {len(members)} x latent {' x '.join(map(str, shape))}"
            for shape, members in self.buckets.items()
        ]
        return "\n".join([", ".join(facts), *sizes])
