"""What peft's save_pretrained writes, and its adapters in memory, under any adapter name."""

from .base import KeyFormat

PEFT_SPELLINGS = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

PEFT = KeyFormat(
    id="peft",
    title="peft",
    prefixes=(
        ("base_model.model.", ("model", "clip_l", "clip_g")),
        ("base_model.model.diffusion_model.", ("model",)),
        ("base_model.model.transformer.", ("model",)),
        ("base_model.model.unet.", ("model",)),
    ),
    separator=".",
    spellings=PEFT_SPELLINGS,
    reads={
        "lora_A.*.weight": "lora_down.weight",
        "lora_B.*.weight": "lora_up.weight",
        "lora_A": "lora_down.weight",
        "lora_B": "lora_up.weight",
        **{f"{name}.*": name for name in (*_HADA, *_LOKR)},
    },
)
