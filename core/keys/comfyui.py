"""ComfyUI's own names, as its trainer, musubi's converter, ai-toolkit and diffusion-pipe write."""

from .base import KeyFormat

COMFYUI = KeyFormat(
    id="comfyui",
    title="ComfyUI",
    prefixes=(
        ("diffusion_model.", ("model",)),
        ("text_encoders.clip_l.transformer.", ("clip_l",)),
        ("text_encoders.clip_g.transformer.", ("clip_g",)),
        ("clip_l.transformer.", ("clip_l",)),
        ("clip_g.transformer.", ("clip_g",)),
        ("text_encoders.", ("other",)),
    ),
    separator=".",
)
