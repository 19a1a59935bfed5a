"""Conditioning of training items as the model's network is given it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
import torch.nn as nn
from torch import Tensor

from ...core.errors import AdapterLabError
from ...core.train.data import TrainItem, tensors

# Name of an argument of the network -> comfy.conds.CONDRegular or a subclass.
Conds = dict[str, Any]
Encode = Callable[[TrainItem], tuple[Tensor | None, Mapping[str, Any]]]
_ROOM = 256 * 2**20


class Conditioner:
    """What a model makes of the conditioning of an item, kept for the next time.

    Args:
        model: BaseModel.
        device: where it computes.
        guidance: for models that embed it, where the conditioning does not say.
        encode: item -> text (tokens, dim) and the rest; without it what the item holds.
        room: bytes that may be kept; the longest unused makes way.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        guidance: float = 1.0,
        encode: Encode | None = None,
        room: int = _ROOM,
    ) -> None:
        self.model, self.device, self.encode, self.room = model, device, encode, room
        # Models without the embedding may read the number otherwise: Chroma wants its own.
        layer = getattr(model.diffusion_model, "guidance_in", None)
        embeds = layer is not None and not isinstance(layer, nn.Identity)
        self.defaults = {"guidance": guidance} if embeds else {}
        # The item is kept so that no other can have its id.
        self._kept: OrderedDict[tuple[int, torch.Size], tuple[TrainItem, Conds, int]]
        self._kept, self._used, self._varies = OrderedDict(), 0, encode is not None

    def __call__(self, item: TrainItem, x: Tensor) -> Conds:
        """Of one item for its latent ``x`` (1, c, *space), whose values do not matter."""
        key = (id(item), x.shape)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][1]
        conds = self._encoded(item, x)
        parts = [t for _, t in tensors({name: cond.cond for name, cond in conds.items()})]
        # What adapters take part in is different at each step, also where chance left them out.
        self._varies = self._varies or any(t.requires_grad for t in parts)
        if not self._varies:
            self._keep(key, item, conds, sum(t.nbytes for t in parts))
        return conds

    def _keep(self, key: tuple[int, torch.Size], item: TrainItem, conds: Conds, size: int) -> None:
        self._kept[key], self._used = (item, conds, size), self._used + size
        while self._used > self.room:
            self._used -= self._kept.popitem(last=False)[1][2]

    # Whether adapters take part is to be seen in validation too.
    @torch.enable_grad()
    def _encoded(self, item: TrainItem, x: Tensor) -> Conds:
        text, extra = (item.cond, item.extra) if self.encode is None else self.encode(item)
        rest = {k: v[None] if isinstance(v, Tensor) else v for k, v in extra.items()}
        entry = [None if text is None else text[None], self.defaults | rest]
        blank = torch.zeros_like(x, requires_grad=False)
        encoded = comfy.samplers.encode_model_conds(
            self.model.extra_conds, comfy.sampler_helpers.convert_cond([entry]), blank,
            self.device, "positive", latent_image=blank, seed=0,
        )  # fmt: skip
        conds: Conds = encoded[0]["model_conds"]
        if "num_video_frames" in conds:
            raise AdapterLabError(
                "This model cannot be trained",
                found="a model whose batch is one clip",
                expected="a model whose batch is independent items",
            )
        done = {name: cond.process_cond(batch_size=1, area=None) for name, cond in conds.items()}
        for cond in done.values():
            cond.cond = self._resident(cond.cond)
        return done

    def _resident(self, value: Any) -> Any:
        """On the device and fit for autograd, which refuses tensors of inference mode."""
        if isinstance(value, Tensor):
            return (value.clone() if value.is_inference() else value).to(self.device)
        if isinstance(value, dict):
            return {k: self._resident(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._resident(v) for v in value])
        return value


def stacks(conds: Sequence[Conds]) -> list[list[int]]:
    """Which of them can be stacked without padding.

    ComfyUI would repeat the shorter text until both are equally long, which attention over text
    alone does not notice, but attention over text and image together does.
    """
    parts: list[list[int]] = []
    for i, cond in enumerate(conds):
        part = next((p for p in parts if _alike(conds[p[0]], cond)), None)
        if part is None:
            parts.append([i])
        else:
            part.append(i)
    return parts


def _alike(a: Conds, b: Conds) -> bool:
    return comfy.samplers.cond_equal_size(a, b) and all(a[k].size() == b[k].size() for k in a)
