"""Training data: cached latents with their conditioning, and the batches of an epoch."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..streams import raw
from .random import generator, permutation

_END = 1 << 12  # bytes
# Latents of all VAEs are within hundreds; more is a broken VAE, or what float16 can't hold soon.
_LARGEST = 1e4


@dataclass(frozen=True)
class TrainItem:
    """One picture or clip with its conditioning.

    Args:
        latent: (c, h, w) or (c, t, h, w), as the VAE gives it, before the model's latent format.
        cond: (tokens, dim) text conditioning, None for models without.
        extra: what else the conditioning holds: tensors without batch axis, numbers, strings.
        mask: (h, w) in [0, 1] at any size, the weight of each place in the loss.
        weight: weight of the item in the loss.
        variants: the same picture otherwise: under other captions, flipped. Each has the item's
            latent shape, and no variants itself.
        repeats: how often an epoch visits it.
        regularisation: shows the class in general, not the subject (DreamBooth's prior).
        share: how often it is drawn, relative to the other variants.
    """

    latent: Tensor
    cond: Tensor | None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    caption: str = ""
    mask: Tensor | None = None
    weight: float = 1.0
    variants: tuple[TrainItem, ...] = ()
    repeats: int = 1
    regularisation: bool = False
    share: float = 1.0

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
        _require_variants(self)
        subject = f"'{self.caption}'" if self.caption else "A training item"
        for name, tensor in tensors({"latent": self.latent, "conditioning": self.cond,
                                     "mask": self.mask, **self.extra}):  # fmt: skip
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterLabError(
                    f"{subject} holds NaN or infinite values",
                    found=f"in its {name}",
                    fix="Encode it again",
                )
        require_plausible(self.latent, subject)


def require_plausible(latent: Tensor, subject: str) -> None:
    """Refuse a finite latent that no sound VAE gives."""
    largest = float(latent.abs().max())
    if largest > _LARGEST:
        raise AdapterLabError(
            f"{subject} holds absurd values",
            found=f"{largest:.3g} in its latent",
            expected=f"at most {_LARGEST:g}",
            fix="Encode it again with the VAE of the model, with --fp32-vae if that overflows",
        )


def _require_variants(item: TrainItem) -> None:
    forms = (item, *item.variants)
    if item.repeats < 1 or not all(0 <= f.share < math.inf for f in forms):
        raise AdapterLabError(
            "A training item has impossible counts",
            found=f"repeats {item.repeats}, shares {[f.share for f in forms]}",
            expected="at least one repeat, finite shares of at least 0",
        )
    shapes = {tuple(f.latent.shape) for f in forms}
    if len(shapes) > 1 or any(f.variants for f in item.variants):
        raise AdapterLabError(
            "The variants of a training item do not belong together",
            found=f"latents {' and '.join(map(str, sorted(shapes)))}",
            expected="one shape, and no variants of variants",
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
        buckets: latent shape -> indices of the items that have it, each as often as it repeats.
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
        self._epoch, self._orders = (0, 0), dict[tuple[str | int, ...], list[int]]()
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(self.items):
            self.buckets.setdefault(tuple(item.latent.shape), []).extend([i] * item.repeats)

    def __getitem__(self, index: int) -> TrainItem:
        return self.items[index]

    def __iter__(self) -> Iterator[TrainItem]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, batch_size: int) -> list[int]:
        """Number of batches of an epoch, for each bucket."""
        return [math.ceil(len(bucket) / batch_size) for bucket in self.buckets.values()]

    def batch(self, number: int, batch_size: int, seed: int) -> list[int]:
        """Items of the ``number``-th batch since the start: a pure function of its arguments.

        Every epoch visits each item as often as it repeats, in shuffled batches of one latent
        shape. A bucket that ``batch_size`` does not divide is cut into batches of nearly equal
        size, so that no item has a step to itself.
        """
        counts = self.batches(batch_size)
        epoch, position = divmod(number, sum(counts))
        wanted = self._order(seed, "batches", sum(counts), epoch)[position]
        for i, (bucket, count) in enumerate(zip(self.buckets.values(), counts, strict=True)):
            if wanted < count:
                order = self._order(seed, "items", len(bucket), epoch, i)
                size, larger = divmod(len(bucket), count)  # the first ``larger`` hold one more
                first = wanted * size + min(wanted, larger)
                return [bucket[j] for j in order[first : first + size + (wanted < larger)]]
            wanted -= count
        raise AssertionError("unreachable: wanted is below the sum of the counts")

    def _order(self, seed: int, purpose: str, length: int, epoch: int, *numbers: int) -> list[int]:
        """The permutation, kept for its epoch: a step costs the same with however many items."""
        if self._epoch != (seed, epoch):
            self._epoch, self._orders = (seed, epoch), {}
        key = (purpose, length, *numbers)
        if key not in self._orders:
            self._orders[key] = permutation(seed, purpose, length, epoch, *numbers)
        return self._orders[key]

    def draw(self, number: int, batch_size: int, seed: int) -> list[TrainItem]:
        """The ``number``-th batch with one variant of each of its items, by their shares.

        A pure function of its arguments; all latents have one shape.
        """
        rng = generator(seed, "variants", number)
        items = [self.items[i] for i in self.batch(number, batch_size, seed)]
        return [_variant(item, rng) for item in items]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a caption, a number or a value of a tensor does, on whatever machine."""
        digest, known = hashlib.sha256(), dict[int, str]()
        for item in self.items:
            for form in (item, *item.variants):
                # Variants are described by themselves.
                content = {k: v for k, v in vars(form).items() if k != "variants"}
                digest.update(repr(_described(content, known)).encode())
        return digest.hexdigest()[:16]

    def to_text(self) -> str:
        """What is in it, a line per latent shape."""
        captions = {item.caption for item in self.items} - {""}
        facts = [f"{len(self)} item{'s' * (len(self) > 1)}"]
        counts = {
            "regularisation item": sum(item.regularisation for item in self.items),
            "visit an epoch": sum(item.repeats for item in self.items),
            "different caption": len(captions) if len(self) > 1 else 0,
            "variant": sum(len(item.variants) for item in self.items),
            "mask": sum(item.mask is not None for item in self.items),
        }
        if counts["visit an epoch"] == len(self):
            del counts["visit an epoch"]
        for what, count in counts.items():
            noun, *rest = what.split(" an ")
            facts += [" an ".join((f"{count} {noun}{'s' * (count > 1)}", *rest))] * bool(count)
        sizes = [
            f"  {len(set(members))} x latent {' x '.join(map(str, shape))}"
            for shape, members in self.buckets.items()
        ]
        return "\n".join([", ".join(facts), *sizes])


def _variant(item: TrainItem, rng: torch.Generator) -> TrainItem:
    forms = (item, *item.variants)
    shares = torch.tensor([form.share for form in forms], dtype=torch.float64)
    if len(forms) == 1 or float(shares.sum()) == 0:
        return item
    return forms[int(torch.multinomial(shares, 1, generator=rng))]


def _described(value: Any, known: dict[int, str]) -> Any:
    """``value`` with a digest in place of each tensor; shared tensors are read once."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = f"{value.dtype} {tuple(value.shape)} {checksum(value)}"
        return known[id(value)]
    if isinstance(value, Mapping):
        pairs = cast(Mapping[str, Any], value).items()
        return sorted((k, _described(v, known)) for k, v in pairs)
    if isinstance(value, (list, tuple)):
        return [_described(v, known) for v in cast(Sequence[Any], value)]
    return value


def checksum(tensor: Tensor) -> int:
    """Of all bytes of a CPU tensor, at the speed of memory: their sum as 64-bit numbers, with a
    proper checksum of its ends, since a sum does not see an exchange of two places."""
    data = raw(tensor.detach().cpu().contiguous())
    words = np.frombuffer(data, np.uint64, len(data) // 8)
    ends = bytes(data[:_END]) + bytes(data[-_END:])
    return (int(words.sum(dtype=np.uint64)) << 32) + zlib.crc32(ends)
