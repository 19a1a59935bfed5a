"""sd-scripts, musubi-tuner and LyCORIS under them: underscored names, alpha beside each module."""

from .base import KeyFormat

KOHYA = KeyFormat(
    id="kohya",
    title="kohya",
    prefixes=(
        ("lora_unet_", ("model",)),
        ("lora_unet__", ("model",)),  # Wan-Fun
        ("lora_te1_", ("clip_l",)),
        ("lora_te2_", ("clip_g",)),
        ("lora_te_", ("clip_l",)),
    ),
    separator="_",
)
