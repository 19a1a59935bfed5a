"""sd-scripts, musubi-tuner and LyCORIS under them: underscored names, alpha beside each module."""

from .base import ANY_ENCODER, KeyFormat

KOHYA = KeyFormat(
    id="kohya",
    title="kohya",
    prefixes=(
        ("lora_unet_", ("model",)),
        ("lora_unet__", ("model",)),  # Wan-Fun
        ("lora_te1_", ("clip_l", "clip_h", ANY_ENCODER)),
        ("lora_te2_", ("clip_g", "t5xxl", ANY_ENCODER)),
        ("lora_te3_", ("t5xxl", ANY_ENCODER)),
        ("lora_te4_", ("llama", ANY_ENCODER)),  # OneTrainer's HiDream
        ("lora_te_", (ANY_ENCODER,)),
    ),
    separator="_",
    instead={"kohya_oft_blocks": "kohya_oft"},
)

# The rows of sd-scripts' own OFT, whose alpha and constraint differ from LyCORIS' of that name.
KOHYA_OFT = KeyFormat(
    id="kohya_oft",
    title="kohya OFT",
    prefixes=(("oft_unet_", ("model",)),),
    separator="_",
    spellings={"kohya_oft_blocks": "oft_blocks", "kohya_oft_blocks.*": "oft_blocks.*"},
    private=True,
)
