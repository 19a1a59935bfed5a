"""OmniGen2, and Boogu-Image, which puts blocks with two streams in front of it."""

from __future__ import annotations

from .base import Alias, ArchSpec, has_all

_ATTENTION = tuple(f"to_{x}" for x in ("q", "k", "v", "out.0"))
_MLP = tuple(f"feed_forward.linear_{i}" for i in (1, 2, 3))
_BLOCK = (*(f"attn.{leaf}" for leaf in _ATTENTION), *_MLP)
_ENDS = (
    "x_embedder", "ref_image_patch_embedder", "time_caption_embed.caption_embedder.1",
    *(f"{name}.linear_{i}" for name in ("time_caption_embed.timestep_embedder", "norm_out")
      for i in (1, 2)),
)  # fmt: skip
_REFINERS = ("noise_refiner", "ref_image_refiner", "context_refiner")


def _layers(main: str) -> tuple[str, ...]:
    """``main``: name of the blocks behind the refiners."""
    stacks = (main, *_REFINERS)
    return (
        *_ENDS,
        *(f"{stack}.{{}}.{leaf}" for stack in stacks for leaf in _BLOCK),
        *(f"{stack}.{{}}.norm1.linear" for stack in (main, *_REFINERS[:2])),
    )


_DOUBLE = "double_stream_layers.{}."
_PROCESSOR = _DOUBLE + "img_instruct_attn.processor."
_DOUBLES = (
    _DOUBLE + "img_instruct_attn.to_out.0",
    *(f"{_PROCESSOR}{m}_to_{x}" for m in ("img", "instruct") for x in "qkv"),
    *(f"{_PROCESSOR}{m}_out" for m in ("img", "instruct")),
    *(f"{_DOUBLE}img_self_attn.{leaf}" for leaf in _ATTENTION),
    *(f"{_DOUBLE}{m}_{leaf}" for m in ("img", "instruct") for leaf in _MLP),
    *(f"{_DOUBLE}img_norm{i}.linear" for i in (1, 2, 3)),
    *(f"{_DOUBLE}instruct_norm{i}.linear" for i in (1, 2)),
)
# diffusers' attention processors are no modules; here they are, so names lose one that counts.
_UNPROCESSED = tuple(
    Alias(name.replace(".processor.", "."), name, family="other")
    for name in _DOUBLES
    if ".processor." in name
)
_GROUPS = {
    "attention": ("*attn",),
    "mlp": ("*feed_forward",),
    "modulation": ("*norm?.linear",),
    "refiner": ("*_refiner",),
}

OMNIGEN2 = ArchSpec(
    id="omnigen2",
    title="OmniGen2",
    detect=has_all("ref_image_patch_embedder", "layers.0.attn.to_q", "norm_out.linear_2"),
    blocks=(r"layers\.\d+", *(rf"{name}\.\d+" for name in _REFINERS)),
    layers=_layers("layers"),
    excludes=(r".*norm.*",),
    base_versions=("omnigen2",),
    keep=(r"(?!(layers|\w+_refiner)\.\d+\.).*", r".*norm.*"),
    groups=_GROUPS,
)
BOOGU = ArchSpec(
    id="boogu",
    title="Boogu-Image",
    detect=has_all("double_stream_layers.0.img_instruct_attn.processor.img_to_q"),
    blocks=(r"(single|double)_stream_layers\.\d+", *(rf"{name}\.\d+" for name in _REFINERS)),
    layers=_layers("single_stream_layers") + _DOUBLES,
    aliases=_UNPROCESSED,
    excludes=(r".*norm.*",),
    base_versions=("boogu_image.0.1", "boogu_image_edit.0.1"),
    keep=(r"(?!((single|double)_stream_layers|\w+_refiner)\.\d+\.).*", r".*norm.*"),
    groups=_GROUPS | {"double": ("double_stream_layers",), "single": ("single_stream_layers",)},
)
