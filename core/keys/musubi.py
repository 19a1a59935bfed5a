"""What musubi-tuner's own networks are called; read as kohya's, from which only names differ."""

from .base import KeyFormat
from .kohya import KOHYA

MUSUBI = KeyFormat(
    id="musubi",
    title="musubi-tuner",
    prefixes=KOHYA.prefixes,
    separator="_",
    like="kohya",
    instead=KOHYA.instead,
    loads=("lora", "loha", "lokr"),
)
