"""The residual of a network, of its block stack or as a whole, caught and put back.

Both ways work on the arguments and the result of a call alone: no forward is copied, nothing stays
on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.cache.trace import Parts

Streams = Tensor | Sequence[Tensor]
Call = Callable[[dict[str, Any]], Any]  # of the network, with the transformer options given
Caught = tuple[Any, Parts | None]
BLOCKS, NETWORK = "blocks", "network"
LEVELS = ("auto", BLOCKS, NETWORK)
_KINDS = ("double_block", "single_block")  # what models call their blocks


def parts(streams: Streams) -> Parts:
    """One tensor, or those of a model with several streams (video and audio)."""
    return (streams,) if isinstance(streams, Tensor) else tuple(streams)


def _like(streams: Streams, made: Parts) -> Streams:
    if isinstance(streams, Tensor):
        return made[0]
    return list(made) if isinstance(streams, list) else made


class OtherBlocks(Exception):
    """The model's blocks are not called as those of other models are (Kandinsky 5 is one)."""


class Blocks(dict[Any, Any]):
    """Stands for every ``patches_replace["dit"]`` that the model may ask for.

    A model asks block by block; the blocks are learned from that. Others' replacements are called
    in their turn. What models add between their blocks (control, VACE, block patches) is part of
    the residual, for the last block alone puts it back; what they add after it, they always add.

    Args:
        others: the replacements that are there.
        last: the block after which the stack ends; None while that is unknown.
        fill: the residual to put back in place of the blocks; None: they are computed.

    Attributes:
        seen: the last block that was called, None before the first.
        residual: of the stack, None where it was not computed or has another shape than its input.
    """

    def __init__(self, others: dict[Any, Any], last: Any = None, fill: Parts | None = None) -> None:
        super().__init__(others)
        self.others, self.last, self.fill = others, last, fill
        self.seen: Any = None
        self.start: Parts = ()
        self.residual: Parts | None = None
        self.hidden = False

    def __contains__(self, key: object) -> bool:
        if self.hidden or not isinstance(key, tuple):
            return key in self.others
        return key[0] in _KINDS or key in self.others

    def __bool__(self) -> bool:
        """A model that asks whether anything is replaced works otherwise if so: let it be."""
        self.hidden = True
        return bool(self.others)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - get is what this makes

    def __getitem__(self, key: Any) -> Any:
        if self.hidden or key[0] not in _KINDS:
            return self.others[key]
        return lambda args, extra: self._block(key, args, extra)

    def _block(self, key: Any, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        if "img" not in args:
            raise OtherBlocks(key)
        first, self.seen = self.seen is None, key
        if first:
            self._begin(parts(args["img"]))
        if self.fill is not None:
            made = {name: args[name] for name in ("img", "txt") if name in args}
            if key == self.last:
                made["img"] = self._ended(args)
            elif first:  # what models add to it in place is not to reach the start
                made["img"] = _like(args["img"], tuple(part.clone() for part in self.start))
            return made
        other = self.others.get(key)
        made = other(args, extra) if other else extra["original_block"](args)
        if self.last in (None, key):
            self.residual = self._difference(made["img"], args)
        return made

    def _begin(self, start: Parts) -> None:
        if self.fill is not None and [p.shape for p in start] != [p.shape for p in self.fill]:
            self.fill = None
        computed = self.fill is None  # blocks add to their input in place
        self.start = tuple(part.detach().clone() for part in start) if computed else start

    def _ended(self, args: dict[str, Any]) -> Streams:
        """The input of the first block with the residual on, in the place of the image's tokens."""
        pairs = zip(self.start, self.fill or (), strict=True)
        made = tuple(start + fill for start, fill in pairs)
        now, place = parts(args["img"]), _place(args)
        if place is not None and now[0].shape != made[0].shape:
            begin, end = place
            made = (torch.cat((now[0][:, :begin], made[0], now[0][:, end:]), 1),)
        return _like(args["img"], made)

    def _difference(self, img: Streams, args: dict[str, Any]) -> Parts | None:
        now, place = parts(img), _place(args)
        if place is not None and now[0].shape != self.start[0].shape:
            begin, end = place
            now = (now[0][:, begin:end],)
        if [part.shape for part in now] != [part.shape for part in self.start]:
            return None
        pairs = zip(now, self.start, strict=True)
        if self.last is None:  # there may be more to come, relative to the same start
            return tuple(one.detach() - two for one, two in pairs)
        return tuple(torch.sub(one.detach(), two, out=two) for one, two in pairs)


def _place(args: dict[str, Any]) -> tuple[int, int] | None:
    """First token of the image and the one after its last, where text tokens are in one tensor."""
    place = args.get("transformer_options", {}).get("img_slice")
    return None if place is None else (place[0], place[1])


def _compiled(network: nn.Module) -> bool:
    """As another module, or in place."""
    return hasattr(network, "_orig_mod") or network._compiled_call_impl is not None


@contextmanager
def forward(network: nn.Module, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Call ``stand_in(forward, *args, **kwargs)`` in the place of the network's forward."""
    name = "forward" if network._compiled_call_impl is None else "_compiled_call_impl"
    original, own = getattr(network, name), name in vars(network)
    setattr(network, name, lambda *args, **kwargs: stand_in(original, *args, **kwargs))
    try:
        yield
    finally:
        if own:
            setattr(network, name, original)
        else:
            delattr(network, name)


def base(x: Streams, like: Parts) -> Parts:
    """What a network's residual is relative to: its input, or 0 where the output has another shape.

    Of an input with more channels than the output, such as a mask beside the latent, the first.
    """
    made: list[Tensor] = []
    for one, two in zip(parts(x), like, strict=True):
        cut = one[:, : two.shape[1]] if one.ndim == two.ndim > 1 else one
        made.append(cut.to(two.dtype) if cut.shape == two.shape else torch.zeros_like(two))
    return tuple(made)


class Reader:
    """Catches residuals and puts them back, on the level that the model turns out to offer.

    Args:
        wanted: "blocks", "network" or "auto": blocks where the model lets them be replaced.

    Attributes:
        level: "" before the first call, then "blocks" or "network".
    """

    def __init__(self, wanted: str = "auto") -> None:
        self.wanted, self.level = wanted, ""
        self._last: Any = None

    @property
    def axis(self) -> int:
        """The axis of channels, over which norms are taken."""
        return -1 if self.level == BLOCKS else 1

    def computed(self, call: Call, options: dict[str, Any], network: nn.Module) -> Caught:
        """Run the network; its result and its residual, None where that can't be had."""
        if not self.level and (self.wanted == NETWORK or _compiled(network)):
            self.level = NETWORK  # what is compiled is not to be compiled anew for its blocks
        if self.level == NETWORK:
            return self._whole(call, options, network)
        blocks = Blocks(_replaced(options), self._last)
        if self.level == BLOCKS:
            return call(_replacing(options, blocks)), blocks.residual
        try:
            made, residual = self._whole(call, _replacing(options, blocks), network)
        except OtherBlocks:  # raised before the first block
            self.level = NETWORK
            return self._whole(call, options, network)
        self.level = NETWORK if blocks.residual is None else BLOCKS
        self._last = blocks.seen
        return made, residual if blocks.residual is None else blocks.residual

    def _whole(self, call: Call, options: dict[str, Any], network: nn.Module) -> Caught:
        caught: list[Parts] = []

        def watch(original: Callable[..., Any], x: Streams, *args: Any, **kwargs: Any) -> Any:
            made = original(x, *args, **kwargs)
            like = parts(made)
            differences = zip(like, base(x, like), strict=True)
            caught[:] = [tuple(one.detach() - two for one, two in differences)]
            return made

        with forward(network, watch):
            made = call(options)
        return made, caught[0] if caught else None

    def skipped(
        self, call: Call, options: dict[str, Any], network: nn.Module, fill: Parts
    ) -> Caught:
        """The result with ``fill`` in the place of what the network would have computed.

        Where ``fill`` does not fit the blocks' input, they are computed; the residual tells.
        """
        if self.level == BLOCKS:
            blocks = Blocks(_replaced(options), self._last, fill)
            return call(_replacing(options, blocks)), blocks.residual

        def stand_in(_original: Callable[..., Any], x: Streams, *_args: Any, **_kw: Any) -> Any:
            made = tuple(a + b for a, b in zip(base(x, fill), fill, strict=True))
            return _like(x, made)

        with forward(network, stand_in):
            return call(options), None


def _replaced(options: dict[str, Any]) -> dict[Any, Any]:
    return options.get("patches_replace", {}).get("dit", {})


def _replacing(options: dict[str, Any], blocks: Blocks) -> dict[str, Any]:
    return {**options, "patches_replace": {**options.get("patches_replace", {}), "dit": blocks}}
