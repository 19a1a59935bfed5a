"""FLUX, Stable Diffusion, Hunyuan and their kin as ComfyUI builds them: classes and options."""

from __future__ import annotations

from typing import Any

DEPTH = dict(depth=2, depth_single_blocks=2)
FLUX = dict(
    in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
    mlp_ratio=4.0, num_heads=24, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
    guidance_embed=True, txt_ids_dims=[], **DEPTH,
)  # fmt: skip
FLUX2 = FLUX | dict(
    in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=15360, hidden_size=6144,
    mlp_ratio=3.0, num_heads=48, axes_dim=[32] * 4, theta=2000, patch_size=1, qkv_bias=False,
    txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
)  # fmt: skip
KLEIN = dict(hidden_size=4096, context_in_dim=12288, num_heads=32, guidance_embed=False)
OVIS = dict(
    vec_in_dim=None, context_in_dim=2048, guidance_embed=False, yak_mlp=True, txt_norm=True,
    txt_ids_dims=[1, 2],
)  # fmt: skip
LONGCAT = dict(vec_in_dim=None, context_in_dim=3584, guidance_embed=False, txt_ids_dims=[1, 2])
CHROMA = dict(
    in_channels=64, out_channels=64, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
    num_heads=24, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, in_dim=64,
    out_dim=3072, hidden_dim=5120, n_layers=5, txt_ids_dims=[], vec_in_dim=None, **DEPTH,
)  # fmt: skip
RADIANCE = CHROMA | dict(
    in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=64, nerf_mlp_ratio=4,
    nerf_depth=2, nerf_max_freqs=8, nerf_tile_size=512, nerf_final_head_type="conv",
    nerf_embedder_dtype=None, use_x0=False, use_sequential_txt_ids=False,
)  # fmt: skip
HUNYUAN = dict(
    in_channels=16, out_channels=16, patch_size=[1, 2, 2], vec_in_dim=768, context_in_dim=4096,
    hidden_size=3072, mlp_ratio=4.0, num_heads=24, axes_dim=[16, 56, 56], theta=256, qkv_bias=True,
    guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False,
    vision_in_dim=None, meanflow_sum=False, **DEPTH,
)  # fmt: skip
HUNYUAN15 = HUNYUAN | dict(
    in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, context_in_dim=3584,
    hidden_size=2048, num_heads=16, guidance_embed=False, byt5=True, vision_in_dim=1152,
    use_cond_type_embedding=True, meanflow_sum=True, depth_single_blocks=0,
)  # fmt: skip
IMAGE21 = HUNYUAN | dict(
    in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, context_in_dim=3584,
    hidden_size=3584, num_heads=28, axes_dim=[64, 64], guidance_embed=False, byt5=True,
)  # fmt: skip
REFINER = HUNYUAN | dict(
    in_channels=128, out_channels=64, patch_size=[1, 1, 1], vec_in_dim=None, context_in_dim=3584,
    hidden_size=3328, num_heads=26, guidance_embed=False, meanflow=True,
)  # fmt: skip
SD3 = dict(
    in_channels=16, patch_size=2, out_channels=16, depth=24, input_size=None, adm_in_channels=2048,
    context_embedder_config=dict(
        target="torch.nn.Linear", params=dict(in_features=4096, out_features=1536)
    ),
    num_patches=36864, pos_embed_max_size=192, num_blocks=3,
)  # fmt: skip
SD35 = SD3 | dict(qk_norm="rms", num_patches=147456, pos_embed_max_size=384)
SD35_LARGE = SD35 | dict(
    depth=38,
    num_patches=36864,
    pos_embed_max_size=192,
    context_embedder_config=dict(
        target="torch.nn.Linear", params=dict(in_features=4096, out_features=2432)
    ),
)
MOCHI = dict(
    depth=3, patch_size=2, num_heads=24, hidden_size_x=3072, hidden_size_y=1536, mlp_ratio_x=4.0,
    mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True,
    use_t5=True, t5_feat_dim=4096, t5_token_length=256,
)  # fmt: skip
AURA = dict(n_layers=4, n_double_layers=2, max_seq=9216)
PIXART = dict(depth=2, input_size=64, pe_interpolation=2, model_max_length=300, in_channels=4)
HYDIT = dict(
    depth=4,
    hidden_size=1408,
    mlp_ratio=4.3637,
    size_cond=False,
    use_style_cond=False,
    input_size=None,
)
CASCADE_C = dict(blocks=[[1, 2], [2, 1]])
CASCADE_LITE = dict(c_cond=1536, c_hidden=[1536, 1536], nhead=[24, 24])
CASCADE_B = dict(blocks=[[1, 1, 2, 1], [1, 2, 1, 1]], block_repeat=[[1, 1, 1, 1], [3, 3, 2, 2]])
HIDREAM = dict(
    attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[4096, 4096],
    max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1], num_attention_heads=20,
    num_routed_experts=4, num_activated_experts=2, num_layers=2, num_single_layers=2,
    out_channels=16, patch_size=2, text_emb_dim=2048,
)  # fmt: skip
UNET = dict(
    image_size=32, in_channels=4, model_channels=320, out_channels=4, use_spatial_transformer=True,
    legacy=False,
)  # fmt: skip
SD1 = UNET | dict(
    num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4], transformer_depth=[1] * 6 + [0, 0],
    transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, num_heads=8,
    context_dim=768, use_linear_in_transformer=False,
)  # fmt: skip
SD2 = SD1 | dict(
    num_heads=-1, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True
)
SDXL = UNET | dict(
    num_res_blocks=[2] * 3, channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 2, 2],
    transformer_depth_output=[0] * 3 + [2] * 6, transformer_depth_middle=2, num_head_channels=64,
    context_dim=2048, use_linear_in_transformer=True, num_classes="sequential",
    adm_in_channels=2816,
)  # fmt: skip
LDM = "modules.diffusionmodules.openaimodel.UNetModel"
VIDEO = "hunyuan_video.model.HunyuanVideo"
MMDIT = "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper"

# architecture -> variant -> (class below comfy.ldm, its options)
MODELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "flux": {
        "dev": ("flux.model.Flux", FLUX),
        "schnell": ("flux.model.Flux", FLUX | dict(guidance_embed=False)),
        "fill": ("flux.model.Flux", FLUX | dict(in_channels=96)),
    },
    "longcat_image": {"base": ("flux.model.Flux", FLUX | LONGCAT)},
    "ovis_image": {"base": ("flux.model.Flux", FLUX | OVIS)},
    "flux2": {
        "dev": ("flux.model.Flux", FLUX2),
        "klein": ("flux.model.Flux", FLUX2 | KLEIN),
    },
    "chroma": {
        "base": ("chroma.model.Chroma", CHROMA),
        "radiance": ("chroma_radiance.model.ChromaRadiance", RADIANCE),
    },
    "hunyuan_video": {
        "t2v": (VIDEO, HUNYUAN),
        "i2v": (VIDEO, HUNYUAN | dict(in_channels=33)),
        "skyreels": (VIDEO, HUNYUAN | dict(in_channels=32, guidance_embed=False)),
    },
    "hunyuan_video_15": {
        "base": (VIDEO, HUNYUAN15),
        "meanflow": (VIDEO, HUNYUAN15 | dict(in_channels=98, meanflow=True)),
    },
    "hunyuan_image": {
        "base": (VIDEO, IMAGE21),
        "distilled": (VIDEO, IMAGE21 | dict(guidance_embed=True, meanflow=True)),
        "refiner": (VIDEO, REFINER),
    },
    "sd3": {
        "sd3-medium": (MMDIT, SD3),
        "sd3.5-medium": (MMDIT, SD35 | dict(x_block_self_attn_layers=[0, 1])),
        "sd3.5-large": (MMDIT, SD35_LARGE),
    },
    "mochi": {"base": ("genmo.joint_model.asymm_models_joint.AsymmDiTJoint", MOCHI)},
    "auraflow": {"base": ("aura.mmdit.MMDiT", AURA)},
    "pixart": {
        "alpha": ("pixart.pixartms.PixArtMS", PIXART),
        "sigma": ("pixart.pixartms.PixArtMS", PIXART | dict(micro_condition=False)),
    },
    "hunyuan_dit": {
        "1.0": ("hydit.models.HunYuanDiT", HYDIT | dict(size_cond=True, use_style_cond=True)),
        "1.2": ("hydit.models.HunYuanDiT", HYDIT),
    },
    "cascade_c": {
        "full": ("cascade.stage_c.StageC", CASCADE_C),
        "lite": ("cascade.stage_c.StageC", CASCADE_C | CASCADE_LITE),
    },
    "cascade_b": {"full": ("cascade.stage_b.StageB", CASCADE_B)},
    "sd15": {"base": (LDM, SD1)},
    "sd2": {"base": (LDM, SD2)},
    "sdxl": {"base": (LDM, SDXL)},
    "hidream": {"base": ("hidream.model.HiDreamImageTransformer2DModel", HIDREAM)},
}  # fmt: skip
