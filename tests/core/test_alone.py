"""A file's modules at their places, without a model."""

from __future__ import annotations

import torch
from adapter_lab.core.files import Adapter
from adapter_lab.core.keys.alone import file_entries


def lora(stem: str) -> dict[str, torch.Tensor]:
    up, down = torch.ones(8, 2), torch.ones(2, 8)
    return {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}


def test_names_are_the_models_own():
    file = lora("lora_unet_double_blocks_3_img_attn_proj")
    file |= lora("transformer.single_transformer_blocks.7.proj_out")
    file |= lora("lora_te1_text_model_encoder_layers_2_self_attn_q_proj")
    entries, spec = file_entries(Adapter(file))
    assert spec is not None and spec.id == "flux"
    assert {(entry.part, entry.path) for entry in entries} == {
        ("model", "double_blocks.3.img_attn.proj"),
        ("model", "single_blocks.7.linear2"),
        ("clip_l", "text_model.encoder.layers.2.self_attn.q_proj"),
    }


def test_broken_and_unknown_modules_are_left_out():
    file = lora("a.0.b") | {"a.1.b.lora_up.weight": torch.ones(8, 2)}
    file |= {"a.2.b.vblora_logits_A": torch.ones(2, 2)}
    entries, spec = file_entries(Adapter(file))
    assert [entry.path for entry in entries] == ["a.0.b"] and spec is None
