"""diffusers pipelines: one prefix a component, peft's factor names; older files their own."""

from .base import ANY_ENCODER, KeyFormat
from .peft import PEFT_SPELLINGS

DIFFUSERS = KeyFormat(
    id="diffusers",
    title="diffusers",
    prefixes=(
        ("transformer.", ("model",)),
        ("unet.", ("model",)),
        ("text_encoder.", ("clip_l", "clip_h", ANY_ENCODER)),
        ("text_encoder_2.", ("clip_g", "t5xxl", ANY_ENCODER)),
        ("text_encoder_3.", ("t5xxl", ANY_ENCODER)),
        ("text_encoder_4.", ("llama", ANY_ENCODER)),
        ("text_encoder.qwen3.", (ANY_ENCODER,)),  # sd-scripts' Anima
        ("text_encoder.base_model.model.", (ANY_ENCODER,)),
        ("transformer.base_model.model.", ("model",)),
        ("unet.base_model.model.", ("model",)),
    ),
    separator=".",
    spellings=PEFT_SPELLINGS,
    reads={
        "_lora.up.weight": "lora_up.weight",
        "_lora.down.weight": "lora_down.weight",
        "lora.up.weight": "lora_up.weight",
        "lora.down.weight": "lora_down.weight",
        "lora_linear_layer.up.weight": "lora_up.weight",
        "lora_linear_layer.down.weight": "lora_down.weight",
    },
    family="diffusers",
    drops="processor",
    folds=("lora", "loha", "lokr"),
    loads=("lora", "lokr"),
    single=True,
)
