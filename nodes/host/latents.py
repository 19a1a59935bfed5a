"""LATENT and CONDITIONING of the graph <-> items of a training dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import AdapterLabError
from ...core.train.data import TrainDataset, TrainItem

# Conditioning that describes a sampling run or a region, not a training sample.
_UNSUPPORTED = (
    "control", "hooks", "gligen", "area", "mask", "start_percent", "end_percent",
    "additional_models",
)  # fmt: skip
CAPTIONS = "adapter_lab_captions"  # of the samples of a LATENT, one each


def own(value: Any) -> Any:
    """A deep copy on the CPU whose tensors autograd accepts: nodes run in inference mode, and an
    inference tensor can never be saved for backward."""
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: own(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [own(item) for item in value]
    return value


def dataset(
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[Sequence[Any]],
    masks: Sequence[Tensor | None],
    name: str,
    captions: Sequence[str] = (),
) -> TrainDataset:
    """Pair latents with conditioning, masks and captions: one each, one for each LATENT, or one
    for all. Without ``masks`` those that came with the latents (Set Latent Noise Mask) count."""
    if any(getattr(latent["samples"], "is_nested", False) for latent in latents):
        raise AdapterLabError("Latents of several streams cannot be trained on")
    groups = [list(own(latent["samples"])) for latent in latents]
    samples = [sample for group in groups for sample in group]
    # Read once here: items that share a prompt share its tensors, in memory and on disk.
    conds = [text_of(entry) for group in conditioning for entry in group]
    texts = _spread(conds, groups, "conditioning")
    drawn = [own(mask) for group in masks if group is not None for mask in group]
    areas = _spread(drawn, groups, "mask") if drawn else _noise_masks(latents, groups)
    known = list(captions) or [text for latent in latents for text in latent.get(CAPTIONS, ())]
    words = _spread(known, groups, "captions") if known else [""] * len(samples)
    items: list[TrainItem] = []
    for i, (sample, text, mask, said) in enumerate(zip(samples, texts, areas, words, strict=True)):
        try:
            items.append(TrainItem(sample, *text, mask=mask, caption=said))
        except AdapterLabError as error:
            raise error.about(f"Item {i}") from error
    return TrainDataset(items, name)


def _noise_masks(
    latents: Sequence[dict[str, Any]], groups: list[list[Tensor]]
) -> list[Tensor | None]:
    """The mask of each latent that came with its LATENT: (b or 1, 1, h, w), white is what to
    paint, and so what to learn."""
    found: list[Tensor | None] = []
    for latent, group in zip(latents, groups, strict=True):
        mask = own(latent.get("noise_mask"))
        if mask is None:
            found += [None] * len(group)
            continue
        flat = list(mask.reshape(-1, *mask.shape[-2:]))
        # ComfyUI repeats what is too short.
        found += [flat[i % len(flat)] for i in range(len(group))]
    return found


def graph(item: TrainItem) -> tuple[dict[str, Any], list[Any]]:
    """LATENT and CONDITIONING of one item; the LATENT knows the caption."""
    extra = {k: v[None] if isinstance(v, Tensor) else v for k, v in item.extra.items()}
    cond = None if item.cond is None else item.cond[None]
    return {"samples": item.latent[None], CAPTIONS: [item.caption]}, [[cond, extra]]


def _spread(values: list[Any], groups: list[list[Tensor]], what: str) -> list[Any]:
    total = sum(map(len, groups))
    if len(values) == total:
        return values
    if len(values) == len(groups):
        return [value for value, group in zip(values, groups, strict=True) for _ in group]
    if len(values) == 1:
        return values * total
    raise AdapterLabError(
        f"Latents and {what} do not pair up",
        found=f"{total} latents in {len(groups)} LATENT, {len(values)} {what}",
        expected=f"one {what} for each latent, one for each LATENT, or one for all",
    )


def text_of(entry: Sequence[Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """Text and the rest of one conditioning, without batch axis."""
    cond, extra = entry
    refused = [key for key in _UNSUPPORTED if extra.get(key) is not None]
    if refused:
        raise AdapterLabError(
            "This conditioning cannot be trained on",
            found=", ".join(refused),
            expected="plain text conditioning",
            fix="Connect the output of the text encoder",
        )
    plain = {k: own(_single(v, k)) for k, v in extra.items() if v is not None}
    return None if cond is None else own(_single(cond, "conditioning")), plain


def _single(value: Any, name: str) -> Any:
    """Drop the batch axis, which must be 1."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 or value.shape[0] != 1:
        raise AdapterLabError(
            f"'{name}' of a conditioning holds several prompts",
            found=f"shape {tuple(value.shape)}",
            expected="a batch of 1",
            fix="Encode each caption by itself",
        )
    return value[0]
