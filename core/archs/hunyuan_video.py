"""HunyuanVideo with SkyReels and FramePack, and HunyuanVideo 1.5.

Three spellings: ComfyUI's; that of the released code, which musubi-tuner, diffusion-pipe and
OneTrainer keep; diffusers', which FramePack has from the start.
"""

from __future__ import annotations

from .base import Alias, ArchSpec, Leaf, aliases, has_all, own_names, share, swapped
from .streams import BLOCKS, DOUBLE, DOUBLE_NORMS, FUSED, GROUPS, NORMS, SINGLE, embedders

_STREAMS = ("img", "txt")
_REFINER = "context_embedder.token_refiner.refiner_blocks.{}."
_OWN_REFINER = "txt_in.individual_token_refiner.blocks.{}."
REFINER = (
    *embedders("context_embedder.time_text_embed.timestep_embedder.", "txt_in.t_embedder."),
    *embedders("context_embedder.time_text_embed.text_embedder.", "txt_in.c_embedder."),
    *aliases("", "", {"context_embedder.proj_in": "txt_in.input_embedder"}),
    *aliases(_REFINER, _OWN_REFINER, {
        "attn.to_q": ("self_attn.qkv", share(0, 3)),
        "attn.to_k": ("self_attn.qkv", share(1, 3)),
        "attn.to_v": ("self_attn.qkv", share(2, 3)),
        "attn.to_out.0": "self_attn.proj",
        "ff.net.0.proj": "mlp.0",
        "ff.net.2": "mlp.2",
        "norm_out.linear": "adaLN_modulation.1",
    }),
)  # fmt: skip
REFINER_NORMS = aliases(_REFINER, _OWN_REFINER, {"norm1": "norm1", "norm2": "norm2"})
ENDS = (
    *aliases("", "", {"x_embedder.proj": "img_in.proj", "proj_out": "final_layer.linear"}),
    *aliases("", "", {"norm_out.linear": "final_layer.adaLN_modulation.1"}, order=swapped),
)  # fmt: skip

_ORIGINAL_DOUBLE: dict[str, Leaf] = {
    f"{stream}_{theirs}": f"{stream}_{own}"
    for stream in _STREAMS
    for theirs, own in (
        ("attn_qkv", "attn.qkv"), ("attn_proj", "attn.proj"), ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"), ("mod.linear", "mod.lin"),
        ("attn_q_norm", "attn.norm.query_norm"), ("attn_k_norm", "attn.norm.key_norm"),
    )
}  # fmt: skip
ORIGINAL = (
    *(
        alias for name in ("time", "time_r", "guidance")
        for alias in aliases(f"{name}_in.mlp.", f"{name}_in.", {"0": "in_layer", "2": "out_layer"},
                             family="original")
    ),
    *aliases("txt_in.", "txt_in.", {
        "t_embedder.mlp.0": "t_embedder.in_layer",
        "t_embedder.mlp.2": "t_embedder.out_layer",
        "c_embedder.linear_1": "c_embedder.in_layer",
        "c_embedder.linear_2": "c_embedder.out_layer",
    }, family="original"),
    *aliases(_OWN_REFINER, _OWN_REFINER, {
        "self_attn_qkv": "self_attn.qkv",
        "self_attn_proj": "self_attn.proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }, family="original"),
    *aliases("double_blocks.{}.", "double_blocks.{}.", _ORIGINAL_DOUBLE, family="original"),
    *aliases("single_blocks.{}.", "single_blocks.{}.", {
        "modulation.linear": "modulation.lin",
        "q_norm": "norm.query_norm",
        "k_norm": "norm.key_norm",
    }, family="original"),
)  # fmt: skip
# HunyuanVideo 1.5, and HunyuanImage 2.1 where it runs on several devices.
SPLIT = aliases("double_blocks.{}.", "double_blocks.{}.", {
    f"{stream}_attn_{x}": (f"{stream}_attn.qkv", share(i, 3))
    for stream in _STREAMS
    for i, x in enumerate("qkv")
}, family="original")  # fmt: skip

KEEP = (
    r"(cond_type_embedding|\w+_in\..+|final_layer\..+)",
    r".*(norm|_mod\.lin|modulation\.lin).*",
)
FAMILIES = {"kohya": "original", "musubi": "original"}

_LAYERS = (
    *ENDS,
    *REFINER,
    *embedders("time_text_embed.timestep_embedder.", "time_in."),
    *embedders("time_text_embed.text_embedder.", "vector_in."),
    *embedders("time_text_embed.guidance_embedder.", "guidance_in."),
    *DOUBLE,
    *SINGLE,
)
HUNYUAN_VIDEO = ArchSpec(
    id="hunyuan_video",
    title="HunyuanVideo",
    detect=has_all("img_in.proj", "vector_in.in_layer", "double_blocks.0.img_attn.qkv"),
    blocks=BLOCKS,
    layers=own_names(_LAYERS),
    aliases=_LAYERS + REFINER_NORMS + NORMS + ORIGINAL + FUSED,
    excludes=(r".*(img_mod|txt_mod|modulation).*", r".*(norm).*"),
    hidden="img_in.proj",
    base_versions=("hunyuan_video",),
    modelspec=("hunyuan-video",),
    # As its pipeline in diffusers counts them, of which kohya's are OneTrainer's.
    prefixes={
        "kohya": {"llama": "lora_te1_", "clip_l": "lora_te2_"},
        "diffusers": {"llama": "text_encoder.", "clip_l": "text_encoder_2."},
    },
    families=FAMILIES,
    keep=KEEP,
    groups=GROUPS,
)

_LAYERS_15 = (
    *ENDS,
    *REFINER,
    *embedders("time_embed.timestep_embedder.", "time_in."),
    *embedders("time_embed.timestep_embedder_r.", "time_r_in."),
    *aliases("", "", {f"context_embedder_2.linear_{i}": f"byt5_in.fc{i}" for i in (1, 2, 3)}),
    *aliases("image_embedder.", "vision_in.proj.", {"linear_1": "1", "linear_2": "3"}),
    *DOUBLE,
)
_NORMS_15 = (
    *aliases("", "", {
        "context_embedder_2.norm": "byt5_in.layernorm",
        "image_embedder.norm_in": "vision_in.proj.0",
        "image_embedder.norm_out": "vision_in.proj.4",
        "cond_type_embed": "cond_type_embedding",
    }),
    *REFINER_NORMS,
    *DOUBLE_NORMS,
)  # fmt: skip
_ORIGINAL_15, _FUSED_15 = (
    tuple(alias for alias in table if not alias.own.startswith("single"))
    for table in (ORIGINAL, FUSED)
)
HUNYUAN_VIDEO_15 = ArchSpec(
    id="hunyuan_video_15",
    title="HunyuanVideo 1.5",
    detect=has_all("img_in.proj", "vision_in.proj.1", "double_blocks.0.img_attn.qkv"),
    blocks=BLOCKS[:1],
    layers=own_names(_LAYERS_15),
    aliases=_LAYERS_15 + _NORMS_15 + _ORIGINAL_15 + SPLIT + _FUSED_15,
    excludes=(r".*(_in).*", r".*(norm).*"),
    hidden="img_in.proj",
    base_versions=("hunyuan_video_1_5",),
    modelspec=("hunyuan-video-1.5",),
    families=FAMILIES,
    keep=KEEP,
    groups={
        name: tuple(pattern for pattern in found if not pattern.startswith("single"))
        for name, found in GROUPS.items()
        if name != "single"
    },
)

_FRAMEPACK: tuple[Alias, ...] = tuple(alias for alias in _LAYERS if alias.family == "diffusers")
FRAMEPACK = ArchSpec(
    id="framepack",
    title="FramePack",
    # Its files keep diffusers' names; on a HunyuanVideo model its adapters fit as diffusers' do.
    detect=has_all("clean_x_embedder.proj", "transformer_blocks.0.attn.to_q", "x_embedder.proj"),
    blocks=(r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"),
    layers=(
        *(alias.theirs for alias in _FRAMEPACK),
        *(f"clean_x_embedder.proj{size}" for size in ("", "_2x", "_4x")),
        *(f"image_projection.{end}" for end in ("up", "down")),
    ),
    excludes=(r".*(norm).*",),
    base_versions=("framepack",),
    modelspec=("framepack",),
    keep=(r"(?!(single_)?transformer_blocks\.).*", r".*norm.*"),
    groups={
        "double": ("transformer_blocks.*",),
        "single": ("single_transformer_blocks.*",),
        "attention": ("*.attn.*",),
        "mlp": ("*.ff.*", "*.ff_context.*", "*.proj_mlp"),
        "modulation": ("*norm*.linear",),
    },
)
