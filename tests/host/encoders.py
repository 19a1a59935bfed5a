"""Tiny text encoders of ComfyUI's own classes, with its own tokenizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.flux
import comfy.text_encoders.omnigen2 as omnigen2
import torch


def _clip(width: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width,
        "num_attention_heads": heads, "num_hidden_layers": 3,
    }  # fmt: skip


_T5 = {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 2}
_SD15 = (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer)
_SDXL = (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer)
_LLM = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
_FLUX = (comfy.text_encoders.flux.flux_clip(), comfy.text_encoders.flux.FluxTokenizer)
# Widths as the models of ``tiny`` take them.
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sd15": (*_SD15, {"clip_l_model_config": _clip(768, 12)}),
    "sdxl": (*_SDXL, {
        "clip_l_model_config": _clip(32, 2),
        "clip_g_model_config": _clip(64, 2),
    }),
    "flux": (*_FLUX, {"clip_l_model_config": _clip(32, 2), "t5xxl_model_config": _T5}),
    "omnigen2": (omnigen2.te(), omnigen2.Omnigen2Tokenizer, {"qwen25_3b_model_config": _LLM}),
}  # fmt: skip


def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """CLIP with random weights, made as ComfyUI's executor does: in inference mode."""
    model, tokenizer, sizes = KINDS[kind]
    target = SimpleNamespace(params={}, clip=model, tokenizer=tokenizer)
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, model_options={"dtype": dtype, **sizes})
        rng = torch.Generator().manual_seed(0)
        for name, tensor in clip.cond_stage_model.state_dict().items():
            scale = (
                1.0 if "embed" in name or "shared" in name else tensor.shape[-1:].numel() ** -0.5
            )
            noise = torch.randn(tensor.shape, generator=rng)
            tensor.copy_(1 + 0.1 * noise if tensor.ndim == 1 and "bias" not in name
                         else noise * (0.02 if tensor.ndim < 2 else scale))  # fmt: skip
    return clip
