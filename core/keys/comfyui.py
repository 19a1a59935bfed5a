"""ComfyUI's own names, as its trainer, musubi's converter, ai-toolkit and diffusion-pipe write."""

from .base import ANY_ENCODER, OTHER, KeyFormat

COMFYUI = KeyFormat(
    id="comfyui",
    title="ComfyUI",
    prefixes=(
        ("diffusion_model.", ("model",)),
        ("text_encoders.{part}.transformer.", (ANY_ENCODER,)),
        ("text_encoders.transformer.", (ANY_ENCODER,)),
        ("text_encoders.", (OTHER,)),
        ("{part}.transformer.", (ANY_ENCODER,)),
    ),
    separator=".",
)
