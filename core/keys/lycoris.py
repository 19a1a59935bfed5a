"""LyCORIS' generic wrapper (create_lycoris): one prefix over the wrapped model's own names."""

from .base import KeyFormat

LYCORIS = KeyFormat(
    id="lycoris",
    title="LyCORIS",
    prefixes=(("lycoris_", ("model", "clip_l", "clip_g")),),
    separator="_",
    family="diffusers",
)
