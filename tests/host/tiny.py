"""Tiny checkpoints of real architectures, built with ComfyUI's own classes.

Run inside an environment where ``comfy`` imports. The files load through ComfyUI's own detection.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.wan.model import WanModel
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file, save_file

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
# Its loader tells the number of blocks from a width that no tiny model has.
COSMOS = dict(
    image_model="cosmos_predict2", in_channels=16, out_channels=16, max_img_h=32, max_img_w=32,
    max_frames=8, patch_spatial=2, patch_temporal=1, model_channels=64, num_blocks=2, num_heads=1,
    concat_padding_mask=True, crossattn_emb_channels=1024, pos_emb_cls="rope3d",
    pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
    use_adaln_lora=True, adaln_lora_dim=16, extra_per_block_abs_pos_emb=False,
)  # fmt: skip
# The same, from the number of heads.
LTXV = dict(
    image_model="ltxv", in_channels=128, cross_attention_dim=64, attention_head_dim=32,
    num_attention_heads=2, caption_channels=64, num_layers=2,
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
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_random(model, dtype), str(path))
    return path


def cosmos() -> Any:
    """A ModelPatcher of Cosmos-Predict2 with random weights."""
    return _patcher(comfy.supported_models.CosmosT2IPredict2(dict(COSMOS)))


def ltxv() -> Any:
    """The same of LTX-Video."""
    return _patcher(comfy.supported_models.LTXV(dict(LTXV)))


def _patcher(config: Any) -> Any:
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    model.diffusion_model.load_state_dict(_random(model.diffusion_model, torch.float32))
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(model, load_device=cpu, offload_device=cpu)


def _random(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        scale = 0.02 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
        noise = torch.randn(tensor.shape, generator=generator) * scale
        is_norm = name.endswith(_NORMS) or "norm" in f".{name}".split(".")[-2]
        state[name] = (noise + 1.0 * is_norm).to(dtype).contiguous()
    return state


def quantise(source: Path, path: Path, form: str) -> Path:
    """``source`` with the linear layers of its blocks in a format of ComfyUI, a key of
    ``QUANT_ALGOS``, as ComfyUI's own tools write it."""
    options = {"scale": "recalculate"} if form.startswith("float8") else {}
    more = {"convrot_groupsize": 64} if form == "convrot_w4a4" else {}
    state = load_file(str(source))
    for key in [k for k in state if "blocks." in k and k.endswith(".weight")]:
        if state[key].ndim == 2:
            layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
            quantised = QuantizedTensor.from_float(state.pop(key), layout, **options, **more)
            state |= quantised.state_dict(key)
            said = json.dumps({"format": form, **more}).encode()
            name = key.removesuffix("weight") + "comfy_quant"
            state[name] = torch.tensor(list(said), dtype=torch.uint8)
    save_file(state, str(path))
    return path
