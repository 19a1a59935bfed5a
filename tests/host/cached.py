"""Sampling of the tiny models with MagCache, and what of their networks was computed in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.sample
import comfy.samplers
import samples
import torch
from adapter_lab.core.cache.trace import Trace
from adapter_lab.nodes.host.caching import Settings, attach
from comfy.patcher_extension import WrappersMP

# Of each kind: a layer of its first block, and on which level the residual is.
KINDS = {
    "flux": ("double_blocks.0.img_attn.qkv", "blocks"),
    "wan": ("blocks.0.self_attn.q", "blocks"),
    "sd3": ("joint_blocks.0.x_block.attn.qkv", "blocks"),
    "hunyuan_video": ("double_blocks.0.img_attn.qkv", "blocks"),
    "ltxv": ("transformer_blocks.0.attn1.to_q", "blocks"),
    "sd15": ("input_blocks.1.0.in_layers.2", "network"),
}
STEPS = 12
# Two skips after a computed step: 0.03 + (1 - 0.97²) = 0.089, three: 0.089 + (1 - 0.97³) = 0.177.
SETTINGS = dict(
    ratios="manual", manual=dict.fromkeys(("cond", "uncond"), (1.0, *(0.97,) * (STEPS - 1))),
    threshold=0.12, k=4, retention=0.25,
)  # fmt: skip
SKIPPED = [3, 4, 6, 7, 9, 10]


def cached(model: Any, **settings: Any) -> Any:
    """``model`` with MagCache by those settings."""
    return attach(model, Settings(**SETTINGS | settings))


def conditioning(kind: str, seed: int, words: int = 0, **more: Any) -> list[Any]:
    """One; ``words`` makes its text longer than the others' are."""
    (item,) = samples.items(kind, 1, seed=seed)
    pooled = {name: tensor[None] for name, tensor in item.extra.items()}
    text = torch.cat([item.cond, item.cond[:words]])[None]
    if kind == "ltxv":
        pooled["attention_mask"] = torch.ones(1, text.shape[1], dtype=torch.int64)
    return [[text, pooled | more]]


def sample(
    model: Any, kind: str, sampler: str = "euler", cfg: float = 3.0, steps: int = STEPS,
    positive: Any = None, negative: Any = None, batch: int = 1, size: int = 0, **more: Any,
) -> torch.Tensor:  # fmt: skip
    """One picture by ComfyUI's own sampling."""
    shape = samples.SHAPES[kind]
    latent = torch.zeros(batch, *shape[:-1], size or shape[-1])
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "normal", positive or conditioning(kind, 1),
            negative or conditioning(kind, 2), latent, disable_pbar=True, seed=0, **more,
        )  # fmt: skip


class Seen:
    """Evaluations of a model: (sigma, which conditionings, whether its first block ran)."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, tuple[int, ...], bool]] = []
        self.blocks = 0

    def wrap(self, executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or args[3]
        before = self.blocks
        made = executor(x, t, *args, **kwargs)
        told = tuple(options["cond_or_uncond"])
        self.calls.append((float(options["sigmas"][0]), told, self.blocks > before))
        return made

    def skipped(self, which: int | None = None) -> list[int]:
        """Noise levels, by their number, at which nothing (of one conditioning) was computed."""
        mine = [call for call in self.calls if which is None or which in call[1]]
        sigmas = sorted({sigma for sigma, _, _ in mine}, reverse=True)
        ran = {sigma for sigma, _, ran in mine if ran}
        return [i for i, sigma in enumerate(sigmas) if sigma not in ran]


@contextmanager
def seen(model: Any, kind: str) -> Iterator[tuple[Any, Seen]]:
    """``model`` as one whose evaluations are seen."""
    watch, clone = Seen(), model.clone()
    layer = model.model.diffusion_model.get_submodule(KINDS[kind][0])

    def count(*_: Any) -> None:
        watch.blocks += 1

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", watch.wrap)
    handle = layer.register_forward_hook(count)
    try:
        yield clone, watch
    finally:
        handle.remove()


def sizes(monkeypatch):
    """Numbers of residuals that each trace has had, as they are put in."""
    counts, put = [], Trace.put

    def counted(self, sigma, parts):
        put(self, sigma, parts)
        counts.append(len(self.points))

    monkeypatch.setattr(Trace, "put", counted)
    return counts
