"""OneTrainer: kohya's spelling with the names that diffusers has for a pipeline's components."""

from .base import KeyFormat

ONETRAINER = KeyFormat(
    id="onetrainer",
    title="OneTrainer",
    prefixes=(
        ("lora_transformer_", ("model",)),
        ("lora_prior_unet_", ("model",)),  # Stable Cascade
        ("lora_prior_te_", ("clip_g",)),
    ),
    separator="_",
    family="diffusers",
)
