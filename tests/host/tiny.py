"""Tiny checkpoints of real architectures, built with ComfyUI's own classes.

Run inside an environment where ``comfy`` imports. The files load through ComfyUI's own detection.
"""

from __future__ import annotations

from pathlib import Path

import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.wan.model import WanModel
from safetensors.torch import save_file

FLUX = dict(
    in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=128,
    mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000,
    patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[],
)  # fmt: skip
WAN = dict(model_type="t2v", dim=128, ffn_dim=256, text_dim=4096, num_heads=1, num_layers=2)
SD15 = dict(
    image_size=32, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=[1],
    channel_mult=(1,), num_heads=8, use_spatial_transformer=True, transformer_depth=[1],
    transformer_depth_output=[1, 1], transformer_depth_middle=1, context_dim=768,
    use_linear_in_transformer=False, legacy=False,
)  # fmt: skip
SD3 = dict(
    input_size=None, in_channels=16, out_channels=16, patch_size=2, depth=2, adm_in_channels=64,
    context_embedder_config={
        "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128},
    },
    num_patches=144, pos_embed_max_size=12, qk_norm="rms",
)  # fmt: skip
HUNYUAN_VIDEO = dict(
    in_channels=16, out_channels=16, patch_size=[1, 2, 2], vec_in_dim=768, context_in_dim=64,
    hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=1,
    axes_dim=[16, 56, 56], theta=256, qkv_bias=True, guidance_embed=True, byt5=False,
    meanflow=False, meanflow_sum=False, use_cond_type_embedding=False, vision_in_dim=None,
)  # fmt: skip

BUILDERS = {
    "flux": (Flux, FLUX),
    "wan": (WanModel, WAN),
    "sd15": (UNetModel, SD15),
    "sd3": (OpenAISignatureMMDITWrapper, SD3),
    "hunyuan_video": (HunyuanVideo, HUNYUAN_VIDEO),
}
_NORMS = ("norm.weight", "scale", "ln_q.weight", "ln_k.weight")


def write(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights of architecture ``kind``, a key of ``BUILDERS``, at ``path``."""
    build, options = BUILDERS[kind]
    model = build(**options, operations=comfy.ops.disable_weight_init, dtype=dtype, device="cpu")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        scale = 0.02 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
        noise = torch.randn(tensor.shape, generator=generator) * scale
        is_norm = name.endswith(_NORMS) or "norm" in f".{name}".split(".")[-2]
        state[name] = (noise + 1.0 * is_norm).to(dtype).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path))
    return path
