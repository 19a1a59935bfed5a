"""Wan 2.1 and 2.2: text and image to video, VACE, Animate and the variants of ComfyUI's own."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, same, share

_ATTENTION = {f"attn1.to_{x}": f"self_attn.{x}" for x in "qkv"} | {
    "attn1.to_out.0": "self_attn.o",
    **{f"attn2.to_{x}": f"cross_attn.{x}" for x in "qkv"},
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
}
_BLOCK = _ATTENTION | {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
_BLOCK_NORMS = {
    "norm2": "norm3",  # theirs count in the order of use
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "scale_shift_table": "modulation",
}

_LAYERS = (
    *aliases("", "", {
        **same("patch_embedding", "vace_patch_embedding", "pose_patch_embedding"),
        "proj_out": "head.head",
    }),
    *aliases("condition_embedder.", "", {
        "text_embedder.linear_1": "text_embedding.0",
        "text_embedder.linear_2": "text_embedding.2",
        "time_embedder.linear_1": "time_embedding.0",
        "time_embedder.linear_2": "time_embedding.2",
        "time_proj": "time_projection.1",
        "image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "image_embedder.ff.net.2": "img_emb.proj.3",
    }),
    *aliases("blocks.{}.", "blocks.{}.", _BLOCK),
    *aliases("vace_blocks.{}.", "vace_blocks.{}.", {
        "proj_in": "before_proj",
        "proj_out": "after_proj",
        **_BLOCK,
    }),
    *aliases("face_adapter.{}.", "face_adapter.fuser_blocks.{}.", {
        "to_q": "linear1_q",
        "to_k": ("linear1_kv", share(0, 2)),
        "to_v": ("linear1_kv", share(1, 2)),
        "to_out": "linear2",
    }),
    *aliases("face_encoder.", "face_encoder.", {
        **{name: f"{name}.conv" for name in ("conv1_local", "conv2", "conv3")},
        **same("out_proj"),
    }),
)  # fmt: skip

_NORMS = (
    *aliases("", "", {"scale_shift_table": "head.modulation"}),
    *aliases("condition_embedder.image_embedder.", "img_emb.", {
        "norm1": "proj.0",
        "norm2": "proj.4",
        "pos_embed": "emb_pos",
    }),
    *aliases("blocks.{}.", "blocks.{}.", _BLOCK_NORMS),
    *aliases("vace_blocks.{}.", "vace_blocks.{}.", _BLOCK_NORMS),
    *aliases("face_adapter.{}.", "face_adapter.fuser_blocks.{}.", {
        "norm_q": "q_norm",
        "norm_k": "k_norm",
    }),
    *aliases("face_encoder.", "face_encoder.", same("padding_tokens")),
)  # fmt: skip

# Of the variants that diffusers has no class for.
_AUDIO = "casual_audio_encoder.encoder."
_INJECTED = "blocks.{}.audio_cross_attn_wrapper.audio_cross_attn."
_OWN = (
    "ref_conv",  # Fun
    "control_adapter.conv",  # Fun Camera
    *(f"control_adapter.residual_blocks.{{}}.conv{i}" for i in (1, 2)),
    *(_AUDIO + leaf for leaf in ("conv1_local.conv", "conv1_global.conv", "conv2.conv")),  # S2V
    *(_AUDIO + leaf for leaf in ("conv3.conv", "final_linear")),
    "cond_encoder", "frame_packer.proj", "frame_packer.proj_2x", "frame_packer.proj_4x",
    "audio_injector.injector_adain_layers.{}.linear",
    *(f"audio_injector.injector.{{}}.{x}" for x in "qkvo"),
    *(_INJECTED + x for x in "qkvo"),  # HuMo
    *(f"audio_proj.audio_proj_glob_{i}.layer" for i in (1, 2, 3)),
    "patch_embedding_pose", "patch_embedding_mask",  # SCAIL
    "patch_embedding_global", "head_global.head", "music_projection",  # WanDancer
    "img_emb_refimage.proj.1", "img_emb_refimage.proj.3",
    *(f"music_injector.injector.{{}}.{x}" for x in "qkvo"),
    *(f"music_encoder.{{}}.self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
    "music_encoder.{}.linear1", "music_encoder.{}.linear2",
)  # fmt: skip

WAN = ArchSpec(
    id="wan",
    title="Wan",
    detect=has_all("patch_embedding", "blocks.0.self_attn.q", "blocks.0.ffn.0", "head.head"),
    blocks=(r"blocks\.\d+", r"vace_blocks\.\d+"),
    layers=own_names(_LAYERS) + _OWN,
    aliases=_LAYERS + _NORMS,
    excludes=(r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",),
    base_versions=("wan", "wan_2.1", "wan_2.2_14b", "wan_2.2_5b"),
    modelspec=("wan2.1",),
    prefixes={"diffusers": {"model": "transformer."}},
    keep=(r"(?!(vace_)?blocks\.\d+\.).*", r".*(norm|modulation).*"),
    groups={
        "attention": ("*_attn", "*.injector", "face_adapter"),
        "self_attention": ("*.self_attn",),
        "cross_attention": ("*.cross_attn",),
        "mlp": ("*.ffn",),
        "modulation": ("*modulation", "time_projection"),
        "image": ("*_img", "img_emb*"),
        "vace": ("vace_*",),
        "face": ("face_*", "motion_encoder"),
        "audio": ("*audio*", "music_*"),
    },
)
