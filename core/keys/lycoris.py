"""LyCORIS' generic wrapper (create_lycoris): one prefix over the wrapped model's own names."""

from .base import ANY_ENCODER, KeyFormat

LYCORIS = KeyFormat(
    id="lycoris",
    title="LyCORIS",
    prefixes=(("lycoris_", ("model", ANY_ENCODER)),),
    separator="_",
    family="diffusers",
)
