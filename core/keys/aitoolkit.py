"""ComfyUI's names, of a LoRA with peft's factors and no alpha; read as ComfyUI's own."""

from .base import KeyFormat
from .comfyui import COMFYUI
from .peft import PEFT_SPELLINGS

AITOOLKIT = KeyFormat(
    id="aitoolkit",
    title="ai-toolkit",
    prefixes=COMFYUI.prefixes,
    separator=".",
    spellings=PEFT_SPELLINGS,
    like="comfyui",
    folds=("lora",),
)
