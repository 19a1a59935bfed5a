"""ComfyUI's own names, as its trainer writes."""

from .base import ANY_ENCODER, OTHER, KeyFormat

# Of these ComfyUI reads diffusers' names of q, k and v as ranges of its own fused weights.
_MIXED = (
    "flux", "longcat_image", "ovis_image", "flux2", "chroma", "sd3", "auraflow", "pixart",
    "lumina2", "z_image",
)  # fmt: skip

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
    mixed=_MIXED,
)
