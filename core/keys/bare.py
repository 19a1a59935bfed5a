"""Module paths with no prefix at all: DiffSynth, and adapters of a plain torch module."""

from .base import KeyFormat
from .peft import PEFT_SPELLINGS

BARE = KeyFormat(
    id="bare",
    title="bare",
    prefixes=(("", ("model", "clip_l", "clip_g", "other")),),
    separator=".",
    spellings=PEFT_SPELLINGS,
    drops="processor",
    hint=False,
)
