"""Wan, Qwen-Image, Lumina and what came with them as ComfyUI builds them: classes and options."""

from __future__ import annotations

from typing import Any

TWO = dict(num_layers=2)
WAN = dict(dim=5120, ffn_dim=13824, num_heads=40, **TWO)
COSMOS = dict(
    max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
    patch_temporal=1, pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True,
    adaln_lora_dim=256, num_blocks=2,
)  # fmt: skip
COSMOS1 = dict(
    affline_emb_norm=True, block_x_format="THWBD", model_channels=4096, num_heads=32,
    extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable",
)  # fmt: skip
PREDICT2 = dict(model_channels=2048, num_heads=16)
LUMINA = dict(in_channels=16, n_layers=2, qk_norm=True)
LUMINA2 = dict(
    dim=2304, n_heads=24, n_kv_heads=8, axes_dims=[32, 32, 32], cap_feat_dim=2304,
    ffn_dim_multiplier=4.0,
)  # fmt: skip
Z_IMAGE = dict(
    dim=3840, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48], cap_feat_dim=2560,
    ffn_dim_multiplier=8 / 3, z_image_modulation=True, pad_tokens_multiple=32,
)  # fmt: skip
PIXEL = dict(patch_size=32, in_channels=3, decoder_in_channels=3072)
OMNIGEN2 = dict(
    axes_dim_rope=[40, 40, 40], hidden_size=2520, num_attention_heads=21, num_kv_heads=7,
    text_feat_dim=2048, **TWO,
)  # fmt: skip
LTX23 = dict(
    apply_gated_attention=True, cross_attention_adaln=True, caption_proj_before_connector=True
)
BOOGU = dict(num_layers=2, num_double_stream_layers=2)
ACE = dict(
    inner_dim=2560, attention_head_dim=128, num_attention_heads=20, mlp_ratio=2.5,
    ssl_encoder_depths=[8, 8], lyric_encoder_vocab_size=6693, **TWO,
)  # fmt: skip
# Its quantiser computes a number of a tensor, which the meta device can't.
ACE15 = dict(
    device="cpu", num_dit_layers=2, num_lyric_layers=2, num_timbre_layers=2, num_tokenizer_layers=2
)
COG5B = dict(num_attention_heads=48, use_rotary_positional_embeddings=True, **TWO)
COG15 = COG5B | dict(in_channels=32, patch_size_t=2, ofs_embed_dim=512)
QWEN_VL = dict(
    text_config_overrides={"num_hidden_layers": 2}, vision_config_overrides={"num_hidden_layers": 2}
)

# architecture -> variant -> (class below comfy.ldm, its options)
MODELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "wan": {
        "t2v": ("wan.model.WanModel", dict(model_type="t2v") | WAN),
        "i2v": ("wan.model.WanModel", dict(model_type="i2v", in_dim=36) | WAN),
        "flf": ("wan.model.WanModel",
                dict(model_type="i2v", in_dim=36, flf_pos_embed_token_number=514) | WAN),
        "fun": ("wan.model.WanModel", dict(model_type="i2v", in_dim=48, in_dim_ref_conv=16) | WAN),
        "camera": ("wan.model.CameraWanModel", WAN),
        "vace": ("wan.model.VaceWanModel", dict(vace_layers=2, vace_in_dim=96) | WAN),
        "animate": ("wan.model_animate.AnimateWanModel", WAN | dict(in_dim=36, num_layers=6)),
        "s2v": ("wan.model.WanModel_S2V", WAN | dict(audio_inject_layers=[0, 1])),
        "humo": ("wan.model.HumoWanModel", dict(in_dim=36) | WAN),
        "scail": ("wan.model.SCAILWanModel", WAN),
        "scail2": ("wan.model.SCAIL2WanModel", WAN),
        "wandancer": ("wan.model_wandancer.WanDancerModel",
                      dict(in_dim=36) | WAN | dict(audio_inject_layers=[0, 1])),
    },
    "qwen_image": {
        "base": ("qwen_image.model.QwenImageTransformer2DModel", TWO),
        "layered": ("qwen_image.model.QwenImageTransformer2DModel",
                    dict(use_additional_t_cond=True) | TWO),
    },
    "mage_flow": {"base": ("mage_flow.model.MageFlowTransformer2DModel", TWO)},
    "lumina2": {
        "base": ("lumina.model.NextDiT", LUMINA | LUMINA2),
        "newbie": ("lumina.model.NextDiT", LUMINA | LUMINA2 | dict(clip_text_dim=1024)),
    },
    "z_image": {
        "base": ("lumina.model.NextDiT", LUMINA | Z_IMAGE),
        "omni": ("lumina.model.NextDiT", LUMINA | Z_IMAGE | dict(siglip_feat_dim=1152)),
        "pixel": ("lumina.model.NextDiTPixelSpace", LUMINA | Z_IMAGE | PIXEL),
    },
    "ltxv": {"base": ("lightricks.model.LTXVModel", TWO)},
    "ltx2": {
        "base": ("lightricks.av_model.LTXAVModel", TWO),
        "2.3": ("lightricks.av_model.LTXAVModel", TWO | LTX23),
    },
    "cosmos": {"base": ("cosmos.model.GeneralDIT", COSMOS | COSMOS1)},
    "cosmos_predict2": {"base": ("cosmos.predict2.MiniTrainDIT", COSMOS | PREDICT2)},
    "anima": {"base": ("anima.model.Anima", COSMOS | PREDICT2)},
    "kandinsky5": {"base": ("kandinsky5.model.Kandinsky5", dict(num_visual_blocks=2))},
    "krea2": {"base": ("krea2.model.SingleStreamDiT", dict(layers=2))},
    "ace_step": {"base": ("ace.model.ACEStepTransformer2DModel", ACE)},
    "ace_step15": {"base": ("ace.ace_step15.AceStepConditionGenerationModel", ACE15)},
    "cogvideox": {
        "2b": ("cogvideo.model.CogVideoXTransformer3DModel", TWO),
        "5b": ("cogvideo.model.CogVideoXTransformer3DModel", COG5B),
        "1.5": ("cogvideo.model.CogVideoXTransformer3DModel", COG15),
    },
    "omnigen2": {"base": ("omnigen.omnigen2.OmniGen2Transformer2DModel", OMNIGEN2)},
    "boogu": {"base": ("boogu.model.BooguTransformer2DModel", BOOGU)},
    "hidream_o1": {"base": ("hidream_o1.model.HiDreamO1Transformer", QWEN_VL)},
    "ideogram4": {"base": ("ideogram4.model.Ideogram4Transformer2DModel", TWO)},
    "lens": {"base": ("lens.model.LensTransformer2DModel", TWO)},
    "ernie": {"base": ("ernie.model.ErnieImageModel", TWO)},
    "joyimage": {"base": ("joyimage.model.JoyImageTransformer3DModel", TWO)},
    "minimax_h3": {"base": ("minimax.model.MiniMaxH3Model", TWO)},
}  # fmt: skip
