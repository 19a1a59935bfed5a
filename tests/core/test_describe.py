"""What is said of a file from the file alone."""

from __future__ import annotations

import torch
from adapter_lab.core.files import Adapter
from adapter_lab.core.keys import describe


def lora(stem: str, rank: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    up, down = torch.ones(128, rank), torch.ones(rank, 128)
    factors = {"lora_up.weight": up, "lora_down.weight": down, **more}
    return {f"{stem}.{suffix}": tensor for suffix, tensor in factors.items()}


def test_format_architecture_ranks_and_metadata():
    file = lora("lora_unet_double_blocks_0_img_attn_proj", 4, alpha=torch.tensor(2.0))
    file |= lora("lora_unet_double_blocks_1_img_attn_proj", 8, alpha=torch.tensor(8.0))
    text = describe(Adapter(file, {"ss_seed": "7", "other": "x"}, name="a.safetensors"))
    assert text.startswith("a.safetensors: 2 modules (2 LoRA)")
    assert "FLUX.1" in text and "kohya" in text and "float32" in text
    assert "rank 4 alpha 2 (1 x), rank 8 alpha 8 (1 x)" in text
    assert "ss_seed: 7" in text and "other" not in text


def test_scale_of_peft_is_shown():
    file = lora("base_model.model.layer", 8)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32}
    assert "rank 8 alpha 32" in describe(Adapter(file, config=config))


def test_unsupported_modules_are_counted():
    file = {"lora_unet_x.oft_blocks": torch.ones(2, 4, 4)}
    assert "1 modules of no supported algorithm" in describe(Adapter(file))
