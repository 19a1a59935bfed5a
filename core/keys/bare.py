"""Module paths with no prefix at all: XLabs, DiffSynth, Black Forest Labs, plain torch modules."""

from .base import ANY_ENCODER, OTHER, KeyFormat
from .peft import PEFT_SPELLINGS

BARE = KeyFormat(
    id="bare",
    title="bare",
    prefixes=(("", ("model", ANY_ENCODER, OTHER)),),
    separator=".",
    spellings=PEFT_SPELLINGS,
    reads={
        "up.weight": "lora_up.weight",  # XLabs, USO
        "down.weight": "lora_down.weight",
    },
    drops="processor",
    folds=("lora", "loha", "lokr"),
)
