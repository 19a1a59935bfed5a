"""Which program trained a file, guessed from what only that program writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

# Networks that sd-scripts has none of the same name of.
_MUSUBI = tuple(
    f"networks.{name}"
    for name in (
        "lora_wan", "lora_framepack", "lora_flux_kontext", "lora_flux_2", "lora_qwen_image",
        "lora_kandinsky", "lora_hv_1_5", "lora_zimage", "lora_hidream_o1", "lora_ideogram4",
        "lora_ernie_image", "lora_mage_flow", "lora_krea2",
    )
)  # fmt: skip
# (start of a metadata key, program)
_KEYS = (
    ("ot_", "OneTrainer"),
    ("simpletuner", "SimpleTuner"),
    ("ss_sd_scripts", "sd-scripts"),
    ("lora_adapter_metadata", "diffusers"),
)
GUESS = "sd-scripts or musubi-tuner"  # of networks that files of others name too
# (what is in a stem, program), where metadata says nothing
_STEMS = (
    (".processor.qkv_lora", "XLabs"),
    ("lora_transformer_", "OneTrainer"),
    ("lora_prior_", "OneTrainer"),
    ("lycoris_", "LyCORIS"),
    ("base_model.model.", "peft"),
)


def trainer(metadata: Mapping[str, str], stems: Sequence[str], config: bool = False) -> str:
    """Name of the program; "" where nothing tells.

    Args:
        stems: names of the file's modules. config: whether peft's config is beside the file.
    """
    software = _named(metadata.get("software", ""))
    if software:
        return software
    for start, program in _KEYS:
        if any(key.startswith(start) for key in metadata):
            return program
    module = metadata.get("ss_network_module", "")
    if module.startswith(_MUSUBI):
        return "musubi-tuner"
    if module.startswith("lycoris"):
        return "sd-scripts with LyCORIS"
    if module:
        return GUESS
    for part, program in _STEMS:
        if any(part in stem for stem in stems):
            return program
    comfyui = any(stem.startswith("diffusion_model.") for stem in stems)
    return "diffusion-pipe" if config and comfyui else ""


def _named(software: str) -> str:
    """ai-toolkit describes itself in a JSON object; others may with a plain name."""
    try:
        described: object = json.loads(software)
    except ValueError:
        return software
    return str(described.get("name", "")) if isinstance(described, dict) else ""  # pyright: ignore
